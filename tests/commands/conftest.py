"""A finished run for the tests of the commands."""

import pytest

from support.micro_runs import MicroRuns


@pytest.fixture(scope="session")
def micro(micro: MicroRuns) -> MicroRuns:
    """A folder with data, and one finished run named ``run``."""
    micro.make("run")
    return micro
