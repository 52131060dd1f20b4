"""Host side of sm90_order.cu: the choices of a batch in the order of their experts, and how many each has."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, Launch, load

KERNEL = "sm90_order"
NUM_THREADS = 512
FORMS = ((4, 8), (8, 8), (8, 16))
"""Sizes of the cluster, and choices of a thread."""
MAX_EXPERTS = 1024


def _capacity(form: tuple[int, int]) -> int:
    cluster_size, choices_per_thread = form
    return cluster_size * NUM_THREADS * choices_per_thread


MAX_CHOICES = _capacity(FORMS[-1])


class _Params(ctypes.Structure):
    _fields_ = (
        ("topk_ids", ctypes.c_uint64),
        ("sorted_choices", ctypes.c_uint64),
        ("expert_choices", ctypes.c_uint64),
        ("num_choices", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
    )


def compiled_forms() -> list[Cubin]:
    """The kernel, compiled in each of FORMS."""
    return [_compiled(form) for form in FORMS]


def _compiled(form: tuple[int, int]) -> Cubin:
    cluster_size, choices_per_thread = form
    sizes = {"CLUSTER_SIZE": cluster_size, "CHOICES_PER_THREAD": choices_per_thread}
    return compile_kernel(KERNEL, sizes | {"PARAMS_BYTES": ctypes.sizeof(_Params)})


@functools.cache
def _kernel(form: tuple[int, int], device: torch.device) -> Kernel:
    return load(_compiled(form), NUM_THREADS, form[0], dynamic_smem_bytes=0, device=device)


def warm(device: torch.device) -> None:
    """Compile and load, which must not happen while a CUDA graph is captured."""
    for form in FORMS:
        _kernel(form, device)


def parts(num_choices: int) -> dict[str, int]:
    """Bytes of what the launch writes: `sorted_choices` int32 [num_choices], of which those of no expert are missing at
    the end, and `expert_choices` int32 [MAX_EXPERTS], how many each has."""
    return {"sorted_choices": 4 * num_choices, "expert_choices": 4 * MAX_EXPERTS}


def bind(device: torch.device, num_choices: int, num_experts: int) -> Launch:
    """A launch that orders so many of `topk_ids` int32 [M, top_k], at most MAX_CHOICES, by expert, at most MAX_EXPERTS;
    an id outside 0..num_experts-1 is left out. The caller fills in the addresses of it and of parts()."""
    assert num_choices <= MAX_CHOICES and num_experts <= MAX_EXPERTS, (num_choices, num_experts)
    params = _Params(num_choices=num_choices, num_experts=num_experts)
    form = next(form for form in FORMS if num_choices <= _capacity(form))
    return _kernel(form, device).bind(params, form[0], overlap_previous=False)
