"""`bdcli bench --dry-run` prints the plan and writes nothing."""

import hashlib

import pytest


def files(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("words", [("--ctx", "256", "--samples", "1"), ("--shape", "tiny+tiny", "--ctx", "256")])
def test_a_dry_run_leaves_no_file(words, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cli("bench", *words, "--dry-run")
    assert found.code == 0 and "bdcli: " in found.err and found.out == ""
    assert list(tmp_path.iterdir()) == []
    for db in (tmp_path / "new" / "runs.db", f"sqlite:///{tmp_path}/runs.db"):
        named = cli("bench", *words, "--dry-run", "--db", db)
        assert named.code == 0 and list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_an_existing_store_and_leaves_it_as_it_was(cli, tmp_path):
    words = ("bench", "--ctx", "128", "--samples", "1", "--max-new-tokens", "4", "--methods", "ar")
    assert cli(*words).code == 0
    before = files(tmp_path)
    for db in (tmp_path / "runs.db", f"sqlite:///{tmp_path}/runs.db"):
        found = cli(*words, "--dry-run", "--db", db)
        assert found.code == 0 and "1 of 1 texts are stored" in found.err
    assert "0 of 1 texts are stored" in cli(*words, "--dry-run", "--fresh").err
    assert files(tmp_path) == before


def test_a_dry_run_loads_no_model_and_still_refuses_what_cannot_run(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("bdcli.decode.pair.load_model", None)
    assert cli("bench", "--ctx", "128", "--dry-run").code == 0
    for words, message in {
        ("--ctx", "17k"): "exceed the 16896 positions",
        ("--drafter", "nowhere/at/all"): "nowhere/at/all",
        ("--datasets", "nowhere/at/all"): "data source nowhere/at/all does not exist",
    }.items():
        done = cli("bench", *words, "--dry-run")
        assert done.code == 2 and message in done.err and list(tmp_path.iterdir()) == []
