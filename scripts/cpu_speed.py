"""How near compiled decoding comes to memory speed on this machine, in one run.

    python scripts/cpu_speed.py                    # the pocket pair and a random pair of 125M shape, bf16, 4K to 16K
    python scripts/cpu_speed.py --dtype float32 --contexts 4096 --shapes pocket

First the ceiling: bytes that a step must move (weights and KV entries) over the measured speed of a stream from memory.
Then each step as a multiple of it, steps taken in turn, medians. Caches hold random numbers: speed does not depend on
them, and nothing has to be read first. Draft tokens are timed inside rounds, each after a verification that has swept
the target's cache through memory. Last comes causal attention of a whole prompt, ours and torch's, beside a large
product. The last line is JSON.
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
import torch.nn.functional as F
import typer

from bdcli.backends.select import pick_backend, torch_backend
from bdcli.base.devices import DTYPES, product_dtype
from bdcli.base.progress import Progress
from bdcli.base.provenance import machine
from bdcli.bench.peers import cache_argument
from bdcli.bench.timing import fill_random
from bdcli.cache.selection import CacheSize, Window
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.llama import Model
from bdcli.model.sizes import kv_count
from bdcli.speculation.drafter import ModelDrafter
from bdcli.speculation.runner import Runner
from bdcli.speculation.sampling import Sampling

CPU = torch.device("cpu")
VERIFIED_ROWS = (2, 3, 5, 9, 16)
BUDGETS = (256, 512, 1024, 2048)
GAMMA = 8
SPARE_TOKENS = 64  # of a cache, for the rows of a step
STREAM_NUMBERS = 128 * 2**20  # fp32
AR_SHARE = 0.6  # of stream speed, that an AR step is expected to reach
SETTLE_S = 0.01  # torch's threads spin for some milliseconds after the step before
SHAPE_125M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 16896,
    "tie_word_embeddings": True,
}


class Notes(Progress):
    """Prints notes."""

    note = staticmethod(print)


def milliseconds(step: Callable[[], object]) -> float:
    time.sleep(SETTLE_S)
    started = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - started)


def median_ms(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step; every round runs all of them once, after one that does not count."""
    turns = [{name: milliseconds(step) for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in steps}


def stream_speed() -> float:
    """GB/s: a sum over 512 MB on all threads, the median of nine."""
    data = torch.ones(STREAM_NUMBERS)
    return data.nbytes / median_ms({"sum": data.sum}, 9)["sum"] / 1e6


def random_pair(folder: Path) -> tuple[Path, Path]:
    """Target and 2-layer drafter of 125M shape as checkpoint folders."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, layers in (("target", 12), ("drafter", 2)):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE_125M | {"num_hidden_layers": layers})).to(torch.bfloat16)
        model.save_pretrained(folder / name)
    return folder / "target", folder / "drafter"


def forward_step(runner: Runner, rows: int) -> Callable[[], None]:
    """A forward over `rows` tokens, undone."""
    length = runner.length

    def step() -> None:
        with runner.exclusive():
            runner.feed([5] * rows, rows)
        runner.rollback(length)

    return step


def draft_step(drafter: ModelDrafter, ids: list[int]) -> Callable[[], None]:
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


def moved_bytes(model: Model, entries: int) -> int:
    """What a step reads: weights, and `entries` of each layer's cache."""
    return model.weight_bytes + kv_count(model.config, entries) * model.dtype.itemsize


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
    steps = {"AR": forward_step(ours, 1)} | {f"verify {r}": forward_step(ours, r) for r in VERIFIED_ROWS}
    steps["torch AR"] = forward_step(eager, 1)
    steps |= {
        f"transformers AR {str(d)[6:]}": hugging_face(folder, context, d)
        for d in DTYPES.values()
        if d.itemsize != 2 or d is torch.bfloat16
    }
    return median_ms(steps, rounds), moved_bytes(model, context), ours


def draft_steps(target: Runner, folder: Path, dtype: torch.dtype, rounds: int) -> dict[int, tuple[float, int]]:
    """Per budget: milliseconds of a draft token inside rounds, and the bytes it must move."""
    found = {}
    model = load_model(folder, dtype, CPU)
    backend, ids = pick_backend("compiled", [model], Notes()), [5] * (target.length + 1)
    for budget in BUDGETS:
        drafter = backend.drafter(model, Window(budget), cache_size(target.length), model.config.vocab_size)
        fill_random(drafter.runner, target.length)
        draft, verify, times = draft_step(drafter, ids), forward_step(target, GAMMA + 1), []
        for _ in range(rounds + 1):
            verify()
            started = time.perf_counter()
            draft()
            times.append(1e3 * (time.perf_counter() - started) / GAMMA)
        found[budget] = statistics.median(times[1:]), moved_bytes(model, budget)
    return found


def show(name: str, ms: float, floor_ms: float, note: str = "") -> None:
    print(f"  {name:24} {ms:8.3f} ms  floor {floor_ms:7.3f}  {floor_ms / ms:5.0%} of stream speed  {note}")


def comparison(name: str, ms: float, ar_ms: float, floor_ms: float) -> str:
    """What a step of the target is compared with."""
    if name.startswith("verify"):
        return f"{ms / max(ar_ms, floor_ms / AR_SHARE):.2f} × max(AR, floor / {AR_SHARE})"
    return f"{ms / ar_ms:.2f} × ours" if " AR" in name else ""


def prompt_attention(folder: Path, context: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """GFLOPS of causal attention of a prompt in the target's shape, and of the largest product of its layers."""
    from bdcli.backends.cpu.prompt.attention import causal_attention as ours
    from bdcli.cache.causal import causal_attention as plain

    c = load_model(folder, dtype, CPU).config
    q, rows = torch.randn(context, c.heads, c.head_dim, dtype=dtype), product_dtype("cpu")
    k, v = (torch.randn(c.kv_heads, context, c.head_dim, dtype=dtype) for _ in range(2))
    x, w = torch.randn(context, c.hidden_size), torch.randn(2 * c.intermediate_size, c.hidden_size)
    x, w = (t.to(dtype if dtype is torch.float32 else rows) for t in (x, w))
    scale, gqa = c.head_dim**-0.5, c.heads != c.kv_heads
    side_by_side = q.transpose(0, 1)[None], k[None], v[None]
    steps = {  # a bf16 product runs in the dtype that prompts are multiplied in
        "ours": lambda: ours(q, k, v, scale),
        "torch, in its faster dtype": lambda: plain(q, k, v, scale),
        "torch": lambda: F.scaled_dot_product_attention(*side_by_side, is_causal=True, enable_gqa=gqa),
        "product": lambda: F.linear(x, w),
    }
    attention, product = 2 * context**2 * c.heads * c.head_dim, 2 * x.numel() * w.shape[0]
    with torch.inference_mode():
        times = median_ms(steps, rounds)
    return {name: (product if name == "product" else attention) / ms / 1e6 for name, ms in times.items()}


def measure(folders: tuple[Path, Path], context: int, dtype: torch.dtype, bandwidth: float, rounds: int) -> dict:
    """Steps of a pair at one context, shown as they come. `bandwidth` in GB/s."""
    steps, target_bytes, target = target_steps(folders[0], context, dtype, rounds)
    floor_ms = target_bytes / bandwidth / 1e6
    for name, ms in steps.items():
        show(name, ms, floor_ms, comparison(name, ms, steps["AR"], floor_ms))
    draft_ms, draft_floor_ms = {}, {}
    for budget, (ms, draft_bytes) in draft_steps(target, folders[1], dtype, rounds).items():
        draft_ms[budget], draft_floor_ms[budget] = ms, draft_bytes / bandwidth / 1e6
        note = f"{ms / draft_floor_ms[budget]:.2f} × floor, {ms / steps['AR']:.1%} of an AR step"
        show(f"draft token {budget}", ms, draft_floor_ms[budget], note)
    gflops = prompt_attention(folders[0], context, dtype, rounds)
    for name, speed in gflops.items():
        print(f"  prompt: {name:28} {speed:8.1f} GFLOPS  {speed / gflops['product']:5.0%} of the product")
    return {
        "floor_ms": floor_ms,
        "steps_ms": steps,
        "draft_ms": draft_ms,
        "draft_floor_ms": draft_floor_ms,
        "prompt_gflops": gflops,
    }


def main(
    shapes: Annotated[str, typer.Option(help="pocket and 125m, by comma.")] = "pocket,125m",
    contexts: Annotated[str, typer.Option(help="Tokens in the target's cache.")] = "4096,8192,16384",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Timed rounds of each step.")] = 9,
) -> None:
    found, bandwidth = [], stream_speed()
    print(f"{machine()}; {dtype}; stream from memory {bandwidth:.1f} GB/s on {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes.split(","):
            folders = (POCKET / "target", POCKET / "drafter") if shape == "pocket" else random_pair(Path(temporary))
            for context in map(int, contexts.split(",")):
                print(f"{shape} at {context} tokens")
                head = {"shape": shape, "context": context, "dtype": dtype, "bandwidth_gb_s": bandwidth}
                found.append(head | measure(folders, context, DTYPES[dtype], bandwidth, rounds))
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
