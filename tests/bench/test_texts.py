"""`bdcli bench`: texts that spell special tokens, contexts equal to a budget, and the sampling settings of a recipe."""

from tests.support.bench import SMALL, reasons


def test_a_recipe_may_penalise_repetition_and_every_arm_writes_ars_text(cli, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i} says </s> and {i * i} things\n" for i in range(400)))
    flags = ["--prompts", book, "--methods", "ar,bd,lookup,hf-ar", "--budgets", 64, "--ctx", 64, "--select", "chunk"]
    flags += ["--gamma", 3, "--max-new-tokens", 12, "--set", "repetition_penalty=1.3"]
    done = cli(*SMALL[:1], *flags, "--samples", 2, "--dtype", "float32", "--engine", "torch", "--json")
    assert "spells 400 special tokens, read as such: </s> (400); --set special_tokens=text" in done.err
    assert set(reasons(done).values()) == {None}
    assert all(cell["output_equal"] is True for cell in done.json["cells"])
    literal = cli(*SMALL[:1], *flags, "--samples", 2, "--set", "special_tokens=text", "--dry-run")
    assert "special tokens" not in literal.err


def test_settings_that_no_run_can_use_are_refused(cli):
    for word in ("seed=100000000000000000000000", "seed=-1", "top_k=100000000000000000000000", "min_p=2", "top_p=0"):
        done = cli("bench", "--ctx", 64, "--set", word)
        assert done.code == 2 and word.partition("=")[0] in done.err and " must " in done.err, done.err
