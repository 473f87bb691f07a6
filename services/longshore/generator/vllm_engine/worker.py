"""In each of vLLM's worker processes: loads a version's tensors from shared memory into the resident model.

vLLM imports this module there because `WorkerExtension` is named as its worker extension; importing it registers the
transfer backend. An update is vLLM's own: start, any number of chunks, finish, with requests held between two steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from longshore.generator.vllm_engine.options import BACKEND
from longshore.generator.vllm_engine.segment import read_segment


@dataclass
class StoreInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class StoreUpdate(WeightTransferUpdateInfo):
    """Where one chunk's tensors are; see segment.py."""

    path: str
    size: int


class StoreTransfer(WeightTransferEngine[StoreInit, StoreUpdate]):
    """Loads what the generator's process has fetched, decoded and verified; each rank takes its share of a tensor."""

    init_info_cls = StoreInit
    update_info_cls = StoreUpdate

    def init_transfer_engine(self, init_info: StoreInit) -> None:
        pass

    def start_weight_update(self) -> None:
        # A version sends what changed; vLLM warns of every layer that gets nothing.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        with torch.device(self.device):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdate) -> None:
        try:
            self.model.load_weights(read_segment(update_info.path, update_info.size))
        except BaseException:
            # Or the next update would go on with half of this one's tensors.
            self.finish_weight_update()
            raise

    def finish_weight_update(self) -> None:
        with torch.device(self.device):
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                self.pack_tied_weights()

    def pack_tied_weights(self) -> None:
        """Makes the CPU's packed copies of weights that are kept unpacked too, anew.

        vLLM 0.32 puts the loaded numbers into the weight's own storage afterwards, and leaves the packed copy, by which
        tied embeddings are multiplied, as it was before the update.
        """
        for module in self.model.modules():
            weight: Any = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Adds nothing to vLLM's worker: its module's import is what counts."""


WeightTransferEngineFactory.register_engine(BACKEND, StoreTransfer)
