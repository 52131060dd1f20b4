"""What all CUDA variants need to know of the GPUs that they are for."""

from __future__ import annotations

import torch

from workbench.variant import Support

NUM_SMS = 132  # of the H100 and the H200, where there is no device to ask
SMEM_BYTES = 232_448  # what a CTA can have


def supports_device(device: torch.device) -> Support:
    """Whether sm_90a code runs on `device`."""
    if device.type != "cuda":
        return Support.no("needs a GPU of compute capability 9.0; without one it is compiled only")
    if torch.cuda.get_device_capability(device) != (9, 0):
        return Support.no(f"needs compute capability 9.0, got {torch.cuda.get_device_capability(device)}")
    return Support.yes()
