"""From the CPU to the device that computes, without waiting for what that is at work on."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to CUDA is queued behind the work there; from ordinary memory it would wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
