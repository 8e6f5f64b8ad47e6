"""A session: models loaded once and settings resolved once, for any number of texts.

    Session.open(options)  ->  session.prompt_ids(text)  ->  session.decode(ids, progress)  ->  DecodeResult
    Session.find(options)  ->  session.prompt_ids(text)  ->  session.check_memory(len(ids))  ->  session.load()  ->  ...

Callers show what `progress` is handed and store the result; nothing here prints or exits.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from bdcli.base.devices import dtype_name, peak_memory, resident_memory
from bdcli.base.errors import OutputError, UserError
from bdcli.base.interrupt import deferred_interrupt
from bdcli.base.progress import SILENT, Progress
from bdcli.cache.selection import CacheSize, Selection, parse_selection
from bdcli.config.decode import OWN, DecodeOptions
from bdcli.data.prompts import encode, fit, shorten, special_tokens_note
from bdcli.decode.memory import DecodePlan, check_plan, decode_plan, runtime_bytes
from bdcli.decode.pair import FoundPair, Pair, find_pair, load_pair
from bdcli.decode.positions import positions_note
from bdcli.decode.result import DecodeResult
from bdcli.model.text import StopText, TextStream
from bdcli.results.metrics import RoundFigures, mark_loops, measure
from bdcli.speculation.baseline import Baseline, warm_up
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator


@dataclass(frozen=True)
class Session:
    """Models and the options of a run. `find` leaves the weights to `load`, so that memory can be checked first."""

    pair: Pair | FoundPair
    options: DecodeOptions

    @classmethod
    def open(cls, options: DecodeOptions, progress: Progress = SILENT) -> Session:
        """Load the models that `options` name. Raises UserError on every fault of a folder or an option."""
        return cls(load_pair(options, progress), options)

    @classmethod
    def find(cls, options: DecodeOptions) -> Session:
        """A session whose models are found and checked but not loaded; prompts can be encoded and memory planned.

        What another library is to load is loaded now.
        """
        return cls.open(options) if options.engine == "transformers" else cls(find_pair(options), options)

    def load(self, progress: Progress = SILENT) -> Session:
        """This session with its models loaded."""
        return self if isinstance(self.pair, Pair) else replace(self, pair=self.pair.load(progress))

    @cached_property
    def selection(self) -> Selection:
        """What the drafter keeps."""
        o = self.options
        return parse_selection(o.budget, o.select, o.positions, self.gamma)

    @property
    def gamma(self) -> int | None:
        """The draft length asked for, at most what --max-new-tokens leaves to draft; None is auto."""
        o = self.options
        return None if o.gamma is None else min(o.gamma, max(1, o.max_new_tokens - 1))

    @cached_property
    def sampling(self) -> Sampling:
        o, vocab = self.options, self.pair.configs[0].vocab_size
        return Sampling(o.temperature, min(o.top_k, vocab), o.top_p, o.min_p, o.repetition_penalty)

    def prompt_ids(self, text: str, progress: Progress = SILENT) -> list[int]:
        """Ids of the prompt, fitted into what the target can hold.

        Special tokens that it spells are a note. Raises UserError where it is empty or too long, or the budget too
        small for it.
        """
        o, target, tokenizer = self.options, self.pair.configs[0], self.pair.tokenizer
        text = shorten(tokenizer, text, target.context_limit, o.max_new_tokens, o.trim)
        line = special_tokens_note(tokenizer, text) if o.special_tokens == "parse" else None
        if line is not None:
            progress.note(f"{line}; --special-tokens text reads them as text")
        ids = encode(tokenizer, text, o.chat, o.special_tokens)
        if not ids:
            raise UserError("the prompt has no tokens", "Write one with: bdcli prompt --ctx 4k --out prompt.txt")
        limit = target.context_limit
        name = f"sliding window of {limit}, beyond which it is not decoded" if limit == target.sliding_window else ""
        ids = fit(ids, limit, o.max_new_tokens, o.trim, name)
        self.selection.view(len(ids) - 1)
        return ids

    def size(self, prompt: int, gamma_max: int) -> CacheSize:
        """Of caches for a prompt of `prompt` tokens, the new ones, and drafts of up to `gamma_max`."""
        total = prompt + self.options.max_new_tokens
        return CacheSize(prompt - 1, total + gamma_max + 2, total)

    def target(self, prompt: int, gamma_max: int) -> Runner:
        return self.pair.backend.target(self.pair.target, self.size(prompt, gamma_max))

    def drafter(self, prompt: int) -> ModelDrafter:
        size = self.size(prompt, self.selection.gamma_max)
        vocab, own = self.pair.target.config.vocab_size, self.pair.names[1] == OWN
        return self.pair.backend.drafter(self.pair.drafter, self.selection, size, vocab, own)

    def speculator(self, prompt: int) -> Speculator:
        """Models with caches for a prompt of `prompt` tokens."""
        target = self.target(prompt, self.selection.gamma_max)
        return Speculator(target, self.drafter(prompt), self.sampling, self.options.seed, self.pair.target.device)

    def memory_plan(self, prompt: int) -> DecodePlan:
        """What decoding after `prompt` tokens will hold."""
        size, device = self.size(prompt, self.selection.gamma_max), self.pair.device
        kind = dtype_name(self.pair.dtype)
        plan = decode_plan(*self.pair.configs, kind, size, self.selection, runtime_bytes(device))
        return replace(plan, weights=self.pair.weight_bytes)

    def check_memory(self, prompt: int, progress: Progress = SILENT) -> None:
        """Compare the plan of decoding after `prompt` tokens with the memory there is. Raises UserError."""
        if isinstance(self.pair, Pair) and not self.pair.backend.plans_memory:
            return
        plan = self.memory_plan(prompt)
        check_plan(plan, self.pair.device, progress, plan.weights if isinstance(self.pair, Pair) else 0)

    def decode(self, prompt: list[int], progress: Progress = SILENT) -> DecodeResult:
        """Generate and measure.

        KeyboardInterrupt, and OutputError where the text is shown, end the run early: what was accepted is kept and
        `status` is interrupted.
        """
        total = len(prompt) + self.options.max_new_tokens
        beyond = positions_note(self.pair.drafter.config, self.selection, total)
        if beyond:
            progress.note(beyond)
        generation = Generation(self, prompt, progress)
        generation.run()
        return generation.result()

    def settings(self) -> dict[str, object]:
        """What the run was resolved to, by column of the store."""
        pair, o, selection = self.pair, self.options, self.selection
        return {
            "target": pair.names[0],
            "drafter": pair.names[1],
            "device": str(pair.target.device),
            "dtype": dtype_name(pair.dtype),
            "weights": pair.target.weights,
            "draft_weights": pair.drafter.weights,
            "attention": pair.backend.name,
            "budget": selection.budget or "full",
            "gamma": self.gamma or "auto",
            "select": selection.label,
            "positions": selection.positions,
            "temperature": o.temperature,
            "top_k": self.sampling.top_k,
            "top_p": o.top_p,
            "min_p": o.min_p,
            "repetition_penalty": o.repetition_penalty,
            "seed": o.seed,
        }


class Generation:
    """One text as it grows: new tokens, shown pieces, figures of its rounds, and the baseline beside it."""

    def __init__(self, session: Session, prompt: list[int], progress: Progress):
        o = session.options
        self.session, self.prompt, self.progress = session, prompt, progress
        self.speculator = session.speculator(len(prompt))
        self.baseline = Baseline(o.baseline, o.check, o.max_new_tokens)
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.rounds: list[RoundFigures] = []
        self.ttft_s: float | None = None
        self.finish_reason: str | None = None
        self.status = "interrupted"
        self._stream, self._stop = TextStream(session.pair.tokenizer), StopText(tuple(o.stop))

    def run(self) -> None:
        """Read the prompt, then rounds until the text ends or the user ends it."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            started = time.perf_counter()
            self.speculator.prefill(self.prompt, self.progress)
            prefill_s = time.perf_counter() - started
            options, selection = self.session.options, self.session.selection
            controller = warm_up(self.speculator, self.session.gamma, selection.gamma_max)
            with deferred_interrupt() as interrupt:
                for done in self.speculator.rounds(options.max_new_tokens, self.session.pair.eos, controller):
                    self.ttft_s = self.ttft_s if self.ttft_s is not None else prefill_s + done.seconds
                    self.tokens += done.tokens
                    self.rounds.append(RoundFigures.of(done))
                    self._show(self._stop.feed(self._stream.feed(done.tokens)))
                    self.baseline.after(self.speculator, done)
                    if self._stop.found or interrupt.requested:
                        break
                self._show(self._stop.feed(self._stream.feed([], end=True), end=True))
        except (KeyboardInterrupt, OutputError):
            return
        if not interrupt.requested:
            self.status = "done"
            self.finish_reason = "stop" if self._stop.found else self.speculator.finish_reason
            self._note_idle()

    def _note_idle(self) -> None:
        """Say so where auto γ found that drafting does not pay."""
        idle = sum(r.tokens for r in self.rounds if r.drafted == 0)
        if self.session.options.gamma is None and 2 * idle > len(self.tokens):
            drafter = self.session.pair.names[1]
            self.progress.note(
                f"{idle} of {len(self.tokens)} tokens were decoded without drafting: after {len(self.prompt)} of "
                f"prompt, a draft of {drafter} costs more than it saves here"
            )

    def _show(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self.progress.text(piece)

    def result(self) -> DecodeResult:
        """Figures of the text, once it has ended."""
        from bdcli.results.schema import Figures

        pair, drafter, baseline = self.session.pair, self.speculator.drafter, self.baseline
        measured = measure(self.prompt, self.tokens, self.rounds)
        ar = baseline.tokens_per_second
        figures = Figures(
            context=len(self.prompt),
            finish_reason=self.finish_reason,
            ttft_s=self.ttft_s,
            ar_tokens_per_second=ar,
            speedup=measured.tokens_per_second / ar if ar and measured.tokens_per_second else None,
            max_drafter_entries=drafter.peak_entries,
            drafter_kv_bytes=drafter.kv_bytes,
            target_kv_bytes=self.speculator.target.cache.kv_bytes,
            peak_memory_bytes=peak_memory(pair.target.device),
            output_equal=baseline.output_equal,
            ties=baseline.ties,
            **asdict(measured),
        )
        return DecodeResult(
            status=self.status,
            settings=self.session.settings(),
            figures=figures,
            tokens=self.tokens,
            text="".join(self.pieces),
            rounds=[r.row() for r in mark_loops(self.prompt, self.tokens, self.rounds)],
            attention_detail=pair.backend.detail,
            weight_bytes=pair.weight_bytes,
            resident_bytes=resident_memory(),
            planned_bytes=self.session.memory_plan(len(self.prompt)).peak if pair.backend.plans_memory else None,
            logit_error=baseline.logit_error if baseline.steps and self.session.sampling.greedy else None,
        )
