"""The memory plan against what is allocated: exactly for what lives, from above and not by far for what passes."""

import weakref

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from bdcli.engine import static_engine
from bdcli.errors import UserError
from bdcli.memory import decode_plan, weight_count
from bdcli.sampling import Sampling
from bdcli.speculate import Speculator
from bdcli.views import View

STATIC = static_engine("triton", "plain operations")


class Peak(TorchDispatchMode):
    """Bytes of tensor storage alive that were made within, and the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self._known = set()

    def _drop(self, key, size):
        self._known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._drop, key, storage.nbytes())
        self.most = max(self.most, self.alive)
        return out


@pytest.mark.parametrize(
    "shape", [{}, {"biases": True, "qk_norm": True, "heads": 3, "kv_heads": 3}, {"layers": 1}], ids=["a", "b", "c"]
)
def test_weights_are_counted(shape):
    model = tiny_model(**shape)
    assert 4 * weight_count(model.config) == model.weight_bytes


VIEWS = {
    "full": (None, None),
    "official": (None, 256),
    "window": (View(256, 4, 0, 9, True), None),
    "chunk": (View(256, 4, 64, 9, True), None),
    "chunk absolute": (View(256, 4, 64, 9, False), None),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_run_holds_what_was_planned(kind):
    view, official = VIEWS[kind]
    shape = {"dim": 16, "heads": 4, "kv_heads": 2, "hidden": 64, "inner": 160}
    target, drafter = tiny_model(layers=3, **shape), tiny_model(layers=2, **shape)
    prompt, new, gamma = 2600, 40, 8
    capacity = prompt + new + gamma + 2
    plan = decode_plan(target.config, drafter.config, 4, prompt - 1, capacity, gamma, view, official)
    ids = torch.randint(41, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    with Peak() as peak:
        readers = (
            STATIC.target(target, capacity, capacity),
            STATIC.drafter(drafter, capacity, capacity, 41, official, view),
        )
        run = Speculator(*readers, Sampling(), 0)
        run.prefill(ids)
        read, peak.most = peak.most, peak.alive
        held = peak.alive
        run.round(gamma)
    kv = [r.cache.kv_bytes for r in readers]
    assert kv == [plan.target_kv, plan.drafter_kv]
    assert held <= sum(kv) + plan.tables + 10_000  # a table of the ring
    assert 0.6 * plan.prefill < read - sum(kv) - plan.tables < 1.05 * plan.prefill
    # plain attention, which stands in for the kernels here, copies a layer's values and makes three sets of scores
    plain = 4 * capacity * (2 * 16 + 3 * (gamma + 1) * 4)
    assert peak.most - held < plan.round + plain
    assert plan.peak == plan.weights + sum(kv) + plan.tables + max(plan.prefill, plan.round)


def test_too_little_memory_is_said_with_the_numbers():
    c = tiny_model().config
    plan = decode_plan(c, c, 2, 1000, 1100, 8)
    plan.check(plan.peak)
    with pytest.raises(UserError, match=r"peak .* but 0\.0 MB are free"):
        plan.check(1)
