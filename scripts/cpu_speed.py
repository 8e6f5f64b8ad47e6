"""How near compiled decoding comes to memory speed on this machine, in one run.

    python scripts/cpu_speed.py                    # the pocket pair and a random pair of 125M shape, bf16, 4K to 16K
    python scripts/cpu_speed.py --dtype float32 --contexts 4096 --shapes pocket

First the ceiling: bytes that a step must move (weights and KV entries) over the measured speed of a stream from memory.
Then each step as a multiple of it, arms taken in turn, medians. Caches hold random numbers: speed does not depend on
them, and nothing has to be read first. Draft tokens are timed inside rounds, each after a verification that has swept
the target's cache through memory. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.devices import DTYPES
from bdcli.base.progress import Progress
from bdcli.base.provenance import machine
from bdcli.bench.peers import cache_argument
from bdcli.bench.timing import fill_random
from bdcli.cache.selection import CacheSize, Window
from bdcli.model.checkpoint import POCKET, load_model
from bdcli.model.llama import Model
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling

CPU = torch.device("cpu")
ROWS = (2, 3, 5, 9, 16)
BUDGETS = (256, 512, 1024, 2048)
GAMMA = 8
SPARE_TOKENS = 64  # of a cache, for the rows of a step
LARGE = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 16896, "tie_word_embeddings": True,
}  # fmt: skip


class Notes(Progress):
    """Prints notes."""

    note = staticmethod(print)


def milliseconds(step: Callable[[], object]) -> float:
    time.sleep(0.01)  # torch's threads spin for some milliseconds after the arm before
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def in_turn(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm; every round runs all of them once, after one that does not count."""
    taken = [{name: milliseconds(step) for name, step in arms.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(t[name] for t in taken) for name in arms}


def stream() -> float:
    """GB/s: a sum over 512 MB on all threads, the median of nine."""
    data = torch.ones(128 * 2**20)
    return data.nbytes / in_turn({"sum": data.sum}, 9)["sum"] / 1e6


def random_pair(folder: Path) -> tuple[Path, Path]:
    """Target and 2-layer drafter of 125M shape as checkpoint folders."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, layers in (("target", 12), ("drafter", 2)):
        model = LlamaForCausalLM(LlamaConfig(**LARGE | {"num_hidden_layers": layers})).to(torch.bfloat16)
        model.save_pretrained(folder / name)
    return folder / "target", folder / "drafter"


def plain(runner: Runner, rows: int) -> Callable[[], None]:
    """A forward over `rows` tokens, undone."""
    length = runner.length

    def step() -> None:
        with runner.exclusive():
            runner.feed([5] * rows, rows)
        runner.rollback(length)

    return step


def drafting(drafter: ModelDrafter, ids: list[int]) -> Callable[[], None]:
    """A draft of GAMMA tokens after `ids`, undone."""

    def step() -> None:
        with drafter.runner.exclusive():
            drafter.draft(ids, GAMMA, Sampling(), None)
        drafter.rollback(len(ids) - 1)

    return step


def hugging_face(folder: Path, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """One autoregressive step of transformers with its dynamic cache, undone."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    c, cache = model.config, DynamicCache()
    heads, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    for layer in range(c.num_hidden_layers):
        cache.update(*(torch.randn(1, heads, length, dim, dtype=dtype) for _ in range(2)), layer)

    @torch.inference_mode()
    def step() -> None:
        model(torch.tensor([[5]]), use_cache=True, **{cache_argument(): cache}).logits.argmax(-1).item()
        cache.crop(-1)

    return step


def kv_bytes(model: Model, entries: int) -> int:
    c = model.config
    return 2 * c.layers * c.kv_heads * c.head_dim * entries * model.embedding.element_size()


def cache_size(context: int) -> CacheSize:
    """Of caches that hold `context` tokens and the few of a step."""
    return CacheSize(context, context + SPARE_TOKENS, context + SPARE_TOKENS)


def target_steps(folder: Path, context: int, dtype: torch.dtype, rounds: int) -> tuple[dict[str, float], int, Runner]:
    """Milliseconds of the target's steps, ours and others'; its bytes a step; our runner."""
    model = load_model(folder, dtype, CPU)
    size = cache_size(context)
    ours = fill_random(pick_backend("compiled", [model], Notes()).target(model, size), context)
    other = load_model(folder, dtype, CPU)
    eager = fill_random(torch_backend().target(other, size), context)
    arms = {"AR": plain(ours, 1), **{f"verify {r}": plain(ours, r) for r in ROWS}, "torch AR": plain(eager, 1)}
    arms |= {
        f"transformers AR {str(d)[6:]}": hugging_face(folder, context, d)
        for d in DTYPES.values()
        if d.itemsize != 2 or d is torch.bfloat16
    }
    return in_turn(arms, rounds), model.weight_bytes + kv_bytes(model, context), ours


def draft_steps(target: Runner, folder: Path, dtype: torch.dtype, rounds: int) -> dict[int, tuple[float, int]]:
    """Per budget: milliseconds of a draft token inside rounds, and the bytes it must move."""
    found = {}
    model = load_model(folder, dtype, CPU)
    backend, ids = pick_backend("compiled", [model], Notes()), [5] * (target.length + 1)
    for budget in BUDGETS:
        drafter = backend.drafter(model, Window(budget), cache_size(target.length), model.config.vocab_size)
        fill_random(drafter.runner, target.length)
        draft, verify, taken = drafting(drafter, ids), plain(target, GAMMA + 1), []
        for _ in range(rounds + 1):
            verify()
            began = time.perf_counter()
            draft()
            taken.append(1e3 * (time.perf_counter() - began) / GAMMA)
        found[budget] = statistics.median(taken[1:]), model.weight_bytes + kv_bytes(model, budget)
    return found


def show(name: str, ms: float, floor: float, note: str = "") -> None:
    print(f"  {name:24} {ms:8.3f} ms  floor {floor:7.3f}  {floor / ms:5.0%} of stream speed  {note}")


def main(
    shapes: Annotated[str, typer.Option(help="pocket and 125m, by comma.")] = "pocket,125m",
    contexts: Annotated[str, typer.Option(help="Tokens in the target's cache.")] = "4096,8192,16384",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Timed rounds of each arm.")] = 9,
) -> None:
    kind, found = DTYPES[dtype], []
    bandwidth = stream()
    print(f"{machine()}; {dtype}; stream from memory {bandwidth:.1f} GB/s on {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes.split(","):
            folders = (POCKET / "target", POCKET / "drafter") if shape == "pocket" else random_pair(Path(temporary))
            for context in map(int, contexts.split(",")):
                print(f"{shape} at {context} tokens")
                steps, moved, ours = target_steps(folders[0], context, kind, rounds)
                floor = moved / bandwidth / 1e6
                bound = max(steps["AR"], floor / 0.6)
                for name, ms in steps.items():
                    note = f"{ms / bound:.2f} × max(AR, floor / 0.6)" if name.startswith("verify") else ""
                    note = f"{ms / steps['AR']:.2f} × ours" if name.endswith("32") or " AR" in name else note
                    show(name, ms, floor, note)
                drafts = draft_steps(ours, folders[1], kind, rounds)
                for budget, (ms, size) in drafts.items():
                    share = f"{ms * bandwidth * 1e6 / size:.2f} × floor, {ms / steps['AR']:.1%} of an AR step"
                    show(f"draft token {budget}", ms, size / bandwidth / 1e6, share)
                found.append({"shape": shape, "context": context, "dtype": dtype, "bandwidth_gb_s": bandwidth,
                              "floor_ms": floor, "steps_ms": steps, "draft_ms": {b: d[0] for b, d in drafts.items()},
                              "draft_floor_ms": {b: d[1] / bandwidth / 1e6 for b, d in drafts.items()}})  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
