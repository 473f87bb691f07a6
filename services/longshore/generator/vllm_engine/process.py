"""vLLM's front end on an event loop: the one file of the generator's process that imports vllm.

Written against vllm 0.32; tests/vllm_engine/test_vllm_contract.py lists what is leaned on beyond its public interface.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase

from longshore.errors import ConfigError, IntegrityError, Rejected, Unavailable
from longshore.generator.vllm_engine.options import BACKEND, VllmOptions
from longshore.generator.vllm_engine.segment import Segment
from longshore.types import Sampling

DEAD = "vLLM's engine process has died; its own message is above in this log"
# Canaries that may run beside a full batch.
SPARE_SEQUENCES = 2
# How a part of a reply may end.
_REASONS = (None, "stop", "length")
# A canary before every other request.
_FIRST, _NEXT = -1, 0


@dataclass(frozen=True)
class Part:
    """What a request drew since its last part; one log-prob and one label a token."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    # Which load of weights drew each token.
    labels: Sequence[str]
    finished: bool


class Draw:
    """One request in vLLM. Use: `async for part in draw.parts()`, and `end` where that is not read to its end."""

    def __init__(self, engine: AsyncLLM, request_id: str, prompt: Any, sampling: dict[str, Any]) -> None:
        self._engine = engine
        # vLLM's own record of the request: it knows the load that drew each token before the reply is finished.
        self._state: Any = None
        self._read = 0
        self._adding = asyncio.ensure_future(self._add(request_id, prompt, sampling))
        self._adding.add_done_callback(_retrieve)

    def is_behind(self, label: str) -> bool:
        """Whether tokens that were drawn before the load `label` have not been read yet."""
        if self._state is None:
            return False
        starts = [start for name, start in self._state.weight_version_starts if name == label]
        return self._read < (starts[0] if starts else self._state.detokenizer.num_output_tokens())

    async def parts(self) -> AsyncIterator[Part]:
        """Until the reply is finished.

        Raises:
            Rejected: vLLM takes no such request.
            Unavailable: the engine has died.
        """
        try:
            queue = await asyncio.shield(self._adding)
            finished = False
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                if output.outputs[0].finish_reason not in _REASONS:
                    raise Rejected("vllm", f"vLLM ended the request: {output.outputs[0].finish_reason}")
                yield self._part(output.outputs[0], finished)
            queue.close()
        except EngineDeadError:
            raise Unavailable(DEAD) from None
        except (VLLMClientError, ValueError) as error:
            raise Rejected("vllm", str(error)) from None

    async def end(self) -> None:
        """Takes the request out of vLLM, if it is in there."""
        try:
            queue = await self._adding
        except Exception:  # noqa: BLE001 - it never got in: whoever reads it is told
            return
        with _alive():
            await self._engine.abort(queue.request_id, internal=True)

    async def _add(self, request_id: str, prompt: Any, sampling: dict[str, Any]) -> RequestOutputCollector:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, skip_clone=True, **sampling)
        queue = await self._engine.add_request(request_id, prompt, params, priority=_NEXT)
        self._state = self._engine.output_processor.request_states.get(queue.request_id)
        return queue

    def _part(self, output: Any, finished: bool) -> Part:
        tokens = output.token_ids
        logprobs = [chosen[token].logprob for token, chosen in zip(tokens, output.logprobs or (), strict=True)]
        if self._state is None:
            # It was finished before it could be looked up.
            starts = [(span.version, span.start) for span in output.weight_versions or ()]
        else:
            starts = self._state.weight_version_starts
        labels = []
        current = 0
        for position in range(self._read, self._read + len(tokens)):
            while current + 1 < len(starts) and starts[current + 1][1] <= position:
                current += 1
            labels.append(starts[current][0])
        self._read += len(tokens)
        return Part(tokens, logprobs, labels, finished)


class VllmProcess:
    """One AsyncLLM, its processes, and the model in them. Lives on the event loop that made it."""

    def __init__(self, model_dir: str, options: VllmOptions) -> None:
        """Starts it with weights that mean nothing; takes most of a minute.

        Raises:
            ConfigError: vLLM cannot run this model, or not on this machine; says why, as far as vLLM does.
        """
        self.version: str = vllm.__version__
        self.device: str = current_platform.device_type
        self.kv_used_ratio = 0.0
        # Requests that wait in vLLM: for a place in its cache, or in its batch.
        self.num_waiting = 0
        try:
            config = _engine_args(model_dir, options, self.device).create_engine_config()
            self._engine = AsyncLLM.from_vllm_config(config, stat_loggers=[self._stats], disable_log_stats=True)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"vLLM {self.version} does not start: {error}") from None
        self.context: int = self._engine.model_config.max_model_len
        self.vocab_size: int = self._engine.model_config.get_vocab_size()

    async def prepare(self) -> None:
        """Makes the workers ready for loads."""
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    def check_alive(self) -> None:
        """Raises Unavailable once vLLM's processes have died."""
        if self._engine.errored:
            raise Unavailable(DEAD)

    def close(self) -> None:
        """Ends the processes."""
        self._engine.shutdown(timeout=5.0)

    def draw(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, most: int, salt: str) -> Draw:
        """Begins to draw at most `most` tokens; prefixes are shared with requests of the same salt alone."""
        parameters = {
            "temperature": sampling.temperature,
            "max_tokens": most,
            "stop_token_ids": list(sampling.stop_token_ids),
            # Of the drawn token alone.
            "logprobs": 0,
            "detokenize": False,
            # The request's stop tokens say when to stop, not the model's files.
            "ignore_eos": True,
        }
        prompt = {"prompt_token_ids": list(token_ids), "cache_salt": salt}
        return Draw(self._engine, request_id, prompt, parameters)

    async def score(self, name: str, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of each token after the first that the context has room for, under the loaded weights.

        Before every other request, and beside a full batch.
        """
        token_ids = list(token_ids[: self.context - 1])
        if len(token_ids) < 2:
            return []
        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": token_ids, "cache_salt": name}
        with _alive():
            outputs = [output async for output in self._engine.generate(prompt, params, name, priority=_FIRST)]
        rows = outputs[-1].prompt_logprobs[1:]
        return [float(row[token].logprob) for row, token in zip(rows, token_ids[1:], strict=True)]

    async def pause(self, *, forget: bool) -> None:
        """Holds every request between two decode steps.

        Args:
            forget: drops what was computed of prompts and replies; requests that go on compute it anew.
        """
        with _alive():
            await self._engine.pause_generation(mode="keep", clear_cache=forget)

    async def load(self, segment: Segment, label: str) -> None:
        """Puts tensors into the resident model; what is drawn from now on has this label. Only while paused.

        Raises:
            IntegrityError: they are not this model's; what the model holds now is undefined.
            Unavailable: the engine has died.
        """
        update = WeightTransferUpdateRequest(update_info={"path": segment.path, "size": segment.size})
        try:
            with _alive():
                await self._engine.start_weight_update()
                await self._engine.update_weights(update)
                await self._engine.finish_weight_update(label)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a worker raised comes as a plain Exception
            raise IntegrityError(f"vLLM could not load the version: {error}") from None

    async def resume(self) -> None:
        with _alive():
            await self._engine.resume_generation()

    def _stats(self, config: VllmConfig, engine_index: int) -> StatLoggerBase:
        return _Usage(self)


class _Usage(StatLoggerBase):
    """Where vLLM tells how full its cache is, and how many wait."""

    def __init__(self, process: VllmProcess) -> None:
        self._process = process

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self._process.kv_used_ratio = scheduler_stats.kv_cache_usage
            self._process.num_waiting = scheduler_stats.num_waiting_reqs

    def log_engine_initialized(self) -> None:
        pass


# The smallest that its attention on a CPU is fast with.
_CPU_BLOCK = 32


def _engine_args(model_dir: str, options: VllmOptions, device: str) -> AsyncEngineArgs:
    on_cpu = device == "cpu"
    memory = (
        {"kv_cache_memory_bytes": options.cache_bytes} if on_cpu else {"gpu_memory_utilization": options.gpu_memory}
    )
    return AsyncEngineArgs(
        model=model_dir,
        skip_tokenizer_init=True,
        # The first version brings the weights.
        load_format="dummy",
        generation_config="vllm",
        dtype=options.dtype,
        seed=options.seed % 2**31,
        # As long as the model's, or what the cache holds.
        max_model_len=-1,
        max_num_seqs=options.slots + SPARE_SEQUENCES,
        tensor_parallel_size=options.tensor_parallel,
        # After temperature: what was drawn from.
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        # Beginnings are shared by whole blocks; the default on a CPU is 128 tokens, longer than many prompts.
        block_size=_CPU_BLOCK if on_cpu else None,
        scheduling_policy="priority",
        # Compiling for a CPU takes longer than it saves in a short job.
        enforce_eager=on_cpu,
        worker_extension_cls=options.worker_extension,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        **memory,
    )


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Raises Unavailable where vLLM's processes have died."""
    try:
        yield
    except EngineDeadError:
        raise Unavailable(DEAD) from None


def _retrieve(done: asyncio.Future[Any]) -> None:
    # Who reads the request is told; nobody may be left.
    if not done.cancelled():
        done.exception()
