"""KV caches in the layout that compiled steps read: panels of 16 slots for keys, rows of values, bf16 in pairs.

They prefill exactly as the caches of `bdcli.cache.full` do, in torch, and are then moved into panels: a full cache
layer by layer, so that no second copy of it ever lives. After prefill only compiled code reads and writes entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdcli.backends.cpu import tables
from bdcli.backends.cpu.machine.huge_pages import huge_zeros
from bdcli.backends.cpu.prompt.attention import causal_attention
from bdcli.backends.cpu.prompt.rows import CompiledRows
from bdcli.cache.budget import BudgetCache
from bdcli.cache.full import FullCache
from bdcli.cache.official import OfficialCache
from bdcli.cache.selection import CacheKinds
from bdcli.cache.view import View
from bdcli.model.llama import Model

PANEL = 16  # slots of a panel of keys
SLOT_MULTIPLE = 32  # slots are allocated in whole tiles of values


def round_up(count: int, to: int = PANEL) -> int:
    return -(-count // to) * to


def key_panels(keys: Tensor) -> Tensor:
    """[..., S, D] as [..., S / 16, D / 2, 16, 2] for bf16, [..., S / 16, D, 16, 1] for fp32; S a multiple of 16."""
    pair = 2 if keys.dtype is torch.bfloat16 else 1
    *lead, slots, dim = keys.shape
    return keys.view(*lead, slots // PANEL, PANEL, dim // pair, pair).transpose(-2, -3)


def value_panels(values: Tensor) -> Tensor:
    """[..., S, D] as [..., S / 2, D, 2] for bf16, [..., S, D, 1] for fp32."""
    pair = 2 if values.dtype is torch.bfloat16 else 1
    *lead, slots, dim = values.shape
    return values.view(*lead, slots // pair, pair, dim).transpose(-1, -2)


class _Panels:
    """Storage in panels for `slots` entries (a multiple of SLOT_MULTIPLE) per layer and KV head, and its geometry.

    `geometry` maps fields of `tables` to what compiled code needs to know.
    """

    row_operations = CompiledRows
    geometry: dict[int, int]

    def _allocate_panels(self, slots: int) -> None:
        self._slots = slots
        pair = 2 if self.dtype is torch.bfloat16 else 1
        lead = self.layers, self.kv_heads
        self.panel_keys = huge_zeros((*lead, slots // PANEL, self.head_dim // pair, PANEL, pair), self.dtype)
        self.panel_values = huge_zeros((*lead, slots // pair, self.head_dim, pair), self.dtype)
        none = (tables.SHIFT, tables.RING, tables.WINDOW, tables.SINKS, tables.PREFIX, tables.RING_AT)
        self.geometry = dict.fromkeys(none, 0) | {tables.SLOTS: slots, tables.LAST_RANK: -1}

    @property
    def slots(self) -> int:
        return self._slots

    def _fill(self, layer: int | slice, first: int, keys: Tensor, values: Tensor) -> None:
        """Entries [..., Hkv, n, D] into slots first..; n is rounded up to a panel with zeros."""
        spare = round_up(keys.shape[-2]) - keys.shape[-2]
        keys = key_panels(torch.nn.functional.pad(keys, (0, 0, 0, spare)))
        values = value_panels(torch.nn.functional.pad(values, (0, 0, 0, spare)))
        pair = 2 if self.dtype is torch.bfloat16 else 1
        self.panel_keys[layer, :, first // PANEL : first // PANEL + keys.shape[-4]] = keys
        self.panel_values[layer, :, first // pair : first // pair + values.shape[-3]] = values

    def _put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Entries [layers, Hkv, n, D] into n slots."""
        pair = self.panel_keys.shape[-1]
        keys, values = keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)
        keys = keys.reshape(*keys.shape[:3], -1, pair)
        self.panel_keys[:, :, slots // PANEL, :, slots % PANEL] = keys
        self.panel_values[:, :, slots // pair, :, slots % pair] = values

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        return self.panel_keys, self.panel_values


class PanelFullCache(_Panels, FullCache):
    """The target's cache: during prefill one layer's rows live beside the panels."""

    causal_attention = staticmethod(causal_attention)

    def _allocate(self, slots: int) -> None:
        self._allocate_panels(round_up(slots, SLOT_MULTIPLE))

    def begin_prefill(self, tokens: int) -> None:
        super().begin_prefill(tokens)
        self.keys = self._zeros(1, self.kv_heads, tokens, self.head_dim).expand(self.layers, -1, -1, -1)
        self.values = torch.zeros_like(self.keys[:1]).expand(self.layers, -1, -1, -1)

    def end_layer(self, layer: int) -> None:
        self._fill(layer, 0, self.keys[layer], self.values[layer])

    def end_prefill(self) -> None:
        super().end_prefill()
        del self.keys, self.values

    def entries(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.panel_keys.shape[-1]
        keys = self.panel_keys[:, :, positions // PANEL, :, positions % PANEL].flatten(-2)
        values = self.panel_values[:, :, positions // pair, :, positions % pair]
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)

    def save(self, start: int) -> tuple[int, int, Tensor, Tensor]:
        """Copy of the panels from position `start` on; `restore` puts them back."""
        first, stop = start // PANEL, round_up(self.length) // PANEL
        step = self.panel_values.shape[2] * PANEL // self.slots
        keys, values = self.panel_keys[:, :, first:stop], self.panel_values[:, :, first * step : stop * step]
        return self.length, first, keys.clone(), values.clone()

    def restore(self, saved: tuple[int, int, Tensor, Tensor]) -> None:
        self.length, first, keys, values = saved
        step = self.panel_values.shape[2] * PANEL // self.slots
        self.panel_keys[:, :, first : first + keys.shape[2]] = keys
        self.panel_values[:, :, first * step : first * step + values.shape[2]] = values


class PanelOfficialCache(_Panels, OfficialCache):
    """The paper's drafter cache, moved into panels when its chunks are chosen."""

    causal_attention = staticmethod(causal_attention)

    def begin_prefill(self, tokens: int) -> None:
        super().begin_prefill(tokens)
        self._slots = tokens  # of the one layer that is read

    def end_prefill(self) -> None:
        super().end_prefill()
        self._allocate_panels(round_up(self.keys.shape[2], SLOT_MULTIPLE))
        self._fill(slice(None), 0, self.keys, self.values)
        self.geometry[tables.SHIFT] = self.shift
        del self.keys, self.values


class PanelBudgetCache(_Panels, BudgetCache):
    """The drafter's budgeted cache: prefix slots rounded up, then the ring. Padding is never seen."""

    def __init__(self, model: Model, capacity: int, view: View, total_length: int | None = None):
        super().__init__(model, capacity, view, total_length)
        self._ring_at = round_up(view.prefix, SLOT_MULTIPLE)
        self._allocate_panels(self._ring_at + round_up(view.ring, SLOT_MULTIPLE))
        self.geometry |= {
            tables.RING: view.ring,
            tables.WINDOW: view.window,
            tables.SINKS: view.sinks,
            tables.PREFIX: view.prefix,
            tables.RING_AT: self._ring_at,
            tables.LAST_RANK: view.last_rank if view.rebased else -1,
        }

    @property
    def ring_at(self) -> int:
        return self._ring_at

    def end_prefill(self) -> None:
        super().end_prefill()
        prefix, keys = self.view.prefix, self.keys.transpose(2, 3)
        everywhere = slice(None)
        self._fill(everywhere, 0, keys[:, :, :prefix], self.values[:, :, :prefix])
        self._fill(everywhere, self._ring_at, keys[:, :, prefix:], self.values[:, :, prefix:])
        del self.keys, self.values


PANEL_CACHES = CacheKinds(PanelFullCache, PanelOfficialCache, PanelBudgetCache)
