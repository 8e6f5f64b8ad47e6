"""Loop rate by its definition, figures of a run, text that arrives in pieces."""

import random

from bdcli.model.text import StopText, TextStream
from bdcli.results.metrics import LOOP_GRAM, LOOP_REACH, RoundFigures, looped_tokens, measure


def looped_by_definition(prompt, new):
    ids, out = prompt + new, []
    for end in range(len(prompt), len(ids)):
        gram = ids[end - LOOP_GRAM + 1 : end + 1]
        earlier = [
            e
            for e in range(LOOP_GRAM - 1, end)
            if ids[e - LOOP_GRAM + 1 : e + 1] == gram and (e >= len(prompt) or end - e <= LOOP_REACH)
        ]
        out.append(len(gram) == LOOP_GRAM and bool(earlier))
    return out


def test_loops_match_the_definition_on_random_small_alphabets():
    rng = random.Random(1)
    for _ in range(30):
        prompt = [rng.randrange(2) for _ in range(rng.choice((0, 3, 90, 1500)))]
        new = [rng.randrange(2) for _ in range(rng.choice((1, 70)))]
        assert looped_tokens(prompt, new) == looped_by_definition(prompt, new)


def test_a_repeat_from_far_back_in_the_prompt_is_no_loop():
    rare = list(range(100, 120))
    filler = list(range(1000, 1000 + LOOP_REACH + 50))
    assert not any(looped_tokens(rare + filler, rare))
    assert sum(looped_tokens(filler + rare, rare)) == len(rare) - LOOP_GRAM + 1


def test_figures_of_a_run():
    rounds = [RoundFigures(3, 4, 2, 0.5), RoundFigures(1, 4, 0, 0.5), RoundFigures(1, 0, 0, 0.25)]
    m = measure([1], list(range(50, 55)), rounds)
    assert (m.drafted, m.accepted, m.acceptance_rate) == (8, 2, 0.25)
    assert m.mean_accepted_length == 5 / 3 and m.tokens_per_second == 4.0
    assert m.loop_rate == 0 and m.acceptance_rate_no_loops == 0.25


def test_rounds_that_begin_in_a_loop_are_left_out():
    loop = [7] * 30
    m = measure([1, 2], loop, [RoundFigures(10, 9, 9, 1.0), RoundFigures(20, 19, 19, 1.0)])
    assert m.acceptance_rate == 1.0 and m.acceptance_rate_no_loops == 1.0  # the first round began outside
    m = measure([7] * 20, loop, [RoundFigures(30, 29, 29, 1.0)])
    assert m.loop_rate == 1.0 and m.acceptance_rate_no_loops is None


def test_nothing_drafted_gives_null_not_zero():
    m = measure([1], [2], [RoundFigures(1, 0, 0, 0.1)])
    assert m.acceptance_rate is None and m.acceptance_rate_no_loops is None
    assert measure([1], [], []).tokens_per_second is None


def test_streamed_text_equals_the_whole(pocket):
    tokenizer = pocket[2]
    text = "naïve – «日本語» 🙂\n\tdef f(x):  return x  # ok\n" * 3
    ids = tokenizer(text)["input_ids"]
    rng = random.Random(3)
    for _ in range(5):
        stream, shown, i = TextStream(tokenizer), "", 0
        while i < len(ids):
            step = rng.randint(1, 4)
            piece = stream.feed(ids[i : i + step])
            assert "\ufffd" not in piece
            shown, i = shown + piece, i + step
        assert shown + stream.feed([], end=True) == tokenizer.decode(ids) == text


def test_stop_text_is_found_across_pieces_and_never_shown():
    for cut in range(1, 12):
        stop = StopText(("STOP", "XY"))
        whole = "abc ST STO STOP tail"
        pieces = [whole[i : i + cut] for i in range(0, len(whole), cut)]
        assert "".join(stop.feed(p) for p in pieces) == "abc ST STO " and stop.found
    stop = StopText(("STOP",))
    assert stop.feed("a ST") + stop.feed("", end=True) == "a ST" and not stop.found
