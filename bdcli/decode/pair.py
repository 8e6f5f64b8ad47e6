"""A target and a drafter, found, checked and loaded once, with the backend that runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.devices import dtype_name, free_memory, pick_device, pick_dtype
from bdcli.base.errors import UserError
from bdcli.base.files import user_path
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import BITS, OWN, DecodeOptions
from bdcli.model.checkpoint import kept_codes, load_model, read_config, text_ends
from bdcli.model.config import ModelConfig
from bdcli.model.hub import NAMED, resolve
from bdcli.model.llama import Model
from bdcli.model.quantised import nbytes
from bdcli.model.sizes import draft_weight_bytes, gigabytes, weight_bytes
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class FoundPair:
    """A target and drafter that are here and fit together; nothing of their weights is loaded."""

    options: DecodeOptions
    paths: tuple[Path, Path]
    configs: tuple[ModelConfig, ModelConfig]
    tokenizer: object
    names: tuple[str, str]
    device: torch.device
    dtype: torch.dtype

    @property
    def own(self) -> bool:
        """The target is its own drafter."""
        return self.options.drafter == OWN

    @property
    def weight_bytes(self) -> int:
        """Of both models once they are loaded, as `Pair.weight_bytes` counts them."""
        o = self.options
        target, bits = self._weights(0, o.weights)
        if not self.own:
            return target + self._weights(1, o.draft_weights)[0]
        lighter = BITS.get("int4" if o.draft_weights == "auto" else o.draft_weights)
        copied = self._compiled and lighter is not None and (bits is None or bits > lighter)
        return target + (draft_weight_bytes(self.configs[0], f"int{lighter}") if copied else 0)

    @property
    def _compiled(self) -> bool:
        return self.device.type == "cpu" and self.options.engine in ("auto", "compiled")

    def _weights(self, which: int, weights: str) -> tuple[int, int | None]:
        """Bytes of a model stored as `weights` asks, and bits of its codes, None of dense weights."""
        kept = kept_codes(self.paths[which], self.dtype.itemsize) if weights == "auto" and self._compiled else None
        return kept or (weight_bytes(self.configs[which], weights, dtype_name(self.dtype)), BITS.get(weights))

    def load(self, progress: Progress = SILENT) -> Pair:
        """Load both models and pick what runs them. Raises UserError on every fault of a folder.

        What the user may have to wait for is a note of `progress`.
        """
        o, own = self.options, self.own
        target = _load(self.paths[0], self.dtype, self.device, o.weights)
        drafter = target if own else _load(self.paths[1], self.dtype, self.device, o.draft_weights)
        if own and o.engine in ("auto", "compiled") and self.device.type == "cpu":
            drafter = _lighter(target, o.draft_weights)
        backend = pick_backend(o.engine, [target, drafter], progress)
        if backend.name != "compiled":
            target = target.dense()
            drafter = target if own else drafter.dense()
        eos = _text_ends(o, self.paths[0], self.tokenizer, progress)
        return Pair(target, drafter, self.tokenizer, eos, self.names, backend, self.paths[0])

    def check_weights(self) -> None:
        """Raises UserError where the weights alone do not fit into memory."""
        needed, free = self.weight_bytes, free_memory(self.device)
        if needed > free:
            raise UserError(
                f"the weights take {gigabytes(needed)}, but {gigabytes(free)} are free on {self.device}",
                "Use smaller models or free memory on the device",
            )


@dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with the target's tokenizer."""

    target: Model
    drafter: Model
    tokenizer: object
    eos: frozenset[int]
    names: tuple[str, str]
    backend: Backend
    path: Path = Path()  # of the target

    @property
    def weight_bytes(self) -> int:
        """Of both models; what they share counts once."""
        weights = {id(w): w for model in (self.target, self.drafter) for w in model.tensors()}
        return sum(map(nbytes, weights.values()))

    @property
    def configs(self) -> tuple[ModelConfig, ModelConfig]:
        return self.target.config, self.drafter.config

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype


def find_pair(options: DecodeOptions) -> FoundPair:
    """Find and check both models. Every fault that shows without loading them is a UserError."""
    target_path = resolve(options.target, "target")
    own = options.drafter == OWN
    drafter_path = target_path if own else resolve(options.drafter, "drafter")
    device = pick_device(options.device)
    _check_weights(options, device)
    configs = {path: read_config(path) for path in (target_path, drafter_path)}
    tokenizer = load_tokenizer(target_path)
    if not own:
        check_vocabulary(target_path, drafter_path, tokenizer)
    return FoundPair(
        options=options,
        paths=(target_path, drafter_path),
        configs=(configs[target_path], configs[drafter_path]),
        tokenizer=tokenizer,
        names=(_name(options.target, target_path), OWN if own else _name(options.drafter, drafter_path)),
        device=device,
        dtype=pick_dtype(options.dtype, device, options.engine),
    )


def _text_ends(options: DecodeOptions, path: Path, tokenizer, progress: Progress) -> frozenset[int]:
    """Tokens that end a text; a note where there are none."""
    eos = text_ends(path, tokenizer, options.chat)
    if not eos:
        token = f" (the tokenizer's is {tokenizer.eos_token!r})" if tokenizer.eos_token is not None else ""
        progress.note(f"{options.target} names no EOS token{token}: texts end at the limit of new tokens")
    return eos


def load_pair(options: DecodeOptions, progress: Progress = SILENT) -> Pair:
    """Find, check and load both models. Raises UserError as `find_pair` and `FoundPair.load` do."""
    if options.engine == "transformers":
        return _library_pair(options, progress)
    found = find_pair(options)
    found.check_weights()
    return found.load(progress)


def with_drafter(pair: Pair, name: str, weights: str, progress: Progress = SILENT) -> Pair:
    """The same target with the drafter `name`, stored as `weights` asks. Raises UserError as `load_pair`."""
    target = pair.target
    if pair.backend.name == "transformers":
        path = _library_drafter(name, pair.path, pair.tokenizer)
        drafter = load_model(path, target.dtype, target.device)
    elif name == OWN:
        drafter = _lighter(target, weights) if pair.backend.name == "compiled" else target
    else:
        path = resolve(name, "drafter")
        check_vocabulary(pair.path, path, pair.tokenizer)
        drafter = _load(path, target.dtype, target.device, weights)
    backend = pick_backend(pair.backend.name, [target, drafter], progress)
    if backend.name != "compiled":
        drafter = drafter.dense()
    return replace(pair, drafter=drafter, names=(pair.names[0], name))


def _check_weights(options: DecodeOptions, device: torch.device) -> None:
    for flag, weights in (("--weights", options.weights), ("--draft-weights", options.draft_weights)):
        if weights in BITS and (device.type != "cpu" or options.engine not in ("auto", "compiled")):
            raise UserError(f"{flag} {weights} needs the compiled engine of a CPU", f"Leave {flag} out")


def _load(path: Path, dtype: torch.dtype, device: torch.device, weights: str) -> Model:
    """A model with its weights as they are stored, dense, or in fewer bits."""
    model = load_model(path, dtype, device, BITS.get(weights), keep_codes=weights == "auto")
    return model.dense() if weights == "bf16" else model


def _lighter(target: Model, weights: str) -> Model:
    """The target as its own drafter: in int4 unless asked otherwise; itself where that would not be smaller."""
    bits = BITS.get("int4" if weights == "auto" else weights)
    stored = BITS.get(target.weights)
    return target if bits is None or (stored is not None and stored <= bits) else target.draft_weights(bits)


def _library_pair(options: DecodeOptions, progress: Progress) -> Pair:
    """As `load_pair`, with a target of any family in `transformers`; the drafter is of ours."""
    from bdcli.backends.transformers_engine import load_target

    path, device = resolve(options.target, "target"), pick_device(options.device)
    _check_weights(options, device)
    tokenizer = load_tokenizer(path)
    drafter_path = _library_drafter(options.drafter, path, tokenizer)
    target = load_target(path, pick_dtype(options.dtype, device, options.engine), device)
    drafter = load_model(drafter_path, target.dtype, device).dense()
    backend = pick_backend(options.engine, [target, drafter], progress)
    names = _name(options.target, path), OWN if options.drafter == OWN else _name(options.drafter, drafter_path)
    eos = _text_ends(options, path, tokenizer, progress)
    return Pair(target, drafter, tokenizer, eos, names, backend, path)


def _library_drafter(name: str, target_path: Path, tokenizer) -> Path:
    """Of a drafter beside a target of any family; `self` is one where our own models have the target's family."""
    path = target_path if name == OWN else resolve(name, "drafter")
    try:
        read_config(path)
    except UserError as error:
        hint = "Name a drafter of the Llama family with the target's vocabulary: --drafter DIR"
        raise UserError(f"--drafter {name}: {error.problem}", hint) from None
    check_vocabulary(target_path, path, tokenizer)
    return path


def _name(given: str, path: Path) -> str:
    """How a model is stored: a local folder or file by its whole path."""
    return str(path.resolve()) if given not in NAMED and user_path(given).exists() else given
