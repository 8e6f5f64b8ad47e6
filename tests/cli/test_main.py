"""The entry point of the command line: what a start imports, and the version."""

import subprocess
import sys
from pathlib import Path

import pytest

from bdcli import __version__
from bdcli.model.hub import POCKET

HEAVY = {"torch", "transformers", "datasets", "matplotlib"}


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], {*HEAVY, "sqlmodel", "sqlalchemy"}),
        (["decode", "--help"], {*HEAVY, "sqlmodel", "sqlalchemy"}),
        (["report"], HEAVY),
        (["report", "--format", "json"], HEAVY),
    ],
)
def test_light_commands_import_nothing_heavy(args, unwanted):
    code = """if True:
        import sys, bdcli.cli.main
        sys.argv = ["bdcli", *sys.argv[1:]]
        try:
            bdcli.cli.main.main()
        except SystemExit as stop:
            assert not stop.code
        print(*sys.modules, file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, text=True)
    assert not unwanted & set(done.stderr.split())


def test_version(cli):
    assert cli("--version").out == f"bdcli {__version__}\n"
    assert Path(POCKET / "target" / "README.md").exists()
