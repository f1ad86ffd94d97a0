"""The shipped scaling examples run and train on a CPU, with the overrides of their headers."""

import re
from pathlib import Path

import pytest

import deepseek
from deepseek.config import load_config
from support.examples import ALONE, PROCESSES, QUICK, header_overrides
from support.launchers import by_itself, log_distance
from support.micro_runs import MicroRuns

GUIDE = Path(deepseek.__file__).parent / "docs" / "distributed.md"
AFFORDABLE = [name for name, count in PROCESSES.items() if count <= 8]
"""32 processes: tests/support/four_hosts.py."""


@pytest.fixture(scope="module")
def alone(micro: MicroRuns) -> str:
    """The model of all examples in one process."""
    small = [*header_overrides("deepseek_v3_distributed"), *QUICK]
    words = micro.words("example", *small, *ALONE, config="deepseek_v3_distributed")
    micro.cli.start(*words).wait().assert_done()
    return "example"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if PROCESSES[name] > 4 else [])
        for name in AFFORDABLE
    ],
)
def test_an_example_trains_as_one_process_does(micro: MicroRuns, alone: str, name: str) -> None:
    settings = [*header_overrides(name), *QUICK]
    ran = by_itself(micro, name, *settings, config=name).wait().assert_done()
    assert f"{PROCESSES[name]} processes: " in ran.out
    assert log_distance(micro, alone, name) <= 1e-5


@pytest.mark.parametrize("name", PROCESSES)
def test_a_header_fits_its_configuration(name: str) -> None:
    cfg = load_config(name, header_overrides(name))
    assert cfg.trainer.devices * cfg.trainer.num_nodes == PROCESSES[name]


def test_the_guides_commands_are_sound() -> None:
    text = re.sub(r"\\\n", " ", GUIDE.read_text())
    lines = re.findall(r"deepseek train --config (\S+)(.*)", text)
    assert len(lines) >= 3
    for config, rest in lines:
        load_config(config, [word for word in rest.split() if "=" in word])
