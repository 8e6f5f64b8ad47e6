"""The bootstrap."""

import random
from statistics import mean

from bdcli.base.statistics import bootstrap


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, covered = random.Random(5), 0
    for _ in range(200):
        low, high = bootstrap([rng.gauss(3.0, 1.0) for _ in range(12)], mean, resamples=200)
        covered += low <= 3.0 <= high
    assert 170 <= covered <= 200
    assert bootstrap([1.0], mean) == (None, None) and bootstrap([2.0, 2.0], mean) == (2.0, 2.0)
