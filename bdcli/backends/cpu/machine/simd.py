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
from numba.extending import intrinsic, models, overload, register_model

from bdcli.backends.cpu.machine.code_cache import code_folder
from bdcli.backends.cpu.machine.llvm import (
    BF16S,
    F16,
    F32,
    F32S,
    HAS_DOTS,
    I8,
    I16,
    I16S,
    I32,
    I32S,
    I64,
    LANES,
    call,
    constant,
    exp,
    fma,
    load,
    narrowed,
    pointer,
    rounded_bits,
    splat,
    tree,
)

numba.config.CACHE_DIR = str(code_folder())  # before anything is compiled


class _VectorType(types.Type):
    def __init__(self):
        super().__init__(name="f32x16")


Vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, F32S)


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
vlarger = compiled(_v, _v, _v)(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))  # y where one is NaN
vexp = compiled(_v, _v)(exp)
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
    """The nearest bf16 of x's lanes, then of y's: 64 bytes."""
    if HAS_DOTS:
        b.store(call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16S, y, x), pointer(b, at), align=4)
        return
    for i, half in enumerate((x, y)):
        b.store(narrowed(b, half), pointer(b, b.add(at, I64(32 * i))), align=2)


@compiled(_v, _v)
def rounded(b, x):
    """Each lane to the nearest bf16, ties to even."""
    return b.bitcast(b.and_(rounded_bits(b, x), constant(0xFFFF0000, I32S)), F32S)


@compiled(_none, _i, _v)
def put_bf16(b, at, x):
    """The nearest bf16 of each lane: 32 bytes."""
    b.store(narrowed(b, x), pointer(b, at), align=2)


@compiled(_none, _i, _i, _i)
def put_transposed(b, source, source_row, into):
    """16 × 16 floats whose rows lie `source_row` bytes apart, transposed into 1 KiB."""
    rows = [load(b, b.add(source, b.mul(I64(i), source_row)), F32S, 4) for i in range(LANES)]
    for step in (8, 4, 2, 1):
        keep = [lane if not lane & step else lane - step + LANES for lane in range(LANES)]
        move = [lane + step if not lane & step else lane + LANES for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                x, y = rows[i], rows[i + step]
                rows[i] = b.shuffle_vector(x, y, ir.Constant(I32S, keep))
                rows[i + step] = b.shuffle_vector(x, y, ir.Constant(I32S, move))
    for i, row in enumerate(rows):
        b.store(row, pointer(b, b.add(into, I64(64 * i))), align=64)


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
