"""Makes the engine that a job asks for, as wide as its site's machines are to be."""

from __future__ import annotations

import secrets

import structlog

from longshore.config import GeneratorSpec
from longshore.generator.config import GeneratorSettings
from longshore.generator.engine import Emit, Engine
from longshore.generator.llama_config import read_config
from longshore.generator.metrics import EngineMetrics
from longshore.generator.torch_slots import SlotOptions, TorchSlotsEngine
from longshore.generator.vllm_engine.options import VllmOptions
from longshore.settings import JobFile

log = structlog.get_logger()


def make_engine(settings: GeneratorSettings, job: JobFile, config: bytes, emit: Emit) -> Engine:
    """The engine for a model's config.json; takes as long as its start.

    Raises:
        ConfigError: the engine cannot run the model, or is not installed.
    """
    metrics = EngineMetrics(job.ref)
    if job.spec.generator.engine == "vllm":
        # Heavy, and only where it is installed.
        from longshore.generator.vllm_engine import engine as vllm_engine

        return vllm_engine.make_engine(config, vllm_options(settings, job), emit, metrics)
    shape = read_config(config)
    engine = TorchSlotsEngine(shape, slot_options(settings, job), emit, metrics)
    if engine.limits.context < shape.max_position_embeddings:
        log.warning("the cache bounds the context", tokens=engine.limits.context)
    return engine


def slot_options(settings: GeneratorSettings, job: JobFile) -> SlotOptions:
    spec: GeneratorSpec = job.spec.generator
    return SlotOptions(
        slots=job.spec.resources_at(settings.site).generator_slots,
        max_waiting=settings.max_waiting,
        cache_bytes=settings.cache_mb * 1024 * 1024,
        seed=_seed(),
        residents=settings.residents,
        drain=spec.update == "drain",
        recompute=spec.kv_after_update == "recompute",
    )


def vllm_options(settings: GeneratorSettings, job: JobFile) -> VllmOptions:
    spec: GeneratorSpec = job.spec.generator
    return VllmOptions(
        slots=job.spec.resources_at(settings.site).generator_slots,
        max_waiting=settings.max_waiting,
        cache_bytes=settings.cache_mb * 1024 * 1024,
        seed=_seed(),
        dtype=spec.dtype,
        tensor_parallel=spec.tensor_parallel,
        gpu_memory=settings.gpu_memory,
        recompute=spec.kv_after_update == "recompute",
        drain=spec.update == "drain",
    )


def _seed() -> int:
    """Neither two generators of a job nor two lives of one may draw the same tokens: what was lost with the one life is
    drawn in the next, and members of one group in both."""
    return secrets.randbits(56)
