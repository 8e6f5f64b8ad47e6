"""What compiled code finds where: fields of the int64 tables that describe a model, a cache and a call.

Tables hold counts and addresses, eight bytes a field. `step` reads them; `reader` fills them.
"""

from __future__ import annotations

from numba import njit

from bdcli.backends.cpu.machine.simd import get_f32, get_i64

# The model, its cache's geometry, then LAYER_FIELDS for each layer. EPS and SCALE are floats in their field's low half.
MODEL_FIELDS = 26
(
    KIND,  # of caches and dense matrices: products.FLOATS, products.PAIRS or products.DOTS
    HIDDEN,
    INNER,
    LAYERS,
    HEADS,
    KV_HEADS,
    DIM,
    VOCAB,
    EPS,
    SCALE,  # of attention scores, 1/√D
    EMBEDDING,
    EMBEDDING_KIND,  # KIND, or a kind of `blocks`
    FINAL_NORM,
    HEAD,
    HEAD_KIND,
    COS,  # float [positions, D/2]
    SIN,
    SLOTS,  # per KV head, a multiple of 32
    SHIFT,  # full cache: slot of position p is p - shift
    RING,  # budgeted cache: entries of the ring; 0 for a full one
    WINDOW,
    SINKS,
    PREFIX,  # sinks and chosen entries, slots 0 .. PREFIX - 1
    RING_AT,  # first slot of the ring: PREFIX rounded up to 32
    LAST_RANK,  # rank of a query whose view is full; -1 under absolute positions
    TILED,  # BY_TILES bits of what the processor's tiles multiply
) = range(MODEL_FIELDS)

# One layer. Norms and biases are floats; a bias or qk norm that is not there has address 0.
LAYER_FIELDS = 17
(
    ATTENTION_NORM,
    QKV,
    QKV_KIND,
    QKV_BIAS,
    QK_NORM,
    OUT,
    OUT_KIND,
    OUT_BIAS,
    MLP_NORM,
    GATE_UP,
    GATE_UP_KIND,
    GATE_UP_BIAS,
    DOWN,
    DOWN_KIND,
    DOWN_BIAS,
    KEYS,  # [Hkv][SLOTS / 16][D][16], bf16 in pairs along D: [Hkv][SLOTS / 16][D / 2][16][2]
    VALUES,  # [Hkv][SLOTS][D], bf16 in pairs along the slots: [Hkv][SLOTS / 2][D][2]
) = range(LAYER_FIELDS)

# One call: what to read, what to give back, and scratch.
CALL_FIELDS = 31
(
    ROWS,  # tokens of the first forward
    START,  # position of the first
    TOKENS,  # int64 [ROWS], then space for what is drafted
    LOGIT_ROWS,  # the last so many rows get logits
    LOGITS,  # float [LOGIT_ROWS, stride VOCAB]
    DRAFT,  # tokens to draft; 0 is a plain forward
    KNOWN,  # only tokens below this are drafted
    TEMPERATURE,  # float; 0 is greedy
    TOP_K,
    TOP_P,  # float
    MIN_P,  # float
    SEED,
    Q_ROWS,  # float [DRAFT, stride]: what each token was drawn from
    Q_STRIDE,  # bytes
    THREADS,
    ARRIVED,  # address of the count of threads at the barrier
    CLAIMS,  # address of three counters of tasks taken
    X,  # float [ROWS, HIDDEN]
    QUERIES,  # float [Hkv, ROWS · group, D]
    RANK_QUERIES,  # the same rotated at ranks
    PARTS,  # float [Hkv, chunks, ROWS · group, 2 + D]: maximum, sum, output
    GATED,  # float [ROWS, INNER], packed
    OWN,  # scratch of thread t starts at OWN + t · OWN_BYTES
    OWN_BYTES,
    NARROW,  # offset in it of rows [ROWS, max(HIDDEN, H · D)], packed
    TILE,  # offset of rows [ROWS, TILE_COLUMNS]
    UNSEEN,  # offset of int64 [ROWS, UNSEEN_RANGES, 2]
    SCORES,  # offset of float [16, BLOCK]
    SOFT,  # offset of bf16 [16, 2, BLOCK]: the weights of attention, for tiles high and low parts
    CORNER,  # offset of float [16, max(48, D)]: what tiles leave before it goes where it belongs
    TILE_CONFIG,  # address of `amx.tile_configs`
) = range(CALL_FIELDS)

QKV_TILES, OUT_TILES, GATE_UP_TILES, DOWN_TILES, HEAD_TILES, ATTENTION_TILES = BY_TILES = 1, 2, 4, 8, 16, 32

X_GROUP = 32  # numbers of a packed row that are packed together
UNSEEN_RANGES = 4  # ranges of slots that a row may not see
TILE_COLUMNS = 64  # weight rows of a task
TASK_SLOTS = 512  # slots of an attention task
BLOCK = 128  # slots whose scores are in cache at once
MAX_CALL_ROWS = 32  # tokens of one forward; more are read in several


@njit(inline="always")
def field(table, index):
    return get_i64(table + 8 * index)


@njit(inline="always")
def number(table, index):
    return get_f32(table + 8 * index)
