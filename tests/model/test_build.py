"""Models that are made here: of another depth, and written so that transformers reads them."""

import pytest
import torch

from bdcli.cache.full import FullCache
from bdcli.config.optimizer import Updates
from bdcli.model.build import with_layers
from bdcli.model.checkpoint import load_model, save_model
from bdcli.model.hub import POCKET
from bdcli.model.rope import RopeTable
from bdcli.train.forward import causal_hidden
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model


def test_saved_models_come_back_and_transformers_reads_them(tmp_path):
    from transformers import AutoModelForCausalLM

    model = load_model(POCKET / "drafter", torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.layers[0].gate_up.add_(torch.randn_like(model.layers[0].gate_up).bfloat16().float())
    save_model(model, POCKET / "drafter", tmp_path / "d")
    again = load_model(tmp_path / "d", torch.float32, torch.device("cpu"))
    assert all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(model.tensors(), again.tensors(), strict=True))
    ids = torch.arange(5, 45)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)(ids).logits[0]
    ours = again.forward(ids[0].tolist(), FullCache(again, 40), 40)
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("family", [{}, {"biases": True}, {"qk_norm": True, "kv_heads": 1}])
def test_another_depth_begins_as_the_model_it_comes_from(family):
    model = tiny_model(**family)
    deeper, cut = with_layers(model, 4, seed=1), with_layers(model, 1, seed=1)
    want = model.forward(list(range(9)), FullCache(model, 9), 9)
    assert torch.equal(deeper.forward(list(range(9)), FullCache(deeper, 9), 9), want)
    assert not torch.allclose(cut.forward(list(range(9)), FullCache(cut, 9), 9), want, atol=0.1)
    assert len(cut.layers) == cut.config.layers == 1 and torch.equal(cut.layers[0].qkv, model.layers[0].qkv)
    assert deeper.layers[3].qkv.std() > 0  # what reads is random, so that gradients reach it once outputs move
    made = Trainer(deeper, Updates(method="muon"))
    ids = torch.arange(9)[None]
    rope = RopeTable(deeper.config.rope, 9, 9, torch.float32, "cpu")
    for _ in range(2):
        made.step(lambda _: [lambda: causal_hidden(deeper, rope, ids).square().mean()])
    assert deeper.layers[3].out.abs().max() > 0 and deeper.layers[3].down.abs().max() > 0
