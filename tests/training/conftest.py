"""One server of forked runs per test process."""

from collections.abc import Iterator

import pytest

from support.micro_runs import MicroRuns


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroRuns]:
    runs = MicroRuns(tmp_path_factory.mktemp("micro"))
    yield runs
    runs.cli.close()


@pytest.fixture(scope="session")
def whole(micro: MicroRuns) -> str:
    """The uninterrupted run that others are compared with."""
    micro.train("whole").assert_done()
    return "whole"
