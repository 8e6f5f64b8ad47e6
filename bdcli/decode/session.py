"""One decode run: options in, result out. Loads the pair, plans the caches, drives the engine, fills in the figures.

The CLI prints what the callbacks hand it and stores the result; nothing here prints or exits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bdcli.backends.select import Backend, pick_backend
from bdcli.base.devices import pick_device, pick_dtype
from bdcli.base.errors import UserError
from bdcli.base.interrupt import deferred_interrupt
from bdcli.cache.view import View, gamma_limit, plan_view
from bdcli.config.decode import DecodeOptions
from bdcli.data.prompts import encode, fit
from bdcli.decode.memory import RUNTIME, DecodePlan, decode_plan, gigabytes, weight_count
from bdcli.model.checkpoint import (
    check_vocabulary,
    eos_tokens,
    load_model,
    load_tokenizer,
    read_config,
    resolve,
)
from bdcli.model.llama import Model
from bdcli.model.text import StopText, TextStream
from bdcli.results.metrics import RoundFigures, mark_loops, measure
from bdcli.speculation.baseline import Baseline, warm_up
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Runner, Speculator


@dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with the target's tokenizer."""

    target: Model
    drafter: Model
    tokenizer: object
    eos: frozenset[int]
    names: tuple[str, str]
    engine: Backend


@dataclass
class Listener:
    """Callbacks of a run; the defaults do nothing."""

    text: Callable[[str], None] = lambda _text: None
    progress: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = lambda _line: None


def load_pair(options: DecodeOptions, say: Callable[[str], None] = lambda _line: None) -> Pair:
    """Find, check and load both models and pick what runs them. Every fault of a folder is a UserError.

    `say` is told what the user may have to wait for.
    """
    target, drafter = resolve(options.target, "target"), resolve(options.drafter, "drafter")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    tokenizer = load_tokenizer(target)
    check_vocabulary(target, drafter, tokenizer)
    if device.type == "cuda":
        needed, free = sum(weight_count(read_config(f)) for f in (target, drafter)), free_memory(device)
        if needed * dtype.itemsize > free:
            raise UserError(
                f"the weights take {gigabytes(needed * dtype.itemsize)}, but {gigabytes(free)} are free on {device}",
                "Use smaller models or free memory on the device",
            )
    models = [load_model(folder, dtype, device) for folder in (target, drafter)]
    names = _name(options.target, target), _name(options.drafter, drafter)
    return Pair(*models, tokenizer, eos_tokens(target), names, pick_backend(options.engine, models, say))


def _name(given: str, folder: Path) -> str:
    return str(folder.resolve()) if Path(given).expanduser().is_dir() else given


def prompt_ids(pair: Pair, options: DecodeOptions, text: str) -> list[int]:
    """Ids of the prompt, fitted into what both models can hold."""
    ids = encode(pair.tokenizer, text, options.chat)
    if not ids:
        raise UserError("the prompt has no tokens", "Write one with: bdcli prompt --ctx 4k --out prompt.txt")
    ids = fit(ids, pair.target.config.max_position, options.max_new_tokens, options.trim)
    window = pair.target.config.sliding_window
    if window is not None and len(ids) + options.max_new_tokens > window:
        raise UserError(
            f"{len(ids)} prompt + {options.max_new_tokens} new tokens exceed the model's sliding window of {window}",
            "Sliding windows are not decoded: shorten the prompt",
        )
    return ids


def drafter_view(options: DecodeOptions, prompt: int) -> View | None:
    """The drafter's view for a prompt of `prompt` tokens; None for a full or `official` cache.

    Raises UserError when the budget is too small.
    """
    if options.budget is None or options.select == "official":
        return None
    return plan_view(options.budget, options.select, options.positions, options.gamma, prompt - 1)


def make_speculator(pair: Pair, options: DecodeOptions, prompt: int) -> Speculator:
    """Models with caches for a prompt of `prompt` tokens."""
    target = target_runner(pair, options, prompt, gamma_max_of(options))
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    return Speculator(target, drafter_runner(pair, options, prompt), sampling, options.seed, pair.target.device)


def target_runner(pair: Pair, options: DecodeOptions, prompt: int, gamma_max: int) -> Runner:
    """The target with a cache for `prompt` tokens, the new ones, and drafts of up to `gamma_max`."""
    total = prompt + options.max_new_tokens
    return pair.backend.target(pair.target, total + gamma_max + 2, total)


def drafter_runner(pair: Pair, options: DecodeOptions, prompt: int) -> Runner:
    """The drafter with the cache that the options ask for."""
    total = prompt + options.max_new_tokens
    capacity = total + gamma_max_of(options) + 2
    vocab, view = pair.target.config.vocab_size, drafter_view(options, prompt)
    return pair.backend.drafter(pair.drafter, capacity, total, vocab, options.budget, view)


def memory_plan(pair: Pair, options: DecodeOptions, prompt: int) -> DecodePlan:
    """What decoding after `prompt` tokens will hold."""
    gamma = gamma_max_of(options)
    official = options.budget if options.select == "official" else None
    return decode_plan(
        pair.target.config,
        pair.drafter.config,
        pair.target.dtype.itemsize,
        prompt,
        prompt + options.max_new_tokens + gamma + 2,
        gamma,
        drafter_view(options, prompt),
        official,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU, what torch holds without using it among them."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused - RUNTIME


def gamma_max_of(options: DecodeOptions) -> int:
    """Longest draft of a run, which sizes caches and bounds `--gamma auto`."""
    return gamma_limit(options.budget if options.budget is not None else sys.maxsize, options.gamma)


def effective_positions(options: DecodeOptions) -> str:
    """A full cache and the paper's own selection keep true positions."""
    return "absolute" if options.budget is None or options.select == "official" else options.positions


def decode(pair: Pair, options: DecodeOptions, prompt: list[int], listener: Listener) -> dict:
    """Generate and measure; returns the contract's JSON fields, without run_id.

    KeyboardInterrupt ends the run early: what was accepted is kept and `status` says interrupted.
    """
    if pair.target.device.type == "cuda":
        plan = memory_plan(pair, options, len(prompt))
        listener.say(plan.line())
        plan.check(free_memory(pair.target.device) + plan.weights)
    speculator = make_speculator(pair, options, len(prompt))
    baseline = Baseline(options.baseline, options.check, options.max_new_tokens)
    stream, stop = TextStream(pair.tokenizer), StopText(tuple(options.stop))
    rounds: list[RoundFigures] = []
    pieces: list[str] = []
    new: list[int] = []
    finish, status, ttft = None, "done", None

    def show(text: str) -> None:
        if text:
            pieces.append(text)
            listener.text(text)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        started = time.perf_counter()
        speculator.prefill(prompt, listener.progress)
        prefill_s = time.perf_counter() - started
        controller = warm_up(speculator, options.gamma, gamma_max_of(options))
        with deferred_interrupt() as interrupt:
            for step in speculator.rounds(options.max_new_tokens, pair.eos, controller):
                new += step.tokens
                rounds.append(RoundFigures(len(step.tokens), step.drafted, step.accepted, step.seconds))
                ttft = ttft if ttft is not None else prefill_s + step.seconds
                show(stop.feed(stream.feed(step.tokens)))
                baseline.after(speculator, step)
                if stop.found or interrupt.requested:
                    break
            show(stop.feed(stream.feed([], end=True), end=True))
        finish = "stop" if stop.found else speculator.finish_reason
        status = "interrupted" if interrupt.requested else "done"
    except KeyboardInterrupt:
        status = "interrupted"
    m = measure(prompt, new, rounds)
    ar = baseline.tokens_per_second
    return {
        "status": status,
        "target": pair.names[0],
        "drafter": pair.names[1],
        "device": str(pair.target.device),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "attention": pair.backend.name,
        "attention_detail": pair.backend.detail,
        "context": len(prompt),
        "budget": options.budget if options.budget is not None else "full",
        "gamma": options.gamma if options.gamma is not None else "auto",
        "select": options.select if options.budget is not None else "full",
        "positions": effective_positions(options),
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "tokens": new,
        "text": "".join(pieces),
        "finish_reason": finish if status == "done" else None,
        "new_tokens": m.new_tokens,
        "accepted": m.accepted,
        "drafted": m.drafted,
        "acceptance_rate": m.acceptance_rate,
        "acceptance_rate_no_loops": m.acceptance_rate_no_loops,
        "mean_accepted_length": m.mean_accepted_length,
        "ttft_s": ttft,
        "tokens_per_second": m.tokens_per_second,
        "ar_tokens_per_second": ar,
        "speedup": m.tokens_per_second / ar if ar and m.tokens_per_second else None,
        "max_drafter_entries": speculator.drafter.cache.peak_entries,
        "drafter_kv_bytes": speculator.drafter.cache.kv_bytes,
        "target_kv_bytes": speculator.target.cache.kv_bytes,
        "weight_bytes": pair.target.weight_bytes + pair.drafter.weight_bytes,
        "peak_memory_bytes": peak_memory(pair.target.device),
        "resident_bytes": psutil.Process().memory_info().rss,
        "loop_rate": m.loop_rate,
        "output_equal": baseline.output_equal,
        "ties": baseline.ties,
        "logit_error": baseline.logit_error if baseline.steps and options.temperature == 0 else None,
        "rounds": [r.row() for r in mark_loops(prompt, new, rounds)],
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
