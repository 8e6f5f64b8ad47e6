"""Operations of a forward, for estimates of time."""

from dataclasses import replace

import pytest
import torch

from bdcli.config.pretrain import Shape
from bdcli.model.checkpoint import load_model
from bdcli.model.hub import POCKET
from bdcli.model.rope import RopeTable
from bdcli.train.forward import causal_hidden


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from bdcli.model.build import random_model
    from bdcli.train.estimate import BACKWARD, forward_operations, speed

    model = random_model(
        replace(load_model(POCKET / "drafter", torch.float32, torch.device("cpu")).config, layers=2), 0
    )
    table = RopeTable(model.config.rope, 256, 256, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counted:
        model.logits(causal_hidden(model, table, torch.arange(256)[None])[0])
    products = forward_operations(model.config, 256, 0)  # torch does not count attention on a CPU
    assert counted.get_total_flops() == pytest.approx(products, rel=0.01)
    c = model.config
    scores_and_sums = 2 * c.layers * c.heads * 256 * 100 * 2 * c.head_dim
    assert forward_operations(c, 256, 100) - products == scores_and_sums
    assert speed(Shape(), torch.float32, torch.device("cpu")) > 1e8 and BACKWARD == 3
