"""The floor: the least time that a batch can take on a device, whatever the kernel.

Weights are read once for each expert that was hit, tokens are read once, `out` is written once; the products of the
choices that are on this rank are computed once. The slower of memory and tensor cores bounds the call from below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.problem import InputKind, MoEShape, scale_blocks

FP8_BYTES, BF16_BYTES, FP32_BYTES = 1, 2, 4


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach."""

    read_latency_us: float
    """Time that the smallest read from memory takes, cold L2."""
    bytes_per_us: float
    flops_per_us: float
    """Dense FP8 matrix products."""


CEILINGS = {
    # Plain bulk loads from all SMs, cold L2: 25 MB in 7.5 us, 700 MB in 152 us. cuBLAS FP8, 8192 x 8192 x 8192.
    "NVIDIA H200": Ceilings(read_latency_us=2.0, bytes_per_us=4.6e6, flops_per_us=1464e6),
}


def experts_hit(topk_ids: torch.Tensor) -> int:
    """How many experts of this rank `topk_ids` int [M, top_k] names; -1 is none."""
    return int(topk_ids[topk_ids >= 0].unique().numel())


def expert_bytes(shape: MoEShape) -> int:
    """Bytes of one expert's w13 and w2 with their scales."""
    weights = 3 * shape.intermediate_size * shape.hidden_size * FP8_BYTES
    blocks = 3 * scale_blocks(shape.intermediate_size) * scale_blocks(shape.hidden_size)
    return weights + blocks * FP32_BYTES


def token_bytes(shape: MoEShape, input_kind: InputKind) -> int:
    """Bytes of one token read (bf16, or e4m3 with its scales) and its row of `out` written."""
    read = shape.hidden_size * BF16_BYTES
    if input_kind == "fp8":
        read = shape.hidden_size * FP8_BYTES + scale_blocks(shape.hidden_size) * FP32_BYTES
    return read + shape.hidden_size * BF16_BYTES


def flops(shape: MoEShape, num_choices: int) -> int:
    """Multiplications and additions of `num_choices` choices (token, expert) that are on this rank."""
    return num_choices * 2 * 3 * shape.intermediate_size * shape.hidden_size


def floor_us(shape: MoEShape, topk_ids: torch.Tensor, input_kind: InputKind, device_name: str) -> float | None:
    """The floor in microseconds for the routing `topk_ids` int [M, top_k]; None for a device without ceilings."""
    ceilings = CEILINGS.get(device_name)
    if ceilings is None:
        return None
    num_choices = int((topk_ids >= 0).sum())
    moved = experts_hit(topk_ids) * expert_bytes(shape) + topk_ids.shape[0] * token_bytes(shape, input_kind)
    memory_us = ceilings.read_latency_us + moved / ceilings.bytes_per_us
    return max(memory_us, flops(shape, num_choices) / ceilings.flops_per_us)
