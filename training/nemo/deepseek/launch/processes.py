"""The processes of a run: which one this is, how many there are, and how they find each other.

There is one contract, the environment variables of torchrun. Our own supervisor, which starts the
processes of one machine, sets the same; several machines are torchrun's business, and what starts a
torchrun on each of them (Slurm, Kubernetes, ...) is no concern of ours. This file needs torch only
to join, so that a wrong environment is told at once.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deepseek import console
from deepseek.config.errors import UserError
from deepseek.launch.attempt import agreed_attempt

if TYPE_CHECKING:
    from torch.distributed import Store

STARTED_BY = "DEEPSEEK_STARTED_BY"
"""``supervisor`` in the processes that ``launch/supervisor.py`` starts."""
STORE_FD = "DEEPSEEK_STORE_FD"
"""Rank 0 under the supervisor: the listening socket, inherited, of the store."""
LOST_PEER_EXIT_CODE = 75
"""Of a rank that ends because another one did ("temporary failure" in sysexits.h)."""
NCCL_CHARACTERS = 200
"""The end of NCCL's text, which gives its cause."""
USUAL_FILES = 1024
"""That a process may have open where nobody has set another limit."""
OTHER_FILES = 512
"""That a process may have open besides sockets to all other ranks: 85 were seen with gloo. NCCL has
some for each of its groups, and messages go to ranks 2^k away."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "20000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""torch's record of the newest collectives of NCCL, written when one times out."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; the default is one process alone."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = 0
    attempt: int = 0
    """How often the run was started anew."""
    started_by: Literal["supervisor", "torchrun", "none"] = "none"
    agent_store: bool = False
    """The store at ``main_address`` is served by torchrun's agent, not by rank 0."""
    store_fd: int | None = None
    """Listening socket for the store that this rank serves; None: bind ``main_port``."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Processes:
        """Read what a launcher has set; ``env`` is ``os.environ`` if not given.

        Raises:
            UserError: torchrun's variables are missing in part, are no numbers or contradict each
                other; or srun has started several processes without torchrun.
        """
        variables = _Variables(os.environ if env is None else env)
        if any(variables.text(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return _from_torchrun(variables)
        _refuse_bare_srun(variables)
        return cls()


def check_world(processes: Processes, devices: int, num_nodes: int) -> None:
    """The configured number of processes is the number that was started.

    Raises:
        UserError: it is not; with the numbers and the nearest way out.
    """
    configured = devices * num_nodes
    product = f"trainer.devices={devices} x trainer.num_nodes={num_nodes} = {configured}"
    if processes.started_by == "none":
        if num_nodes > 1:
            raise UserError(
                f"{product}, but no launcher started this process: on each of the {num_nodes} "
                f"nodes run {torchrun(devices, num_nodes)}; under Slurm, srun does that"
            )
        if devices > 1:
            raise UserError(
                f"{product}, but this is one process alone: start it with "
                f"torchrun --nproc-per-node {devices}, or set trainer.devices=1"
            )
        return
    world, local = processes.world_size, processes.local_world_size
    by_torchrun = processes.started_by == "torchrun"
    launcher = "torchrun" if by_torchrun else "the supervisor"
    option = f"--nproc-per-node {devices}" if by_torchrun else f"devices {devices}"
    if world != configured:
        if world % num_nodes == 0:
            settings = f"trainer.devices={world // num_nodes}"
        else:
            settings = f"trainer.devices={local} trainer.num_nodes={max(1, world // local)}"
        nodes = f"--nnodes {num_nodes} " if by_torchrun and num_nodes > 1 else ""
        raise UserError(
            f"{launcher} started {world} processes, {product}: set {settings}, or {nodes}{option}"
        )
    if local != devices:
        raise UserError(
            f"{launcher} started {local} processes on this node (node {processes.node_rank}), "
            f"but trainer.devices={devices}: set trainer.devices={local} "
            f"trainer.num_nodes={max(1, world // local)}, or {option}"
        )


def torchrun(devices: int | str, num_nodes: int | str, endpoint: str = "FIRST_NODE:29500") -> str:
    """The command that starts the processes of one of several nodes, up to the program."""
    return (
        f"torchrun --nnodes {num_nodes} --nproc-per-node {devices} "
        f"--rdzv-backend c10d --rdzv-endpoint {endpoint}"
    )


# -- the process group --

_store: Store | None = None
_times_joined = 0
_attempt = 0


def quiet(processes: Processes) -> None:
    """Rank 0 speaks for all, and an error of all ranks of a node is told once; call it first."""
    console.speak_for_all(processes.rank, processes.local_rank)


def join(processes: Processes, device_type: str, timeout: timedelta) -> Processes:
    """Make the default process group, unless it is there: gloo for CPU tensors, NCCL for CUDA's.

    Args:
        processes: this process.
        device_type: ``cpu`` or ``cuda``; with ``cuda``, the device of the local rank is chosen.
        timeout: of the rendezvous and of every collective.

    Returns:
        This process, with the number of the attempt that all ranks agree on.

    Raises:
        UserError: no GPU for this rank, or other ranks cannot be reached.
    """
    import torch
    import torch.distributed as dist

    global _times_joined, _attempt
    if dist.is_initialized():
        have = (dist.get_rank(), dist.get_world_size())
        if have != (processes.rank, processes.world_size):
            raise UserError(
                f"a process group exists already, in which this is rank {have[0]} of {have[1]} "
                f"instead of {processes.rank} of {processes.world_size}; let none be made before"
            )
        return replace(processes, attempt=_attempt)
    if device_type == "cuda":
        visible = torch.cuda.device_count()
        if processes.local_rank >= visible:
            raise UserError(
                f"local rank {processes.local_rank} (rank {processes.rank}) sees {visible} GPUs, "
                f"but {processes.local_world_size} processes run on this node: start at most one "
                "per GPU, and let each see all of them (no CUDA_VISIBLE_DEVICES of its own)"
            )
        torch.cuda.set_device(processes.local_rank)
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
        # For messages alone, gloo need not connect every rank with every other before it starts.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    let_open(processes, device_type)
    store = _open_store(processes, timeout)
    _attempt = processes.attempt
    try:
        if processes.agent_store and _times_joined == 0:
            among = processes.rank, processes.world_size
            _attempt = agreed_attempt(store, *among, timeout)
        # torchrun keeps one store for all attempts: gloo would find the addresses of the dead.
        name = f"attempt{_attempt}.{_times_joined}"
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore(name, store),
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=timeout,
            # Known, NCCL connects at once, and groups are split off by one call for all of them.
            device_id=torch.device("cuda", processes.local_rank) if device_type == "cuda" else None,
        )
    except RuntimeError as error:
        # On one machine nothing can be misconfigured: a rank died, and all start anew.
        if processes.world_size == processes.local_world_size or not is_lost_peer(error):
            raise
        raise UserError(
            f"rank {processes.rank} of {processes.world_size} cannot reach the other nodes "
            f"({error}): gloo uses the interface that this machine's own name leads to; if that is "
            "not the one between the nodes, export GLOO_SOCKET_IFNAME=eth1, or what it is called "
            "there, on every node"
        ) from error
    _times_joined += 1
    atexit.register(leave)
    return replace(processes, attempt=_attempt)


def remember(processes: Processes, what: str, timeout: timedelta) -> None:
    """Leave word for later attempts of this job."""
    _open_store(processes, timeout).set(f"remember.{what}", "")


def remembers(processes: Processes, what: str, timeout: timedelta) -> bool:
    """Whether an attempt of this job has left word; True where no store outlives an attempt."""
    name = f"remember.{what}"
    return not processes.agent_store or _open_store(processes, timeout).check([name])


def store_files(ranks: int) -> int:
    """That the process which serves the store may have open: one for each rank, and its own."""
    return OTHER_FILES + ranks


def let_open(processes: Processes, device_type: str) -> None:
    """Raise the soft limit of open files where so many ranks would be too many for it.

    Two have a socket for each rank: who serves the store (torchrun's agent on the first node, else
    rank 0), and on CPUs every rank, since gloo connects all with all there. The usual limit is for
    ``select``, which nothing here uses. The hard limit stays.

    Raises:
        UserError: the hard limit is less than there are ranks.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    ranks = processes.world_size
    wanted = {0: OTHER_FILES + (2 * ranks if device_type == "cpu" else 0)}  # 0: this process
    if processes.rank == 0:
        server = os.getppid() if processes.agent_store else 0
        wanted[server] = max(wanted.get(server, 0), store_files(ranks))
    for process, files in wanted.items():
        if not hasattr(resource, "prlimit"):  # macOS
            return
        with suppress(PermissionError):
            soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
            if hard != resource.RLIM_INFINITY:
                if files > OTHER_FILES and hard < ranks:
                    raise UserError(
                        f"{ranks:,} ranks meet at a socket for each, but a process on this machine "
                        f"may have {hard:,} files open: raise its hard limit to "
                        f"{store_files(ranks):,} (ulimit -Hn, LimitNOFILE of slurmd or containerd)"
                    )
                files = min(files, hard)
            if soft != resource.RLIM_INFINITY and soft < files:
                resource.prlimit(process, resource.RLIMIT_NOFILE, (files, hard))


def record_flights(folder: Path, attempt: int) -> None:
    """Where torch's flight recorder writes, one file a rank: it asks when there is need to.

    Args:
        folder: made here; a user's own TORCH_FR_DUMP_TEMP_FILE stays.
        attempt: how often the run was started anew; later ones leave the files of earlier ones.
    """
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:  # its former name
        folder.mkdir(exist_ok=True)
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/attempt{attempt}_rank_")


def leave() -> None:
    """Give the process group up; not a collective, and no error if other ranks are dead."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    try:
        dist.destroy_process_group()
    except Exception as error:  # the peers are gone: nothing is left to be undone with them
        if not is_lost_peer(error):
            raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended, hangs or cannot be reached.

    Also if that is the cause of ``error``: a pipeline stage wraps what its collectives raise.
    """
    link: BaseException | None = error
    while isinstance(link, RuntimeError):
        if _LOST_PEER.search(str(link)) and not _OWN_DEVICE.search(str(link)):
            return True
        link = link.__cause__
    return False


_TIMED_OUT = re.compile(
    r"(?:timed out waiting|wait timeout after|ran for) (\d+) ?(?:ms|milliseconds)"
    r"|timed out|collective operation timeout|timeout caused pair closure|socket timeout"
    r"|NCCL timeout in|failed to pass monitoredBarrier",
    re.IGNORECASE,
)
_LOST_PEER = re.compile(
    rf"{_TIMED_OUT.pattern}|connection (was )?(closed|reset|refused)|broken pipe|failed to recv"
    r"|connection abort|no route to host|network is unreachable"
    # NCCL's
    r"|pair closure|connect timeout|remote process (has )?(exited|terminated)|ncclRemoteError"
    r"|communicator was aborted|unhandled system error|ncclSystemError"
    r"|error set by ProcessGroupNCCL|Dispatch CPU wait|NET/\w+ ?: ?Got (completion|async event)",
    re.IGNORECASE,
)
_OWN_DEVICE = re.compile(r"unhandled cuda error|cuda error:|cuda failure", re.IGNORECASE)
"""Of this rank, though NCCL may give it as the reason why it ends a group."""


def tell_lost_contact(error: BaseException) -> None:
    """Say which ranks did not come to a collective that failed, and to which.

    Each rank that lost contact leaves word in the store. Who has left none a second later ended or
    hangs. The first of those that did tells it for all.
    """
    me = Processes.from_environment()
    said = _who_said_so(me)
    missing = [rank for rank in range(me.world_size) if rank not in said]
    if me.rank != min(said):
        return
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    if not missing:
        who = "another rank"
    why = "ended or cannot be reached"
    if match := _TIMED_OUT.search(str(error)):
        within = f"{int(match[1]) / 1000:g} s" if match[1] else "the time allowed"
        why = (
            f"did not come within {within} (trainer.collective_timeout_minutes, in a step "
            "trainer.step_timeout_seconds): it hangs, or is much slower"
        )
    if "nccl" in str(error).lower():
        why += f"; NCCL: {' '.join(str(error).split())[-NCCL_CHARACTERS:]}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if f"{os.sep}deepseek{os.sep}" in frame.filename
        # These frame a call and time it: its caller is what waits.
        and frame.name not in ("guarded", "watched")
    ]
    where = (
        f" (in {ours[-1].name}, {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    )
    console.complain(f"error: contact lost with {who}, which {why}{where}")


def _who_said_so(me: Processes) -> set[int]:
    """Ranks that lost contact, this one among them; without a store, all but rank 0, its keeper."""
    name = f"lost.{_attempt}.{_times_joined}."
    said: set[int] = set()

    def ask(store: Store) -> None:
        with suppress(RuntimeError):  # its keeper ended
            store.set(f"{name}{me.rank}", "")
            end = time.monotonic() + _WORD_SECONDS
            while time.monotonic() < end and len(said) < me.world_size:
                there = {rank for rank in range(me.world_size) if store.check([f"{name}{rank}"])}
                said.update(there)
                time.sleep(0.05)

    if _store is not None:
        # In a thread: of a keeper that hangs, nothing comes back, whatever the store's time-out.
        asks = threading.Thread(target=ask, args=(_store,), daemon=True)
        asks.start()
        asks.join(2 * _WORD_SECONDS)
    return said or set(range(1, me.world_size)) | {me.rank}


_WORD_SECONDS = 1.0
"""Within what ranks that wait for the same one find out; less than the supervisor's patience."""


def _open_store(processes: Processes, timeout: timedelta) -> Store:
    """The key-value store of all ranks, once a process: a port is bound for good."""
    import torch.distributed as dist

    global _store
    if _store is not None:
        return _store
    if processes.world_size == 1 and not processes.main_port:
        _store = dist.HashStore()
        return _store
    try:
        _store = dist.TCPStore(
            processes.main_address,
            processes.main_port,
            processes.world_size,
            is_master=processes.rank == 0 and not processes.agent_store,
            timeout=timeout,
            master_listen_fd=processes.store_fd,
        )
    except RuntimeError as error:
        # Under the supervisor nothing can be misconfigured: a worker died, and all start anew.
        if processes.started_by == "supervisor":
            raise
        minutes = timeout.total_seconds() / 60
        raise UserError(
            f"rank {processes.rank} of {processes.world_size} found no meeting point at "
            f"{processes.main_address}:{processes.main_port} within {minutes:g} minutes "
            f"({type(error).__name__}): did all ranks start, and is MASTER_ADDR:MASTER_PORT free "
            "there and open between the nodes?"
        ) from error
    return _store


# -- the environment --


class _Variables:
    """Environment variables that are numbers or missing; empty is missing."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def text(self, name: str) -> str:
        return self._env.get(name, "").strip()

    def number(self, name: str, default: int | None = None) -> int:
        text = self.text(name)
        if not text and default is not None:
            return default
        if not text.isdecimal():
            raise UserError(f"{name}={text}: must be a whole number, 0 or more; {_WAY_OUT}")
        return int(text)

    def below(self, name: str, limit_name: str) -> int:
        value, limit = self.number(name), self.number(limit_name)
        if value >= limit:
            raise UserError(f"{name}={value}: must be less than {limit_name}={limit}; {_WAY_OUT}")
        return value


_WAY_OUT = "let torchrun set it, or unset RANK, LOCAL_RANK and WORLD_SIZE for one process"


def _from_torchrun(env: _Variables) -> Processes:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not env.text(name)]
    if missing:
        given = [f"{name}={env.text(name)}" for name in needed[:3] if env.text(name)]
        raise UserError(
            f"{' '.join(given)} says that torchrun started this process, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: let torchrun set them all, or unset "
            "RANK, LOCAL_RANK and WORLD_SIZE for one process"
        )
    rank, local_world_size = env.below("RANK", "WORLD_SIZE"), env.number("LOCAL_WORLD_SIZE")
    supervised = env.text(STARTED_BY) == "supervisor"
    return Processes(
        rank=rank,
        local_rank=env.below("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        world_size=env.number("WORLD_SIZE"),
        local_world_size=local_world_size,
        node_rank=env.number("GROUP_RANK", default=rank // local_world_size),
        main_address=env.text("MASTER_ADDR"),
        main_port=env.number("MASTER_PORT"),
        attempt=env.number("TORCHELASTIC_RESTART_COUNT", default=0),
        started_by="supervisor" if supervised else "torchrun",
        agent_store=env.text("TORCHELASTIC_USE_AGENT_STORE") == "True",
        store_fd=env.number(STORE_FD) if supervised and rank == 0 else None,
    )


_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the batch script, the interactive shell and the like from here."""


def _refuse_bare_srun(env: _Variables) -> None:
    """Several tasks of srun, none of which knows that it is one of several.

    A shell inside an allocation has Slurm's variables too, and so has a single task, which may
    start processes of its own.
    """
    step, tasks = env.text("SLURM_STEP_ID"), env.text("SLURM_NTASKS")
    if not (step.isdecimal() and tasks.isdecimal() and env.text("SLURM_PROCID").isdecimal()):
        return
    shell = env.text("SLURM_JOB_NAME") in ("bash", "interactive") or env.text("SLURM_PTY_PORT")
    if int(tasks) < 2 or int(step) >= _FIRST_SPECIAL_STEP or shell:
        return
    console.speak_for_all(env.number("SLURM_PROCID"), env.number("SLURM_LOCALID", default=0))
    raise UserError(
        f"srun started {tasks} processes that know nothing of each other (SLURM_NTASKS={tasks}, "
        "no RANK): let it start one torchrun a node, srun --ntasks-per-node=1 "
        f"{torchrun('DEVICES', '$SLURM_NNODES')} -m deepseek ...; deepseek launch CONFIG --slurm "
        "writes such a job"
    )
