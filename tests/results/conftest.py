"""A stored sweep, as `bdcli report` reads it."""

import pytest

from bdcli.results.store import Store
from tests.support.cells import sweep


@pytest.fixture
def swept(tmp_path):
    return sweep(Store(str(tmp_path / "runs.db")))
