"""A target and a drafter, found, checked and loaded once, with the backend that runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.devices import free_memory, pick_device, pick_dtype
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.config.decode import BITS, OWN, DecodeOptions
from bdcli.model.checkpoint import load_model, read_config, text_ends
from bdcli.model.hub import resolve
from bdcli.model.llama import Model
from bdcli.model.quantised import nbytes
from bdcli.model.sizes import gigabytes, weight_count
from bdcli.model.tokenizer import check_vocabulary, load_tokenizer


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


def load_pair(options: DecodeOptions, progress: Progress = SILENT) -> Pair:
    """Find, check and load both models and pick what runs them. Every fault of a folder is a UserError.

    What the user may have to wait for is a note of `progress`.
    """
    if options.engine == "transformers":
        return _library_pair(options, progress)
    target_path = resolve(options.target, "target")
    own = options.drafter == OWN
    drafter_path = target_path if own else resolve(options.drafter, "drafter")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device, options.engine)
    _check_weights(options, device)
    configs = [read_config(path) for path in dict.fromkeys((target_path, drafter_path))]
    tokenizer = load_tokenizer(target_path)
    if not own:
        check_vocabulary(target_path, drafter_path, tokenizer)
    if device.type == "cuda":
        needed = sum(map(weight_count, configs)) * dtype.itemsize
        free = free_memory(device)
        if needed > free:
            raise UserError(
                f"the weights take {gigabytes(needed)}, but {gigabytes(free)} are free on {device}",
                "Use smaller models or free memory on the device",
            )
    target = _load(target_path, dtype, device, options.weights)
    drafter = target if own else _load(drafter_path, dtype, device, options.draft_weights)
    if own and options.engine in ("auto", "compiled") and device.type == "cpu":
        drafter = _lighter(target, options.draft_weights)
    backend = pick_backend(options.engine, [target, drafter], progress)
    if backend.name != "compiled":
        target = target.dense()
        drafter = target if own else drafter.dense()
    names = _name(options.target, target_path), OWN if own else _name(options.drafter, drafter_path)
    eos = _text_ends(options, target_path, tokenizer, progress)
    return Pair(target, drafter, tokenizer, eos, names, backend, target_path)


def _text_ends(options: DecodeOptions, path: Path, tokenizer, progress: Progress) -> frozenset[int]:
    """Tokens that end a text; a note where there are none."""
    eos = text_ends(path, tokenizer, options.chat)
    if not eos:
        token = f" (the tokenizer's is {tokenizer.eos_token!r})" if tokenizer.eos_token is not None else ""
        progress.note(f"{options.target} names no EOS token{token}: texts end at the limit of new tokens")
    return eos


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
    model = load_model(path, dtype, device, BITS.get(weights))
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


def _name(given: str, folder: Path) -> str:
    """How a model is stored: a local folder by its whole path."""
    return str(folder.resolve()) if Path(given).expanduser().is_dir() else given
