"""Pieces of LLVM code for vectors of sixteen numbers, which LLVM splits where the processor's registers are narrower.

Functions take a builder and LLVM values, and give a value. Addresses are 64-bit integers.
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

LANES = 16
F32, F16, I64, I32, I16, I8 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (64, 32, 16, 8))
F32S, F16S, I32S, I16S, I8S = (ir.VectorType(t, LANES) for t in (F32, F16, I32, I16, I8))

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_DOTS = bool(_FEATURES.get("avx512bf16"))  # the processor's dot product of bf16 pairs
HAS_INTEGER_DOTS = bool(_FEATURES.get("avx512vnni"))  # of bytes, four a lane
WIDE = bool(_FEATURES.get("avx512f"))  # 32 registers of 16 floats, against 16 of 8


def pointer(builder, address):
    return builder.inttoptr(address, ir.PointerType())


def load(builder, address, kind, align=1):
    return builder.load(pointer(builder, address), typ=kind, align=align)


def splat(builder, scalar):
    """A scalar in all lanes."""
    kind = ir.VectorType(scalar.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(I32S, [0] * LANES))


def constant(value, kind=F32S):
    return ir.Constant(kind, [value] * LANES)


def call(builder, name, result, *operands):
    """An LLVM intrinsic by name."""
    kind = ir.FunctionType(result, [o.type for o in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, operands)


def ask(builder, address):
    """Ask for a cache line, into the second level."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address), I32(0), I32(2), I32(1))


def fma(builder, a, b, c):
    return call(builder, "llvm.fma.v16f32", F32S, a, b, c)


class _BFloat(ir.Type):
    def _to_string(self):
        return "bfloat"


BF16S = ir.VectorType(_BFloat(), 2 * LANES)


def dot(builder, a, b, c):
    """c + the products of a's and b's pairs of bf16, both of a pair in one lane; a and b are <16 x i32>."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return call(builder, name, F32S, c, builder.bitcast(a, BF16S), builder.bitcast(b, BF16S))


def integer_dot(builder, c, a, b):
    """c + the products of a's unsigned and b's signed bytes, all four of a lane; a, b and c are <16 x i32>."""
    if HAS_INTEGER_DOTS:
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32S, c, a, b)
    return builder.add(c, _bytes_dot(builder, a, b))


def _bytes_dot(builder, a, b):
    """The products of `integer_dot` without its instruction: nibbles of a, for sums of two bytes saturate."""
    low = constant(0x0F0F0F0F, I32S)
    high = builder.and_(builder.lshr(a, constant(4, I32S)), low)
    parts = [_small_dot(builder, x, b) for x in (builder.and_(a, low), high)]
    return builder.add(parts[0], builder.shl(parts[1], constant(4, I32S)))


def _small_dot(builder, a, b):
    """The products of bytes of a below 128, in halves of eight lanes."""
    halves, bytes_, words = ir.VectorType(I32, 8), ir.VectorType(I8, 32), ir.VectorType(I16, 16)
    ones, sums = ir.Constant(words, [1] * 16), []
    for first in (0, 8):
        lanes = ir.Constant(halves, list(range(first, first + 8)))
        x, y = (builder.bitcast(builder.shuffle_vector(v, v, lanes), bytes_) for v in (a, b))
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, x, y)
        sums.append(call(builder, "llvm.x86.avx2.pmadd.wd", halves, pairs, ones))
    return builder.shuffle_vector(*sums, ir.Constant(I32S, list(range(16))))


def widen_pairs(builder, pairs):
    """<16 x i32>, each two bf16: the floats of the low halves and of the high halves."""
    low = builder.shl(pairs, constant(16, I32S))
    high = builder.and_(pairs, constant(0xFFFF0000, I32S))
    return builder.bitcast(low, F32S), builder.bitcast(high, F32S)


def exp(builder, x):
    """e^x to about 1e-7 relative for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf).

    0 below -87, NaN where x is. n is read off the low bits of x/ln2 + 1.5·2^23, a float whose unit is 1.
    """
    magic = constant(12582912.0)
    shifted = fma(builder, x, constant(1.4426950408889634), magic)
    turns = builder.fsub(shifted, magic)
    rest = fma(builder, turns, constant(-0.693359375), x)
    rest = fma(builder, turns, constant(2.12194440e-4), rest)
    value = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = fma(builder, value, rest, constant(c))
    value = fma(builder, builder.fmul(rest, rest), value, builder.fadd(rest, constant(1.0)))
    power = builder.shl(builder.add(builder.bitcast(shifted, I32S), constant(127, I32S)), constant(23, I32S))
    value = builder.fmul(value, builder.bitcast(power, F32S))
    return builder.select(builder.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), value)


def rounded_bits(b, x):
    """<16 x i32>: the nearest bf16 of each lane, ties to even, in the high halves; the low ones are noise."""
    bits = b.bitcast(x, I32S)
    odd = b.and_(b.lshr(bits, constant(16, I32S)), constant(1, I32S))
    return b.add(bits, b.add(odd, constant(0x7FFF, I32S)))


def narrowed(b, x):
    """The nearest bf16 of each lane, ties to even, as <16 x i16>."""
    return b.trunc(b.lshr(rounded_bits(b, x), constant(16, I32S)), I16S)


def tree(b, x, join):
    for step in (8, 4, 2, 1):
        x = join(x, b.shuffle_vector(x, x, ir.Constant(I32S, [(i + step) % LANES for i in range(LANES)])))
    return b.extract_element(x, I32(0))
