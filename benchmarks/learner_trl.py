"""TRL's side of benchmarks/learner.py: GRPOTrainer's own training loop on a batch that is given instead of generated.

What is timed is everything from the batch to the next request for one: forward and backward passes, clipping, the
optimizer, and the trainer's bookkeeping.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.learner_load import GROUP_SIZE, LONGEST_COMPLETION, Load, make_model

PAD = 0


def train(model: str, load: Load, micro: int, take: Callable[[], bool]) -> None:
    """Trains on `load` again and again, a step between two calls of `take`, until that says False.

    Args:
        model: of benchmarks/learner_load.py.
        load: the batch of every step.
        micro: sequences in a forward pass.
        take: called before each step.
    """
    from datasets import Dataset
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    batch = _batch(load)
    size = len(load.prompts) * GROUP_SIZE

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            if not take():
                raise _Done
            # The trainer may keep or change what it is given.
            return {name: value.clone() for name, value in batch.items()}

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            num_generations=GROUP_SIZE,
            max_completion_length=LONGEST_COMPLETION,
            # No reference model, one pass over a batch: nothing is computed but the update.
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",
            learning_rate=1e-6,
            max_steps=10_000,
            optim="adamw_torch_fused",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=make_model(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * size}),
            processing_class=_tokenizer(),
        )
        try:
            trainer.train()
        except _Done:
            return


class _Done(Exception):
    """Ends TRL's loop from inside."""


def _batch(load: Load) -> dict[str, Tensor]:
    """As `GRPOTrainer` makes it: prompts padded on the left, completions on the right."""
    flat = [completion for group in load.completions for completion in group]
    longest = max(len(completion) for completion in flat)
    completion_ids = torch.full((len(flat), longest), PAD)
    mask = torch.zeros((len(flat), longest), dtype=torch.long)
    for row, completion in enumerate(flat):
        completion_ids[row, : len(completion)] = torch.tensor(completion)
        mask[row, : len(completion)] = 1
    prompt_ids = torch.tensor(load.prompts).repeat_interleave(GROUP_SIZE, 0)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": torch.tensor([advantage for group in load.advantages for advantage in group]),
        "num_items_in_batch": mask.sum(),
    }


def _tokenizer() -> Any:
    """The trainer wants one; what it is asked for is never used."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")
