"""From a drafter's logits to its next token, in compiled code: the argmax, or a draw from the serving distribution.

Draws use Philox 4x32-10 (Salmon et al. 2011), a counter-based generator: number `counter` of stream `seed`, the same
on every machine and whatever the number of threads. A proposal may follow any distribution as long as verification
uses the same one, so top-k and top-p are cut at a threshold found by bisection instead of by sorting the vocabulary;
ties at the threshold are all kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.machine.simd import get, get_f32, highest, machine_code, put, put_f32, spread, total, vexp, vmax
from bdcli.backends.cpu.tables import field, number

HALVINGS = 40
NOT_FINITE = -1


@njit(error_model="numpy")
def summit(logits, count):
    """Largest of `count` floats; NaN when one of them is not finite."""
    whole = count // 16 * 16
    top, zeros = spread(np.float32(-np.inf)), spread(np.float32(0))
    for i in range(0, 4 * whole, 64):
        row = get(logits + i)
        top, zeros = vmax(top, row), zeros + row * spread(np.float32(0))
    high, zero = highest(top), total(zeros)
    for i in range(whole, count):
        value = get_f32(logits + 4 * i)
        high, zero = max(high, value), zero + value * np.float32(0)
    return high + zero


@machine_code(types.int64, types.int64)
def best(call):
    """Argmax, the first of equals; NOT_FINITE when a logit is NaN or infinite."""
    logits, count = field(call, tables.LOGITS), field(call, tables.KNOWN)
    high = summit(logits, count)
    for i in range(count):
        if get_f32(logits + 4 * i) == high:
            return i
    return NOT_FINITE


@njit(error_model="numpy")
def masked_exp(at, least):
    for lane in range(16):
        if get_f32(at + 4 * lane) < least:
            put_f32(at + 4 * lane, np.float32(-np.inf))
    return vexp(get(at))


@machine_code(types.float32, types.int64, types.int64, types.float32)
def soften(q, count, least):
    """Exponentials in place, 0 below `least`; their sum. Every value is at most 0."""
    whole = count // 16 * 16
    sums = np.float32(0)
    for i in range(0, whole, 16):
        put(q + 4 * i, masked_exp(q + 4 * i, least))
        sums += total(get(q + 4 * i))
    for i in range(whole, count):
        value = get_f32(q + 4 * i)
        value = np.float32(np.exp(value)) if value >= least else np.float32(0)
        put_f32(q + 4 * i, value)
        sums += value
    return sums


@njit(error_model="numpy")
def threshold(values, count, low, high, wanted, counting):
    """The largest t with at least `wanted` values, or a mass of `wanted`, at or above it, by bisection."""
    for _ in range(HALVINGS):
        middle = np.float32(0.5) * (low + high)
        reached = np.float64(0)
        for i in range(count):
            value = get_f32(values + 4 * i)
            if value >= middle:
                reached += 1.0 if counting else value
        if reached >= wanted:
            low = middle
        else:
            high = middle
    return low


@njit(error_model="numpy")
def serve(logits, count, q, temperature, top_k, top_p, min_p):
    """q = softmax(logits / temperature), cut to the top k, to mass p and to `min_p` of the largest, renormalised.

    Returns their sum, NaN where a logit is not finite.
    """
    high = summit(logits, count)
    if not np.isfinite(high):
        return np.float32(np.nan)
    for i in range(count):
        put_f32(q + 4 * i, (get_f32(logits + 4 * i) - high) / temperature)
    least = np.float32(-np.inf)
    if 0 < top_k < count:
        least = threshold(q, count, np.float32(-87), np.float32(0), top_k, True)
    sums = soften(q, count, least)
    if top_p < 1 or min_p > 0:
        least = np.float32(min_p)  # the largest is 1
        if top_p < 1:
            least = max(least, threshold(q, count, np.float32(0), np.float32(1), top_p * sums, False))
        sums = np.float32(0)
        for i in range(count):
            p = get_f32(q + 4 * i)
            p = p if p >= least else np.float32(0)
            put_f32(q + 4 * i, p)
            sums += p
    for i in range(count):
        put_f32(q + 4 * i, get_f32(q + 4 * i) / sums)
    return sums


@machine_code(types.float64, types.int64, types.int64)
def uniform(seed, counter):
    """A float64 in [0, 1): 53 bits of Philox 4x32-10 at `counter` under key `seed`."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1 = np.uint64(counter) & mask, np.uint64(counter) >> np.uint64(32)
    c2, c3 = np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed) & mask, np.uint64(seed) >> np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & mask, (a >> np.uint64(32)) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return float(((c0 << np.uint64(32)) | c1) >> np.uint64(11)) * 2.0**-53


@machine_code(types.int64, *[types.int64] * 2)
def draw(call, nth):
    """A token from the serving distribution, which is left in row `nth` of Q_ROWS; NOT_FINITE as in `best`."""
    logits, count = field(call, tables.LOGITS), field(call, tables.KNOWN)
    q = field(call, tables.Q_ROWS) + nth * field(call, tables.Q_STRIDE)
    mass = serve(
        logits,
        count,
        q,
        number(call, tables.TEMPERATURE),
        field(call, tables.TOP_K),
        number(call, tables.TOP_P),
        number(call, tables.MIN_P),
    )
    if not mass > 0:
        return NOT_FINITE
    left = uniform(field(call, tables.SEED), nth)
    last = 0
    for i in range(count):
        p = get_f32(q + 4 * i)
        left -= p
        if p > 0:
            last = i
            if left < 0:
                return i
    return last
