"""One strategy under every launcher: the losses are those of one process, also after a loss."""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.config.errors import UserError
from deepseek.config.layout import Layout
from deepseek.frameworks import LightningModule, Trainer
from deepseek.launch.processes import Processes
from deepseek.launch.strategy import DeepSeekStrategy
from support.forked import FORK_WORKERS, Started
from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework

SCRIPT = Path(__file__).parents[1] / "support" / "toy_run.py"
STEPS = 6


@dataclass(frozen=True)
class Ran:
    losses: list[float]
    facts: dict[str, Any]
    text: str


def run(folder: Path, started: list[Started]) -> Ran:
    """Wait for commands that started together, and read what rank 0 has written."""
    rans = [process.wait().assert_done() for process in started]
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    facts = json.loads((folder / "facts.json").read_text())
    text = "\n".join(ran.out + ran.err for ran in rans)
    return Ran([row["loss"] for row in rows], facts, text)


def toy(folder: Path, devices: int, precision: str, *more: str) -> list[object]:
    return [SCRIPT, folder, STEPS, devices, precision, *more]


def start(
    micro: MicroRuns, *words: object, program: str = "python", env: dict[str, str] | None = None
) -> Started:
    return micro.cli.start(*words, program=program, before=FORK_WORKERS, env=env)


@pytest.fixture(scope="module")
def alone(micro: MicroRuns, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    ran = run(folder, [start(micro, *toy(folder, 1, "32-true"))])
    assert ran.facts["world"] == [1, 1, 1] and ran.facts["started_by"] == "none"
    assert ran.losses[0] != ran.losses[-1]
    return ran.losses


def by_itself(micro: MicroRuns, folder: Path) -> Ran:
    """``python script.py``: the Trainer's devices decide."""
    ran = run(folder, [start(micro, *toy(folder, 2, "32-true", "kill"))])
    assert "rank 1 was killed by SIGKILL; all start again, restart 1 of 1" in ran.text
    assert ran.facts["started_by"] == "supervisor"
    return ran


def by_torchrun(micro: MicroRuns, folder: Path) -> Ran:
    words = "--standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.1".split()
    script = toy(folder, 2, "bf16-mixed", "kill")
    ran = run(folder, [start(micro, *words, *script, program="torchrun")])
    assert ran.facts["started_by"] == "torchrun"
    return ran


def by_variables(micro: MicroRuns, folder: Path) -> Ran:
    """As torchrun sets them, after a restart."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": "1",
    }
    ranks = [variables | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    script = toy(folder, 2, "64-true")
    ran = run(folder, [start(micro, *script, env=variables) for variables in ranks])
    assert ran.facts["started_by"] == "torchrun"
    return ran


@pytest.mark.parametrize("launcher", [by_itself, by_torchrun, by_variables])
def test_every_launcher(
    micro: MicroRuns,
    launcher: Callable[[MicroRuns, Path], Ran],
    alone: list[float],
    tmp_path: Path,
) -> None:
    ran = launcher(micro, tmp_path)
    assert ran.losses == pytest.approx(alone, rel=1e-13)
    facts = ran.facts
    assert facts["attempt"] == 1
    assert facts["world"] == [2, 2, 1] and facts["layout"] == 2
    assert (facts["backend"], facts["timeout"]) == ("gloo", 120.0)
    assert (facts["mean"], facts["sum"], facts["max"], facts["own"]) == (1.5, 3.0, 2.0, 1.0)
    assert facts["gathered"] == [1.0, 2.0]
    assert facts["broadcast"] == {"from": 1}
    assert (facts["all"], facts["any"]) == (False, True)
    assert facts["sampler"] == {"num_replicas": 2, "rank": 0}
    assert facts["sigterm"] == "0"  # the default; Lightning's handler would broadcast
    assert ran.text.count("the script goes on after fit") == 1


def strategy(processes: Processes) -> DeepSeekStrategy:
    return DeepSeekStrategy(lambda size: Layout(dp_shard=size), processes=processes)


TWO = Processes(world_size=2, local_world_size=2, started_by="torchrun")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precisions(precision: str) -> None:
    ours = strategy(TWO)
    trainer = Trainer(
        strategy=ours, accelerator="cpu", devices=2, precision=precision, logger=False
    )
    assert trainer.strategy is ours and trainer.world_size == 2 and ours.launcher is None
    assert ours.root_device == torch.device("cpu")


@pytest.mark.parametrize(
    ("processes", "devices", "num_nodes", "message"),
    [
        (TWO, 4, 1, "torchrun started 2 processes, trainer.devices=4"),
        (TWO, 2, 2, "torchrun started 2 processes, trainer.devices=2 x trainer.num_nodes=2 = 4"),
        (Processes(), 2, 2, "but no launcher started this process: on each of the 2 nodes run"),
    ],
)
def test_a_trainer_of_another_world(
    processes: Processes, devices: int, num_nodes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(
            strategy=strategy(processes),
            accelerator="cpu",
            devices=devices,
            num_nodes=num_nodes,
            logger=False,
        )


def test_checkpoints_are_left_to_the_callback(tmp_path: Path) -> None:
    ours = strategy(TWO)
    trainer = Trainer(strategy=ours, accelerator="cpu", devices=2, logger=False)
    ours.connect(LightningModule())
    assert ours.lightning_module_state_dict() == {}
    assert ours.optimizer_state(None) == {}
    with pytest.raises(UserError, match="deepseek.checkpoint.callback.Checkpointing"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="without ckpt_path"):
        ours.load_checkpoint(tmp_path / "x.ckpt", weights_only=True)


def test_slurm_is_not_requeued_by_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(strategy=strategy(TWO), accelerator="cpu", devices=2, logger=False)
    environment = trainer._accelerator_connector.cluster_environment
    assert not hasattr(environment, "auto_requeue")
