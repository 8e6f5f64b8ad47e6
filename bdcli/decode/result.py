"""The figures of one decode run, by the names of the JSON contract and of the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import psutil

from bdcli.base.devices import peak_memory
from bdcli.results.metrics import mark_loops, measure

if TYPE_CHECKING:
    from bdcli.decode.session import Generation, Session


@dataclass(frozen=True)
class DecodeResult:
    """One text and its figures; a rate is None where its denominator is 0. Fields in the order of `--json`."""

    status: str
    target: str
    drafter: str
    device: str
    dtype: str
    attention: str
    attention_detail: str
    context: int
    budget: int | str
    gamma: int | str
    select: str
    positions: str
    temperature: float
    top_k: int
    top_p: float
    seed: int
    tokens: list[int]
    text: str
    finish_reason: str | None
    new_tokens: int
    accepted: int
    drafted: int | None
    acceptance_rate: float | None
    acceptance_rate_no_loops: float | None
    mean_accepted_length: float | None
    ttft_s: float | None
    tokens_per_second: float | None
    ar_tokens_per_second: float | None
    speedup: float | None
    max_drafter_entries: int
    drafter_kv_bytes: int
    target_kv_bytes: int
    weight_bytes: int
    peak_memory_bytes: int
    resident_bytes: int
    loop_rate: float | None
    output_equal: bool | None
    ties: int | None
    logit_error: float | None
    rounds: list[list[int | None]]

    def as_dict(self) -> dict:
        return asdict(self)


def decode_result(session: Session, generation: Generation) -> DecodeResult:
    """Figures of a generation that has ended."""
    pair, o, selection = session.pair, session.options, session.selection
    drafter, baseline = generation.speculator.drafter, generation.baseline
    figures = measure(generation.prompt, generation.tokens, generation.rounds)
    ar = baseline.tokens_per_second
    return DecodeResult(
        status=generation.status,
        target=pair.names[0],
        drafter=pair.names[1],
        device=str(pair.target.device),
        dtype=str(pair.target.dtype).removeprefix("torch."),
        attention=pair.backend.name,
        attention_detail=pair.backend.detail,
        context=len(generation.prompt),
        budget=selection.budget or "full",
        gamma=o.gamma or "auto",
        select=selection.label,
        positions=selection.positions,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        seed=o.seed,
        tokens=generation.tokens,
        text="".join(generation.pieces),
        finish_reason=generation.finish_reason,
        ttft_s=generation.ttft_s,
        ar_tokens_per_second=ar,
        speedup=figures.tokens_per_second / ar if ar and figures.tokens_per_second else None,
        max_drafter_entries=drafter.peak_entries,
        drafter_kv_bytes=drafter.kv_bytes,
        target_kv_bytes=generation.speculator.target.cache.kv_bytes,
        weight_bytes=pair.target.weight_bytes + pair.drafter.weight_bytes,
        peak_memory_bytes=peak_memory(pair.target.device),
        resident_bytes=psutil.Process().memory_info().rss,
        output_equal=baseline.output_equal,
        ties=baseline.ties,
        logit_error=baseline.logit_error if baseline.steps and session.sampling.greedy else None,
        rounds=[r.row() for r in mark_loops(generation.prompt, generation.tokens, generation.rounds)],
        **asdict(figures),
    )
