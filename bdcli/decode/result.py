"""The figures of one decode run, by the names of the store's columns, which are those of the JSON contract."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import psutil

from bdcli.base.devices import peak_memory
from bdcli.results.metrics import mark_loops, measure

if TYPE_CHECKING:
    from bdcli.decode.session import Generation, Session
    from bdcli.results.schema import Figures


@dataclass(frozen=True)
class DecodeResult:
    """One text, the settings it was made with, and its figures; a rate is None where its denominator is 0.

    `settings` and `figures` are columns of the store (`bdcli.results.schema`); the other fields have no column of a
    run. rounds: as in `bdcli.results.metrics.RoundFigures.row`.
    """

    status: str
    settings: dict[str, object]
    figures: Figures
    tokens: list[int]
    text: str
    rounds: list[list[int | None]]
    attention_detail: str
    weight_bytes: int
    resident_bytes: int
    logit_error: float | None

    def columns(self) -> dict[str, object]:
        """Columns of the run's row."""
        return self.settings | self.figures.model_dump()

    def as_dict(self) -> dict[str, object]:
        """The fields of `bdcli decode --json`, without run_id."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("settings", "figures")}
        return own | self.columns()


def decode_result(session: Session, generation: Generation) -> DecodeResult:
    """Figures of a generation that has ended."""
    from bdcli.results.schema import Figures

    pair, drafter, baseline = session.pair, generation.speculator.drafter, generation.baseline
    measured = measure(generation.prompt, generation.tokens, generation.rounds)
    ar = baseline.tokens_per_second
    figures = Figures(
        context=len(generation.prompt),
        finish_reason=generation.finish_reason,
        ttft_s=generation.ttft_s,
        ar_tokens_per_second=ar,
        speedup=measured.tokens_per_second / ar if ar and measured.tokens_per_second else None,
        max_drafter_entries=drafter.peak_entries,
        drafter_kv_bytes=drafter.kv_bytes,
        target_kv_bytes=generation.speculator.target.cache.kv_bytes,
        peak_memory_bytes=peak_memory(pair.target.device),
        output_equal=baseline.output_equal,
        ties=baseline.ties,
        **asdict(measured),
    )
    return DecodeResult(
        status=generation.status,
        settings=_settings(session),
        figures=figures,
        tokens=generation.tokens,
        text="".join(generation.pieces),
        rounds=[r.row() for r in mark_loops(generation.prompt, generation.tokens, generation.rounds)],
        attention_detail=pair.backend.detail,
        weight_bytes=pair.target.weight_bytes + pair.drafter.weight_bytes,
        resident_bytes=psutil.Process().memory_info().rss,
        logit_error=baseline.logit_error if baseline.steps and session.sampling.greedy else None,
    )


def _settings(session: Session) -> dict[str, object]:
    """What the run was resolved to, by column."""
    pair, o, selection = session.pair, session.options, session.selection
    return {
        "target": pair.names[0],
        "drafter": pair.names[1],
        "device": str(pair.target.device),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "attention": pair.backend.name,
        "budget": selection.budget or "full",
        "gamma": o.gamma or "auto",
        "select": selection.label,
        "positions": selection.positions,
        "temperature": o.temperature,
        "top_k": o.top_k,
        "top_p": o.top_p,
        "seed": o.seed,
    }
