"""Batched token-by-token decoding on the CPU: slots, pages of the cache, sampling.

A *slot* is a place in the batch. Each `decode` advances all filled slots by one sampled token. A slot's sequence has
its keys and values in pages that it takes as it grows and gives back when it is released; the weights that go on with
it may be replaced between two calls while its pages stay as they are. Knows nothing of requests, versions or threads.

A slot's *pending* token is the last one whose keys and values are not in the cache yet: the last prompt token after a
prefill, the last sampled one after a decode. A decode feeds it, so even a slot's first token uses the weights of that
call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longshore.generator import llama_forward
from longshore.generator.attention import native
from longshore.generator.attention.cache import PagedCache, Rows
from longshore.generator.llama_config import LlamaShape
from longshore.generator.llama_weights import LlamaWeights
from longshore.generator.pages import PAGE, Found, Pages


@dataclass(frozen=True)
class DecodeStep:
    """What one decode drew, one entry for each filled slot, in ascending slot order."""

    slots: list[int]
    tokens: list[int]
    # log_softmax(logits / temperature)[token].
    logprobs: list[float]


@dataclass
class _Sequence:
    """What a slot holds."""

    slot: int
    # All of it, the pending token last.
    tokens: list[int]
    pages: list[int]
    weights: LlamaWeights
    # Where its pages stand in the index; None when several weights have written to them.
    root: int | None


@dataclass
class _Fill:
    """A slot whose context is to be computed."""

    slot: int
    found: Found
    # Tokens of the context that are in pages already, or will be when `found.source` has been copied.
    done: int
    # The source is computed in the same call: it is copied afterwards.
    late: bool


@dataclass
class _Batch:
    """The filled slots, as a step needs them."""

    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    # By weights, rows of the batch.
    owners: list[tuple[LlamaWeights, Tensor]] = field(default_factory=list)


class PagedDecoder:
    """Decodes up to `num_slots` independent sequences together, in float32."""

    def __init__(
        self,
        shape: LlamaShape,
        num_slots: int,
        max_len: int,
        num_pages: int,
        seed: int,
        kernel: native.Kernel | None = None,
    ) -> None:
        """
        Args:
            num_pages: at least those of one sequence of `max_len` tokens.
            kernel: as PagedCache takes it.
        """
        assert max_len <= shape.max_position_embeddings
        assert num_pages * PAGE >= max_len
        self.shape = shape
        self.max_len = max_len
        self.pages = Pages(num_pages)
        self._cache = PagedCache(shape, num_pages, num_slots, max_len, kernel)
        self._random = torch.Generator().manual_seed(seed)
        self._sequences: dict[int, _Sequence] = {}
        self._fills: list[_Fill] = []
        # Pages that this call's fills will compute.
        self._fresh: set[int] = set()
        self._lengths = torch.zeros(num_slots, dtype=torch.long)
        self._pending = torch.zeros(num_slots, dtype=torch.long)
        self._temperature = torch.ones(num_slots)
        self._batch: _Batch | None = None

    def close(self) -> None:
        self._cache.close()

    @property
    def filled(self) -> int:
        """Slots that `decode` advances."""
        return len(self._sequences)

    # -- filling and releasing slots

    def reserve(self, slot: int, tokens: Sequence[int], temperature: float, weights: LlamaWeights) -> bool:
        """Takes the pages of a sequence for a free slot, to be computed by the next `prefill`; False: too few are free.

        What the cache has of it already is used again: of other sequences under the same weights, running or ended.
        Every sequence that runs keeps a page in reserve, so that newcomers do not push them out at once. A sequence
        alone always has room.

        Args:
            tokens: prompt and what was drawn already, 1..max_len - 1 of them. The last one will be pending.
        """
        assert 1 <= len(tokens) < self.max_len
        assert slot not in self._sequences
        context = tokens[:-1]
        found = self.pages.find(-weights.serial, context)
        late = found.source in self._fresh
        if late and found.length < len(context):
            # The rest would have to be computed after the copy, and that after this call.
            self.pages.release([found.source])
            found, late = Found(found.pages), False
        # The pending token will need its place too.
        needed = -(-len(tokens) // PAGE) - len(found.pages)
        if found.source >= 0 and needed + len(self._sequences) > self.pages.available:
            # The page to be copied may be the one that is lacking.
            self.pages.release([found.source])
            found, late = Found(found.pages), False
        if needed + len(self._sequences) > self.pages.available:
            self.pages.release(found.pages)
            return False
        own = self.pages.take(needed)
        sequence = _Sequence(slot, list(tokens), [*found.pages, *own], weights, -weights.serial)
        self._sequences[slot] = sequence
        self._cache.tables[slot, : len(sequence.pages)] = torch.tensor(sequence.pages)
        self._lengths[slot], self._pending[slot], self._temperature[slot] = len(context), tokens[-1], temperature
        self._fills.append(_Fill(slot, found, found.length, late))
        self._publish(sequence, len(found.pages), len(context))
        if late or found.length < len(context):
            self._fresh.update(own)
        self._batch = None
        return True

    def prefill(self) -> None:
        """Computes the contexts of all slots reserved since the last call."""
        fills, self._fills = self._fills, []
        self._fresh.clear()
        with torch.inference_mode():
            self._copy(fill for fill in fills if not fill.late)
            for weights in {fill.weights.serial: fill.weights for fill in map(self._of, fills)}.values():
                self._compute(weights, [fill for fill in fills if self._of(fill).weights is weights])
            self._copy(fill for fill in fills if fill.late)

    def _of(self, fill: _Fill) -> _Sequence:
        return self._sequences[fill.slot]

    def _copy(self, fills: Iterable[_Fill]) -> None:
        for fill in fills:
            if fill.found.source >= 0:
                self._cache.copy(self._of(fill).pages[len(fill.found.pages)], fill.found.source)
                self.pages.release([fill.found.source])

    def _compute(self, weights: LlamaWeights, fills: Sequence[_Fill]) -> None:
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        runs: list[tuple[int, int]] = []
        for fill in fills:
            todo = self._of(fill).tokens[fill.done : -1]
            if todo:
                runs.append((len(tokens), len(tokens) + len(todo)))
                tokens += todo
                slots += [fill.slot] * len(todo)
                positions += range(fill.done, fill.done + len(todo))
        if tokens:
            rows = Rows(torch.tensor(slots), torch.tensor(positions), tuple(runs))
            llama_forward.prefill(self._cache, weights, torch.tensor(tokens), rows)

    def release(self, slots: Iterable[int]) -> None:
        """Takes slots out of the batch; what they computed stays to be found until its pages are needed."""
        for slot in slots:
            sequence = self._sequences.pop(slot)
            cached = len(sequence.tokens) - 1
            self._publish(sequence, cached // PAGE, cached)
            self.pages.release(sequence.pages)
        self._batch = None

    def move(self, slots: Iterable[int], weights: LlamaWeights) -> None:
        """Lets other weights go on with these slots, their caches as they are."""
        for slot in slots:
            self._sequences[slot].weights = weights
            self._sequences[slot].root = None
        self._batch = None

    # -- decoding

    def is_short(self) -> bool:
        """Whether a step needs more pages than there are: then a slot must be released first."""
        return len(self._growing()) > self.pages.available

    def _growing(self) -> list[int]:
        """Slots whose pending token needs another page."""
        return [slot for slot, one in self._sequences.items() if len(one.tokens) > len(one.pages) * PAGE]

    def decode(self) -> DecodeStep:
        """Draws one token for every filled slot, of which there must be at least one; needs room (`is_short`).

        A slot that has been given max_len tokens must be released before.
        """
        growing = self._growing()
        for slot, page in zip(growing, self.pages.take(len(growing)), strict=True):
            sequence = self._sequences[slot]
            self._cache.tables[slot, len(sequence.pages)] = page
            sequence.pages.append(page)
        batch = self._batch or self._gather()
        with torch.inference_mode():
            lengths = self._lengths[batch.slots]
            logits = self._logits(batch, lengths)
            drawn, logprobs = self._sample(logits, self._temperature[batch.slots])
            self._lengths[batch.slots] = lengths + 1
            self._pending[batch.slots] = drawn
        step = DecodeStep(batch.slots.tolist(), drawn.tolist(), logprobs.tolist())
        for slot, token in zip(step.slots, step.tokens, strict=True):
            sequence = self._sequences[slot]
            cached = len(sequence.tokens)
            sequence.tokens.append(token)
            if cached % PAGE == 0:
                self._publish(sequence, cached // PAGE - 1, cached)
        return step

    def _gather(self) -> _Batch:
        slots = sorted(self._sequences)
        rows: dict[int, list[int]] = {}
        owners: dict[int, LlamaWeights] = {}
        for row, slot in enumerate(slots):
            weights = self._sequences[slot].weights
            owners[weights.serial] = weights
            rows.setdefault(weights.serial, []).append(row)
        self._batch = _Batch(
            torch.tensor(slots), [(owners[serial], torch.tensor(chosen)) for serial, chosen in rows.items()]
        )
        return self._batch

    def _logits(self, batch: _Batch, lengths: Tensor) -> Tensor:
        """[filled slots, vocabulary], each row by the weights that go on with its slot."""
        pending = self._pending[batch.slots]
        if len(batch.owners) == 1:
            return llama_forward.decode(self._cache, batch.owners[0][0], pending, Rows(batch.slots, lengths))
        logits = torch.empty(len(pending), self.shape.vocab_size)
        for weights, rows in batch.owners:
            part = Rows(batch.slots[rows], lengths[rows])
            logits[rows] = llama_forward.decode(self._cache, weights, pending[rows], part)
        return logits

    def _sample(self, logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Draws by inversion, in float64: a float32 sum would round small chances of a large vocabulary away."""
        logprobs = torch.log_softmax(logits.div_(temperature.unsqueeze(1)), dim=-1)
        steps = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
        drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=self._random) * steps[:, -1:]
        # The first whose sum is above what was drawn, so that none of chance 0 is.
        tokens = torch.searchsorted(steps, drawn, right=True).clamp_max_(self.shape.vocab_size - 1)
        return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)

    def _publish(self, sequence: _Sequence, first: int, cached: int) -> None:
        """Enters the pages from `first` on, of which the first `cached` tokens of the sequence are (or will be)
        computed, in the index."""
        if sequence.root is None:
            return
        for number in range(first, -(-cached // PAGE)):
            before = sequence.pages[number - 1] if number else sequence.root
            tokens = tuple(sequence.tokens[number * PAGE : min((number + 1) * PAGE, cached)])
            page = self.pages.publish(before, sequence.pages[number], tokens)
            if page != sequence.pages[number]:
                # Another sequence has computed the same.
                sequence.pages[number] = page
                self._cache.tables[sequence.slot, number] = page
