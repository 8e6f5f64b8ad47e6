"""Speed of the attention kernels against the bytes they move, a launch, and torch's own attention.

Small kernels are timed as many calls in one CUDA graph; on a CPU plain operations stand in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bdcli.backends.cuda.graph import capture, new_pool
from bdcli.backends.cuda.ops import ops_for
from bdcli.base.progress import SILENT, Progress
from bdcli.bench.timing import WARM_UP_CALLS, copy_speed, wait
from bdcli.cache.selection import Window

HEAD_DIM = 128  # of Llama-2-7B, whose target is the larger of the pair
SPARE_TOKENS = 32  # of a cache, for new rows
LAUNCH_CALLS = 10  # times the calls of a kernel, for one that does nothing
ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class AttentionBench:
    """What is measured. `batch` sequences fill the chip; `calls` of a kernel make one graph, run `repeats` times."""

    device: torch.device
    dtype: torch.dtype
    contexts: tuple[int, ...]
    rows: tuple[int, ...]  # new rows of a verification
    budget: int
    batch: int
    heads: int
    calls: int
    repeats: int

    def measure(self, progress: Progress = SILENT) -> dict:
        """Microseconds of a call, beside the ceilings of this device."""
        copy_gb_s, launch_us = copy_speed(self.device), self._launch_us()
        progress.note(f"copy {copy_gb_s:.0f} GB/s, launch floor {launch_us:.2f} us")
        return {
            "copy_gb_s": copy_gb_s,
            "launch_us": launch_us,
            "draft": list(self._draft(copy_gb_s)),
            "verify": list(self._verify(copy_gb_s)),
        }

    def _launch_us(self) -> float:
        """What a kernel that does nothing adds to a graph."""
        one = torch.zeros(1, device=self.device)
        return self._microseconds(lambda: one.add_(1), LAUNCH_CALLS * self.calls)

    def _draft(self, copy_gb_s: float) -> Iterator[dict]:
        """One query row over a full budget, rotated in the kernel, alone and for a batch that fills the chip."""
        position = 10 * self.budget
        view, run = Window(self.budget).view(position), ops_for(self.device.type).draft_attention
        table = self._randn(2 * position, HEAD_DIM)
        for batch in (1, self.batch):
            q = self._randn(batch, 1, self.heads, HEAD_DIM)
            k, v = (self._randn(batch, self.heads, self.budget, HEAD_DIM) for _ in range(2))
            arguments = q, k, v, torch.full((batch,), position, device=self.device)
            parts = view.sinks, view.chosen, view.window, view.ring
            us = self._microseconds(lambda a=(*arguments, *parts): run(*a, rope=(table, table)))
            floor_us = (k.nbytes + v.nbytes + 2 * q.nbytes) / copy_gb_s / 1e3
            yield {"batch": batch, "heads": self.heads, "budget": self.budget, "us": us, "floor_us": floor_us}

    def _verify(self, copy_gb_s: float) -> Iterator[dict]:
        """New rows over one long cache, ours and others'; what another cannot do is recorded as its error."""
        for context in self.contexts:
            k, v = (self._randn(1, self.heads, context + SPARE_TOKENS, HEAD_DIM) for _ in range(2))
            for rows in self.rows:
                q, length = self._randn(1, rows, self.heads, HEAD_DIM), torch.tensor([context], device=self.device)
                ours = ops_for(self.device.type).verify_attention
                found: dict = {"us": self._microseconds(lambda a=(q, k, v, length), run=ours: run(*a))}
                for name, call in {"sdpa": sdpa(q, k, v, context), "flex": flex(q, k, v, context)}.items():
                    found |= self._other(name, call)
                moved_bytes = 2 * self.heads * (context + rows) * HEAD_DIM * k.element_size()
                floor_us = moved_bytes / copy_gb_s / 1e3
                yield {"context": context, "rows": rows, "heads": self.heads, **found, "floor_us": floor_us}

    def _other(self, name: str, call: Callable[[], Tensor]) -> dict:
        try:
            return {f"{name}_us": self._microseconds(call)}
        except Exception as error:
            return {f"{name}_us": None, f"{name}_error": " ".join(str(error).split())[:ERROR_CHARACTERS]}

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _microseconds(self, call: Callable[[], object], calls: int | None = None) -> float:
        """Of one call among many in one graph; the median of some replays."""
        calls = calls or self.calls

        def many() -> None:
            for _ in range(calls):
                call()

        replay, times = capture(many, self.device, new_pool(self.device)), []
        for _ in range(self.repeats + WARM_UP_CALLS):
            wait(self.device)
            started = time.perf_counter()
            replay()
            wait(self.device)
            times.append(1e6 * (time.perf_counter() - started) / calls)
        return statistics.median(times[WARM_UP_CALLS:])


def sdpa(q: Tensor, k: Tensor, v: Tensor, context: int) -> Callable[[], Tensor]:
    """torch's scaled-dot-product attention of q [1, T, H, D] over k, v [1, H, K, D], rows masked after the context."""
    rows = q.shape[1]
    k, v, queries = k[:, :, : context + rows], v[:, :, : context + rows], q.transpose(1, 2)
    mask = torch.zeros(rows, context + rows, device=q.device, dtype=q.dtype)
    mask[:, context:] = torch.full((rows, rows), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    mask = None if rows == 1 else mask
    return lambda: torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor, context: int) -> Callable[[], Tensor]:
    """FlexAttention, compiled where there is a GPU; shapes as for `sdpa`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, made = q.shape[1], {}
    k, v, queries = k[:, :, : context + rows], v[:, :, : context + rows], q.transpose(1, 2)

    def call() -> Tensor:
        if not made:  # at the first call, so that an error is recorded as this implementation's
            made["mask"] = create_block_mask(
                lambda _b, _h, row, key: key <= row + context, None, None, rows, context + rows, device=str(q.device)
            )
            made["run"] = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention
        return made["run"](queries, k, v, block_mask=made["mask"])

    return call
