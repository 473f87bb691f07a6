"""How a vLLM engine is set up; importable without vLLM."""

from __future__ import annotations

from dataclasses import dataclass

# Our transfer backend's name in vLLM's registry.
BACKEND = "longshore"
# Below, vLLM draws at the lowest; above, it refuses.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


@dataclass(frozen=True)
class VllmOptions:
    """What a job and a machine say of an engine.

    Example: VllmOptions(slots=128, max_waiting=4096, cache_bytes=2**32, seed=1)
    """

    # Requests decoded together.
    slots: int
    max_waiting: int
    # Bytes of the KV cache of each tensor-parallel rank on a CPU; on a GPU `gpu_memory` decides.
    cache_bytes: int
    # Two generators of one job must not draw the same tokens. Requests have no seeds: they end vLLM's CPU engine.
    seed: int
    # What is computed in: float32, bfloat16 or float16.
    dtype: str = "float32"
    tensor_parallel: int = 1
    # Share of a GPU's memory for weights and KV cache.
    gpu_memory: float = 0.9
    # After an update: compute the running requests' KV cache anew, or go on with what the old weights left.
    recompute: bool = False
    # Whether running requests end under the old version before an update, or go on across it.
    drain: bool = False
    # Loads the transfer backend in every worker process.
    worker_extension: str = "longshore.generator.vllm_engine.worker.WorkerExtension"
