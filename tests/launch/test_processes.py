"""What the environment of each launcher means, and what is refused."""

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from deepseek import console
from deepseek.config.errors import UserError
from deepseek.launch import processes
from deepseek.launch.processes import (
    Processes,
    check_world,
    first_host,
    is_lost_peer,
    join,
    quiet,
)
from support.forked import FORK_WORKERS
from support.micro_runs import MicroRuns

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "node[003-005,9],x1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
}


def test_torchrun() -> None:
    assert Processes.from_environment(TORCHRUN) == Processes(
        rank=5,
        local_rank=1,
        world_size=8,
        local_world_size=4,
        node_rank=1,
        main_address="head",
        main_port=29500,
        attempt=0,
        started_by="torchrun",
    )


def test_torchrun_again_after_a_loss_with_the_agents_store() -> None:
    more = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    again = Processes.from_environment(TORCHRUN | more)
    assert (again.attempt, again.agent_store, again.serves_store) == (2, True, False)
    rank_0 = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}
    assert Processes.from_environment(rank_0).serves_store
    assert not Processes.from_environment(rank_0 | more).serves_store


def test_torchrun_inside_a_slurm_job() -> None:
    assert Processes.from_environment(SLURM | TORCHRUN).started_by == "torchrun"


def test_the_supervisor() -> None:
    env = TORCHRUN | {"DEEPSEEK_STARTED_BY": "supervisor", "DEEPSEEK_STORE_FD": "7"}
    assert Processes.from_environment(env).started_by == "supervisor"
    assert Processes.from_environment(env).store_fd is None
    assert Processes.from_environment(env | {"RANK": "0", "LOCAL_RANK": "0"}).store_fd == 7


def test_slurm() -> None:
    assert Processes.from_environment(SLURM) == Processes(
        rank=5,
        local_rank=1,
        world_size=8,
        local_world_size=4,
        node_rank=1,
        main_address="node003",
        main_port=15000 + 1234567 % 5000,
        attempt=0,
        started_by="slurm",
    )
    own = SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "SLURM_RESTART_COUNT": "3"}
    chosen = Processes.from_environment(own)
    assert (chosen.main_address, chosen.main_port, chosen.attempt) == ("10.0.0.1", 4000, 3)


@pytest.mark.parametrize(
    ("counts", "node", "expected"), [("4(x2)", "1", 4), ("4,2(x2)", "2", 2), ("", "1", 4)]
)
def test_tasks_on_this_node(counts: str, node: str, expected: int) -> None:
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": node}
    assert Processes.from_environment(env).local_world_size == expected


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},  # the batch script itself, or salloc's shell
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the same where Slurm numbers the batch script
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # salloc's interactive step
        {"SLURM_PROCID": ""},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_NAME": "bash"},
        {"SLURM_JOB_NAME": "interactive"},
        {"SLURM_PTY_PORT": "40000"},
    ],
)
def test_a_shell_inside_an_allocation_is_no_launch(change: dict[str, str]) -> None:
    assert Processes.from_environment(SLURM | change) == Processes()


def test_no_launcher() -> None:
    assert Processes.from_environment({"HOME": "/", "MASTER_ADDR": "x"}) == Processes()
    assert Processes().started_by == "none"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,b2", "a1"),
        ("node[003-005,9],x1", "node003"),
        ("node[9,11-12]", "node9"),
        ("x1,node[003-005]", "x1"),
        ("rack[2-3]-n[01-16]", "rack2-n01"),
        ("gpu-[1-4].cluster.org", "gpu-1.cluster.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE, LOCAL_RANK,", "are not set", "or unset RANK"]),
        (
            {k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"},
            ["RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", "MASTER_PORT is not set", "let torchrun"],
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ["but RANK, LOCAL_WORLD_SIZE,"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK=8: must be less than WORLD_SIZE=8", "count from 0"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4: must be less than LOCAL_WORLD_SIZE=4"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE=9", "at most WORLD_SIZE=8"]),
        (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two: must be a whole number"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1: must be a whole number, 0 or more"]),
        (TORCHRUN | {"MASTER_PORT": "99999"}, ["MASTER_PORT=99999: must be 1 to 65535"]),
        (SLURM | {"SLURM_PROCID": "8"}, ["SLURM_PROCID=8: must be less than SLURM_NTASKS=8"]),
        (SLURM | {"SLURM_LOCALID": "x"}, ["SLURM_LOCALID=x"]),
        (SLURM | {"SLURM_JOB_NODELIST": ""}, ["SLURM_JOB_NODELIST is not set", "MASTER_ADDR"]),
        (SLURM | {"SLURM_NTASKS_PER_NODE": ""}, ["SLURM_NTASKS_PER_NODE is not set"]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, ["SLURM_STEP_TASKS_PER_NODE=4x2"]),
    ],
)
def test_contradictions_are_told(env: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Processes.from_environment(env)
    for part in parts:
        assert part in str(error.value)


def started(by: str, world: int, local: int) -> Processes:
    return Processes(world_size=world, local_world_size=local, started_by=by)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("processes", "devices", "num_nodes"),
    [
        (Processes(), 1, 1),
        (started("torchrun", 8, 4), 4, 2),
        (started("slurm", 4, 4), 4, 1),
        (started("supervisor", 2, 2), 2, 1),
    ],
)
def test_worlds_that_agree(processes: Processes, devices: int, num_nodes: int) -> None:
    check_world(processes, devices, num_nodes)


@pytest.mark.parametrize(
    ("processes", "devices", "num_nodes", "message"),
    [
        (
            started("torchrun", 4, 4),
            2,
            1,
            "torchrun started 4 processes, trainer.devices=2 x trainer.num_nodes=1 = 2: "
            "set trainer.devices=4, or --nproc-per-node 2",
        ),
        (
            started("slurm", 8, 4),
            8,
            2,
            "srun started 8 processes, trainer.devices=8 x trainer.num_nodes=2 = 16: "
            "set trainer.devices=4, or --nodes 2 --ntasks-per-node 8",
        ),
        (
            started("torchrun", 3, 3),
            2,
            2,
            "torchrun started 3 processes, trainer.devices=2 x trainer.num_nodes=2 = 4: "
            "set trainer.devices=3 trainer.num_nodes=1, or --nnodes 2 --nproc-per-node 2",
        ),
        (
            started("torchrun", 4, 2),
            4,
            1,
            "torchrun started 2 processes on this node (node 0), but trainer.devices=4: "
            "set trainer.devices=2 trainer.num_nodes=2, or --nproc-per-node 4",
        ),
        (
            Processes(),
            4,
            1,
            "trainer.devices=4 x trainer.num_nodes=1 = 4, but this is one process alone: "
            "start it with torchrun --nproc-per-node 4, or set trainer.devices=1",
        ),
        (Processes(), 8, 4, "on each of the 4 nodes run torchrun --nnodes 4 --nproc-per-node 8"),
    ],
)
def test_worlds_that_do_not(
    processes: Processes, devices: int, num_nodes: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_world(processes, devices, num_nodes)
    assert message in str(error.value)


def test_only_rank_0_speaks_and_each_node_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_speaks", True)
    monkeypatch.setattr(console, "_complains", None)

    def ended_by_the_launcher(seconds: float) -> None:
        assert seconds == processes.PATIENCE_SECONDS
        raise TimeoutError

    monkeypatch.setattr(processes.time, "sleep", ended_by_the_launcher)
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        quiet(Processes(rank=rank, local_rank=local_rank, world_size=4, local_world_size=2))
        console.say(f"said by {rank}")
        console.table(f"t{rank}", ["column"], [["b"]])
        with contextlib.suppress(TimeoutError):
            console.complain(f"error of {rank}")
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    console.complain("what rank 3 alone finds")
    shown = capsys.readouterr()
    assert "said by 0" in shown.out and "t0" in shown.out
    assert "said by 1" not in shown.out and "t1" not in shown.out
    assert shown.err == "error of 0\nerror of 2\nwhat rank 3 alone finds\n"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"),
            True,
        ),
        (RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation"), True),
        (RuntimeError("wait timeout after 60000ms, keys: /default_pg/0/1"), True),
        (RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection reset by peer"), False),  # a download, not a rank
    ],
)
def test_what_a_lost_rank_looks_like(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) is lost
    # torch.distributed.pipelining wraps what a collective inside of a stage raises.
    wrapped = RuntimeError("[Stage 0] failed to run forward")
    wrapped.__cause__ = error
    assert is_lost_peer(wrapped) is lost
    assert not is_lost_peer(RuntimeError("[Stage 0] failed to run forward"))


JOINED = """
import os, signal, sys
from datetime import timedelta
from deepseek.commands.doors import guarded
from deepseek.config.errors import UserError
from deepseek.launch.processes import Processes, join, quiet

def call():
    processes = Processes.from_environment()
    quiet(processes)
    for _ in range(2):
        join(processes, "cpu", timedelta(seconds=60))
    import torch.distributed as dist
    assert dist.get_backend() == "gloo" and dist.get_world_size() == 2
    dist.barrier()
    if processes.attempt == 0 and processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if processes.attempt == 0:
        dist.barrier()
    for rank in map(int, sys.argv[1]):
        if rank == processes.rank:
            raise UserError(f"trouble of {sys.argv[1]}")
    dist.barrier()

guarded(call)
"""


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_what_ranks_say_when_they_end(micro: MicroRuns, ranks: str, tmp_path: Path) -> None:
    """First rank 1 is killed, then some ranks have an error that the user can mend."""
    (tmp_path / "joined.py").write_text(JOINED)
    (tmp_path / "driver.py").write_text(
        "import sys; from deepseek.launch.supervisor import supervise; "
        f"sys.exit(supervise([sys.executable, 'joined.py', '{ranks}'], 2, 3, print))"
    )
    words = {"cwd": tmp_path, "program": "python", "before": FORK_WORKERS}
    ran = micro.cli.start("driver.py", **words).wait()  # type: ignore[arg-type]
    assert ran.code == 2, ran.err
    lines = ran.err.splitlines()
    lost = "error: contact lost with another rank, which ended or cannot be reached"
    assert lines[:2] == [lost, f"error: trouble of {ranks}"], ran.err
    assert lines[2:] in ([], [lost])  # of rank 0, if it is not the one with the trouble
    assert ran.out == "rank 1 was killed by SIGKILL; all start again, restart 1 of 3\n"


def test_a_meeting_point_that_nobody_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nobody = Processes(1, 1, 2, 2, main_port=port, started_by="torchrun")
    with pytest.raises(
        UserError, match="rank 1 of 2 found no meeting point at 127.0.0.1:"
    ) as error:
        join(nobody, "cpu", timedelta(seconds=1))
    assert "did all ranks start, and is MASTER_ADDR:MASTER_PORT open" in str(error.value)


def test_a_meeting_point_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        taken = Processes(0, 0, 2, 2, main_port=server.getsockname()[1], started_by="slurm")
        with pytest.raises(UserError, match="is the port taken. Set another MASTER_PORT"):
            join(taken, "cpu", timedelta(seconds=1))


def test_the_interface_that_leads_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of this machine leads to the interface that has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for documentation: the default route
        own = probe.getsockname()[0]
    found = processes.interface_to(own)
    assert found in [name for _, name in socket.if_nameindex()] and found != "lo"
    assert processes.interface_to("127.0.0.1") is None
    assert processes.interface_to("no-such-host.invalid") is None
    two_nodes = {"world_size": 4, "local_world_size": 2, "main_address": own}
    for values, chosen, expected in (
        (two_nodes, None, found),
        (two_nodes, "ib0", "ib0"),  # the user's choice stays
        (two_nodes | {"world_size": 2}, None, None),  # one node
        (two_nodes | {"main_address": "127.0.0.1"}, None, None),
    ):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if chosen:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
        processes._choose_interface(Processes(**values))  # type: ignore[arg-type]
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"local rank 1 \(rank 5\) sees 1 GPUs, but 4 processes"):
        join(Processes.from_environment(TORCHRUN), "cuda", timedelta(seconds=1))
