"""What decoding will hold, in bytes, from configurations alone: said before it is allocated, tested against it."""

from __future__ import annotations

from dataclasses import dataclass

from bdcli.base.errors import UserError
from bdcli.cache.selection import CacheSize, Selection
from bdcli.cache.view import View
from bdcli.model.config import ModelConfig
from bdcli.model.llama import PREFILL_BLOCK
from bdcli.model.sizes import gigabytes, kv_count, weight_count


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


def decode_plan(
    target: ModelConfig, drafter: ModelConfig | None, number_bytes: int, size: CacheSize, selection: Selection
) -> DecodePlan:
    """Plan of decoding after a prompt in caches of `size`, with what `selection` keeps of the drafter's entries.

    `number_bytes`: bytes of a number in weights and caches. The longest draft is `selection.gamma_max`.
    """
    models = [c for c in (target, drafter) if c is not None]
    reading = [number_bytes * _reading_all(target, size.prompt)]
    drafter_kv, masks = 0, 1
    if drafter is not None:
        drafter_kv = number_bytes * kv_count(drafter, selection.entries(size))
        masks += selection.reads_whole_prompt
        if selection.reads_whole_prompt:
            copied = selection.copied_layers * kv_count(drafter, size.prompt) // drafter.layers
            reading.append(number_bytes * (_reading_all(drafter, size.prompt) + copied))
        else:
            reading.append(_reading_view(drafter, selection.view(size.prompt), size.prompt, number_bytes))
    positions = sum(2 * size.capacity * c.head_dim for c in models)
    return DecodePlan(
        weights=number_bytes * sum(map(weight_count, models)),
        target_kv=number_bytes * kv_count(target, size.capacity),
        drafter_kv=drafter_kv,
        tables=number_bytes * (positions + masks * PREFILL_BLOCK**2) + 8 * size.capacity,
        prefill=max(reading),
        round=_round(target, drafter, number_bytes, selection.gamma_max),
    )


def _block(c: ModelConfig, rows: int) -> int:
    """Numbers alive in a layer's products over `rows` rows: the larger of attention's side and the MLP's."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return rows * (c.hidden_size + max(3 * (q + kv) + kv, 4 * c.intermediate_size + 2 * c.hidden_size))


def _reading_all(c: ModelConfig, tokens: int) -> int:
    """Numbers alive while a prompt is read with full attention: residual stream, a layer's queries and outputs."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    waiting = (q + kv) + 3 * q if c.layers > 1 else 0  # rotated blocks, joined, attended, copied
    return tokens * (c.hidden_size + waiting) + _block(c, min(tokens, PREFILL_BLOCK))


def _reading_view(c: ModelConfig, view: View, tokens: int, size: int) -> int:
    """Bytes for a budgeted drafter; with chosen chunks one layer's keys of the whole prompt are there as well."""
    rows, kv = min(tokens, PREFILL_BLOCK), c.kv_heads * c.head_dim
    held = (3 if view.rebased else 2) * tokens * kv if view.chosen else 0
    read = (
        tokens if view.chosen else min(tokens, view.reach(c.layers - 1) + 2 * rows)
    )  # in whole blocks, and the sinks'
    seen = min(tokens, view.sinks + view.window + rows) if view.rebased or not view.chosen else tokens
    # scores and their softmax, 8 bytes together in any dtype, a mask, and the keys and values that are seen
    attention = rows * seen * (8 * c.heads + size + 3) + size * 3 * seen * kv if c.layers > 1 else 0
    return size * (read * c.hidden_size + held + _block(c, rows)) + attention


def _round(target: ModelConfig, drafter: ModelConfig | None, size: int, gamma: int) -> int:
    """Bytes: logits and probabilities in fp32 with what sorting them needs, a block of rows, splits of attention."""
    rows = gamma + 1
    drawn = 0 if drafter is None else gamma
    vocab = 4 * target.vocab_size * (8 * rows + 2 * drawn)
    splits = 4 * 64 * rows * target.heads * (target.head_dim + 1)
    return vocab + splits + size * _block(target, rows)
