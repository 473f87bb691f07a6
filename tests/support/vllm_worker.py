"""A worker extension that tests can break: vLLM's own faults, without what works around them."""

from __future__ import annotations

from longshore.generator.vllm_engine import worker

_FIX = worker.StoreTransfer.pack_tied_weights


class BreakableExtension(worker.WorkerExtension):
    def leave_tied_weights(self, leave: bool) -> None:
        """As vLLM would do it by itself."""
        worker.StoreTransfer.pack_tied_weights = (lambda transfer: None) if leave else _FIX  # type: ignore[method-assign]
