"""Speed of a real shape with random weights on any device: steps against the bytes they move, no download, no text.

Time does not depend on what the weights and caches hold, so they hold random numbers. A step is timed as decoding does
it, host included: a round of `Speculator`, then everything is rolled back. What a text would gain follows from the
rounds' times and an accepted length, here those that the paper reports.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bdcli.backends.select import Backend, pick_backend, torch_backend
from bdcli.base.devices import free_memory
from bdcli.base.errors import UserError
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.peers import cache_argument, fill
from bdcli.bench.published import PUBLISHED
from bdcli.cache.selection import CacheSize, Full, parse_selection
from bdcli.cache.view import GAMMA_MAX
from bdcli.decode.memory import decode_plan
from bdcli.model.build import random_model
from bdcli.model.config import ModelConfig, parse_config
from bdcli.model.llama import Model
from bdcli.model.sizes import gigabytes, kv_count
from bdcli.speculation.drafter import Drafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling
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
DRAFT = 5  # γ at which a draft token is timed, and at which the paper's acceptance rates are taken
ROUNDS = 15
Shape = tuple[ModelConfig, ModelConfig]


def parse_shape(text: str) -> Shape:
    """(target, drafter) of `llama2-7b+68m`."""
    names = text.split("+")
    if len(names) != 2 or any(name not in SHAPES for name in names):
        raise UserError(f"--shape {text}: must be TARGET+DRAFTER", f"Known: {', '.join(SHAPES)}")
    return tuple(parse_config(hugging_face(name), name) for name in names)


def hugging_face(name: str) -> dict:
    """The shape as a config.json."""
    vocab, hidden, inner, layers, heads, kv_heads = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    }  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_speed(device: torch.device, size: int = 2**30) -> float:
    """GB/s of a copy of `size` bytes within the device, counted as read and written; the median of nine."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median({"copy": lambda: target.copy_(source)}, device, 9)["copy"] / 1e6


def median(arms: dict[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each arm; every round runs all of them once, after two that do not count.

    An arm that returns a float has timed itself, in milliseconds.
    """

    def run(step: Callable[[], object]) -> float:
        wait(device)
        began = time.perf_counter()
        own = step()
        wait(device)
        return own if isinstance(own, float) else 1e3 * (time.perf_counter() - began)

    taken = [{name: run(step) for name, step in arms.items()} for _ in range(rounds + 2)][2:]
    return {name: statistics.median(t[name] for t in taken) for name in arms}


def fill_random(runner: Runner, length: int) -> Runner:
    """Random entries up to `length`, as if a prompt had been read."""
    cache = runner.cache
    for tensor in cache.storage:
        tensor.normal_()
    cache.length = length
    cache.record(length)
    return runner


def a_round(run: Speculator, gamma: int, taken: dict[int, list] | None = None) -> Callable[[], float]:
    """A round of `gamma` after the text of `run`, undone; milliseconds. `taken` collects the steps."""
    kept = len(run.ids)

    def step() -> float:
        done = run.round(gamma)
        if taken is not None:
            taken.setdefault(gamma, []).append(done)
        del run.ids[kept:]
        run.target.rollback(kept - 1)
        if run.drafter is not None:
            run.drafter.rollback(kept - 1)
        return 1e3 * done.seconds

    return step


def began(target: Runner, drafter: Drafter | None, context: int) -> Speculator:
    """A generation whose prompt of `context` tokens has been read."""
    run = Speculator(target, drafter, Sampling(), 0, target.model.device)
    run.ids, run.prompt_tokens = [5] * context, context
    return run


def _size(context: int) -> CacheSize:
    capacity = context + GAMMA_MAX + 2
    return CacheSize(context, capacity, capacity)


def measure(
    shape: Shape,
    contexts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    wanted: str = "auto",
    gammas: Sequence[int] = GAMMAS,
    budgets: Sequence[int | None] = BUDGETS,
    peers: bool = True,
    rounds: int = ROUNDS,
    progress: Progress = SILENT,
    engine: Backend | None = None,
) -> dict:
    """Everything about one pair of shapes; the engine is `wanted`, or given outright."""
    longest = max(contexts)
    plan = decode_plan(*shape, dtype.itemsize, _size(longest), Full())
    progress.note(plan.line())
    if device.type == "cuda":
        plan.check(free_memory(device))
    models = [random_model(c, seed, dtype, device) for seed, c in enumerate(shape)]
    engine = engine or pick_backend(wanted, models, progress)
    copied = copy_speed(device, 2**30 if device.type == "cuda" else 2**27)
    cells = []
    for context in contexts:
        progress.note(f"{context} tokens")
        cells.append(_context(engine, models, context, gammas, budgets, copied, rounds))
        if peers:
            cells[-1]["peers_ms"] = _peers(models[0], context, rounds)
    return {
        "engine": engine.name,
        "detail": engine.detail,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_s": copied,
        "planned_peak_bytes": plan.peak,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "contexts": cells,
    }


def _context(
    engine: Backend,
    models: list[Model],
    context: int,
    gammas: Sequence[int],
    budgets: Sequence[int | None],
    copied: float,
    rounds: int,
) -> dict:
    """Steps at one context: AR, rounds of every γ at the first budget, draft tokens of every budget."""
    (target, drafter), device, size = models, models[0].device, models[0].dtype.itemsize
    held = fill_random(engine.target(target, _size(context)), context - 1)
    runners = {}
    for budget in budgets:
        drafting = engine.drafter(drafter, parse_selection(budget), _size(context), target.config.vocab_size)
        fill_random(drafting.runner, context - 1)
        runners[budget] = began(held, drafting, context)
    plain, taken = began(held, None, context), {}
    arms = {"ar": a_round(plain, 0, taken)} | {f"g{g}": a_round(runners[budgets[0]], g, taken) for g in gammas}
    times = median(arms, device, rounds)
    drafts = {}
    for budget, run in runners.items():  # one at a time: each has graphs of its own
        steps: dict[int, list] = {}
        median({"draft": a_round(run, DRAFT, steps)}, device, rounds)
        drafts[budget] = 1e3 * statistics.median(s.draft_s for s in steps[DRAFT][2:]) / DRAFT
    moved = target.weight_bytes + size * kv_count(target.config, context)
    floor = moved / copied / 1e6
    rows = {g: _round(times[f"g{g}"], taken[g][2:], times["ar"]) for g in gammas}
    return {
        "context": context,
        "ar_ms": times["ar"],
        "ar_bytes": moved,
        "ar_share": floor / times["ar"],
        "host_share": _host_share(taken[0][2:]),
        "rounds_budget": budgets[0] or "full",
        "rounds": rows,
        "drafts": [_draft(drafter, b, context, drafts[b], copied, size) for b in budgets],
        "tokens_per_second": list(_projected(context, times["ar"], rows)),
    }


def _round(ms: float, steps: list, ar_ms: float) -> dict:
    verify = 1e3 * statistics.median(s.verify_s for s in steps)
    return {"ms": ms, "verify_ms": verify, "verify_over_ar": verify / ar_ms, "host_share": _host_share(steps)}


def _host_share(steps: list) -> float | None:
    """Share of a round's time in which the device was not at work."""
    shares = [1 - s.device_s / s.seconds for s in steps if s.device_s is not None]
    return statistics.median(shares) if shares else None


def _draft(drafter: Model, budget: int | None, context: int, ms: float, copied: float, size: int) -> dict:
    moved = drafter.weight_bytes + size * kv_count(drafter.config, min(budget or context, context))
    floor = moved / copied / 1e6
    return {"budget": budget or "full", "ms": ms, "bytes": moved, "floor_ms": floor, "share": floor / ms}


def _projected(context: int, ar_ms: float, rows: dict[int, dict]) -> Iterator[dict]:
    """Tokens/s at the acceptance rates that the paper reports for this context, at the γ that suits them best.

    Each proposal is taken to pass by itself with the chance that gives the paper's rate at γ = DRAFT.
    """
    yield {"acceptance_rate": None, "gamma": 0, "tokens_per_second": 1e3 / ar_ms, "speedup": 1.0}
    for data, rate in sorted({(d, r) for (d, c), (_, r) in PUBLISHED.items() if c == context}):
        chance = chance_of(rate, DRAFT)
        speeds = {g: 1e3 * _length(chance, g) / row["ms"] for g, row in rows.items()}
        best = max(speeds, key=speeds.get)
        yield {
            "dataset": data, "acceptance_rate": rate, "gamma": best, "mean_accepted_length": _length(chance, best),
            "tokens_per_second": speeds[best], "speedup": speeds[best] * ar_ms / 1e3,
        }  # fmt: skip


def _length(chance: float, gamma: int) -> float:
    """Mean tokens of a round whose proposals pass one after another with `chance` each."""
    return sum(chance**k for k in range(gamma + 1))


def chance_of(rate: float, gamma: int) -> float:
    """The chance of one proposal at which `rate` of γ are accepted, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (_length(middle, gamma) - 1) / gamma < rate else (low, middle)
    return low


def _peers(target: Model, context: int, rounds: int) -> dict[str, float]:
    """Milliseconds of an AR step of others on the same shape: our own eager engine (SDPA), and transformers."""
    device = target.device
    eager = fill_random(torch_backend().target(target, _size(context)), context - 1)
    found = median({"torch": a_round(began(eager, None, context), 0)}, device, rounds)
    del eager
    return found | median({"transformers static": static_step(target, context)}, device, rounds)


def static_step(target: Model, context: int) -> Callable[[], object]:
    """One AR step of transformers on its static cache, eager, as its users get it without compiling."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    c = target.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_position, tie_word_embeddings=c.tied_head,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(target.dtype)
    try:
        with target.device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    cache = StaticCache(config=config, max_cache_len=context + 8 * ROUNDS)
    with torch.inference_mode():
        fill(model, [5] * (context - 1), cache)
    token = torch.tensor([[5]], device=target.device)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=token, use_cache=True, **{cache_argument(): cache}).logits.argmax(-1).item()

    return step


def lines(found: dict) -> Iterator[str]:
    """The result as a short table."""
    yield f"{found['engine']} ({found['detail']}), {found['dtype']}; copy {found['copy_gb_s']:.0f} GB/s; " + (
        f"planned peak {gigabytes(found['planned_peak_bytes'])}"
    )
    for cell in found["contexts"]:
        host = "" if cell["host_share"] is None else f", host {cell['host_share']:.1%}"
        yield f"{cell['context']} tokens: AR {cell['ar_ms']:.3f} ms, {cell['ar_share']:.0%} of copy speed{host}"
        for name, ms in cell.get("peers_ms", {}).items():
            yield f"  {name:20} {ms:9.3f} ms  {ms / cell['ar_ms']:.2f} × ours"
        for gamma, row in cell["rounds"].items():
            yield f"  γ {gamma:<2} round {row['ms']:9.3f} ms  verify {row['verify_over_ar']:.2f} × AR"
        for d in cell["drafts"]:
            yield f"  draft token {d['budget']!s:>5} {d['ms']:9.4f} ms  {d['share']:.0%} of copy speed"
        for t in cell["tokens_per_second"]:
            what = (
                "AR"
                if t["acceptance_rate"] is None
                else f"{t['dataset']} at {t['acceptance_rate']:.0%}, γ {t['gamma']}"
            )
            yield f"  {what:28} {t['tokens_per_second']:8.1f} tok/s  {t['speedup']:.2f}×"
