"""What decoding will hold, in bytes, from configurations alone: said before it is allocated, tested against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bdcli.base.devices import HOST_RUNTIME_BYTES, dtype_name, free_memory, product_dtype, resident_memory
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.cache.selection import CacheSize, Selection
from bdcli.cache.view import View
from bdcli.model.config import ModelConfig
from bdcli.model.llama import PREFILL_BLOCK
from bdcli.model.sizes import NUMBER_BYTES, gigabytes, kv_count, layer_count, weight_bytes

NOTED_BYTES, NOTED_SHARE = 10**9, 0.5  # of main memory: beyond these people want to know what a run takes


@dataclass(frozen=True)
class DecodePlan:
    """Bytes of one run. What lives all the time, and the larger of what reading the prompt and a round add to it."""

    weights: int
    target_kv: int
    drafter_kv: int
    tables: int  # RoPE, a full cache's mask of one block, the text
    prefill: int
    round: int
    runtime: int = 0  # of the process itself, where it shares the memory

    @property
    def peak(self) -> int:
        lasting = self.weights + self.target_kv + self.drafter_kv + self.tables
        return lasting + self.runtime + max(self.prefill, self.round)

    def line(self) -> str:
        parts = {
            "weights": self.weights,
            "target KV": self.target_kv,
            "drafter KV": self.drafter_kv,
            "reading the prompt": self.prefill,
            "rounds": self.round,
        } | ({"Python and libraries": self.runtime} if self.runtime else {})
        return (
            f"memory: {', '.join(f'{name} {gigabytes(b)}' for name, b in parts.items())}; peak {gigabytes(self.peak)}"
        )

    def check(self, free: int) -> None:
        """Raises UserError where `free` bytes, what the plan counts and is there already among them, are too few."""
        if self.peak > free:
            raise UserError(f"{self.line()}, but {gigabytes(free)} are free", self._way_out(free))

    def _way_out(self, free: int) -> str:
        if self.weights + self.runtime > free:
            return "Use smaller models or a --dtype of fewer bytes, or free memory on the device"
        return "Shorten the prompt (--trim middle) or lower --max-new-tokens, or free memory on the device"


def check_peak(line: str, peak: int, device: torch.device, hint: str) -> None:
    """Raises UserError where `peak` bytes of a process that holds no tensors yet do not fit into the memory of
    `device`; `line` says what they are.
    """
    free = free_memory(device) + (0 if device.type == "cuda" else resident_memory())
    if peak > free:
        raise UserError(f"{line}, but {gigabytes(free)} are free", hint)


def check_plan(plan: DecodePlan, device: torch.device, progress: Progress = SILENT, loaded: int = 0) -> None:
    """Raises UserError where a plan does not fit into the memory of `device`, where `loaded` bytes of it are already.

    In main memory what is resident now counts as there. A plan that fits is a note where it is worth one.
    """
    here = loaded if device.type == "cuda" else resident_memory()
    free = free_memory(device) + here
    plan.check(free)
    if device.type == "cuda" or plan.peak - plan.runtime > NOTED_BYTES or plan.peak > NOTED_SHARE * free:
        progress.note(plan.line())


def runtime_bytes(device: torch.device) -> int:
    """What a process takes of the memory its tensors are in; of a GPU's it is never free in the first place."""
    return 0 if device.type == "cuda" else HOST_RUNTIME_BYTES


def decode_plan(
    target: ModelConfig,
    drafter: ModelConfig | None,
    kind: str,
    size: CacheSize,
    selection: Selection,
    runtime: int = 0,
) -> DecodePlan:
    """Plan of decoding after a prompt in caches of `size`, with what `selection` keeps of the drafter's entries.

    `kind`: dtype of weights and caches, by name. The longest draft is `selection.gamma_max`.
    """
    number_bytes = NUMBER_BYTES[kind]
    models = [c for c in (target, drafter) if c is not None]
    read_bytes = max(number_bytes, NUMBER_BYTES[dtype_name(product_dtype("cpu"))]) if runtime else number_bytes
    reading = [read_bytes * _reading_all(target, size.prompt) + _dense_layer(target, number_bytes, read_bytes)]
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
        weights=sum(weight_bytes(c, kind) for c in models),
        target_kv=number_bytes * kv_count(target, size.capacity),
        drafter_kv=drafter_kv,
        tables=number_bytes * (positions + masks * PREFILL_BLOCK**2) + 8 * size.capacity,
        prefill=max(reading),
        round=_round(target, drafter, number_bytes, selection.gamma_max),
        runtime=runtime,
    )


def _dense_layer(c: ModelConfig, stored_bytes: int, read_bytes: int) -> int:
    """A layer's weights made dense in another dtype than they are stored in, which a prompt is read with."""
    return 0 if stored_bytes == read_bytes else read_bytes * layer_count(c) // c.layers


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
