"""Any causal language model of `transformers` as the target: its own forward, our cache, our drafter and verification.

`TransformersModel` has the methods of `bdcli.model.llama.Model` that a `Runner` calls. Its cache keeps every key of
every layer, preallocated, so that rollback sets an integer; a layer with a sliding window attends through the mask that
the library makes for it. Models with a state that cannot be rolled back (recurrent, linear or compressed attention) are
refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.errors import UserError
from bdcli.base.progress import Progress
from bdcli.cache.selection import CacheSize, Selection
from bdcli.model.llama import Model
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner

PREFILL_ROWS = 512
MASKED_LAYERS = {"full_attention", "sliding_attention"}  # what a full cache and the library's masks are right for
LAYER_CLASSES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
SWITCHING_ROPE = ("dynamic", "longrope")  # their frequencies change where a text passes the original length
NO_LIMIT = 2**31


@dataclass(frozen=True)
class TargetConfig:
    """The figures of `ModelConfig` that are asked of a target."""

    vocab_size: int
    max_position: int
    layers: int
    kv_heads: int
    head_dim: int
    sliding_window: None = None  # windows are the library's own work

    @property
    def context_limit(self) -> int:
        """Most tokens of a text."""
        return self.max_position


def read_target_config(folder: Path) -> TargetConfig:
    """Figures of a folder's config.json. Raises UserError where it is unknown or its state cannot be rolled back."""
    return _figures(_library_config(folder), folder)


def _library_config(folder: Path):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds, for remote code among others
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot read this model ({reason})", "Update transformers") from None


def _figures(config, folder: Path) -> TargetConfig:
    text = config.get_text_config(decoder=True)
    _check_layers(text, folder)
    heads = getattr(text, "num_attention_heads", None) or 1
    limit = getattr(text, "max_position_embeddings", None) or NO_LIMIT
    for rope in _ropes(text):
        if (rope.get("rope_type") or rope.get("type")) in SWITCHING_ROPE:
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, original or getattr(text, "original_max_position_embeddings", None) or limit)
    return TargetConfig(
        vocab_size=text.vocab_size,
        max_position=limit,
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _ropes(text) -> list[dict]:
    """RoPE settings of a model: one dictionary, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [value for value in found.values() if isinstance(value, dict)] or [found]


def _check_layers(text, folder: Path) -> None:
    """Raise UserError unless every layer keeps plain keys and values."""
    from transformers import DynamicCache

    try:
        classes = {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    except Exception as error:  # configurations of recurrent models lack what a cache needs
        classes = {type(error).__name__}
    odd = (classes - LAYER_CLASSES) | (set(getattr(text, "layer_types", None) or ()) - MASKED_LAYERS)
    if odd:
        kinds = ", ".join(sorted(odd))
        raise UserError(
            f"{folder}: its layers keep more than keys and values ({kinds}), which cannot be rolled back",
            "Use a model with full or sliding attention",
        )


def load_target(folder: Path, dtype: torch.dtype, device: torch.device) -> TransformersModel:
    """The folder's model as the library loads it: safetensors only, no remote code. Raises UserError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = _library_config(folder)
    figures = _figures(config, folder)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot load this model ({reason})", "Check the folder") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}", "Download it again")
    return TransformersModel(figures, model.to(device).eval())


class TransformersModel:
    """A loaded model of the library, as a `Runner` uses one."""

    def __init__(self, config: TargetConfig, library):
        self.config, self.library = config, library
        self._keeps_rows = "logits_to_keep" in inspect.signature(library.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        return self.library.dtype

    @property
    def device(self) -> torch.device:
        return self.library.device

    @property
    def weights(self) -> str:
        """What most weights are stored in."""
        return str(self.dtype)[6:]

    def tensors(self) -> list[Tensor]:
        """Every distinct weight."""
        return list(self.library.parameters())

    @property
    def weight_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def prefill(self, tokens: list[int], cache: EntryCache, on_block: Callable[[int, int], None] | None = None) -> None:
        """Read `tokens` into the empty cache in blocks. `on_block(done, total)` counts them."""
        starts = range(0, len(tokens), PREFILL_ROWS)
        for done, start in enumerate(starts, 1):
            self.forward(tokens[start : start + PREFILL_ROWS], cache, 1)
            if on_block:
                on_block(done, len(starts))

    @torch.inference_mode()
    def forward(self, tokens: list[int], cache: EntryCache, rows: int) -> Tensor:
        """Append `tokens` to the cache; fp32 logits [rows, V] of the last `rows` of them."""
        kept = {"logits_to_keep": rows} if self._keeps_rows else {}
        ids = torch.tensor([tokens], device=self.device)
        out = self.library(input_ids=ids, use_cache=True, **{cache_argument(): cache.library}, **kept)
        return out.logits[0, -rows:].float()

    def forward_together(
        self, tokens: Sequence[list[int]], caches: Sequence[EntryCache], rows: Sequence[int]
    ) -> list[Tensor]:
        """`forward` of several texts, one after the other."""
        return [self.forward(*one) for one in zip(tokens, caches, rows, strict=True)]


@functools.cache
def cache_argument() -> str:
    """What `transformers` calls the KV cache in its calls: `cache` since 5.24, `past_key_values` before."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@functools.cache
def entry_layer() -> type:
    """The class of a layer's cache, made when `transformers` is first needed."""
    from transformers.cache_utils import DynamicLayer

    class EntryLayer(DynamicLayer):
        """Keys and values of all positions in tensors of a fixed size; `held` of them count."""

        def __init__(self, capacity: int):
            super().__init__()
            self.capacity, self.held = capacity, 0
            self.storage: tuple[Tensor, ...] = ()

        def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
            """Store the new entries [1, Hkv, T, D]; all keys and values up to them."""
            if not self.storage:
                self.lazy_initialization(key_states, value_states)
                new = (key_states, value_states)
                self.storage = tuple(t.new_zeros(1, t.shape[1], self.capacity, t.shape[3]) for t in new)
            stop = self.held + key_states.shape[-2]
            if stop > self.capacity:
                raise RuntimeError(f"cache of {self.capacity} entries cannot hold {stop}")
            for stored, new in zip(self.storage, (key_states, value_states)):
                stored[:, :, self.held : stop] = new
            self.held = stop
            return self.storage[0][:, :, :stop], self.storage[1][:, :, :stop]

        def get_seq_length(self) -> int:
            return self.held

    return EntryLayer


class EntryCache:
    """What `FullCache` is to our models: every key and value, rolled back by setting `length`."""

    def __init__(self, model: TransformersModel, capacity: int):
        from transformers import DynamicCache

        self.library = DynamicCache(config=model.library.config)
        self.library.layers = [entry_layer()(capacity) for _ in self.library.layers]

    @property
    def length(self) -> int:
        """Tokens read."""
        return max(layer.held for layer in self.library.layers)

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.library.layers:
            layer.held = min(layer.held, length)

    @property
    def peak_entries(self) -> int:
        return self.length

    @property
    def kv_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.library.layers for t in layer.storage)

    def save(self, start: int) -> tuple[int, list[tuple[Tensor, ...]]]:
        """Copy of the entries from position `start` on; `restore` puts them back."""
        held = self.length
        return start, [tuple(t[:, :, start:held].clone() for t in layer.storage) for layer in self.library.layers]

    @torch.inference_mode()
    def restore(self, saved: tuple[int, list[tuple[Tensor, ...]]]) -> None:
        start, layers = saved
        for layer, copies in zip(self.library.layers, layers, strict=True):
            for stored, copy in zip(layer.storage, copies):
                layer.held = start + copy.shape[2]
                stored[:, :, start : layer.held] = copy


@dataclass(frozen=True)
class TransformersBackend(Backend):
    """The library's model as target; the drafter runs in the backend that these fields come from."""

    plans_memory = False

    def target(self, model: TransformersModel, size: CacheSize) -> Runner:
        return Runner(model, EntryCache(model, size.capacity))

    def drafter(
        self, model: Model, selection: Selection, size: CacheSize, vocab: int, own: bool = False
    ) -> ModelDrafter:
        """Also see the base class. Keys cannot be taken from the library's cache: each reads the prompt."""
        del own
        return super().drafter(model, selection, size, vocab)


def transformers_backend(target: TransformersModel, drafter: Model, progress: Progress) -> Backend:
    """The backend for a target of the library and a drafter of ours."""
    own = pick_backend("auto", [drafter], progress)
    fields = {name: getattr(own, name) for name in ("runner_type", "drafter_type", "caches")}
    detail = f"{type(target.library).__name__}; drafter: {own.name}"
    return TransformersBackend(name="transformers", detail=detail, **fields)
