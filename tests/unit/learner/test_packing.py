"""Packs against the plain path: each sequence alone, with PyTorch's own attention, all logits at once."""

import dataclasses

import pytest
import torch
from builders import rollout
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longshore.config import ComputeSpec, TrainSpec
from longshore.errors import ConfigError
from longshore.learner import tree_attention
from longshore.learner.batch import micro_batches
from longshore.learner.policy_compute import PolicyCompute
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.token_tree import MIN_SHARED
from longshore.learner.trainer import Trainer
from longshore.types import FinishReason, GivenSpan, SampledSpan, Segment, Turn

VOCABULARY = 90
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Weights large enough that tokens differ in how likely they are.
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
}


def model(name="llama"):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    return MODELS[name]().float().train()


def tokens(length, seed):
    return tuple(torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def one_turn(prompt, length, seed):
    return rollout(0, seed, prompt=prompt, reply=tokens(length, seed), logprobs=(-2.0,) * length)


def group():
    """A prompt, and replies of very different lengths."""
    prompt = tokens(40, 0)
    return [one_turn(prompt, length, seed) for seed, length in enumerate((30, 1, 200, 1, 55, 2))]


def many_turns():
    """Three segments: a reply, then two that go on from inside it, and one that goes on from the second."""
    base = one_turn(tokens(30, 7), 40, 8)

    def branch(name, parent, prefix, seed):
        spans = (GivenSpan(5), SampledSpan(0, (-1.0,) * 20), GivenSpan(9), SampledSpan(1, (-3.0,) * 12), GivenSpan(4))
        return Segment(name, tokens(50, seed), spans, parent_segment_id=parent, prefix_len=prefix)

    segments = (*base.segments, branch("1", "0", 50, 9), branch("2", "0", 33, 10), branch("3", "1", 31, 11))
    turns = (*base.turns, Turn("1", 5, 20, FinishReason.STOP))
    return [dataclasses.replace(base, segments=segments, turns=turns)]


def strangers():
    """Short, long and one-token replies to prompts that have nothing in common."""
    return [one_turn(tokens(3 + seed, 20 + seed), length, 30 + seed) for seed, length in enumerate((1, 150, 4, 1, 17))]


def repeated():
    """The same rollout more than once, as a greedy policy draws it."""
    return [one_turn(tokens(20, 40), 25, 41) for _ in range(3)]


BATCHES = {
    "group": group,
    "many turns": many_turns,
    "strangers": strangers,
    "repeated": repeated,
    "all": lambda: [*group(), *many_turns(), *strangers(), *repeated()],
}


def sequences(rollouts, temperature=1.0):
    made = []
    for position, one in enumerate(rollouts):
        one = dataclasses.replace(one, sampling=(dataclasses.replace(one.sampling[0], temperature=temperature),))
        advantages = [(-0.9) ** (position + index) for index in range(one.num_sampled)]
        made += sequences_of(one, Credit(advantages), position)
    return made


def plain(policy, batch):
    """What each sampled token's log-prob, entropy and gradient are without packs, by sequence and column."""
    policy.set_attn_implementation("sdpa")
    policy.zero_grad()
    logps, entropies = {}, {}
    for number, sequence in enumerate(batch):
        ids = torch.tensor([sequence.token_ids])
        logits = policy(input_ids=ids, use_cache=False).logits[0, :-1]
        log_probs = (logits / torch.tensor(sequence.temperature)[1:, None]).log_softmax(-1)
        columns = [column for column in range(1, len(sequence.token_ids)) if sequence.sampled[column]]
        picked = log_probs[[column - 1 for column in columns], [sequence.token_ids[column] for column in columns]]
        (picked * torch.tensor([sequence.advantages[column] for column in columns])).sum().backward()
        entropy = -(log_probs.exp() * log_probs).sum(-1)[[column - 1 for column in columns]]
        logps[number], entropies[number] = picked.detach(), entropy.detach()
    return logps, entropies, gradients(policy)


def packed(policy, batch, budget, **options):
    compute = PolicyCompute(policy, pack_tokens=budget, **options)
    policy.zero_grad()
    compute.refresh()
    logps, entropies = {}, {}
    for micro in micro_batches(batch, budget):
        logp, entropy, _, _ = compute.scores(micro)
        (logp * micro.streams.advantages).sum().backward()
        for number in micro.streams.sequences.unique().tolist():
            chosen = micro.streams.sequences == number
            logps[number], entropies[number] = logp.detach()[chosen], entropy[chosen]
    return logps, entropies, gradients(policy)


def gradients(policy):
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def assert_equal(made, expected, tolerance=1e-5):
    for one, other in zip(made, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert float((one[key] - other[key]).norm()) <= tolerance * float(other[key].norm()), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", BATCHES)
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_path(name, kind):
    policy, batch = model(name), sequences(BATCHES[kind](), temperature=0.7)
    assert_equal(packed(policy, batch, 10_000), plain(policy, batch))


@pytest.mark.parametrize("budget", [16, 100, 400])
def test_the_token_budget_changes_nothing(budget):
    policy, batch = model(), sequences(BATCHES["all"]())
    assert len(list(micro_batches(batch, budget))) > 1
    assert_equal(packed(policy, batch, budget), plain(policy, batch))


def test_a_groups_prompt_is_computed_once():
    (micro,) = micro_batches(sequences(group()), 10_000)
    # A reply's last token is predicted, and predicts nothing.
    assert micro.tree.size == 40 + 29 + 199 + 54 + 1


def test_what_segments_share_is_computed_once():
    (micro,) = micro_batches(sequences(many_turns()), 10_000)
    # Of the four segments of 70, 50, 50 and 50 tokens, all but the last sampled token and what stands behind it.
    assert MIN_SHARED <= 17
    assert micro.tree.size == 69 + 3 * 45


def test_a_sequence_without_sampled_tokens_is_left_out():
    (sequence,) = sequences([one_turn(tokens(20, 1), 5, 2)])
    silent = dataclasses.replace(sequence, sampled=[False] * 25)
    (micro,) = micro_batches([silent, sequence], 100)
    assert micro.streams.sequences.tolist() == [1] * 5


def test_bfloat16_keeps_float32_masters_and_comes_close():
    policy, batch = model(), sequences(BATCHES["all"]())
    expected_logps, _, expected = plain(policy, batch)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    logps, _, made = packed(policy, batch, 300, dtype=torch.bfloat16)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert all(gradient.dtype == torch.float32 for gradient in made.values())
    assert all(logp.dtype == torch.float32 for logp in logps.values())
    assert_equal([logps, made], [expected_logps, expected], tolerance=0.05)


def test_training_in_bfloat16_takes_steps_too_small_for_its_weights():
    compute = ComputeSpec(dtype="bfloat16", pack_tokens=300)
    spec = TrainSpec(steps=50, learning_rate=1e-5, compute=compute)
    trainer, batch = Trainer(model(), spec), sequences(group())
    (micro,) = micro_batches(batch, 1000)
    trainer.compute.refresh()
    first = (trainer.compute.scores(micro).logp.detach() * micro.streams.advantages).sum()
    for number in range(1, 31):
        trainer.step(number, batch, 0)
    trainer.compute.refresh()
    last = (trainer.compute.scores(micro).logp.detach() * micro.streams.advantages).sum()
    # Each step moves a weight by 1e-5; bfloat16's steps at 0.2 are a hundred times as wide.
    assert last > first + 0.1


def test_same_state_and_batch_give_the_same_bits_on_two_threads():
    made = []
    for _ in range(2):
        trainer = Trainer(model(), TrainSpec(steps=9, compute=ComputeSpec(pack_tokens=400)))
        torch.set_num_threads(2)
        for number in (1, 2, 3):
            trainer.step(number, sequences(BATCHES["all"]()), 0)
        made.append(b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.policy.parameters()))
    torch.set_num_threads(1)
    assert made[0] == made[1]


def test_the_policy_still_works_without_packs():
    policy = model()
    ids = torch.tensor([tokens(30, 5), tokens(30, 6)])
    policy.set_attn_implementation("sdpa")
    expected = policy(input_ids=ids).logits
    PolicyCompute(policy)
    assert torch.allclose(policy(input_ids=ids).logits, expected, atol=1e-6)


def test_the_block_mask_of_cuda_is_the_tree():
    # Long enough that some blocks are seen wholly.
    (micro,) = micro_batches(sequences([one_turn(tokens(300, 1), 200, 2), *BATCHES["all"]()]), 10_000)
    tree, size = micro.tree, -(-micro.tree.size // 128) * 128
    mask = tree_attention.block_mask(tree, size, torch.device("cpu"))
    ends = torch.from_numpy(tree.subtree_ends(size))
    query, key = torch.arange(size)[:, None], torch.arange(size)[None]
    expected = (key <= query) & (query < ends[key])
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(mask.mask_mod(zero, zero, query, key), expected)
    blocks = expected.view(size // 128, 128, size // 128, 128)
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    assert torch.equal(mask.to_dense()[0, 0].bool() | every, some)
    whole = torch.zeros_like(every)
    for row in range(size // 128):
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    # A block that is seen wholly may be told as seen in part, never the other way round.
    assert not (whole & ~every).any()
    assert whole.any()


def test_a_window_that_sequences_outgrow_is_refused():
    policy = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=60)).float()
    compute = PolicyCompute(policy)
    (fits,) = micro_batches(sequences([one_turn(tokens(20, 1), 30, 2)]), 1000)
    compute.scores(fits)
    (longer,) = micro_batches(sequences([one_turn(tokens(20, 1), 50, 2)]), 1000)
    with pytest.raises(ConfigError, match="window of 60"):
        compute.scores(longer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.0)),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused(make):
    with pytest.raises(ConfigError):
        PolicyCompute(make().float())
