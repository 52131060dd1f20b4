"""Triton's CPU interpreter (TRITON_INTERPRET=1), repaired so that fp8 and bf16 kernels compute what a GPU computes.

Triton keeps fp8 and bf16 tensors as raw integers in numpy arrays, and 3.6.0 is wrong about them in these ways:

- f32 -> bf16 truncates, and f32 -> fp8 loses the carry out of the mantissa, does not saturate and mangles NaN;
- arithmetic, comparisons and `tl.dot` on bf16 use the integers themselves as if they were the values;
- `tl.range` with a bound computed in the kernel raises under numpy >= 2.4;
- programmatic dependent launch and inline PTX do not exist.

`install` repairs them: every operation decodes its operands to float32, computes, and rounds the result back to nearest
even, saturating for fp8 as `cvt.rn.satfinite` does. A reduction or scan of raw codes is refused rather than wrong.
Inline PTX runs when `EMULATED_PTX` knows its text. An access out of bounds is still a segmentation fault: run
interpreted kernels in a child process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from workbench.errors import UnsupportedError

CHECKED_VERSIONS = ("3.6.0",)

EMULATED_PTX: dict[str, Callable[..., np.ndarray]] = {}
"""Inline PTX text -> function from the operands' numpy arrays to the result's."""

TORCH_DTYPE = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
CODED = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}
"""Types whose numpy arrays hold codes, with the torch type of a code."""


def requested() -> bool:
    """Whether this process interprets kernels: TRITON_INTERPRET=1, to be set before Triton is first imported."""
    return bool(triton.knobs.runtime.interpret)


def decode(codes: np.ndarray, dtype: Any) -> np.ndarray:
    """The values of `codes`, as float32; arrays of types that numpy knows come back as they are."""
    if dtype not in CODED:
        return codes
    writable = np.array(codes)  # torch refuses read-only arrays, which broadcasting makes
    return torch.from_numpy(writable).view(TORCH_DTYPE[dtype]).float().numpy()


def encode(values: np.ndarray, dtype: Any, towards_zero: bool = False) -> np.ndarray:
    """`values` rounded to nearest even in `dtype`; fp8 saturates at its largest finite value, NaN stays NaN."""
    if dtype not in CODED:
        return values.astype(upstream._get_np_dtype(dtype))
    exact = torch.from_numpy(np.array(values, dtype=np.float32))
    if dtype is not tl.bfloat16:
        largest = torch.finfo(TORCH_DTYPE[dtype]).max
        exact = exact.clamp(-largest, largest)
    codes = exact.to(TORCH_DTYPE[dtype]).view(CODED[dtype]).numpy()
    if towards_zero:  # one code less is the next smaller magnitude, for either sign
        codes = codes - (np.abs(decode(codes, dtype)) > np.abs(exact.numpy())).astype(codes.dtype)
    return codes


def _convert(source: TensorHandle, dtype: Any, towards_zero: bool = False) -> TensorHandle:
    if source.dtype.scalar == dtype:
        return TensorHandle(source.data, dtype)
    return TensorHandle(encode(decode(source.data, source.dtype.scalar), dtype, towards_zero), dtype)


def _cast(builder: InterpreterBuilder, source: TensorHandle, dtype: Any) -> TensorHandle:
    return _convert(source, dtype.scalar)


def _float_to_float(builder: InterpreterBuilder, source: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
    return _convert(source, dtype.scalar, towards_zero=rounding is not None and "RTZ" in str(rounding))


def _on_values(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """`operation` applied to decoded operands, with its result rounded back to the operands' type."""

    def wrapped(builder: InterpreterBuilder, *operands: Any) -> TensorHandle:
        coded = next(
            (x.dtype.scalar for x in operands if isinstance(x, TensorHandle) and x.dtype.scalar in CODED), None
        )
        if coded is None:
            return operation(builder, *operands)
        decoded = [
            TensorHandle(decode(x.data, x.dtype.scalar), tl.float32) if isinstance(x, TensorHandle) else x
            for x in operands
        ]
        result = operation(builder, *decoded)
        if result.data.dtype == bool:  # a comparison
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(encode(result.data, coded), coded)

    return wrapped


def _dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, *_: Any) -> TensorHandle:
    accumulate = c.data.dtype
    product = np.matmul(
        decode(a.data, a.dtype.scalar).astype(accumulate), decode(b.data, b.dtype.scalar).astype(accumulate)
    )
    return TensorHandle(product + c.data, c.dtype.scalar)


def _atomic(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Atomic addition to bf16, one element after the other; all else as upstream does it."""

    def wrapped(
        builder: InterpreterBuilder,
        op: Any,
        pointer: TensorHandle,
        value: TensorHandle,
        mask: TensorHandle,
        *order: Any,
    ) -> TensorHandle:
        dtype = value.dtype.scalar
        if dtype not in CODED:
            return original(builder, op, pointer, value, mask, *order)
        if dtype is not tl.bfloat16 or "FADD" not in str(op):
            raise NotImplementedError(f"interpreter: atomic {op} on {dtype}")
        old = np.zeros(value.data.shape, np.uint16)
        pointers, addends, enabled = np.broadcast_arrays(pointer.data, value.data, mask.data)
        one = np.ones(1, bool)
        for index in zip(*np.nonzero(enabled), strict=True):
            address = np.array([pointers[index]])
            before = upstream._interpreter.load(address, one, np.zeros(1, np.uint16), np.dtype(np.uint16))
            total = decode(before, dtype) + decode(addends[index].reshape(1), dtype)
            upstream._interpreter.store(address, encode(total, dtype), one)
            old[index] = before[0]
        return TensorHandle(old, dtype)

    return wrapped


class _AsmResults:
    """What `tl.inline_asm_elementwise` expects of a builder: results by number."""

    def __init__(self, results: list[TensorHandle]) -> None:
        self.results = results

    def get_result(self, index: int) -> TensorHandle:
        return self.results[index]


def _inline_asm(
    builder: InterpreterBuilder, asm: str, constraints: str, values: list[TensorHandle], types: list[Any], *_: Any
) -> _AsmResults:
    if asm not in EMULATED_PTX:
        raise NotImplementedError(f"interpreter: no emulation of inline PTX {asm!r}")
    result = EMULATED_PTX[asm](*(value.data for value in values))
    return _AsmResults([TensorHandle(result, types[0].scalar)])


def _refuse_codes(check: Callable[..., None]) -> Callable[..., None]:
    """Reductions and scans see raw codes; none of our kernels reduces below float32."""

    def wrapped(operation: Any, inputs: Any) -> None:
        check(operation, inputs)
        for tensor in inputs:
            if tensor.dtype.scalar in CODED:
                raise NotImplementedError(f"interpreter: reduction or scan of {tensor.dtype}; convert to float32 first")

    return wrapped


def _indexable(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    """`int()` of a one-element, one-dimensional array is an error since numpy 2.4; scalars here are such arrays."""

    def wrapped(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return wrapped


def _no_operation(*_: Any, **__: Any) -> None:
    """Programs run one after the other here, so that a wait for the preceding kernel is always over."""


_installed = False


def install() -> None:
    """Repair the interpreter in this process; a second call changes nothing.

    Raises UnsupportedError for a Triton version on which the repair was not checked: its results would be unproven.
    """
    global _installed
    if _installed:
        return
    if triton.__version__ not in CHECKED_VERSIONS:
        raise UnsupportedError(
            f"triton: the interpreter's repair is checked on {', '.join(CHECKED_VERSIONS)}, got {triton.__version__}"
        )
    builder = InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _float_to_float
    for name in ("binary_op", "unary_op", "create_clampf", "create_fma", "create_rsqrt"):
        setattr(builder, name, _on_values(getattr(builder, name)))
    builder.create_dot = _dot
    builder.create_atomic_rmw = _atomic(builder.create_atomic_rmw)
    builder.create_inline_asm = _inline_asm
    upstream.ReduceScanOpInterface.check_tensor = _refuse_codes(upstream.ReduceScanOpInterface.check_tensor)
    upstream._patch_lang_tensor = _indexable(upstream._patch_lang_tensor)
    tl.extra.cuda.gdc_wait = _no_operation
    tl.extra.cuda.gdc_launch_dependents = _no_operation
    _installed = True
