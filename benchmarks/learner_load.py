"""What benchmarks/learner.py trains: models with random weights, and batches of groups. Imports torch late."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longshore.learner.sequences import TrainSequence
from longshore.learner.token_tree import TokenTree

GROUP_SIZE, PROMPT, MEAN_COMPLETION, LONGEST_COMPLETION = 8, 256, 256, 2048

_SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
_QWEN_HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
_QWEN_1HALF = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
# Name: architecture and shape. Sources: the models' config.json files.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    # examples/first-light.yaml's, with a longer vocabulary.
    "small": ("llama", {**_SMALL, "num_key_value_heads": 4, "vocab_size": 512}),
    # SmolLM2-135M
    "smollm2": ("llama", {**_SMOLLM2, "num_key_value_heads": 3, "vocab_size": 49_152}),
    # Qwen2.5-0.5B
    "0.5b": ("qwen2", {**_QWEN_HALF, "num_key_value_heads": 2, "vocab_size": 151_936}),
    # Llama-3.2-1B
    "1b": ("llama", {**_LLAMA_1B, "num_key_value_heads": 8, "vocab_size": 128_256}),
    # Qwen2.5-1.5B
    "1.5b": ("qwen2", {**_QWEN_1HALF, "num_key_value_heads": 2, "vocab_size": 151_936}),
}


def make_model(name: str) -> Any:
    """A model in float32 with random weights and tied embeddings, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    architecture, shape = MODELS[name]
    torch.manual_seed(0)
    special: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    special |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **special)).float()
    return Qwen2ForCausalLM(Qwen2Config(**shape, **special)).float()


@dataclass(frozen=True)
class Load:
    """A batch: groups that share a prompt, with advantages whose mean is zero."""

    prompts: list[list[int]]
    # One list of completions a group.
    completions: list[list[list[int]]]
    advantages: list[list[float]]

    @property
    def trained(self) -> int:
        """Sampled tokens."""
        return sum(len(completion) for group in self.completions for completion in group)

    @property
    def with_prompts(self) -> int:
        """Tokens of all sequences, each with its prompt."""
        return self.trained + sum(len(p) * len(g) for p, g in zip(self.prompts, self.completions, strict=True))

    def sequences(self) -> list[TrainSequence]:
        """The batch as the learner takes it; behaviour log-probs are those of a uniform policy."""
        made: list[TrainSequence] = []
        for prompt, group, advantages in zip(self.prompts, self.completions, self.advantages, strict=True):
            for completion, advantage in zip(group, advantages, strict=True):
                made.append(sequence_of(len(made), prompt, completion, advantage))
        return made


def sequence_of(number: int, prompt: list[int], completion: list[int], advantage: float) -> TrainSequence:
    """A rollout of one turn from version 0 at temperature 1."""
    given, length = [False] * len(prompt), len(prompt) + len(completion)
    return TrainSequence(
        rollout=number,
        group=number // GROUP_SIZE,
        token_ids=[*prompt, *completion],
        sampled=[*given, *([True] * len(completion))],
        behaviour=[-5.0] * length,
        temperature=[1.0] * length,
        versions=[0] * length,
        turns=[0] * length,
        advantages=[advantage] * length,
        weights=[1.0] * length,
        rewards=[0.0] * length,
        carried=[False] * length,
    )


def make_load(model: str, groups: int, seed: int = 0) -> Load:
    """Groups of 8 with prompts of 256 tokens and completions of lognormal length, sigma 1, mean 256, at most 2048."""
    # The lengths are the same whatever the vocabulary.
    rng, lengths = random.Random(seed), random.Random(-1 - seed)
    vocabulary = MODELS[model][1]["vocab_size"]

    def text(length: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(length)]

    def length() -> int:
        return min(LONGEST_COMPLETION, max(1, round(lengths.lognormvariate(math.log(MEAN_COMPLETION) - 0.5, 1.0))))

    prompts = [text(PROMPT) for _ in range(groups)]
    completions = [[text(length()) for _ in range(GROUP_SIZE)] for _ in range(groups)]
    advantages = [[(-1.0) ** index for index in range(GROUP_SIZE)] for _ in range(groups)]
    return Load(prompts, completions, advantages)


def model_flops(model: str, trees: Sequence[TokenTree], trained: int) -> float:
    """Floating-point operations of one forward and backward pass that learning needs.

    Six a weight and token that is computed, of the decoder's matrices once a place, of the head's once a sampled token;
    twelve a score and channel of attention. What is padding, computed again, or hidden by the mask is not counted.
    """
    shape = MODELS[model][1]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"])
    places = sum(tree.size for tree in trees)
    scores = sum(int((tree.positions + 1).sum()) for tree in trees)
    return 6.0 * (weights * places + hidden * shape["vocab_size"] * trained) + 12.0 * layers * hidden * scores
