"""Speed of a real shape with random weights on any device: steps against the bytes they move, no download, no text.

A step is timed as decoding does it, host included: a round of `Speculator`, then everything is rolled back. What a text
would gain follows from the times of rounds and an accepted length, here those that the paper reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bdcli.backends.select import Backend, pick_backend, torch_backend
from bdcli.base.devices import dtype_name
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.paper import PUBLISHED
from bdcli.bench.peers import cache_argument, fill
from bdcli.bench.timing import REPEATS, TOKEN, RoundStep, copy_speed, fill_random, median_ms, text_of
from bdcli.cache.selection import CacheSize, Full, parse_selection
from bdcli.cache.view import GAMMA_MAX
from bdcli.decode.memory import DecodePlan, check_plan, decode_plan, runtime_bytes
from bdcli.model.build import random_model
from bdcli.model.config import ModelConfig, parse_config
from bdcli.model.llama import Model
from bdcli.model.sizes import gigabytes, kv_count
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.speculator import Speculator

# vocabulary, hidden, MLP width, layers, heads, KV heads
SHAPES = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
    "tinyllama": (32000, 2048, 5632, 22, 32, 4),
    "125m": (32000, 768, 2048, 12, 12, 12),
    "68m": (32000, 768, 3072, 2, 12, 12),
    "tiny": (512, 128, 192, 2, 2, 1),
}
GAMMAS = tuple(range(1, GAMMA_MAX + 1))
BUDGETS = (256, 512, 1024, 2048, None)
DRAFT_TOKENS = 5  # γ at which a draft token is timed, and at which the paper's acceptance rates are taken
BISECTIONS = 50
Shape = tuple[ModelConfig, ModelConfig]


def parse_shape(text: str) -> Shape:
    """(target, drafter) of `llama2-7b+68m`. Raises UserError on unknown names."""
    names = text.split("+")
    if len(names) != 2 or any(name not in SHAPES for name in names):
        raise UserError(f"--shape {text}: must be TARGET+DRAFTER", f"Known: {', '.join(SHAPES)}")
    return tuple(parse_config(hugging_face(name), name) for name in names)


def hugging_face(name: str) -> dict:
    """The shape as a config.json."""
    vocab, hidden, inner, layers, heads, kv_heads = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }


def _cache_size(context: int) -> CacheSize:
    capacity = context + GAMMA_MAX + 2
    return CacheSize(context, capacity, capacity)


@dataclass(frozen=True)
class ShapeBench:
    """What is measured of a pair of shapes. Budget None is a full cache; rounds are timed at the first budget."""

    shape: Shape
    contexts: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    gammas: Sequence[int] = GAMMAS
    budgets: Sequence[int | None] = BUDGETS
    peers: bool = True
    repeats: int = REPEATS

    def measure(self, engine: str | Backend = "auto", progress: Progress = SILENT) -> dict:
        """All figures, as the JSON contract has them. `engine` is a name to pick a backend by, or a backend."""
        plan = self.memory_plan()
        models = [random_model(c, seed, self.dtype, self.device) for seed, c in enumerate(self.shape)]
        backend = engine if isinstance(engine, Backend) else pick_backend(engine, models, progress)
        copy_gb_s = copy_speed(self.device)
        cells = []
        for context in self.contexts:
            progress.note(f"{context} tokens")
            cells.append(self._context(backend, models, context, copy_gb_s))
            if self.peers:
                cells[-1]["peers_ms"] = self._peers(models[0], context)
        return {
            "engine": backend.name,
            "detail": backend.detail,
            "dtype": dtype_name(self.dtype),
            "copy_gb_s": copy_gb_s,
            "planned_peak_bytes": plan.peak,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            "contexts": cells,
        }

    def check_memory(self, progress: Progress = SILENT) -> None:
        """Raises UserError where the longest context does not fit into memory. Nothing is allocated."""
        check_plan(self.memory_plan(), self.device, progress)

    def memory_plan(self) -> DecodePlan:
        """What the longest context will hold."""
        size, kind = _cache_size(max(self.contexts)), dtype_name(self.dtype)
        return decode_plan(*self.shape, kind, size, Full(), runtime_bytes(self.device))

    def _context(self, backend: Backend, models: list[Model], context: int, copy_gb_s: float) -> dict:
        """Steps at one context: AR, rounds of every γ at the first budget, draft tokens of every budget."""
        runner = fill_random(backend.target(models[0], _cache_size(context)), context - 1)
        texts = {b: text_of(runner, self._drafter(backend, models, b, context), context) for b in self.budgets}
        ar = RoundStep(text_of(runner, None, context), 0)
        rounds = {gamma: RoundStep(texts[self.budgets[0]], gamma) for gamma in self.gammas}
        times = median_ms({"ar": ar} | {f"g{g}": step for g, step in rounds.items()}, self.device, self.repeats)
        draft_ms = {b: self._draft_ms(text) for b, text in texts.items()}  # one at a time: each has graphs of its own
        moved_bytes = models[0].weight_bytes + self.dtype.itemsize * kv_count(models[0].config, context)
        rows = {g: _round_row(step, times[f"g{g}"], times["ar"]) for g, step in rounds.items()}
        return {
            "context": context,
            "ar_ms": times["ar"],
            "ar_bytes": moved_bytes,
            "ar_share": _floor_ms(moved_bytes, copy_gb_s) / times["ar"],
            "host_share": ar.host_share(),
            "rounds_budget": self.budgets[0] or "full",
            "rounds": rows,
            "drafts": [self._draft_row(models[1], b, context, ms, copy_gb_s) for b, ms in draft_ms.items()],
            "tokens_per_second": list(_projections(context, times["ar"], rows)),
        }

    def _drafter(self, backend: Backend, models: list[Model], budget: int | None, context: int) -> ModelDrafter:
        vocab = models[0].config.vocab_size
        drafter = backend.drafter(models[1], parse_selection(budget), _cache_size(context), vocab)
        fill_random(drafter.runner, context - 1)
        return drafter

    def _draft_ms(self, text: Speculator) -> float:
        """Milliseconds of a draft token inside rounds."""
        step = RoundStep(text, DRAFT_TOKENS)
        median_ms({"draft": step}, self.device, self.repeats)
        return step.draft_ms() / DRAFT_TOKENS

    def _draft_row(self, drafter: Model, budget: int | None, context: int, ms: float, copy_gb_s: float) -> dict:
        entries = min(budget or context, context)
        moved_bytes = drafter.weight_bytes + self.dtype.itemsize * kv_count(drafter.config, entries)
        floor_ms = _floor_ms(moved_bytes, copy_gb_s)
        return {
            "budget": budget or "full",
            "ms": ms,
            "bytes": moved_bytes,
            "floor_ms": floor_ms,
            "share": floor_ms / ms,
        }

    def _peers(self, target: Model, context: int) -> dict[str, float]:
        """Milliseconds of an AR step of others on the same shape: our own torch backend (SDPA), and transformers."""
        eager = fill_random(torch_backend().target(target, _cache_size(context)), context - 1)
        found = median_ms({"torch": RoundStep(text_of(eager, None, context), 0)}, self.device, self.repeats)
        del eager
        return found | median_ms({"transformers static": static_step(target, context)}, self.device, self.repeats)


def _floor_ms(moved_bytes: int, copy_gb_s: float) -> float:
    """Milliseconds that moving these bytes takes at copy speed."""
    return moved_bytes / copy_gb_s / 1e6


def _round_row(step: RoundStep, ms: float, ar_ms: float) -> dict:
    verify_ms = step.verify_ms()
    return {"ms": ms, "verify_ms": verify_ms, "verify_over_ar": verify_ms / ar_ms, "host_share": step.host_share()}


def _projections(context: int, ar_ms: float, rows: dict[int, dict]) -> Iterator[dict]:
    """Tokens/s at the acceptance rates that the paper reports for this context, at the γ that suits each best.

    Each proposal is taken to pass by itself with the probability that gives the paper's rate at γ = DRAFT_TOKENS.
    """
    yield {"acceptance_rate": None, "gamma": 0, "tokens_per_second": 1e3 / ar_ms, "speedup": 1.0}
    rates = {(data, figures.acceptance_rate) for (data, c), figures in PUBLISHED.items() if c == context}
    for data, rate in sorted(rates):
        probability = accept_probability(rate, DRAFT_TOKENS)
        speeds = {g: 1e3 * accepted_length(probability, g) / row["ms"] for g, row in rows.items()}
        best = max(speeds, key=speeds.get)
        yield {
            "dataset": data,
            "acceptance_rate": rate,
            "gamma": best,
            "mean_accepted_length": accepted_length(probability, best),
            "tokens_per_second": speeds[best],
            "speedup": speeds[best] * ar_ms / 1e3,
        }


def accepted_length(probability: float, gamma: int) -> float:
    """Mean tokens of a round whose proposals pass one after another with `probability` each."""
    return sum(probability**k for k in range(gamma + 1))


def accept_probability(rate: float, gamma: int) -> float:
    """The probability of one proposal at which `rate` of γ are accepted, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if (accepted_length(middle, gamma) - 1) / gamma < rate else (low, middle)
    return low


def static_step(target: Model, context: int) -> Callable[[], object]:
    """One AR step of transformers on its static cache, eager, as its users get it without compiling."""
    from transformers import LlamaForCausalLM, StaticCache

    config = _llama_config(target.config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(target.dtype)
    try:
        with target.device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    cache = StaticCache(config=config, max_cache_len=context + 8 * REPEATS)
    with torch.inference_mode():
        fill(model, [TOKEN] * (context - 1), cache)
    token = torch.tensor([[TOKEN]], device=target.device)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=token, use_cache=True, **{cache_argument(): cache}).logits.argmax(-1).item()

    return step


def _llama_config(c: ModelConfig):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        tie_word_embeddings=c.tied_head,
    )


def lines(found: dict) -> Iterator[str]:
    """The result as a short table."""
    yield (
        f"{found['engine']} ({found['detail']}), {found['dtype']}; copy {found['copy_gb_s']:.0f} GB/s; "
        f"planned peak {gigabytes(found['planned_peak_bytes'])}"
    )
    for cell in found["contexts"]:
        host = "" if cell["host_share"] is None else f", host {cell['host_share']:.1%}"
        yield f"{cell['context']} tokens: AR {cell['ar_ms']:.3f} ms, {cell['ar_share']:.0%} of copy speed{host}"
        for name, ms in cell.get("peers_ms", {}).items():
            yield f"  {name:20} {ms:9.3f} ms  {ms / cell['ar_ms']:.2f} × ours"
        for gamma, row in cell["rounds"].items():
            yield f"  γ {gamma:<2} round {row['ms']:9.3f} ms  verify {row['verify_over_ar']:.2f} × AR"
        for draft in cell["drafts"]:
            yield f"  draft token {draft['budget']!s:>5} {draft['ms']:9.4f} ms  {draft['share']:.0%} of copy speed"
        for speed in cell["tokens_per_second"]:
            what = "AR"
            if speed["acceptance_rate"] is not None:
                what = f"{speed['dataset']} at {speed['acceptance_rate']:.0%}, γ {speed['gamma']}"
            yield f"  {what:28} {speed['tokens_per_second']:8.1f} tok/s  {speed['speedup']:.2f}×"
