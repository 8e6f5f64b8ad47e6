"""Guiding two heads to copy."""

import math

import pytest
import torch
import torch.nn.functional as F

from bdcli.cache.view import FULL
from bdcli.config.optimizer import Updates
from bdcli.data.corpus import ordinary_ids
from bdcli.model.build import with_layers
from bdcli.model.rope import RopeTable
from bdcli.train.forward import attend
from bdcli.train.pretrain.copying import LESSON_TOKENS, LESSON_WINDOWS, guide_loss, lesson
from bdcli.train.trainer import Trainer
from tests.support.models import tiny_model


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_guide_asks_for_attention_where_a_copy_would_be_found(kv_heads):
    """Against plain loops over one text's scores."""
    model, g = tiny_model(kv_heads=kv_heads), torch.Generator().manual_seed(kv_heads)
    c, length = model.config, 23
    ids = torch.randint(0, 5, (2, length), generator=g)
    ids[1] = torch.arange(length) % 19  # one text that hardly repeats
    rope = RopeTable(c.rope, length, length, torch.float32, "cpu")
    previous, induced = [], []
    for row in ids.tolist():
        x = F.embedding(torch.tensor(row), model.embedding)
        for number, layer in enumerate(model.layers):
            qk, v = model.project(layer, x)
            turned = rope.rotate(qk, rope.rows(slice(0, length)))
            for t in range(length):
                weights = (turned[: t + 1, c.heads] @ turned[t, 0] / c.head_dim**0.5).softmax(0)
                if number == 0 and t > 0:
                    previous.append(-math.log(weights[t - 1]))
                followers = [s for s in range(1, t + 1) if row[s - 1] == row[t]]
                if number == len(model.layers) - 1 and followers:
                    induced.append(-math.log(sum(weights[s] for s in followers)))
            x = model.mix(layer, x, attend(rope, qk, v, FULL))
    want = sum(previous) / len(previous) + sum(induced) / len(induced)
    assert float(guide_loss(model, ids, torch.float32)) == pytest.approx(want, rel=1e-4)
    assert len(induced) < len(previous)
    with pytest.raises(ValueError, match="two layers"):
        guide_loss(with_layers(model, 1, 0), ids, torch.float32)


def test_lessons_repeat_themselves_and_move_the_heads(pocket):
    ids = ordinary_ids(pocket[2])
    once, again, other = lesson(0, 5, ids), lesson(0, 5, ids), lesson(0, 6, ids)
    assert torch.equal(once, again) and not torch.equal(once, other) and once.shape == (LESSON_WINDOWS, LESSON_TOKENS)
    known = [len(set(row)) / LESSON_TOKENS for row in once.tolist()]
    assert max(known) < 0.75 and 0 not in once and 1 not in once
    model = tiny_model(vocab=len(pocket[2]))
    made = Trainer(model, Updates(method="muon", lr=2e-2))
    losses = [made.step(lambda _: [lambda: guide_loss(model, once, torch.float32)]) for _ in range(30)]
    assert losses[-1] < losses[0] - 1.5
