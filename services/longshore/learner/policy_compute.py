"""Where and how the policy is computed: device, number format, attention over packs, compiled blocks.

Knows no job, optimizer or objective. The policy itself stays in float32, the master weights; with `bfloat16` a copy of
it is computed with, and each parameter's gradient is added to its master's as soon as it is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from longshore.errors import ConfigError
from longshore.learner import tree_attention
from longshore.learner.batch import MicroBatch
from longshore.learner.ranks.messages import Message
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.learner.ranks.sharding import as_forward, local, shard
from longshore.learner.ranks.work import nothing
from longshore.learner.sending import sent
from longshore.learner.token_head import token_logprobs
from longshore.learner.token_tree import TokenTree, plant

# On CUDA a pack is padded to a multiple of this share of the token budget, so that few shapes are compiled for.
SIZES_OF_A_PACK = 8
# What a model that can be packed may differ by from itself, unpacked, in log-probs.
PROOF_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Pack:
    """A tree as the model takes it."""

    input_ids: Tensor
    position_ids: Tensor
    tree: tree_attention.Parts | BlockMask


class TokenScores(NamedTuple):
    """What a forward pass says of N sampled tokens; [N] each, in float32, at the temperature they were drawn with."""

    logp: Tensor
    # Both without gradients: entropies, and sum_v pi_v^2.
    entropy: Tensor
    collision: Tensor
    # [N, E] the states that predicted them, in the format of the computation.
    hidden: Tensor


class PolicyCompute:
    """Computes log-probs of packs, and leaves their gradients in `policy`."""

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        pack_tokens: int = 4096,
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            policy: a causal language model in float32; it is moved to `device`.
            device: "cpu" or "cuda".
            dtype: float32 or bfloat16, of weights and activations in the forward and backward pass.
            pack_tokens: token budget of a pack.
            compiled: whether the decoder's blocks are compiled.
            ranks: those that share the policy out, all of which make one of these; the leader's has the weights.

        Raises:
            ConfigError: the device is not there, or the model gives other log-probs for packs.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("train.compute.device is cuda, and this machine has no CUDA device that torch can use")
        self.policy = policy
        self.pack_tokens = pack_tokens
        policy.set_attn_implementation(tree_attention.NAME)
        # None: the layers attend to everything before.
        window = min(_prove(policy), default=None) if ranks.is_leader else None
        self._window = _agreed(window, ranks)
        if ranks.size == 1:
            policy.to(device)
        self.device = torch.device(device)
        self._model = policy if dtype == torch.float32 else _copied(policy, dtype)
        # Known by the names of their classes, which sharding changes.
        blocks = {id(model): _blocks(model) for model in (policy, self._model)}
        if compiled:
            # Every size of a pack is compiled for, with gradients and without; beyond the limit nothing would be.
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * SIZES_OF_A_PACK)
            for block in blocks[id(self._model)]:
                block.compile(dynamic=False)
        if ranks.size > 1:
            for model in {id(policy): policy, id(self._model): self._model}.values():
                shard(model, blocks[id(model)], ranks, device)
        if self._model is not policy:
            _follow(self._model, policy)
        self._forward = as_forward(self._model, _scores)

    def scores(self, micro: MicroBatch) -> TokenScores:
        """What a pass over a micro-batch, which is on `device`, tells of its sampled tokens."""
        if self._window is not None and micro.tree.longest > self._window:
            raise ConfigError(
                f"the model attends within a window of {self._window} tokens, which packs do not know; "
                f"a sequence of this batch has {micro.tree.longest}"
            )
        scores: TokenScores = self._forward(self._pack(micro.tree), micro)
        return scores

    def nothing(self) -> MicroBatch:
        """The smallest pass there is, for a rank that has no pack while others have."""
        return nothing().to(self.device)

    def padded(self, tree: TokenTree) -> int:
        """Places that are computed for a tree."""
        if self.device.type == "cpu":
            return tree.size
        step = max(1, self.pack_tokens // SIZES_OF_A_PACK // tree_attention.BLOCK) * tree_attention.BLOCK
        return -(-tree.size // step) * step

    def refresh(self) -> None:
        """Before a train step: takes over the policy's weights, whoever has changed them."""
        self._model.train()
        if self._model is not self.policy:
            with torch.no_grad():
                torch._foreach_copy_(
                    *([local(one) for one in model.parameters()] for model in (self._model, self.policy))
                )

    def _pack(self, tree: TokenTree) -> _Pack:
        if self.device.type == "cpu":
            return _on_cpu(tree)
        size = self.padded(tree)
        rows = torch.zeros((2, 1, size), dtype=torch.long)
        rows[0, 0, : tree.size] = torch.from_numpy(tree.token_ids)
        rows[1, 0, : tree.size] = torch.from_numpy(tree.positions)
        input_ids, position_ids = sent(rows, self.device)
        return _Pack(input_ids, position_ids, tree_attention.block_mask(tree, size, self.device))


def _copied(policy: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = copy.deepcopy(policy)
    for master, parameter in zip(policy.parameters(), model.parameters(), strict=True):
        # Buffers, such as the rotary frequencies, keep their precision.
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(master.requires_grad)
    return model


def _follow(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Each gradient of the copy goes to the policy's own parameter."""
    for master, parameter in zip(policy.parameters(), model.parameters(), strict=True):
        if master.requires_grad:
            parameter.register_post_accumulate_grad_hook(_to_master(master))


def _agreed(window: int | None, ranks: Ranks) -> int | None:
    """The leader's finding, on every rank."""
    told = ranks.shared(Message("window", {"window": window}) if ranks.is_leader else None).told["window"]
    assert told is None or isinstance(told, int)
    return told


def _scores(model: PreTrainedModel, pack: _Pack, micro: MicroBatch) -> TokenScores:
    hidden = _hidden(model, pack)
    # The backward of index_select adds in a fixed order; that of indexing does not.
    chosen = hidden.index_select(0, micro.places)
    weight = model.get_output_embeddings().weight
    return TokenScores(*token_logprobs(chosen, weight, micro.targets, micro.streams.temperature), chosen)


def _on_cpu(tree: TokenTree) -> _Pack:
    ids, positions = torch.from_numpy(tree.token_ids)[None], torch.from_numpy(tree.positions)[None]
    return _Pack(ids, positions, tree_attention.parts_of(tree))


def _to_master(master: torch.nn.Parameter) -> Callable[[Tensor], None]:
    """Moves a parameter's gradient to its master's."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add


def _blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers, by the class name under which transformers knows them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _hidden(model: PreTrainedModel, pack: _Pack) -> Tensor:
    """[T, E] the last hidden states."""
    made = model.get_decoder()(
        input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False, tree=pack.tree
    )
    hidden: Tensor = made.last_hidden_state[0]
    return hidden


def _prove(policy: PreTrainedModel) -> set[int]:
    """Tries whether the model does what a pack does not know: recurrence, other positions, a head with more to it.

    Returns the sliding windows that its layers attend within.
    """
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    first = [index * 7 % vocabulary for index in range(1, 25)]
    sequences = [first, [*first[:18], *reversed(first)], first[3:9]]
    (tree,) = plant(sequences, 1000)
    was_training = policy.training
    policy.eval()
    with torch.no_grad():
        weight = policy.get_output_embeddings().weight
        pack = _on_cpu(tree)
        hidden = _hidden(policy, pack)
        for member, places in zip(tree.members, tree.places, strict=True):
            ids = torch.tensor(sequences[member])
            plain = policy(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
            packed, _, _ = token_logprobs(hidden[places[:-1]], weight, ids[1:], torch.ones(ids.numel() - 1))
            worst = float((plain.gather(1, ids[1:, None]).squeeze(1) - packed).abs().max())
            if not worst <= PROOF_TOLERANCE:
                raise ConfigError(
                    f"a {type(policy).__name__} gives other log-probs in a pack than alone (by {worst:.2g}): "
                    "it does something that training on packs does not know"
                )
    policy.train(was_training)
    assert isinstance(pack.tree, tree_attention.Parts)
    return pack.tree.windows
