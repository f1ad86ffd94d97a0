"""What the environment of each launcher means, and what is refused."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from deepseek import console
from deepseek.config.errors import UserError
from deepseek.launch import processes
from deepseek.launch.processes import (
    Processes,
    check_world,
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
    assert (again.attempt, again.agent_store) == (2, True)
    assert not Processes.from_environment(TORCHRUN).agent_store


def test_the_supervisor() -> None:
    env = TORCHRUN | {"DEEPSEEK_STARTED_BY": "supervisor", "DEEPSEEK_STORE_FD": "7"}
    assert Processes.from_environment(env).started_by == "supervisor"
    assert Processes.from_environment(env).store_fd is None
    assert Processes.from_environment(env | {"RANK": "0", "LOCAL_RANK": "0"}).store_fd == 7


SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
}


def test_srun_starts_torchrun_and_not_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    spoke = []
    monkeypatch.setattr(console, "speak_for_all", lambda *ranks: spoke.append(ranks))
    assert Processes.from_environment(SRUN | TORCHRUN).started_by == "torchrun"
    assert spoke == []
    with pytest.raises(UserError) as error:
        Processes.from_environment(SRUN)
    assert "srun started 8 processes that know nothing of each other" in str(error.value)
    assert "srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES" in str(error.value)
    assert spoke == [(5, 1)]  # so that one of each node says it


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},  # the batch script itself, or salloc's shell
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the same where Slurm numbers the batch script
        {"SLURM_PROCID": ""},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # one task, which may start processes itself
        {"SLURM_JOB_NAME": "bash"},
        {"SLURM_PTY_PORT": "40000"},
    ],
)
def test_a_shell_inside_an_allocation_is_no_launch(change: dict[str, str]) -> None:
    assert Processes.from_environment(SRUN | change) == Processes()


def test_no_launcher() -> None:
    assert Processes.from_environment({"HOME": "/", "MASTER_ADDR": "x"}) == Processes()
    assert Processes().started_by == "none"


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE, LOCAL_RANK,", "are not set", "or unset RANK"]),
        (
            {k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"},
            ["RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", "MASTER_PORT is not set", "let torchrun"],
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ["but RANK, LOCAL_WORLD_SIZE,"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK=8: must be less than WORLD_SIZE=8", "or unset RANK"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4: must be less than LOCAL_WORLD_SIZE=4"]),
        (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two: must be a whole number"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1: must be a whole number, 0 or more"]),
        (TORCHRUN | {"MASTER_PORT": "x"}, ["MASTER_PORT=x: must be a whole number"]),
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
            started("torchrun", 8, 4),
            8,
            2,
            "torchrun started 8 processes, trainer.devices=8 x trainer.num_nodes=2 = 16: "
            "set trainer.devices=4, or --nnodes 2 --nproc-per-node 8",
        ),
        (
            started("supervisor", 2, 2),
            3,
            1,
            "the supervisor started 2 processes, trainer.devices=3 x trainer.num_nodes=1 = 3: "
            "set trainer.devices=2, or devices 3",
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


def test_only_rank_0_speaks_and_the_first_of_a_node_tells_why_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_speaks", True)
    monkeypatch.setattr(console, "_ends_first", True)
    monkeypatch.setattr(signal, "signal", lambda *given: None)

    def ended_by_the_launcher(seconds: float) -> None:
        assert seconds == console.PATIENCE_SECONDS
        raise TimeoutError

    monkeypatch.setattr(console.time, "sleep", ended_by_the_launcher)
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        quiet(Processes(rank=rank, local_rank=local_rank, world_size=4, local_world_size=2))
        console.say(f"said by {rank}")
        console.table(f"t{rank}", ["column"], [["b"]])
        console.complain(f"warning of {rank}")
        with contextlib.suppress(TimeoutError):
            console.complain_at_the_end(f"error of {rank}")
        console.complain_at_the_end(f"loss of {rank}", by_first_alone=True)
    monkeypatch.setattr(console.time, "sleep", lambda seconds: None)
    console.complain_at_the_end("what rank 3 alone finds")
    shown = capsys.readouterr()
    assert "said by 0" in shown.out and "t0" in shown.out
    assert "said by 1" not in shown.out and "t1" not in shown.out
    assert shown.err.splitlines() == [
        *("warning of 0", "error of 0", "loss of 0", "warning of 1"),
        *("warning of 2", "error of 2", "loss of 2", "warning of 3", "what rank 3 alone finds"),
    ]


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
        (RuntimeError("NCCL communicator was aborted on rank 3."), True),
        (
            RuntimeError(
                "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error (run with "
                "NCCL_DEBUG=INFO for details), NCCL version 2.29.7\nncclSystemError: System call "
                "(e.g. socket, malloc) or external library call failed or device error."
            ),
            True,
        ),
        (RuntimeError("ncclRemoteError: A call failed possibly due to a network error"), True),
        (
            RuntimeError(
                "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType="
                "ALLREDUCE, Timeout(ms)=100000) ran for 100012 milliseconds before timing out."
            ),
            True,
        ),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("The client socket has timed out after 60000ms while trying"), True),
        (
            RuntimeError(
                "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
                "key-value store by key '0', but store->get('0') got error: Socket Timeout"
            ),
            True,
        ),
        (RuntimeError("NCCL timeout in: ProcessGroupNCCL.cpp:2817"), True),
        (RuntimeError("NCCL timeout in communicator initialization."), True),
        (
            RuntimeError(
                "NCCL error in: NCCLUtils.cpp:94, internal error - please report this issue to the "
                "NCCL developers, NCCL version 2.27.5\nncclInternalError: Internal check failed.\n"
                "Last error:\nNET/IB : Got completion from peer 10.0.0.7<39138> with error 12"
            ),
            True,
        ),
        (
            RuntimeError(
                "ncclInternalError: Internal check failed.\nLast error:\nsocketStartConnect: "
                "Connect to 10.0.0.7<45361> failed : Software caused connection abort"
            ),
            True,
        ),
        (RuntimeError("socketPollConnect: Connect to 10.0.0.7<9> returned No route to host"), True),
        (RuntimeError("NCCL communicator encountered error set by ProcessGroupNCCL: reset"), True),
        (RuntimeError("Rank 3 failed to pass monitoredBarrier in 1800000 ms"), True),
        (RuntimeError("Dispatch CPU wait (buffer.hpp:1): CPU side received count: 0"), True),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (
            RuntimeError(
                "NCCL communicator was aborted on rank 3. Original reason for failure was: NCCL "
                "error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
            ),
            False,
        ),
        (RuntimeError("NCCL error in: a.cpp:7, ncclInvalidUsage: This usually reflects"), False),
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
from deepseek.commands.entry import guarded
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


@pytest.mark.parametrize("ranks", ["01", pytest.param("1", marks=pytest.mark.nightly)])
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
    lost = "error: contact lost with rank 1, which ended or cannot be reached"
    assert lines[:2] == [lost, f"error: trouble of {ranks}"], ran.err
    assert lines[2:] in ([], [lost])  # of rank 0, if it notices before it is ended
    assert ran.out == "rank 1 was killed by SIGKILL; all start again, restart 1 of 3\n"


def test_who_is_lost_is_told_by_the_first_that_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "_WORD_SECONDS", 0.1)
    monkeypatch.setattr(processes, "_store", store)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    key = f"lost.0.{processes._times_joined}."
    for rank, others, told in [
        ("1", "3", "contact lost with ranks 0, 2, which did not come within 18 s (trainer.coll"),
        ("3", "1", ""),  # rank 1 tells it
        ("0", "12", "contact lost with rank 3, which"),
    ]:
        for number in "0123":
            store.delete_key(f"{key}{number}")
        for other in others:
            store.set(f"{key}{other}", "")
        monkeypatch.setenv("RANK", rank)
        processes.tell_lost_contact(RuntimeError("Timed out waiting 18000ms for recv"))
        assert told in capsys.readouterr().err if told else not capsys.readouterr().err


def test_what_nccl_says_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_store", None)
    for name, value in (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    says = "ncclRemoteError: a remote process exiting\nLast error:\nsocketProgress: closed by peer"
    processes.tell_lost_contact(RuntimeError(f"NCCL error in: a.cpp:7, {says}"))
    told = capsys.readouterr().err
    assert "contact lost with rank 0, which ended or cannot be reached; NCCL: " in told
    assert "Last error: socketProgress: closed by peer" in told and told.count("\n") == 1


def test_the_flight_recorder_writes_into_the_run_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    former, now = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"
    for name in (former, now):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    folder = tmp_path / "flight_recorder"
    processes.record_flights(folder, attempt=2)
    assert os.environ[now] == f"{folder}/attempt2_rank_" and folder.is_dir()
    processes.record_flights(folder, attempt=3)  # what is there stays, as a user's own would
    assert os.environ[now] == f"{folder}/attempt2_rank_"
    monkeypatch.delenv(now)
    monkeypatch.setenv(former, "/elsewhere/rank_")
    processes.record_flights(folder, attempt=3)
    assert now not in os.environ


def test_a_meeting_point_that_nobody_serves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nobody = Processes(1, 1, 2, 2, main_port=port, started_by="torchrun")
    with pytest.raises(
        UserError, match="rank 1 of 2 found no meeting point at 127.0.0.1:"
    ) as error:
        join(nobody, "cpu", timedelta(seconds=1))
    assert "did all ranks start, and is MASTER_ADDR:MASTER_PORT free there" in str(error.value)


def test_a_meeting_point_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        taken = Processes(0, 0, 2, 2, main_port=server.getsockname()[1], started_by="torchrun")
        with pytest.raises(UserError, match="is MASTER_ADDR:MASTER_PORT free there and open"):
            join(taken, "cpu", timedelta(seconds=1))


def test_nodes_that_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on two machines, one of which gives gloo an address that leads nowhere."""

    def refused(*args: object, **options: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:144] Connection refused")

    monkeypatch.setattr("torch.distributed.init_process_group", refused)
    monkeypatch.setattr(processes, "_store", torch.distributed.HashStore())
    with pytest.raises(UserError) as error:
        join(Processes(0, 0, 2, 1, started_by="torchrun"), "cpu", timedelta(seconds=1))
    assert "rank 0 of 2 cannot reach the other nodes (Gloo connectFullMesh" in str(error.value)
    assert "export GLOO_SOCKET_IFNAME=eth1" in str(error.value)
    with pytest.raises(RuntimeError, match="Connection refused"):  # one machine: a rank died
        join(Processes(0, 0, 2, 2, started_by="torchrun"), "cpu", timedelta(seconds=1))


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"local rank 1 \(rank 5\) sees 1 GPUs, but 4 processes"):
        join(Processes.from_environment(TORCHRUN), "cuda", timedelta(seconds=1))


def test_on_gpus_one_group_has_gloo_and_knows_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nccl connects at once and splits by the device; torch keeps its flight recorder."""
    told: list[dict[str, object]] = []
    for name in (*processes.FLIGHT_RECORDER, "TORCH_GLOO_LAZY_INIT"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **given: told.append(given))
    monkeypatch.setattr(processes, "_store", torch.distributed.HashStore())
    monkeypatch.setattr(processes, "_times_joined", 0)
    monkeypatch.setattr(processes.atexit, "register", lambda call: None)
    monkeypatch.setattr(processes, "let_open", lambda process, kind: None)
    join(Processes.from_environment(TORCHRUN), "cuda", timedelta(seconds=7))
    (given,) = told
    assert (
        given["device_id"] == torch.device("cuda", 1) and given["backend"] == "cpu:gloo,cuda:nccl"
    )
    assert (given["rank"], given["world_size"]) == (5, 8) and given["timeout"].total_seconds() == 7  # type: ignore[attr-defined]
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "20000"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == os.environ["TORCH_GLOO_LAZY_INIT"] == "1"


def test_as_many_open_files_as_ranks_ask_for() -> None:
    """As far as the administrator lets; never fewer than before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gpu = Processes(5, 5, 2048, 8)
    try:
        for soft, process, kind, wanted in (
            (256, Processes(1, 1, 8, 8), "cpu", 528),  # gloo connects all with all
            (600, Processes(1, 1, 8, 8), "cpu", 600),
            (256, replace(gpu, world_size=10**9), "cuda", 512),
            (1024, gpu, "cuda", 1024),  # of 2,048 ranks: the usual limit is enough
            (1024, replace(gpu, rank=0), "cuda", 2560),  # serves the store
            (1024, replace(gpu, rank=0, agent_store=True), "cuda", 1024),
        ):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
            processes.let_open(process, kind)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_agent_of_the_first_node_may_open_as_many_files_as_there_are_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = subprocess.Popen(["sleep", "60"])
    try:
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        monkeypatch.setattr(os, "getppid", lambda: agent.pid)
        leader = Processes(0, 0, 2048, 8, agent_store=True)
        processes.let_open(leader, "cuda")
        assert resource.prlimit(agent.pid, resource.RLIMIT_NOFILE) == (2560, 4096)
        processes.let_open(replace(leader, world_size=4000), "cuda")
        assert resource.prlimit(agent.pid, resource.RLIMIT_NOFILE) == (4096, 4096)
        message = "8,192 ranks meet .* may have 4,096 files .* raise its hard limit to 8,704"
        with pytest.raises(UserError, match=message):
            processes.let_open(replace(leader, world_size=8192), "cuda")
        processes.let_open(replace(leader, rank=1, world_size=8192), "cuda")
    finally:
        agent.kill()
        agent.wait()
