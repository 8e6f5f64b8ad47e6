"""Weights of GGUF tensors, against the `gguf` package."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bdcli.model.gguf import blocks
from bdcli.model.gguf.blocks import ENCODINGS

HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
QUANTISED = {encoding.name: kind for kind, encoding in ENCODINGS.items() if encoding.dtype is None}
FRESH = np.random.default_rng()


def random_rows(name: str, rows: int, count: int) -> np.ndarray:
    """Any bytes in `count` blocks a row, with finite scales at the bytes HALVES."""
    size = ENCODINGS[QUANTISED[name]].block_bytes
    stored = FRESH.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for at in HALVES[name]:
        half = FRESH.normal(scale=10 ** FRESH.uniform(-4, 2), size=(rows, count, 1)).astype(np.float16)
        stored[..., at : at + 2] = half.view(np.uint8)
    return stored.reshape(rows, -1)


def test_sizes_are_those_of_ggml():
    assert set(HALVES) == set(QUANTISED)
    for kind, encoding in ENCODINGS.items():
        assert GGMLQuantizationType(kind).name == encoding.name
        assert GGML_QUANT_SIZES[kind] == (encoding.block_weights, encoding.block_bytes)


@pytest.mark.parametrize("rows, count", [(1, 1), (7, 3), (33, 2)])
@pytest.mark.parametrize("name", QUANTISED)
def test_weights_are_those_of_the_gguf_package(name, rows, count, monkeypatch):
    stored = random_rows(name, rows, count)
    want = torch.from_numpy(dequantize(stored, QUANTISED[name]))
    encoding = ENCODINGS[QUANTISED[name]]
    for chunk in (blocks.CHUNK_WEIGHTS, 1000):
        monkeypatch.setattr(blocks, "CHUNK_WEIGHTS", chunk)
        got = encoding.numbers(torch.from_numpy(stored), torch.float32)
        assert torch.equal(got, want) and got.isfinite().all()
    half = encoding.numbers(torch.from_numpy(stored), torch.bfloat16)
    assert torch.equal(half, want.bfloat16())


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_packed_without_loss(name, rows):
    stored = random_rows(name, rows, 3)
    coded = ENCODINGS[QUANTISED[name]].blocks(torch.from_numpy(stored))
    want = torch.from_numpy(dequantize(stored, QUANTISED[name]))
    assert torch.equal(coded.values(), want)
    assert coded.codes.dtype is torch.int8 and coded.block in (16, 32)
    if coded.bits == 4:
        assert coded.codes.min() >= 0 and coded.codes.max() < 16 and coded.offsets is not None
    packed = coded.packed()
    assert packed.shape == want.shape and packed.format.bits == coded.bits
    assert torch.equal(packed.dense(torch.float32), want)
    index = torch.tensor([rows - 1, 0])
    assert torch.equal(packed.take_rows(index, torch.float32), want[index])


def test_most_types_of_eight_bits_have_no_offsets():
    coded = {n: ENCODINGS[k].blocks(torch.from_numpy(random_rows(n, 3, 1))) for n, k in QUANTISED.items()}
    assert {n for n, b in coded.items() if b.offsets is None} == {"Q5_0", "Q8_0", "Q6_K"}
    assert coded["Q8_0"].codes.min() < -100 and {n: b.packed().format.name for n, b in coded.items()} == {
        "Q4_0": "int4", "Q4_1": "int4", "Q5_0": "int8", "Q8_0": "int8", "Q4_K": "int4 with float scales",
        "Q5_1": "int8 with float scales", "Q5_K": "int8 with float scales", "Q6_K": "int8 with float scales",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_numbers_are_read_as_they_are(dtype):
    encoding = next(e for e in ENCODINGS.values() if e.dtype is dtype)
    want = torch.randn(5, 7).to(dtype)
    stored = want.view(torch.uint8)
    assert torch.equal(encoding.numbers(stored, torch.float32), want.float())
    same = encoding.numbers(stored, dtype)
    assert torch.equal(same, want) and same.data_ptr() != stored.data_ptr()  # not the mapped file itself
