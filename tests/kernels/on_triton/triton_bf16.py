"""pytest plugin (-p triton_bf16): makes Triton's interpreter right for bf16, where it would silently compute on bits.

The interpreter holds bf16 as uint16. Here products and conversions see the values, conversions to bf16 round to
nearest even, and every other arithmetic on bf16 raises.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
HANDLE = interpreter.TensorHandle


def is_bf16(x):
    return isinstance(x, HANDLE) and x.dtype.scalar == tl.bfloat16


def widened(x):
    """The same values in fp32."""
    return HANDLE((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x


def narrowed(x):
    """fp32 values rounded to bf16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x.data).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return HANDLE(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def cast(self, x, to, original=BUILDER.cast_impl):
    if to.scalar != tl.bfloat16:
        return original(self, widened(x), to)
    return x if is_bf16(x) else narrowed(original(self, x, tl.float32))


def dot(self, a, b, *rest, original=BUILDER.create_dot):
    return original(self, widened(a), widened(b), *rest)


def refusing(name):
    original = getattr(BUILDER, name)

    def operation(self, *args):
        if any(map(is_bf16, args)):
            raise TypeError(f"{name} on bf16: the interpreter computes on the bits")
        return original(self, *args)

    return operation


BUILDER.cast_impl = cast
BUILDER.create_dot = dot
for operation in ("unary_op", "binary_op", "ternary_op"):
    setattr(BUILDER, operation, refusing(operation))
for reduction in (interpreter.ReduceOps, interpreter.ScanOps):

    def apply(self, tensors, original=reduction.apply_impl):
        if any(x.dtype.scalar == tl.bfloat16 for x in (tensors if isinstance(tensors, tuple) else (tensors,))):
            raise TypeError("a reduction of bf16: the interpreter computes on the bits")
        return original(self, tensors)

    reduction.apply_impl = apply
