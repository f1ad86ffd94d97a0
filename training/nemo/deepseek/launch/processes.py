"""The processes of a run: which one this is, how many there are, and how they find each other.

Three launchers are understood, ``torchrun``, Slurm's ``srun`` and our own supervisor, which speaks
torchrun's language. This file needs torch only to join, so that a wrong environment is told at
once.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from deepseek import console
from deepseek.config.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

STARTED_BY = "DEEPSEEK_STARTED_BY"
"""``supervisor`` in the processes that ``launch/supervisor.py`` starts."""
STORE_FD = "DEEPSEEK_STORE_FD"
"""Rank 0 under the supervisor: the listening socket, inherited, of the store."""
LOST_PEER_EXIT_CODE = 75
"""Of a rank that ends because another one did ("temporary failure" in sysexits.h)."""
FAREWELL_SECONDS = 2.0
"""How long rank 0, which serves the store, waits for others that have an error to show."""
PATIENCE_SECONDS = 5.0
"""How long a rank lets the first one of its node speak before it does."""


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
    started_by: Literal["supervisor", "torchrun", "slurm", "none"] = "none"
    agent_store: bool = False
    """The store at ``main_address`` is served by torchrun's agent, not by rank 0."""
    store_fd: int | None = None
    """Listening socket for the store that this rank serves; None: bind ``main_port``."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Processes:
        """Read what a launcher has set; ``env`` is ``os.environ`` if not given.

        Raises:
            UserError: variables that are missing, not numbers, or contradict each other.
        """
        variables = _Variables(os.environ if env is None else env)
        if any(variables.text(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return _from_torchrun(variables)
        if _started_by_srun(variables):
            return _from_slurm(variables)
        return cls()

    @property
    def serves_store(self) -> bool:
        """Whether this process must stay until the others need the store no more."""
        return self.rank == 0 and not self.agent_store


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
                f"nodes run torchrun --nnodes {num_nodes} --nproc-per-node {devices} "
                "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500, or use srun under Slurm"
            )
        if devices > 1:
            raise UserError(
                f"{product}, but this is one process alone: start it with "
                f"torchrun --nproc-per-node {devices}, or set trainer.devices=1"
            )
        return
    world, local = processes.world_size, processes.local_world_size
    launcher, option = {
        "torchrun": ("torchrun", "--nproc-per-node"),
        "slurm": ("srun", "--ntasks-per-node"),
        "supervisor": ("the supervisor", "devices"),
    }[processes.started_by]
    if world != configured:
        if world % num_nodes == 0:
            ways = [f"trainer.devices={world // num_nodes}"]
        else:
            ways = [f"trainer.devices={local} trainer.num_nodes={max(1, world // local)}"]
        nodes = f"--nnodes {num_nodes} " if processes.started_by == "torchrun" else ""
        nodes = f"--nodes {num_nodes} " if processes.started_by == "slurm" else nodes
        raise UserError(
            f"{launcher} started {world} processes, {product}: set {ways[0]}, or "
            f"{nodes if num_nodes > 1 else ''}{option} {devices}"
        )
    if local != devices:
        raise UserError(
            f"{launcher} started {local} processes on this node (node {processes.node_rank}), "
            f"but trainer.devices={devices}: set trainer.devices={local} "
            f"trainer.num_nodes={max(1, world // local)}, or {option} {devices}"
        )


# -- the process group --

_store: Store | None = None
_processes = Processes()
_times_joined = 0
_complained = False


def quiet(processes: Processes) -> None:
    """Rank 0 speaks for all. To be called first; errors before ``join`` come once per node."""
    console.speak_for_all(processes.rank, lambda message: _may_complain(processes))


def _may_complain(processes: Processes) -> bool:
    """Where the ranks cannot ask each other: the first of a node at once, the others later.

    An end tells the launcher to end the node's other ranks: the one that speaks must be the first.
    A rank that is still there after the wait has an error of its own.
    """
    if processes.local_rank > 0:
        time.sleep(PATIENCE_SECONDS)
    return True


def join(processes: Processes, device_type: str, timeout: timedelta) -> None:
    """Make the default process group, unless it is there: gloo for CPU tensors, NCCL for CUDA's.

    Args:
        processes: this process.
        device_type: ``cpu`` or ``cuda``; with ``cuda``, the device of the local rank is chosen.
        timeout: of the rendezvous and of every collective.

    Raises:
        UserError: no GPU for this rank, or rank 0 cannot be reached.
    """
    import torch
    import torch.distributed as dist

    global _processes, _times_joined
    if dist.is_initialized():
        have = (dist.get_rank(), dist.get_world_size())
        if have != (processes.rank, processes.world_size):
            raise UserError(
                f"a process group exists already, in which this is rank {have[0]} of {have[1]} "
                f"instead of {processes.rank} of {processes.world_size}; let none be made before"
            )
        return
    if device_type == "cuda":
        visible = torch.cuda.device_count()
        if processes.local_rank >= visible:
            raise UserError(
                f"local rank {processes.local_rank} (rank {processes.rank}) sees {visible} GPUs, "
                f"but {processes.local_world_size} processes run on this node: start at most one "
                "per GPU, and let each see all of them (srun --gpu-bind=none, or no "
                "CUDA_VISIBLE_DEVICES of its own)"
            )
        torch.cuda.set_device(processes.local_rank)
    store = _open_store(processes, timeout)
    _choose_interface(processes)
    # torchrun keeps one store for all attempts, in which gloo would find the addresses of the dead.
    name = f"attempt{processes.attempt}.{_times_joined}"
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore(name, store),
        rank=processes.rank,
        world_size=processes.world_size,
        timeout=timeout,
    )
    _processes = processes
    _times_joined += 1
    console.speak_for_all(processes.rank, first_to_complain)
    atexit.register(leave)


def leave() -> None:
    """Give the process group up; not a collective, and no error if other ranks are dead."""
    import torch.distributed as dist

    if _complained and _processes.serves_store:
        _wait_for_complaints()
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
        if _LOST_PEER.search(str(link)):
            return True
        link = link.__cause__
    return False


_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|failed to recv|pair closure"
    r"|remote process (has )?(exited|terminated)|timed out waiting|wait timeout after",
    re.IGNORECASE,
)


def first_to_complain(message: str) -> bool:
    """True on the first rank that has this message; the same error of all ranks is shown once."""
    global _complained
    _complained = True
    if _store is None:
        return True
    digest = hashlib.sha256(message.encode()).hexdigest()
    prefix = f"attempt{_processes.attempt}"
    try:
        first = _store.add(f"{prefix}/complaint/{digest}", 1) == 1
        _store.add(f"{prefix}/complaints", 1)
    except RuntimeError:  # rank 0 is gone, and with it the store: better twice than never
        return True
    return first


def _wait_for_complaints() -> None:
    """Let the others ask whether their message has been shown, before the store goes."""
    assert _store is not None
    end = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < end:
        count = _store.add(f"attempt{_processes.attempt}/complaints", 0)
        if count >= _processes.world_size:
            return
        time.sleep(0.02)


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
            is_master=processes.serves_store,
            timeout=timeout,
            master_listen_fd=processes.store_fd,
        )
    except RuntimeError as error:
        # Under the supervisor nothing can be misconfigured: a worker died, and all start anew.
        if processes.started_by == "supervisor":
            raise
        minutes = timeout.total_seconds() / 60
        where = f"{processes.main_address}:{processes.main_port}"
        who = f"rank {processes.rank} of {processes.world_size}"
        advice = (
            "is the port taken? Set another MASTER_PORT on all ranks"
            if "EADDRINUSE" in str(error) or "already in use" in str(error)
            else "did all ranks start, and is MASTER_ADDR:MASTER_PORT open between the nodes?"
        )
        raise UserError(
            f"{who} found no meeting point at {where} within {minutes:g} minutes "
            f"({type(error).__name__}): {advice}"
        ) from error
    return _store


def _choose_interface(processes: Processes) -> None:
    """Across nodes, gloo shall use the interface that leads to rank 0, unless the user chose one.

    By itself it takes the address that the host's own name has, often 127.0.1.1 from /etc/hosts, or
    loopback if the name has none: nobody on another node reaches either.
    """
    if processes.world_size == processes.local_world_size or os.environ.get(INTERFACE):
        return
    name = interface_to(processes.main_address)
    if name is not None:
        os.environ[INTERFACE] = name


INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def interface_to(address: str) -> str | None:
    """The network interface from which this machine reaches another, or itself by an address that
    others know; None for loopback, IPv6 alone, and whatever cannot be found out."""
    with (
        suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((address, 9))  # sends nothing: only a route is looked up
        own = probe.getsockname()[0]
        if own.startswith("127."):
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


# -- environments --


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
        if not text:
            raise UserError(f"{name} is not set; {_WAY_OUT}")
        if not text.isdecimal():
            raise UserError(f"{name}={text}: must be a whole number, 0 or more; {_WAY_OUT}")
        return int(text)

    def below(self, name: str, limit_name: str, limit: int) -> int:
        value = self.number(name)
        if value >= limit:
            raise UserError(
                f"{name}={value}: must be less than {limit_name}={limit}; count from 0, and give "
                "all processes the same " + limit_name
            )
        return value

    def port(self, default: int | None = None) -> int:
        value = self.number("MASTER_PORT", default)
        if not 0 < value < 65536:
            raise UserError(f"MASTER_PORT={value}: must be 1 to 65535, such as 29500")
        return value


_WAY_OUT = "let torchrun or srun set it, or unset RANK, LOCAL_RANK and WORLD_SIZE for one process"


def _from_torchrun(env: _Variables) -> Processes:
    given = [f"{n}={env.text(n)}" for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if env.text(n)]
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not env.text(name)]
    if missing:
        raise UserError(
            f"{' '.join(given)} says that a launcher started this process, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: let torchrun "
            "or srun set them all, or unset RANK, LOCAL_RANK and WORLD_SIZE for one process"
        )
    world_size = env.number("WORLD_SIZE")
    rank = env.below("RANK", "WORLD_SIZE", world_size)
    local_world_size = env.number("LOCAL_WORLD_SIZE")
    local_rank = env.below("LOCAL_RANK", "LOCAL_WORLD_SIZE", local_world_size)
    if local_world_size > world_size:
        raise UserError(
            f"LOCAL_WORLD_SIZE={local_world_size}: must be at most WORLD_SIZE={world_size}, the "
            "number of processes on all nodes"
        )
    supervised = env.text(STARTED_BY) == "supervisor"
    return Processes(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=env.number("GROUP_RANK", default=rank // local_world_size),
        main_address=env.text("MASTER_ADDR"),
        main_port=env.port(),
        attempt=env.number("TORCHELASTIC_RESTART_COUNT", default=0),
        started_by="supervisor" if supervised else "torchrun",
        agent_store=env.text("TORCHELASTIC_USE_AGENT_STORE") == "True",
        store_fd=env.number(STORE_FD) if supervised and rank == 0 else None,
    )


_INTERACTIVE_JOBS = ("bash", "interactive")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the batch script, the interactive shell and the like from here."""


def _started_by_srun(env: _Variables) -> bool:
    """Whether this is one of several tasks, and not a shell inside an allocation."""
    if not env.text("SLURM_PROCID") or not env.text("SLURM_STEP_ID"):
        return False
    if env.text("SLURM_JOB_NAME") in _INTERACTIVE_JOBS or env.text("SLURM_PTY_PORT"):
        return False
    return env.number("SLURM_STEP_ID") < _FIRST_SPECIAL_STEP and env.number("SLURM_NTASKS", 1) > 1


def _from_slurm(env: _Variables) -> Processes:
    world_size = env.number("SLURM_NTASKS")
    node_rank = env.number("SLURM_NODEID")
    local_world_size = _tasks_on_node(env, node_rank)
    address = env.text("MASTER_ADDR")
    if not address:
        nodes = env.text("SLURM_STEP_NODELIST") or env.text("SLURM_JOB_NODELIST")
        if not nodes:
            raise UserError(
                "SLURM_JOB_NODELIST is not set, so rank 0 cannot be found: start with srun inside "
                "an allocation, or set MASTER_ADDR to the first node"
            )
        address = first_host(nodes)
    return Processes(
        rank=env.below("SLURM_PROCID", "SLURM_NTASKS", world_size),
        local_rank=env.below("SLURM_LOCALID", "the tasks on this node", local_world_size),
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        main_address=address,
        main_port=env.port(default=15000 + env.number("SLURM_JOB_ID") % 5000),
        attempt=env.number("SLURM_RESTART_COUNT", default=0),
        started_by="slurm",
    )


def _tasks_on_node(env: _Variables, node_rank: int) -> int:
    """From ``4(x2),3`` (the counts node by node), else from ``--ntasks-per-node``."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts: list[int] = []
    for part in filter(None, env.text(name).split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{name}={env.text(name)}: is not of the form 4(x2),3; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    if node_rank < len(counts):
        return counts[node_rank]
    return env.number("SLURM_NTASKS_PER_NODE")


def first_host(nodes: str) -> str:
    """``node003`` of Slurm's ``node[003-005,9],x1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # it may be empty
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])
