"""γ auto: drafts long when that pays, stops when it does not, and follows the machine."""

import random

import pytest

from bdcli.speculation.draft_length import AutoGamma, RoundCosts


def run_auto(accept, draft_s, verify_s, rounds=200, limit=8, first_s=0.0):
    """Drive AutoGamma with fixed costs and a drafter that gets its first accept(round) proposals right."""

    def cost(gamma):
        return first_s * (gamma > 0) + draft_s * gamma + verify_s(gamma + 1)

    auto, chosen = AutoGamma(limit, {g: cost(g) for g in (0, 1, limit)}), []
    for i in range(rounds):
        gamma = auto.choose()
        chosen.append(gamma)
        auto.observe(gamma, min(gamma, accept(i)), cost(gamma))
    return chosen


def test_auto_gamma_drafts_long_when_drafts_are_cheap_and_good():
    assert set(run_auto(lambda _: 8, 0.001, lambda _: 0.1)[20:]) == {8}


def test_auto_gamma_knows_that_the_first_draft_token_costs_most():
    """Seconds over γ would make longer drafts look as dear, a token, as the short ones tried first."""
    rng = random.Random(0)
    passes = [next(n for n in range(99) if rng.random() > 0.7) for _ in range(600)]  # runs of hits, 7 of 10 go on
    rate = {g: (1 - 0.7 ** (g + 1)) / 0.3 / (0.4 + 0.05 * g + 1.7 + 0.2 * g) for g in range(1, 9)}
    chosen = run_auto(lambda i: passes[i], 0.05, lambda rows: 1.5 + 0.2 * rows, rounds=600, first_s=0.4)
    assert max(rate, key=rate.get) == 4
    assert sum(rate.get(g, 0) for g in chosen[100:]) / 500 > 0.98 * rate[4]


@pytest.mark.parametrize("dear", [1, 3, 5, 8, 16])
def test_auto_gamma_is_not_misled_for_long_by_one_bad_moment(dear):
    """A γ that looked twice as dear as it is may cost a few percent, no more."""
    rng, chosen = random.Random(dear), []
    cost = {g: 2.5 + 0.3 * g for g in range(17)}
    rate = {g: (1 - 0.8 ** (g + 1)) / 0.2 / cost[g] for g in cost}
    auto = AutoGamma(16, {g: cost[g] * (2 if g == dear else 1) for g in (0, 1, 3, 5, 7, 8, 9, 12, 16)})
    for _ in range(400):
        chosen.append(auto.choose())
        passed = next(n for n in range(99) if rng.random() > 0.8)
        stall = 4 if rng.random() < 0.03 else 1
        auto.observe(chosen[-1], min(chosen[-1], passed), stall * rng.uniform(0.95, 1.1) * cost[chosen[-1]])
    assert sum(rate[g] for g in chosen[50:]) / 350 > 0.95 * max(rate.values())


def test_costs_of_rounds_follow_the_machine_and_what_a_length_shows_of_itself():
    costs = RoundCosts({0: 2.0, 1: 9.0, 3: 3.0, 5: 4.0, 9: 8.0})
    assert [costs.of(g) for g in (0, 1, 2, 3, 4, 7, 11)] == pytest.approx([2, 3, 3, 3, 3.5, 6, 10]), "1 was a stall"
    for _ in range(200):
        costs.add(5, 8.0)  # the machine is half as fast
    assert [costs.of(g) for g in (0, 3, 5, 9)] == pytest.approx([4, 6, 8, 16], rel=0.01)
    costs.add(5, 800.0)
    assert costs.of(5) == pytest.approx(8, rel=0.05), "one stall counts for little"
    for n in range(400):
        costs.add((3, 5, 9)[n % 3], (6.0, 8.0, 8.0)[n % 3])  # nine cost as much as five, not twice it
    assert costs.of(9) < 0.85 * 2 * costs.of(5) and costs.of(3) == pytest.approx(6, rel=0.2)


def test_auto_gamma_stops_when_drafting_does_not_pay_and_tries_again():
    chosen = run_auto(lambda i: 0 if i < 150 else 8, 0.02, lambda _: 0.05, rounds=700)
    early = chosen[20:150]
    assert early.count(0) > 0.75 * len(early), "drafting costs and gains nothing"
    assert any(early), "but it is tried again"
    assert min(chosen[-50:]) > 0, "and comes back when it pays"


def test_auto_gamma_keeps_drafts_short_when_rows_are_dear():
    chosen = run_auto(lambda i: i % 2, 0.001, lambda rows: 0.01 * rows)
    assert max(chosen[20:]) <= 2
