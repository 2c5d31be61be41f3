"""bfloat16 in Triton's interpreter, which holds it as uint16 and computes on the bits.

Every operation that the kernels use is routed through float32 and rounded to nearest even, as the
hardware does. `tests/kernels/test_interpreter.py` fails if this is missing or has stopped working.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    ).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def install() -> None:
    """Patch the interpreter of this process, once."""
    if hasattr(Builder, "treg_bf16"):
        return
    Builder.treg_bf16 = True
    dot, cast, convert, binary = (
        Builder.create_dot,
        Builder.cast_impl,
        Builder.create_fp_to_fp,
        Builder.binary_op,
    )

    def create_dot(self, a, b, d, *rest):
        return dot(self, _widen(a), _widen(b), d, *rest)

    def cast_impl(self, src, dst):
        if _is_bf16(src) and dst.scalar != tl.bfloat16:
            return cast(self, _widen(src), dst)
        if dst.scalar == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst)

    def create_fp_to_fp(self, src, dst, mode):
        nearest = mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if dst.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32 and nearest:
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if _is_bf16(src) and dst.scalar == tl.float32:
            return _widen(src)
        return convert(self, src, dst, mode)

    def binary_op(self, a, b, op):
        if not (_is_bf16(a) and _is_bf16(b)):
            return binary(self, a, b, op)
        out = op(to_float32(a.data), to_float32(b.data))
        return (
            TensorHandle(out, tl.int1)
            if out.dtype == np.bool_
            else TensorHandle(to_bfloat16(out), tl.bfloat16)
        )

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl
    Builder.create_fp_to_fp, Builder.binary_op = create_fp_to_fp, binary_op
