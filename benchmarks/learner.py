"""The learner's train step: trained tokens a second, and memory.

On a CPU against TRL's GRPOTrainer: the same model, batch and machine in the same run, step by step in turns, each in a
process of its own. On CUDA as MFU. Models have random weights; groups are 8 rollouts with prompts of 256 tokens and
completions of lognormal length (sigma 1, mean 256). What is compared and what the settings are: docs/learner.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, parser, run
from benchmarks.learner_load import MODELS


async def measure(report: Report, args: argparse.Namespace) -> None:
    if args.device == "cuda":
        import torch

        from benchmarks import learner_cuda

        if not torch.cuda.is_available():
            report.skip("train step", "this machine has no CUDA device that torch can use")
            return
        learner_cuda.measure(
            report, args.model, quick=args.quick, seconds=args.seconds, device="cuda", kernels=args.kernels
        )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--model", choices=tuple(MODELS), help="absent: what fits the device and the time")
    made.add_argument("--seconds", type=float, default=220.0, help="with cuda: nothing new is begun after this long")
    made.add_argument("--kernels", type=Path, metavar="FILE", help="with cuda: write where the time goes, by kernel")
    return run(__doc__ or "", measure, argv, made=made)


if __name__ == "__main__":
    sys.exit(main())
