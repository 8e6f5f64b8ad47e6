"""The memory plan against what is allocated: exactly for what lives, from above and not by far for what passes."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bdcli.backends.select import static_backend
from bdcli.base.devices import RUNTIME_BYTES
from bdcli.base.errors import UserError
from bdcli.bench.shapes import parse_shape
from bdcli.cache.selection import CacheSize, Chunk, Full, Official, Window
from bdcli.cache.view import FULL, plan_view
from bdcli.data.prompts import cut_prompt, stdlib_text
from bdcli.decode import memory
from bdcli.decode.memory import decode_plan
from bdcli.model.hub import POCKET
from bdcli.model.rope import RopeTable
from bdcli.model.sizes import weight_count
from bdcli.model.tokenizer import load_tokenizer
from bdcli.results.store import Store
from bdcli.speculation.sampling import Sampling
from bdcli.speculation.speculator import Speculator
from bdcli.train.distill.memory import distill_memory
from bdcli.train.distill.teacher import KEPT_TARGETS_BYTES
from bdcli.train.forward import final_rows, view_hidden
from bdcli.train.losses import head_loss
from bdcli.train.targets import HiddenTarget
from tests.support.models import tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
STDLIB = "--set", "corpus.sources=[stdlib]", "--set", "corpus.weights=[1]", "--set", "held_out.sources=[stdlib]"
STATIC = static_backend("triton", "plain operations")


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


SELECTIONS = {
    "full": Full(),
    "official": Official(256),
    "window": Window(256),
    "chunk": Chunk(256),
    "chunk absolute": Chunk(256, "absolute"),
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_run_holds_what_was_planned(kind):
    selection = SELECTIONS[kind]
    shape = {"dim": 16, "heads": 4, "kv_heads": 2, "hidden": 64, "inner": 160}
    target, drafter = tiny_model(layers=3, **shape), tiny_model(layers=2, **shape)
    prompt, new, gamma = 2600, 40, selection.gamma_max
    capacity = prompt + new + gamma + 2
    size = CacheSize(prompt - 1, capacity, capacity)
    plan = decode_plan(target.config, drafter.config, "float32", size, selection)
    ids = torch.randint(41, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    with Peak() as peak:
        run = Speculator(STATIC.target(target, size), STATIC.drafter(drafter, selection, size, 41), Sampling(), 0)
        run.prefill(ids)
        read, peak.most = peak.most, peak.alive
        held = peak.alive
        run.round(gamma)
    kv = [run.target.cache.kv_bytes, run.drafter.kv_bytes]
    assert kv == [plan.target_kv, plan.drafter_kv]
    assert held <= sum(kv) + plan.tables + 10_000  # a table of the ring
    assert 0.6 * plan.prefill < read - sum(kv) - plan.tables < 1.05 * plan.prefill
    # plain attention, which stands in for the kernels here, copies a layer's values and makes three sets of scores
    plain = 4 * capacity * (2 * 16 + 3 * (gamma + 1) * 4)
    assert peak.most - held < plan.round + plain
    assert plan.peak == plan.weights + sum(kv) + plan.tables + max(plan.prefill, plan.round)


def test_too_little_memory_is_said_with_the_numbers():
    c = tiny_model().config
    plan = decode_plan(c, c, "float16", CacheSize(1000, 1100, 1100), Full(8))
    plan.check(plan.peak)
    with pytest.raises(UserError, match=r"peak .* but 0\.0 MB are free"):
        plan.check(1)
    with pytest.raises(UserError, match="smaller models"):
        plan.check(plan.weights - 1)
    with pytest.raises(UserError, match="Shorten the prompt"):
        plan.check(plan.weights + 1)


@pytest.fixture
def scarce(monkeypatch):
    """A machine with a few MB left, on which loading a model is an error of its own."""

    def unexpected(*_args, **_kwargs):
        raise AssertionError("memory is checked before anything is loaded")

    monkeypatch.setattr(memory, "free_memory", lambda _device: 5_000_000)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)  # tests before this one have left theirs
    for place in ("bdcli.decode.pair.load_model", "bdcli.bench.shapes.random_model"):
        monkeypatch.setattr(place, unexpected)


@pytest.mark.parametrize(
    "words",
    [
        ["decode", "PROMPT", "--trim", "middle", "--max-new-tokens", 16000],
        ["bench", "--ctx", "16k", "--methods", "bd", "--budgets", 64, "--samples", 1],
        ["bench", "--shape", "llama2-7b+68m", "--ctx", "4k"],
        ["prepare", RECIPES / "llama_4k.yaml", "--out", "OUT"],
        ["distill", RECIPES / "llama_4k.yaml", "--out", "OUT"],
        ["pretrain", RECIPES / "pocket_target.yaml", *STDLIB, "--max-minutes", 1, "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.usefixtures("scarce")
def test_too_little_memory_is_one_line_before_anything_is_loaded(words, cli, tmp_path):
    prompt = tmp_path / "p.txt"
    prompt.write_text("x = 1\n" * 8000)
    places = {"PROMPT": prompt, "OUT": tmp_path / "out"}
    done = cli(*(places.get(word, word) for word in words))
    error = done.err.splitlines()[-1]
    assert done.code == 2 and done.out == "", done.err
    assert "are free" in error and "Traceback" not in done.err
    if words[0] in ("decode", "bench"):
        assert done.err.count("\n") == 1
    assert not Store().runs() and not (tmp_path / "out").exists()


def test_what_is_planned_is_what_is_resident_then(tmp_path):
    """Of a process that decodes, to a tenth: weights, caches, the prompt's activations, Python and its libraries."""
    # compiled by now, for compiling takes memory of its own
    subprocess.run([sys.executable, "-c", "import bdcli.backends.cpu.runner"], check=True)
    prompt = cut_prompt(load_tokenizer(POCKET / "target"), stdlib_text(), 3000)
    words = ["decode", "-", "--max-new-tokens", "8", "--baseline", "off", "--dtype", "float32", "--json"]
    command = [sys.executable, "-m", "bdcli", *words, "--db", str(tmp_path / "r.db")]
    done = subprocess.run(command, input=prompt.encode(), capture_output=True, check=True)
    run = json.loads(done.stdout)
    assert abs(run["planned_bytes"] / run["peak_memory_bytes"] - 1) < 0.1, run


# -- distilling

STEP = {"hidden": 64, "inner": 160, "dim": 16, "heads": 4, "kv_heads": 4, "vocab": 300}


SMALL, LARGE = (plan_view(b, "window", p, None, 2048) for b, p in ((64, "rebased"), (700, "absolute")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("views", [[FULL], [FULL, SMALL, LARGE]], ids=["full", "views"])
def test_a_training_step_holds_what_was_planned(views, dtype):
    """Activations and loss of one window, forward and backward; what a rank-0 run adds is counted from weights."""
    target, drafter = tiny_model(layers=2, **STEP, dtype=dtype), tiny_model(layers=2, **STEP, spread=0.1)
    for tensor in drafter.tensors():
        tensor.requires_grad_()
    tokens, size = 2048, dtype.itemsize
    ids = torch.randint(300, (tokens,), generator=torch.Generator().manual_seed(0))
    planned = distill_memory(target.config, drafter.config, tokens, views, (), size)
    with Peak() as forward:
        hidden = final_rows(target, ids)
    assert 0.5 * planned["target's forward"] < forward.most < 1.05 * planned["target's forward"]
    with Peak() as peak:
        rope = RopeTable(drafter.config.rope, tokens, tokens, dtype, "cpu")
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            x = view_hidden(drafter, rope, ids, views)
        activations = peak.alive
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], drafter.norm, 1e-5).to(dtype)
        loss, _ = head_loss(x, drafter.head, HiddenTarget(hidden, target.head), "kl", 1.0)
        loss.backward()
    wanted = planned["drafter's activations"]
    assert 0.6 * wanted < activations < 1.1 * wanted
    gradients = 4 * weight_count(drafter.config)
    assert 0.6 * (wanted + planned["loss"]) < peak.most < 1.15 * (wanted + planned["loss"]) + gradients


def test_a_7b_target_at_16k_fits_an_80_gb_card():
    target, drafter = parse_shape("llama2-7b+68m")
    views = [FULL, *(plan_view(b, "window", "rebased", None, 16384) for b in (256, 2048, 1024))]
    plan = distill_memory(target, drafter, 16384, views, (), 2, 2**25 // 32000)
    assert 14e9 < sum(plan.values()) + KEPT_TARGETS_BYTES + RUNTIME_BYTES < 60e9


def test_peak_memory_is_this_processes_own():
    """Not that of the one that started it, which Linux hands on in `ru_maxrss`."""
    ballast = torch.ones(400_000_000, dtype=torch.uint8)
    code = "import torch; from bdcli.base.devices import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < ballast.nbytes
