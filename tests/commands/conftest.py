"""The forked runs of ``tests/training``, for the tests of the commands."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from micro_runs import MicroRuns  # noqa: E402


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroRuns]:
    """A folder with data, and one finished run named ``run``."""
    runs = MicroRuns(tmp_path_factory.mktemp("commands"), NO_COLOR="")
    runs.train("run").assert_done()
    yield runs
    runs.cli.close()
