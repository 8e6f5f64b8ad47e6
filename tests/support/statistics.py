"""Tests of counts against a distribution."""

from __future__ import annotations

import torch


def p_value(counts, law) -> float:
    """Of Pearson's chi-square test of counts [N] against their law [N], which is nowhere zero."""
    counts, law = (torch.as_tensor(x).double() for x in (counts, law))
    expected = counts.sum() * law / law.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2))


def fits(counts, law) -> bool:
    return p_value(counts, law) > 1e-4


def law_of_two(sampling, plain, prompt, vocab):
    """Joint law [V, V] of the two tokens after `prompt`, by plain forwards of the reader `plain`."""
    plain.prefill(prompt[:-1])
    first = sampling.distribution(plain.feed(prompt[-1:], 1))[0]
    joint = torch.zeros(vocab, vocab)
    for token in range(vocab):
        joint[token] = first[token] * sampling.distribution(plain.feed([token], 1))[0]
        plain.rollback(len(prompt))
    return joint
