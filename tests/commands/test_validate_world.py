"""``deepseek validate --world``: layouts of clusters that are not there."""

from __future__ import annotations

import pytest

from deepseek.commands.validate import validate
from deepseek.config import ConfigError, UserError

ONE_SEQUENCE = ["model.micro_batch_size=1", "model.global_batch_size=64"]


@pytest.mark.parametrize(
    ("config", "world", "devices", "nodes"),
    [
        ("deepseek_v3_8gpu", 8, 8, 1),
        ("deepseek_v3_8gpu", 4, 4, 1),
        ("deepseek_v3_8gpu", 32, 8, 4),
        ("deepseek_v3_distributed", 8, 4, 2),
        ("deepseek_v3_32gpu", 32, 8, 4),
        ("deepseek_v3_tiny", 4, 4, 1),
        ("deepseek_v3_tiny", 16, 8, 2),
    ],
)
def test_a_world_fills_one_node_or_whole_nodes(
    config: str, world: int, devices: int, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    validate(config, ONE_SEQUENCE, world)
    out = capsys.readouterr().out
    assert out.startswith(f"for {world} processes: ")
    assert f"trainer.devices={devices} trainer.num_nodes={nodes}" in out.splitlines()[-1]
    noun = "node" if nodes == 1 else "nodes"
    assert f"{world} ranks on {nodes} {noun} of {devices}" in out


def test_the_configured_world_needs_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    validate("deepseek_v3_32gpu")
    without = capsys.readouterr().out
    for part in (
        "4 nodes of 8",
        "2 pipeline stages",
        "experts of",
        "shapes:",
        "states of one rank",
    ):
        assert part in without
    assert "note:" not in without
    validate("deepseek_v3_tiny")
    assert "ranks" not in capsys.readouterr().out


def test_a_width_given_by_override_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["trainer.devices=2", "model.expert_model_parallel_size=4"]
    validate("deepseek_v3_tiny", [*ONE_SEQUENCE, *more], world=8)
    out = capsys.readouterr().out
    assert "8 ranks on 4 nodes of 2" in out
    assert "note: EP 4 is wider than a node of 2" in out


def test_the_command_to_train_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    validate("deepseek_v3_tiny", ["name=a run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "train it with: deepseek train --config deepseek_v3_tiny 'name=a run'"


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (0, "--world 0: a cluster has at least 1 process; use 1 or more"),
        (20, "--world 20: nodes of 8 processes make 16 or 24; use one of these, or give "),
    ],
)
def test_a_world_of_broken_nodes_is_refused(world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate("deepseek_v3_8gpu", [], world)


def test_the_arithmetic_of_the_world_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        validate("deepseek_v3_8gpu", [], world=2)
    (problem,) = caught.value.problems
    assert problem.field == "model.expert_model_parallel_size"
    assert "= 1 x 2 = 2" in problem.rule and problem.way_out == "use one of 1, 2"
    with pytest.raises(ConfigError, match=r"trainer\.devices=many: must be a whole number"):
        validate("deepseek_v3_8gpu", ["trainer.devices=many"], world=8)
