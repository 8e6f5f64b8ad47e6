"""The store's tables: one row a run, one row a prompt. Fields only, no behaviour, no torch.

This is the one list of figures. The report's table, the summary of `decode`, the cells of `bench --json` and what the
store computes with take names, headings and formats from here. A new field also needs a migration
(`bdcli.results.migrations`); with a heading it needs a place in `bdcli.results.tables.COLUMNS`.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, String
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from bdcli.results.figures import BYTES, LENGTH, NAME, NUMBER, PERCENT, RATIO, SECONDS, SPEED, TEXT, YES_NO, figure


class NumberOrWord(TypeDecorator):
    """A column like budget (512 or "full") and gamma (5 or "auto")."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value, dialect):  # noqa: ARG002
        return None if value is None else str(value)

    def process_result_value(self, value, dialect):  # noqa: ARG002
        return int(value) if value is not None and value.isdigit() else value


class Figures(SQLModel):
    """Columns that a run and each of its prompts share. Rates are null where nothing was measured."""

    context: int | None = figure("prompt tokens", NUMBER, "ctx", index=True)
    new_tokens: int | None = figure("generated tokens", NUMBER, "new")
    drafted: int | None = figure("tokens the drafter proposed")
    accepted: int | None = figure("proposed tokens that passed")
    acceptance_rate: float | None = figure("accepted / drafted", PERCENT, "acceptance", missing="nothing drafted")
    acceptance_rate_no_loops: float | None = figure(
        "the same over the rounds that begin outside loops", PERCENT, "outside loops"
    )
    mean_accepted_length: float | None = figure("tokens per target forward", LENGTH, "mean length")
    ttft_s: float | None = figure("time to the first token, reading the prompt included", SECONDS)
    tokens_per_second: float | None = figure("decode speed, without reading the prompt", SPEED, "tok/s")
    ar_tokens_per_second: float | None = figure("the same of the AR baseline", SPEED, "AR tok/s", against_ar=True)
    speedup: float | None = figure("decode speed over that of AR", RATIO, "speedup", against_ar=True)
    loop_rate: float | None = figure("share of the tokens that end a repeated 8-gram", PERCENT, "loops")
    max_drafter_entries: int | None = figure(
        "most entries per layer and KV head that the drafter held", NUMBER, "entries", largest=True
    )
    drafter_kv_bytes: int | None = figure("size of the drafter's KV cache", BYTES, largest=True)
    target_kv_bytes: int | None = figure("size of the target's KV cache", BYTES, largest=True)
    peak_memory_bytes: int | None = figure("most memory that was in use", BYTES, "memory", largest=True)
    output_equal: bool | None = figure("the text is AR's", YES_NO, "equal", missing="not checked (--check)")
    ties: int | None = figure("tokens that rounding alone decided otherwise than AR")
    finish_reason: str | None = figure("stop | length", TEXT)


class Run(Figures, table=True):
    run_id: str = figure("when it began, and a random part", TEXT, "run", default=..., primary_key=True)
    started_at: datetime
    finished_at: datetime | None = None
    command: str = Field(index=True)
    status: str = figure("running | done | failed | interrupted", TEXT, "status", default=...)
    error: str | None = None
    method: str | None = None
    dataset: str | None = figure("name of the prompts", NAME, "dataset")
    prompts: int = 0
    target: str | None = figure("folder or name of the target", NAME, "target")
    drafter: str | None = None
    device: str | None = None
    dtype: str | None = figure("of weights and caches", TEXT, "dtype")
    weights: str | None = figure("what the target's weights are stored in", TEXT)
    draft_weights: str | None = figure("the same of the drafter", TEXT)
    attention: str | None = Field(default=None, description="what ran the forwards: compiled or torch")
    budget: int | str | None = figure(
        "KV entries the drafter may hold, or full", NUMBER, "budget", sa_type=NumberOrWord
    )
    gamma: int | str | None = figure("tokens drafted per round, or auto", NUMBER, "γ", sa_type=NumberOrWord)
    select: str | None = figure("what the drafter keeps of the prompt", TEXT, "select")
    positions: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    experiment: str | None = Field(default=None, index=True, description="key of a sweep, by which it is resumed")
    arm: str | None = figure("name of a bench cell's arm", TEXT, "arm")
    ar_run_id: str | None = Field(default=None, description="the AR cell that a bench cell is compared with")
    acceptance_low: float | None = figure("95 % bootstrap interval over prompts", PERCENT)
    acceptance_high: float | None = figure("its upper end", PERCENT)
    speedup_low: float | None = figure("95 % bootstrap interval over prompts", RATIO, "95 %", against_ar=True)
    speedup_high: float | None = figure("its upper end", RATIO, against_ar=True)
    speedup_no_loops: float | None = figure("speedup over the rounds that begin outside loops", RATIO, against_ar=True)
    ar_variation: float | None = figure(
        "AR tok/s over prompts: standard deviation / mean", PERCENT, "AR varies", against_ar=True
    )
    valid: bool | None = figure("no gate of bench objects", YES_NO, "valid")
    invalid_reason: str | None = None
    seal: str | None = Field(default=None, description="digest of a bench cell's row and prompts when measured")
    machine: str | None = None
    host: str | None = None
    pid: int | None = None
    process_started: float | None = None
    git_revision: str | None = None
    versions: dict = Field(default_factory=dict, sa_type=JSON)
    config: dict = Field(default_factory=dict, sa_type=JSON)


class Prompt(Figures, table=True):
    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="run.run_id", index=True)
    index: int = 0
    source: str
    sha256: str
    text: str = Field(description="what was generated")
    tokens: list[int] = Field(default_factory=list, sa_type=JSON)
    rounds: list[list[int | None]] = Field(
        default_factory=list,
        sa_type=JSON,
        description="[tokens, drafted, accepted, microseconds, 1 if it begins in a loop] a round",
    )
    error: str | None = None


class Evaluation(SQLModel, table=True):
    """Acceptance of one context and budget at one step of a distil run, measured without a rollout."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="run.run_id", index=True)
    step: int
    dataset: str
    context: int
    budget: int | str = Field(sa_type=NumberOrWord)
    gamma: int
    acceptance_rate: float | None = None
    acceptance_rate_no_loops: float | None = None
    low: float | None = Field(default=None, description="95 % bootstrap interval over passages")
    high: float | None = None
    mean_accepted_length: float | None = None
    passages: int = 0


class Loss(SQLModel, table=True):
    """Held-out loss of a pretrain run at one step and context, in nats a token."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="run.run_id", index=True)
    step: int
    tokens: int = Field(description="read in training so far")
    context: int
    windows: int
    nll: float = Field(description="mean over the whole window")
    tail_nll: float = Field(description="over its last tokens, given all of the context")
    tail_nll_short: float = Field(description="over the same tokens, given only about the last 256")


class Migration(SQLModel, table=True):
    """A change of the schema that was applied to this store."""

    name: str = Field(primary_key=True)
    applied_at: datetime
