"""What decoding will hold, in bytes, from configurations alone: said before it is allocated, tested against it."""

from __future__ import annotations

from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.cache.view import CHUNK_KEYS, View
from bdcli.model.config import ModelConfig
from bdcli.model.llama import PREFILL_BLOCK

RUNTIME = 512 << 20  # bytes of a GPU that libraries, compiled kernels and graphs take beside tensors


@dataclass(frozen=True)
class DecodePlan:
    """Bytes of one run. What lives all the time, and the larger of what reading the prompt and a round add to it."""

    weights: int
    target_kv: int
    drafter_kv: int
    tables: int  # RoPE, a full cache's mask of one block, the text
    prefill: int
    round: int

    @property
    def peak(self) -> int:
        return self.weights + self.target_kv + self.drafter_kv + self.tables + max(self.prefill, self.round)

    def line(self) -> str:
        parts = {
            "weights": self.weights,
            "target KV": self.target_kv,
            "drafter KV": self.drafter_kv,
            "reading the prompt": self.prefill,
            "rounds": self.round,
        }
        return (
            f"memory: {', '.join(f'{name} {gigabytes(b)}' for name, b in parts.items())}; peak {gigabytes(self.peak)}"
        )

    def check(self, free: int) -> None:
        """Raises UserError where `free` bytes, those of the weights among them, are too few."""
        if self.peak > free:
            raise UserError(
                f"{self.line()}, but {gigabytes(free)} are free",
                "Shorten the prompt or --max-new-tokens, or free memory on the device",
            )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def weight_count(c: ModelConfig) -> int:
    """Numbers in a model's weights."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = (q + 2 * kv) * c.hidden_size + c.hidden_size * q + 3 * c.hidden_size * c.intermediate_size
    biases = c.qkv_bias * (q + 2 * kv) + c.out_bias * c.hidden_size
    biases += c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
    layer = matrices + biases + 2 * c.hidden_size + c.qk_norm * (q + kv)
    return c.layers * layer + (1 if c.tied_head else 2) * c.vocab_size * c.hidden_size + c.hidden_size


def kv_count(c: ModelConfig, entries: int) -> int:
    """Numbers in the keys and values of `entries` per layer and KV head."""
    return 2 * c.layers * c.kv_heads * c.head_dim * entries


def decode_plan(
    target: ModelConfig,
    drafter: ModelConfig | None,
    size: int,
    prompt: int,
    capacity: int,
    gamma: int,
    view: View | None = None,
    official: int | None = None,
) -> DecodePlan:
    """Plan of decoding after `prompt` tokens in caches for `capacity` positions, drafting at most `gamma`.

    `size`: bytes of a number. The drafter's cache is a `view`, the paper's with a budget of `official`, or full.
    """
    models = [c for c in (target, drafter) if c is not None]
    entries, reading, full = capacity, [size * _reading_all(target, prompt)], len(models) - (view is not None)
    if view is not None:
        entries = view.budget
        reading.append(_reading_view(drafter, view, prompt, size))
    elif drafter is not None:
        reading.append(size * _reading_all(drafter, prompt))
        if official is not None:
            kept = min(official, prompt) // CHUNK_KEYS * CHUNK_KEYS
            entries = kept + capacity - prompt
            reading[-1] += size * kv_count(drafter, prompt) // drafter.layers  # one layer's keys of the whole prompt
    return DecodePlan(
        weights=size * sum(map(weight_count, models)),
        target_kv=size * kv_count(target, capacity),
        drafter_kv=size * kv_count(drafter, entries) if drafter is not None else 0,
        tables=size * (sum(2 * capacity * c.head_dim for c in models) + full * PREFILL_BLOCK**2) + 8 * capacity,
        prefill=max(reading),
        round=_round(target, drafter, size, gamma),
    )


def _block(c: ModelConfig, rows: int) -> int:
    """Numbers alive in a layer's products over `rows` rows: the larger of attention's side and the MLP's."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return rows * (c.hidden_size + max(3 * (q + kv) + kv, 4 * c.intermediate_size + 2 * c.hidden_size))


def _reading_all(c: ModelConfig, tokens: int) -> int:
    """Numbers alive while a prompt is read with full attention: residual stream, a layer's queries and outputs."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    waiting = (q + kv) + 3 * q if c.layers > 1 else 0  # rotated blocks, then joined, attended, and laid out anew
    return tokens * (c.hidden_size + waiting) + _block(c, min(tokens, PREFILL_BLOCK))


def _reading_view(c: ModelConfig, view: View, tokens: int, size: int) -> int:
    """Bytes for a budgeted drafter; with chosen chunks one layer's keys of the whole prompt are there as well."""
    rows, kv = min(tokens, PREFILL_BLOCK), c.kv_heads * c.head_dim
    held = (3 if view.rebased else 2) * tokens * kv if view.chosen else 0
    seen = min(tokens, view.sinks + view.window + rows) if view.rebased or not view.chosen else tokens
    # scores and their softmax, 8 bytes together in any dtype, a mask, and the keys and values that are seen
    attention = rows * seen * (8 * c.heads + size + 3) + size * 3 * seen * kv if c.layers > 1 else 0
    return size * (tokens * c.hidden_size + held + _block(c, rows)) + attention


def _round(target: ModelConfig, drafter: ModelConfig | None, size: int, gamma: int) -> int:
    """Bytes: logits and probabilities in fp32 with what sorting them needs, a block of rows, splits of attention."""
    rows = gamma + 1
    drawn = 0 if drafter is None else gamma
    vocab = 4 * target.vocab_size * (8 * rows + 2 * drawn)
    splits = 4 * 64 * rows * target.heads * (target.head_dim + 1)
    return vocab + splits + size * _block(target, rows)
