"""One thread per process: tests run side by side, and threads that wait for each other crawl."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.micro_runs import MicroRuns

TESTS = Path(__file__).resolve().parent

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# They find `support` too, and this checkout's package.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS), str(TESTS.parent / "training" / "nemo"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the forks of the tests


def pytest_configure(config: pytest.Config) -> None:
    """In a process that runs tests, not in the one that hands them out to workers."""
    if config.getoption("numprocesses", 0) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    gc.disable()  # until all is imported and collected, of which nothing is garbage
    import torch

    from support import profiles  # noqa: F401

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroRuns]:
    """The server of forked runs of this test process, and a folder with data for them."""
    from support.micro_runs import MicroRuns

    runs = MicroRuns(tmp_path_factory.mktemp("micro"), NO_COLOR="")
    yield runs
    runs.cli.close()


@pytest.fixture(scope="session")
def whole(micro: MicroRuns) -> str:
    """The uninterrupted run that others are compared with."""
    return micro.make("whole")


def pytest_sessionstart() -> None:
    """Before anything is collected."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from support.forked import prepare_server

        prepare_server()


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no search for garbage goes through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that may take longest begin first, so that no worker ends alone with one of them."""
    items.sort(key=lambda item: -_most_seconds(item))


def _most_seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0
