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
    named = cli("bench", *words, "--dry-run", "--db", tmp_path / "new" / "runs.db")
    assert named.code == 0 and list(tmp_path.iterdir()) == []


def test_a_dry_run_reads_an_existing_store_and_leaves_it_as_it_was(cli, tmp_path):
    words = ("bench", "--ctx", "128", "--samples", "1", "--max-new-tokens", "4", "--methods", "ar")
    assert cli(*words).code == 0
    before = files(tmp_path)
    found = cli(*words, "--dry-run")
    assert found.code == 0 and "1 of 1 texts are stored" in found.err
    assert files(tmp_path) == before
