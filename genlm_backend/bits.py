"""What compiled functions share: memory at an address, a counter of tasks, float32 and bfloat16 as bits, exp.

numba compiles it into each function that uses it and keeps that by the function's own file: after a change here, delete
the caches (`make clean`). Importing this file imports numba.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LOG2_E = np.float32(1.0 / math.log(2.0))
LN2 = np.float32(math.log(2.0))


@intrinsic  # type: ignore[untyped-decorator]
def pointer(context: Any, address: Any, kind: Any) -> Any:
    """What lies at an address, as numbers of the type of `kind`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())

    return types.CPointer(kind)(address, kind), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the memory at an address, which will be read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], function_type)
        place = builder.inttoptr(arguments[0], byte)
        builder.call(function, [place, number(0), number(3), number(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def count_up(context: Any, counter: Any) -> Any:
    """What the int64 at a pointer was before this added 1, for any number of threads at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


def widened(bits: Any) -> Any:
    """The float32 that bits stand for: its own, or those of a bfloat16."""
    raise NotImplementedError("for compiled functions")


def to_bits(number: Any, kind: Any) -> Any:
    """The bits of a float32, or of the nearest bfloat16, of two the even one; NaN stays NaN.

    Args:
        number: float32. NaN with all of its low bits set is taken for another number: no bfloat16 leads to it.
        kind: A number of the type of the bits, uint32 or uint16.
    """
    raise NotImplementedError("for compiled functions")


def power_of_2(octaves: Any) -> Any:
    """2^x to 2e-7, for -126 <= x <= 126: a whole power times a short series."""
    raise NotImplementedError("for compiled functions")


@overload(widened, inline="always")  # type: ignore[untyped-decorator]
def _compile_widened(bits: Any) -> Any:
    def as_it_is(bits: Any) -> Any:
        return np.uint32(bits).view(np.float32)

    def shifted(bits: Any) -> Any:
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

    return as_it_is if bits.bitwidth == 32 else shifted


@overload(to_bits, inline="always")  # type: ignore[untyped-decorator]
def _compile_to_bits(number: Any, kind: Any) -> Any:
    def as_it_is(number: Any, kind: Any) -> Any:
        return np.float32(number).view(np.uint32)

    def rounded(number: Any, kind: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        is_odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))

    return as_it_is if kind.bitwidth == 32 else rounded


@overload(power_of_2, inline="always")  # type: ignore[untyped-decorator]
def _compile_power_of_2(octaves: Any) -> Any:
    def power(octaves: Any) -> Any:
        whole = np.floor(octaves + np.float32(0.5))
        r = (octaves - whole) * LN2
        series = np.float32(1 / 5040)
        series = series * r + np.float32(1 / 720)
        series = series * r + np.float32(1 / 120)
        series = series * r + np.float32(1 / 24)
        series = series * r + np.float32(1 / 6)
        series = series * r + np.float32(0.5)
        series = series * r + np.float32(1.0)
        series = series * r + np.float32(1.0)
        return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)

    return power
