"""The forked runs of ``tests/training``, for the tests of the commands."""

from collections.abc import Iterator

import pytest

from support.micro_runs import MicroRuns


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroRuns]:
    """A folder with data, and one finished run named ``run``."""
    runs = MicroRuns(tmp_path_factory.mktemp("commands"), NO_COLOR="")
    runs.train("run").assert_done()
    yield runs
    runs.cli.close()
