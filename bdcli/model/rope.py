"""Rotary position embeddings (Su et al. 2021) with the context extensions that Llama-family models use.

Frequencies are fixed once per run, so every cache holds one pair of tables and a rotation is a row look-up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdcli.model.config import RopeConfig


def frequencies(rope: RopeConfig, total_length: int) -> tuple[Tensor, float]:
    """Inverse frequencies [D/2] in fp32 and the factor on cos and sin.

    `total_length` = prompt + new tokens; only dynamic NTK and longrope read it. Sources: linear = position
    interpolation (Chen et al. 2023); dynamic = NTK-aware base change, b' = b (s L/L0 - (s-1))^(D/(D-2)); llama3 =
    Llama 3.1 wavelength bands; yarn = Peng et al. 2023, eq. 23 with the correction range taken from the *original*
    length; longrope = Ding et al. 2024, a divisor for each frequency, one set for short and one for long texts.
    """
    dim = rope.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    theta = rope.theta
    if rope.kind == "dynamic":
        length = max(total_length, rope.max_position)
        theta *= (rope.factor * length / rope.max_position - (rope.factor - 1)) ** (dim / (dim - 2))
    inverse = 1.0 / theta**exponent
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse)
    if rope.kind == "longrope":
        divisors = rope.long_factors if total_length > rope.original_max_position else rope.short_factors
        return inverse / torch.tensor(divisors, dtype=torch.float32), rope.attention_factor
    return inverse, 1.0


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by `factor`, interpolate between the two bands."""
    turns = rope.original_max_position * inverse / (2 * math.pi)  # rotations over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / rope.factor)


def _yarn(rope: RopeConfig, inverse: Tensor) -> tuple[Tensor, float]:
    dim, base = rope.head_dim, rope.theta

    def dimension_with(rotations: float) -> float:
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = inverse / rope.factor * ramp + inverse * (1 - ramp)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return blended, scale


class RopeTable:
    """cos and sign-folded sin for positions 0..length-1, each [length, 1, D] in the model's dtype.

    Llama pairs dimension i with i + D/2, so rotate(x) = x·cos + roll(x, D/2)·sin with the first half of sin negated.
    """

    def __init__(self, rope: RopeConfig, length: int, total_length: int, dtype: torch.dtype, device):
        inverse, scale = frequencies(rope, total_length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat((cos, cos), -1)[:, None].to(device, dtype)
        self.sin = torch.cat((-sin, sin), -1)[:, None].to(device, dtype)
        self.half = rope.head_dim // 2

    def rows(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]

    def rotate(self, x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H, D] rotated to the positions of `rows` ([T, 1, D] each)."""
        cos, sin = rows
        return torch.addcmul(x * cos, x.roll(self.half, -1), sin)
