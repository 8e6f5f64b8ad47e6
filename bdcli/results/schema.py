"""The store's tables: one row a run, one row a prompt. Fields only, no behaviour, no torch.

A new field also needs a migration (`bdcli.results.migrations`).
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, String
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel


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

    context: int | None = Field(default=None, index=True, description="prompt tokens")
    new_tokens: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    acceptance_rate: float | None = None
    acceptance_rate_no_loops: float | None = None
    mean_accepted_length: float | None = None
    ttft_s: float | None = None
    tokens_per_second: float | None = None
    ar_tokens_per_second: float | None = None
    speedup: float | None = None
    loop_rate: float | None = None
    max_drafter_entries: int | None = None
    drafter_kv_bytes: int | None = None
    target_kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    output_equal: bool | None = None
    ties: int | None = None
    finish_reason: str | None = None


class Run(Figures, table=True):
    run_id: str = Field(primary_key=True)
    started_at: datetime
    finished_at: datetime | None = None
    command: str = Field(index=True)
    status: str = Field(description="running | done | failed | interrupted")
    error: str | None = None
    method: str | None = None
    dataset: str | None = None
    prompts: int = 0
    target: str | None = None
    drafter: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = Field(default=None, description="what ran the forwards: compiled or torch")
    budget: int | str | None = Field(default=None, sa_type=NumberOrWord)
    gamma: int | str | None = Field(default=None, sa_type=NumberOrWord)
    select: str | None = None
    positions: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    experiment: str | None = Field(default=None, index=True, description="key of a sweep, by which it is resumed")
    arm: str | None = Field(default=None, description="name of a bench cell's arm")
    ar_run_id: str | None = Field(default=None, description="the AR cell that a bench cell is compared with")
    acceptance_low: float | None = Field(default=None, description="95 % bootstrap interval over prompts")
    acceptance_high: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    speedup_no_loops: float | None = None
    ar_variation: float | None = Field(default=None, description="AR tok/s over prompts: standard deviation / mean")
    valid: bool | None = Field(default=None, description="no gate of bench objects")
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
