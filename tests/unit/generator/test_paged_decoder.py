"""The paged decoder against `transformers`, with the C kernel and without."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tiny_family import MEMBERS, member
from tiny_llama import CONTEXT, VOCABULARY, config_json, named_tensors, reference_logprobs, tiny_model
from torch.nn import functional
from transformers import PreTrainedModel

from longshore.generator.attention import cache, native
from longshore.generator.attention.cache import PagedCache
from longshore.generator.llama_config import LlamaShape, read_config
from longshore.generator.llama_weights import LlamaWeights, build_weights
from longshore.generator.paged_decoder import PagedDecoder
from longshore.generator.pages import PAGE


@pytest.fixture(params=["kernel", "torch"])
def kernel(request: pytest.FixtureRequest) -> native.Kernel | None:
    if request.param == "torch":
        return None
    loaded = native.load()
    if loaded is None:
        pytest.skip("no C kernel was built here: run hatch_build.py")
    return loaded


def shape_of(model: PreTrainedModel) -> LlamaShape:
    return read_config(config_json(model))


def weights_of(model: PreTrainedModel) -> LlamaWeights:
    return build_weights(shape_of(model), named_tensors(model))


def tokens_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(VOCABULARY) for _ in range(length))


class Bench:
    """A decoder, and all that its slots have drawn."""

    def __init__(
        self, model: PreTrainedModel, kernel: native.Kernel | None, *, slots: int = 6, pages: int = 48
    ) -> None:
        self.decoder = PagedDecoder(shape_of(model), slots, CONTEXT, pages, seed=1, kernel=kernel)
        self.live: dict[int, tuple[tuple[int, ...], float, list[int], list[float]]] = {}
        self.computed: list[int] = []

    def fill(self, slot: int, prompt: Sequence[int], weights: LlamaWeights, heat: float = 1.0) -> None:
        assert self.decoder.reserve(slot, prompt, heat, weights)
        fill = self.decoder._fills[-1]
        self.computed.append(len(prompt) - 1 - fill.done)
        self.live[slot] = (tuple(prompt), heat, [], [])

    def decode(self, count: int = 1) -> None:
        for _ in range(count):
            step = self.decoder.decode()
            for slot, token, logprob in zip(step.slots, step.tokens, step.logprobs, strict=True):
                self.live[slot][2].append(token)
                self.live[slot][3].append(logprob)

    def end(self, slot: int, model: PreTrainedModel) -> tuple[int, ...]:
        """Releases a slot, when its log-probs are right; its prompt and reply."""
        prompt, heat, reply, logprobs = self.live.pop(slot)
        self.decoder.release([slot])
        expected = reference_logprobs(model, prompt, reply, heat)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
        return (*prompt, *reply)


@pytest.mark.parametrize("name", MEMBERS)
def test_decoder_matches_transformers(name: str, kernel: native.Kernel | None) -> None:
    """Ragged prompts, a temperature a slot, slots released and filled again in mid flight."""
    model = member(name)
    bench, weights = Bench(model, kernel), weights_of(model)
    todo = [tokens_of(length, seed=length) for length in (1, 5, 16, 17, 33, 3, 40, 2, 8, 4)]
    # Equal prompts share one prefill, also when they do not end with a page.
    todo[2:2] = [todo[1], todo[1]]
    free, done = list(range(6)), 0
    while todo or bench.live:
        for _ in range(min(len(free), len(todo))):
            slot = free.pop()
            bench.fill(slot, todo.pop(0), weights, (1.0, 0.7, 1.5)[slot % 3])
        bench.decoder.prefill()
        bench.decode()
        for slot in [slot for slot, (_, _, reply, _) in bench.live.items() if len(reply) >= 4 + 4 * slot]:
            bench.end(slot, model)
            free.append(slot)
            done += 1
    assert done == 12
    assert bench.decoder.pages.held == 0


def test_long_prompts_go_another_way_and_give_the_same(
    kernel: native.Kernel | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LONG_RUN", 20)
    # Masks of a few rows each: one of a whole long prompt would not fit in memory.
    monkeypatch.setattr(cache, "MOST_MASKED", 256)
    masked, attention = [], functional.scaled_dot_product_attention

    def watched(*tensors: torch.Tensor, attn_mask: torch.Tensor | None, **how: bool) -> torch.Tensor:
        masked.append(0 if attn_mask is None else attn_mask.numel())
        return attention(*tensors, attn_mask=attn_mask, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    model = member("llama")
    bench, weights = Bench(model, kernel), weights_of(model)
    prompts = [tokens_of(30), tokens_of(9), tokens_of(50, 1), tokens_of(3)]
    # The last one is long and its beginning is there already.
    prompts.append((*prompts[0], *tokens_of(25, 2)))
    for slot, prompt in enumerate(prompts):
        bench.fill(slot, prompt, weights)
        if slot == 3:
            bench.decoder.prefill()
    bench.decoder.prefill()
    assert bench.computed[-1] == 54 - 29
    bench.decode(5)
    assert 0 < max(masked) <= 256
    monkeypatch.undo()
    for slot in range(5):
        bench.end(slot, model)


def test_two_threads_give_what_one_gives(kernel: native.Kernel | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARED_ROWS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = member("llama")
    bench, weights = Bench(model, kernel), weights_of(model)
    for slot in range(5):
        bench.fill(slot, tokens_of(7 * slot + 2, slot), weights)
    bench.decoder.prefill()
    bench.decode(5)
    for slot in range(5):
        bench.end(slot, model)
    bench.decoder.close()


def test_every_library_that_was_built_gives_the_same() -> None:
    """Whichever this processor would choose."""
    model = member("llama")
    weights = weights_of(model)
    best = native.load()
    if best is None:
        pytest.skip("no C kernel was built here: run hatch_build.py")
    for level in range(best.level + 1):
        bench = Bench(model, native.Kernel(native.FOLDER / native.LIBRARIES[level]))
        bench.fill(0, tokens_of(37), weights)
        bench.decoder.prefill()
        bench.decode(3)
        bench.end(0, model)


def test_a_groups_prompt_is_computed_once(kernel: native.Kernel | None) -> None:
    model = member("llama")
    bench, weights = Bench(model, kernel), weights_of(model)
    prompt = tokens_of(39)
    for slot in range(3):
        bench.fill(slot, prompt, weights)
    bench.decoder.prefill()
    assert bench.computed == [38, 0, 0]
    # Two whole pages are shared; the third one, which each writes to, is not.
    assert bench.decoder.pages.held == 2 + 3
    bench.decode(4)
    bench.end(0, model)
    # One that comes later, and one after all have ended.
    bench.fill(3, prompt, weights)
    bench.decoder.prefill()
    bench.decode(3)
    for slot in (1, 2, 3):
        bench.end(slot, model)
    bench.fill(0, prompt, weights)
    bench.decoder.prefill()
    assert bench.computed == [38, 0, 0, 0, 0]
    bench.decode(2)
    bench.end(0, model)


def test_the_next_turn_computes_what_is_new_alone(kernel: native.Kernel | None) -> None:
    model = member("llama")
    bench, weights = Bench(model, kernel), weights_of(model)
    bench.fill(0, tokens_of(10), weights)
    bench.decoder.prefill()
    bench.decode(15)
    said = bench.end(0, model)
    follow_up = (*said, *tokens_of(6, 1))
    bench.fill(1, follow_up, weights)
    bench.fill(2, follow_up, weights)
    bench.decoder.prefill()
    # The reply's last token was drawn and never fed.
    assert bench.computed == [9, 6, 0]
    bench.decode(5)
    bench.end(1, model)
    bench.end(2, model)


def test_prompts_that_part_share_what_comes_before(kernel: native.Kernel | None) -> None:
    model = member("llama")
    bench, weights = Bench(model, kernel), weights_of(model)
    prompt = tokens_of(39)
    others = [(*prompt[:20], *tokens_of(8, 5)), (*prompt[:35], *tokens_of(8, 6))]
    bench.fill(0, prompt, weights)
    bench.decoder.prefill()
    bench.decode(2)
    for slot, other in enumerate(others, start=1):
        bench.fill(slot, other, weights)
    bench.decoder.prefill()
    assert bench.computed == [38, 27 - 20, 42 - 35]
    bench.decode(6)
    for slot in range(3):
        bench.end(slot, model)


def test_new_weights_see_nothing_of_what_old_ones_computed(kernel: native.Kernel | None) -> None:
    old, new = tiny_model(0), tiny_model(1)
    bench = Bench(old, kernel)
    first, second = weights_of(old), weights_of(new)
    prompt = tokens_of(33)
    bench.fill(0, prompt, first)
    bench.decoder.prefill()
    bench.fill(1, prompt, second)
    bench.decoder.prefill()
    assert bench.computed == [32, 32]
    # Goes on under the new ones: what it draws from now on nobody may use.
    bench.decoder.move([0], second)
    bench.decode(20)
    moved = (*bench.live[0][0], *bench.live[0][2])
    bench.decoder.release([0])
    bench.live.pop(0)
    bench.fill(2, moved, second)
    bench.decoder.prefill()
    # Beyond what slot 1, which began alike, has computed.
    assert bench.computed[-1] > 10
    bench.decode(3)
    bench.end(1, new)
    bench.end(2, new)
    # What the old ones had computed before that is still good for them.
    bench.fill(3, moved, first)
    bench.decoder.prefill()
    assert bench.computed[-1] == 20
    bench.decode(3)
    bench.end(3, old)


def test_pages_run_out_and_come_back(kernel: native.Kernel | None) -> None:
    model = member("llama")
    bench, weights = Bench(model, kernel, slots=3, pages=5), weights_of(model)
    prompts = [tokens_of(31, 1), tokens_of(15, 2)]
    bench.fill(0, prompts[0], weights)
    bench.fill(1, prompts[1], weights)
    bench.decoder.prefill()
    # It would share the first one's first page, and begin its second with a copy.
    assert not bench.decoder.reserve(2, (*prompts[0][:20], *tokens_of(11, 3)), 1.0, weights)
    while not bench.decoder.is_short():
        bench.decode()
    assert bench.decoder.pages.available < 2
    drawn = bench.end(1, model)
    bench.decode(10)
    bench.end(0, model)
    # Computed again where it had to go, and right.
    bench.fill(1, drawn, weights)
    bench.decoder.prefill()
    bench.decode(3)
    bench.end(1, model)
    assert bench.decoder.pages.held == 0


def test_a_sequence_alone_has_room_also_where_it_would_copy_a_page(kernel: native.Kernel | None) -> None:
    """It needs every page, the one too that holds the beginning of its last one."""
    model = member("llama")
    bench, weights = Bench(model, kernel, slots=1, pages=4), weights_of(model)
    bench.fill(0, tokens_of(50), weights)
    bench.decoder.prefill()
    bench.decode(5)
    follow_up = (*bench.end(0, model), *tokens_of(3, 1))
    bench.fill(0, follow_up, weights)
    bench.decoder.prefill()
    assert bench.computed == [49, 57 - 48]
    bench.decode(4)
    bench.end(0, model)
    assert bench.decoder.pages.held == 0


def test_equal_seeds_draw_equal_tokens() -> None:
    model = tiny_model(0)
    drawn = []
    for seed in (1, 1, 2):
        decoder = PagedDecoder(shape_of(model), 4, 32, 8, seed)
        for slot in range(4):
            decoder.reserve(slot, (1, 2), 1.0, weights_of(model))
        decoder.prefill()
        drawn.append([decoder.decode().tokens for _ in range(8)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_head_that_the_kernel_does_not_take_is_computed_by_torch() -> None:
    shape = shape_of(member("narrow heads"))
    assert shape.head_dim % native.DIMS_MULTIPLE
    assert PagedCache(shape, 4, 1, 4 * PAGE, native.load())._kernel is None
