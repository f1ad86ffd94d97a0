"""Runs a function on several gloo ranks, each a fork of the test process.

A fork has torch imported already, and a test may hand over any function and any arguments, also
those that cannot be pickled; only what comes back is.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 1.0
"""For the other ranks to end by themselves once one has failed."""


class RankFailed(AssertionError):
    """A rank raised, was killed, or never ended; the message says which and where."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """``work(rank, *args)`` on every rank of a gloo process group; results in order of rank.

    Each rank has one thread, and the random state of the caller.

    Args:
        timeout: seconds for the whole run.

    Raises:
        RankFailed: with the traceback of the rank that failed first; after a time-out with the
            place where each rank stands.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    sys.stdout.flush()
    sys.stderr.flush()
    running: dict[int, int] = {}  # pid -> rank
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        try:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    _child(rank, world_size, work, args, folder, server, timeout)
                running[pid] = rank
            _wait(running, folder, timeout)
            return [
                pickle.loads(_file(folder, rank, "result").read_bytes())
                for rank in range(world_size)
            ]
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            torch.set_num_threads(threads)


def run_in_turn(world_size: int, work: Callable[..., Any], cases: Sequence[Any]) -> list[list[Any]]:
    """``work(rank, case)`` of each case, one after another on the same ranks: their first step
    costs as much as the next two. For each case the results in order of rank."""
    ranks = run_ranks(
        world_size,
        lambda rank: [work(rank, case) for case in cases],
        timeout=120.0 * len(cases),
    )
    return [list(results) for results in zip(*ranks, strict=True)]


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"{rank}.{kind}"


# -- in the parent --


def _wait(running: dict[int, int], folder: Path, timeout: float) -> None:
    """Until all have ended well; takes those that ended out of ``running``."""
    end = time.monotonic() + timeout
    failed: dict[int, str] = {}  # rank -> how it ended
    while running:
        for pid, rank in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == 0:
                continue
            del running[pid]
            code = os.waitstatus_to_exitcode(status)
            if code:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                failed[rank] = how
                end = min(end, time.monotonic() + GRACE_SECONDS)
        if running and time.monotonic() > end:
            if failed:
                break
            raise RankFailed(_stuck(running, folder, timeout))
        time.sleep(0.01)
    if failed:
        raise RankFailed(_blame(failed, folder))


def _blame(failed: dict[int, str], folder: Path) -> str:
    """The first failure in full: what follows on other ranks is mostly its consequence."""

    def when(rank: int) -> int:
        error = _file(folder, rank, "error")
        return error.stat().st_mtime_ns if error.exists() else 0  # no traceback: it was killed

    first, *others = sorted(failed, key=when)
    lines = [f"rank {first} {failed[first]}"]
    for kind in ("error", "output"):
        if _file(folder, first, kind).exists():
            lines.append(_file(folder, first, kind).read_text())
    for rank in others:
        error = _file(folder, rank, "error")
        last = error.read_text().strip().splitlines()[-1] if error.exists() else ""
        lines.append(f"then rank {rank} {failed[rank]}: {last}")
    return "\n".join(lines)


def _stuck(running: dict[int, int], folder: Path, timeout: float) -> str:
    """Ask every rank for the place where it stands."""
    for pid in running:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    lines = [f"ranks {sorted(running.values())} still ran after {timeout:g} s"]
    for rank in sorted(running.values()):
        stack = _file(folder, rank, "stack")
        lines.append(f"-- rank {rank}:\n{stack.read_text() if stack.exists() else 'not started'}")
        lines.append(_file(folder, rank, "output").read_text())
    return "\n".join(lines)


# -- in the child --


def _child(
    rank: int,
    world_size: int,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    server: socket.socket,
    timeout: float,
) -> None:
    """Never returns: whatever happens, the test process must not go on twice."""
    code = 1
    try:
        _die_with_parent()
        gc.freeze()  # what is inherited is no garbage: not to search it saves a tenth of the time
        warnings.simplefilter("default")  # as for users: torch's compiler warns of itself
        output = os.open(_file(folder, rank, "output"), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # pytest's own go elsewhere
        with _file(folder, rank, "stack").open("w") as stack:
            faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
            _start(rank, world_size, server, timedelta(seconds=2 * timeout))
            result = work(rank, *args)
            _file(folder, rank, "result").write_bytes(pickle.dumps(result))
            dist.barrier()  # rank 0 holds the store: it leaves last
        code = 0
    except BaseException:
        _file(folder, rank, "error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _start(rank: int, world_size: int, server: socket.socket, timeout: timedelta) -> None:
    """The process group; rank 0 serves the store on the socket that the parent has bound."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # What a launcher would set, for code under test that asks the environment.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    host, port = server.getsockname()
    store = dist.TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=server.fileno() if rank == 0 else None,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _die_with_parent() -> None:
    """Linux kills this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
