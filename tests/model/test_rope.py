"""RoPE: frequencies against the published formulas in float64, the rotation against complex numbers."""

import math

import numpy as np
import pytest
import torch

from bdcli.model.config import RopeConfig
from bdcli.model.rope import RopeTable, frequencies

YARN_LLAMA_2_128K = RopeConfig("yarn", 10000.0, 128, 131072, factor=32.0, original_max_position=4096)
LLAMA_3_1 = RopeConfig(
    "llama3",
    500000.0,
    128,
    131072,
    factor=8.0,
    original_max_position=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)


def plain(dim: int, base: float) -> np.ndarray:
    """Su et al. 2021: θ_i = b^(-2i/D)."""
    return base ** (-2.0 * np.arange(dim // 2, dtype=np.float64) / dim)


def dynamic_ntk(dim: int, base: float, factor: float, trained: int, length: int) -> np.ndarray:
    """b' = b · (s·L/L0 - (s - 1))^(D/(D-2)) beyond the trained length L0, b up to it."""
    if length > trained:
        base = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return plain(dim, base)


def meta_llama3(freqs: np.ndarray, factor: float, low: float, high: float, trained: int) -> np.ndarray:
    """`apply_scaling` of Meta's llama-models, frequency by frequency."""
    scaled = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < trained / high:
            scaled.append(freq)
        elif wavelength > trained / low:
            scaled.append(freq / factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(scaled)


def yarn_range(dim: int, base: float, length: int, fast: float, slow: float) -> tuple[int, int]:
    """Ends of the ramp: the pairs that make `fast` and `slow` turns over `length`, rounded outwards."""

    def pair_that_turns(turns: float) -> float:
        return dim / 2 * math.log(length / (2 * math.pi * turns), base)

    return max(math.floor(pair_that_turns(fast)), 0), min(math.ceil(pair_that_turns(slow)), dim - 1)


def yarn(dim: int, base: float, factor: float, length: int, fast: float = 32, slow: float = 1) -> np.ndarray:
    """Peng et al. 2023, NTK-by-parts: (1 - γ)·θ/s + γ·θ, γ falling from 1 to 0 over the correction range."""
    low, high = yarn_range(dim, base, length, fast, slow)
    gamma = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    freqs = plain(dim, base)
    return (1 - gamma) * freqs / factor + gamma * freqs


def computed(rope: RopeConfig, total_length: int = 1) -> np.ndarray:
    inverse, _ = frequencies(rope, total_length)
    assert inverse.dtype is torch.float32
    return inverse.double().numpy()


PUBLISHED = {
    "default": (RopeConfig("default", 500000.0, 64, 4096), 1, plain(64, 500000.0)),
    "default-odd-head": (RopeConfig("default", 10000.0, 20, 4096), 1, plain(20, 10000.0)),
    # Chen et al. 2023: position m becomes m/s
    "linear": (RopeConfig("linear", 10000.0, 128, 8192, factor=4.0), 1, plain(128, 10000.0) / 4),
    "dynamic": (
        RopeConfig("dynamic", 1e4, 128, 4096, factor=2.0),
        9001,
        dynamic_ntk(128, 1e4, 2, 4096, 9001),
    ),
    "dynamic-within": (RopeConfig("dynamic", 1e4, 128, 4096, factor=2.0), 4096, plain(128, 1e4)),
    "llama3": (LLAMA_3_1, 1, meta_llama3(plain(128, 500000.0), 8, 1, 4, 8192)),
    "yarn-llama-2-128k": (YARN_LLAMA_2_128K, 1, yarn(128, 10000.0, 32, 4096)),
    "yarn-betas": (
        RopeConfig("yarn", 1e6, 64, 32768, 4.0, original_max_position=8192, beta_fast=16.0, beta_slow=2.0),
        1,
        yarn(64, 1e6, 4, 8192, 16, 2),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_the_published_ones(name):
    rope, length, expected = PUBLISHED[name]
    np.testing.assert_allclose(computed(rope, length), expected, rtol=1e-6)


def test_only_dynamic_reads_the_total_length():
    for name, (rope, length, _) in PUBLISHED.items():
        same = np.array_equal(computed(rope, length), computed(rope, 5 * length))
        assert same == (rope.kind != "dynamic"), name


def test_llama3_bands():
    """All three bands are there: kept, interpolated and divided by the factor."""
    ratio = computed(LLAMA_3_1) / plain(128, 500000.0)
    wavelength = 2 * math.pi / plain(128, 500000.0)
    kept, divided = wavelength < 8192 / 4, wavelength > 8192
    assert kept.any() and divided.any() and not (kept | divided).all()
    np.testing.assert_allclose(ratio[kept], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[divided], 1 / 8, rtol=1e-6)
    between = ratio[~(kept | divided)]
    assert ((between > 1 / 8) & (between < 1)).all() and (np.diff(between) < 0).all()


def test_yarn_takes_the_correction_range_from_the_original_length():
    low, high = yarn_range(128, 10000.0, 4096, 32, 1)
    assert (low, high) == (20, 46)  # 20.94 and 45.03, rounded outwards
    ratio = computed(YARN_LLAMA_2_128K) / plain(128, 10000.0)
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[high:], 1 / 32, rtol=1e-6)
    assert ((ratio[low + 1 : high] > 1 / 32) & (ratio[low + 1 : high] < 1)).all()
    extended = yarn(128, 10000.0, 32, 131072)
    assert yarn_range(128, 10000.0, 131072, 32, 1) != (low, high)
    assert np.abs(computed(YARN_LLAMA_2_128K) / extended - 1).max() > 0.5  # so it would be seen


@pytest.mark.parametrize(
    "factor, given, expected",
    [(32.0, None, 0.1 * math.log(32) + 1), (1.0, None, 1.0), (0.5, None, 1.0), (32.0, 0.75, 0.75)],
)
def test_yarn_attention_factor(factor, given, expected):
    rope = RopeConfig("yarn", 1e4, 64, 8192, factor, original_max_position=4096, attention_factor=given)
    assert frequencies(rope, 1)[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("yarn")])
def test_other_kinds_do_not_scale_attention(name):
    rope, length, _ = PUBLISHED[name]
    assert frequencies(rope, length)[1] == 1.0


def table(rope: RopeConfig, length: int) -> RopeTable:
    return RopeTable(rope, length, length, torch.float32, torch.device("cpu"))


ROTATIONS = {
    "default": (RopeConfig("default", 10000.0, 20, 512), plain(20, 10000.0), 1.0),
    "yarn": (
        RopeConfig("yarn", 10000.0, 64, 1024, factor=4.0, original_max_position=256),
        yarn(64, 10000.0, 4, 256),
        0.1 * math.log(4) + 1,
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("positions", [slice(250, 257), torch.tensor([3, 0, 255, 3, 96, 1, 41])])
def test_rotate_is_a_complex_rotation_of_pairs(name, positions):
    rope, freqs, scale = ROTATIONS[name]
    half, rows = rope.head_dim // 2, 7
    x = torch.randn(rows, 3, rope.head_dim, generator=torch.Generator().manual_seed(1))
    rope_table = table(rope, 300)
    got = rope_table.rotate(x, rope_table.rows(positions)).double().numpy()
    at = np.arange(300)[positions if isinstance(positions, slice) else positions.numpy()]
    z = x.double().numpy()
    z = (z[..., :half] + 1j * z[..., half:]) * scale * np.exp(1j * at[:, None, None] * freqs)
    np.testing.assert_allclose(got, np.concatenate((z.real, z.imag), -1), atol=1e-4)


@pytest.mark.parametrize("name", ROTATIONS)
def test_dot_products_depend_only_on_distance(name):
    rope, _, scale = ROTATIONS[name]
    q, k = torch.randn(2, 1, 1, rope.head_dim, generator=torch.Generator().manual_seed(2))
    rope_table = table(rope, 300)

    def rotated(x: torch.Tensor, start: int) -> torch.Tensor:
        return rope_table.rotate(x.expand(200, 1, -1), rope_table.rows(slice(start, start + 200)))[:, 0]

    keys = rotated(k, 0)
    per_distance = []
    for distance in (0, 1, 17, 100):
        dots = (rotated(q, distance) * keys).sum(-1)
        assert dots.max() - dots.min() < 1e-3
        per_distance.append(dots.mean())
    assert per_distance[0].item() == pytest.approx(scale**2 * (q * k).sum().item(), abs=1e-3)
    assert torch.stack(per_distance).std() > 0.1  # and on distance they do depend
