"""SIMD for compiled code: sixteen floats as one numba value, loads and stores at addresses, atomics.

numba vectorises only what it recognises; the engine needs register blocking that holds. So a vector is a value here
(`Vector`, LLVM's <16 x float>, which LLVM splits where the processor's registers are narrower), memory is an int64
address, and each function below is a few LLVM instructions. Nothing checks bounds: addresses come from `step`.
"""

from __future__ import annotations

import operator

import llvmlite.binding
import numba
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from bdcli.backends.cpu.code_cache import code_folder

numba.config.CACHE_DIR = str(code_folder())  # before anything is compiled

LANES = 16
F32, F16, I64, I32, I16, I8 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (64, 32, 16, 8))
F32S, F16S, I32S, I16S, I8S = (ir.VectorType(t, LANES) for t in (F32, F16, I32, I16, I8))

_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_DOTS = bool(_FEATURES.get("avx512bf16"))  # the processor's dot product of bf16 pairs
HAS_INTEGER_DOTS = bool(_FEATURES.get("avx512vnni"))  # of bytes, four a lane
WIDE = bool(_FEATURES.get("avx512f"))  # 32 registers of 16 floats, against 16 of 8


class _VectorType(types.Type):
    def __init__(self):
        super().__init__(name="f32x16")


Vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32S)


# -- building LLVM code


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


def _exp(builder, x):
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


# -- functions for compiled code


def compiled(result, *arguments):
    """Turns `emit(builder, *values)` into a function of that signature that compiled code can call."""
    signature = result(*arguments)

    def wrap(emit):
        def generate(context, builder, _signature, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        # numba reads an intrinsic's arity off its own signature, so make a function with as many parameters
        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        head: dict = {}
        exec(
            f"def head(typing, {names}): return signature, generate",
            {"signature": signature, "generate": generate},
            head,
        )
        return intrinsic(head["head"])

    return wrap


_i, _f, _v, _none = types.int64, types.float32, Vector, types.void


def machine_code(result, *arguments):
    """Compiles a function of numbers and addresses once, and lets other compiled code call it by its symbol.

    numba links callees into every caller and optimises them there again, which for code this size takes minutes; a
    symbol is compiled once. Nothing here raises, so the error model is numpy's: no checks for division by zero.
    """
    signature = result(*arguments)

    def wrap(function):
        name = f"bdcli_{function.__name__}"
        code = cfunc(signature, nopython=True, cache=True, error_model="numpy")(function)
        llvmlite.binding.add_symbol(name, code.address)
        code._library._shared_module = None  # its IR, kept for callers to inline: megabytes that nothing here reads
        entries[function.__name__] = code
        return types.ExternalFunction(name, signature)

    return wrap


entries: dict = {}  # what symbols point to; `entries[name].ctypes` can be called from Python

get_f32 = compiled(_f, _i)(lambda b, at: load(b, at, F32, 4))
get_f16 = compiled(_f, _i)(lambda b, at: b.fpext(load(b, at, F16, 2), F32))
get_i64 = compiled(_i, _i)(lambda b, at: load(b, at, I64, 8))
get_u8 = compiled(_i, _i)(lambda b, at: b.zext(load(b, at, I8), I64))
get = compiled(_v, _i)(lambda b, at: load(b, at, F32S, 4))
spread = compiled(_v, _f)(splat)
vfma = compiled(_v, _v, _v, _v)(fma)
vmax = compiled(_v, _v, _v)(lambda b, x, y: call(b, "llvm.maxnum.v16f32", F32S, x, y))
vexp = compiled(_v, _v)(_exp)
magnitude = compiled(_v, _v)(lambda b, x: call(b, "llvm.fabs.v16f32", F32S, x))
get_bf16 = compiled(_v, _i)(
    lambda b, at: b.bitcast(b.shl(b.zext(load(b, at, I16S, 2), I32S), constant(16, I32S)), F32S)
)
evens = compiled(_v, _v, _v)(lambda b, x, y: b.shuffle_vector(x, y, ir.Constant(I32S, list(range(0, 2 * LANES, 2)))))
odds = compiled(_v, _v, _v)(lambda b, x, y: b.shuffle_vector(x, y, ir.Constant(I32S, list(range(1, 2 * LANES, 2)))))


@compiled(_none, _i, _f)
def put_f32(b, at, x):
    b.store(x, pointer(b, at), align=4)


@compiled(_none, _i, _i)
def put_i64(b, at, x):
    b.store(x, pointer(b, at), align=8)


@compiled(_none, _i, _v)
def put(b, at, x):
    b.store(x, pointer(b, at), align=4)


@compiled(_none, _i, _f)
def put_bf16_one(b, at, x):
    """The nearest bf16, ties to even."""
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
    b.store(b.trunc(rounded, I16), pointer(b, at), align=2)


@compiled(_none, _i, _v, _v)
def put_narrow(b, at, x, y):
    """The nearest bf16 of x's lanes, then of y's: 64 bytes. Only where the processor has the instruction."""
    if HAS_DOTS:
        b.store(call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16S, y, x), pointer(b, at), align=4)


def _rounded_bits(b, x):
    """Each lane to the nearest bf16, ties to even, in the upper halves of <16 x i32>."""
    bits = b.bitcast(x, I32S)
    odd = b.and_(b.lshr(bits, constant(16, I32S)), constant(1, I32S))
    return b.add(bits, b.add(odd, constant(0x7FFF, I32S)))


def narrowed(b, x):
    """The nearest bf16 of each lane as <16 x i16>."""
    return b.trunc(b.lshr(_rounded_bits(b, x), constant(16, I32S)), I16S)


@compiled(_v, _v)
def rounded(b, x):
    """Each lane to the nearest bf16, ties to even."""
    return b.bitcast(b.and_(_rounded_bits(b, x), constant(0xFFFF0000, I32S)), F32S)


@compiled(_v, _v, _v)
def paired(b, x, y):
    """Lanes that are bf16 values, as sixteen pairs of x's and y's in the lanes' bits."""
    low = b.lshr(b.bitcast(x, I32S), constant(16, I32S))
    return b.bitcast(b.or_(low, b.bitcast(y, I32S)), F32S)


@compiled(_none, _i, _v)
def put_column(b, at, x):
    """Lane i at `at` + 64·i."""
    bits = b.bitcast(x, I32S)
    for i in range(LANES):
        b.store(b.extract_element(bits, I32(i)), pointer(b, b.add(at, I64(64 * i))), align=4)


@compiled(_f, _v)
def total(b, x):
    """Sum of the lanes, as a tree."""
    return tree(b, x, b.fadd)


@compiled(_f, _v)
def highest(b, x):
    return tree(b, x, lambda p, q: call(b, "llvm.maxnum.v16f32", F32S, p, q))


def tree(b, x, join):
    for step in (8, 4, 2, 1):
        x = join(x, b.shuffle_vector(x, x, ir.Constant(I32S, [(i + step) % LANES for i in range(LANES)])))
    return b.extract_element(x, I32(0))


@overload(operator.add)
def _add(a, b):
    return (lambda a, b: _vadd(a, b)) if a is Vector and b is Vector else None


@overload(operator.mul)
def _mul(a, b):
    return (lambda a, b: _vmul(a, b)) if a is Vector and b is Vector else None


@overload(operator.sub)
def _sub(a, b):
    return (lambda a, b: _vsub(a, b)) if a is Vector and b is Vector else None


@overload(operator.truediv)
def _truediv(a, b):
    return (lambda a, b: _vdiv(a, b)) if a is Vector and b is Vector else None


_vadd = compiled(_v, _v, _v)(lambda b, x, y: b.fadd(x, y))
_vsub = compiled(_v, _v, _v)(lambda b, x, y: b.fsub(x, y))
_vmul = compiled(_v, _v, _v)(lambda b, x, y: b.fmul(x, y))
_vdiv = compiled(_v, _v, _v)(lambda b, x, y: b.fdiv(x, y))

# -- threads: values that several of them change

fetch_add = compiled(_i, _i, _i)(lambda b, at, x: b.atomic_rmw("add", pointer(b, at), x, "seq_cst"))
exchange = compiled(_i, _i, _i)(lambda b, at, x: b.atomic_rmw("xchg", pointer(b, at), x, "seq_cst"))
observe = compiled(_i, _i)(lambda b, at: b.load_atomic(pointer(b, at), "seq_cst", 8, typ=I64))


@compiled(_none, _i, _i)
def publish(b, at, x):
    b.atomic_rmw("xchg", pointer(b, at), x, "seq_cst")


@compiled(_none)
def pause(b):
    """Hint to the processor that this is a waiting loop."""
    call(b, "llvm.x86.sse2.pause", ir.VoidType())
