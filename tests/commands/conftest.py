"""A finished run for the tests of the commands."""

import shutil
from pathlib import Path

import pytest

from support.forked import Forked
from support.micro_runs import MicroRuns


@pytest.fixture(scope="session")
def micro(micro: MicroRuns) -> MicroRuns:
    """A folder with data, and one finished run named ``run``."""
    micro.make("run")
    return micro


@pytest.fixture
def cli(micro: MicroRuns) -> Forked:
    """The command line, in the folder of ``micro``."""
    return micro.cli


@pytest.fixture
def copy(micro: MicroRuns, tmp_path: Path) -> Path:
    """A copy of the finished run, checkpoints of steps 8 and 12."""
    return Path(shutil.copytree(micro.folder / "run", tmp_path / "copy"))
