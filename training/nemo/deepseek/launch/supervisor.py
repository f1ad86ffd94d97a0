"""Starts the processes of one machine, watches them, and starts all anew if one is lost.

Workers see torchrun's environment variables. This process needs neither torch nor a port: it hands
rank 0 the listening socket at which the ranks meet, a new one each attempt.

Against torchrun's own agent (``torch.distributed.launcher.elastic_launch``) it starts without
importing torch, does not try again what only the user can mend, ends with the workers' exit code,
and adds nothing to what they say.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.config.processor import cores, told_threads
from deepseek.launch.processes import LOST_PEER_EXIT_CODE, STARTED_BY, STORE_FD
from deepseek.launch.signals import StopRequests, signal_name

USER_ERROR = 2
"""Exit code of what only the user can mend: not started anew."""
SETTLE_SECONDS = 2.0
"""After a loss, how long the other ranks may take to notice and end by themselves."""
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
END_SECONDS = 60.0
"""That other ranks may take to end after rank 0 has ended well: one that hangs is ended then."""
START_SECONDS = 60.0
"""An attempt that lasted longer counts as progress where nothing better is known."""
POLL_SECONDS = 0.03
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":  # elsewhere a worker outlives a supervisor that is killed
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
os.execv(command[0], command)
"""
# Asking for it between fork and exec (``preexec_fn``) would run Python in a copy of a process that
# may have threads.


def supervise(
    command: Sequence[str],
    num_processes: int,
    max_restarts: int,
    report: Callable[[str], None],
    progress: Callable[[], int] | None = None,
    complete: Callable[[], bool] | None = None,
    conclude: Callable[[], None] = lambda: None,
) -> int:
    """Run ``num_processes`` copies of a command to the end, whatever happens to them.

    A worker that dies by a signal, or ends with a code other than 0 and 2, is lost: the others are
    stopped, and all start again, at most ``max_restarts`` times. A signal that asks to stop goes on
    to every worker, once, and is waited for; another one a while later kills.

    A worker may also be lost when all is done: a library crashes as its process ends, or memory
    runs out over a report. Where ``complete`` is given, that is no reason to start again.

    Args:
        command: of a worker, with the path of its program first; see ``worker_command``.
        num_processes: workers, ranks 0 to n - 1.
        max_restarts: after the first attempt.
        report: where messages go.
        progress: the step of the newest checkpoint, so that an error that comes back without any
            progress in between is not repeated ``max_restarts`` times.
        complete: whether the last step is done and saved. Not asked where rank 0 has ended well,
            which leaves nothing undone: the others then have ``END_SECONDS`` to end, too.
        conclude: what rank 0 does after the last step; called if it was lost over it.

    Returns:
        0, 2 for an error that the user can mend, 1 if given up, 128 + N after signal N to this
        process or to a worker.
    """
    with _Signals() as signals:
        before = progress() if progress else 0
        last_code = 0
        for attempt in range(max_restarts + 1):
            if signals.first is not None:
                return 128 + signals.first
            group = _WorkerGroup(command, num_processes, attempt, signals)
            started = time.monotonic()
            failure = group.watch(complete)
            if signals.first is not None:
                return group.code_after_signal(signals.first)
            if failure is None:
                if group.late:
                    report(f"{group.late}, {END_SECONDS:g} s after rank 0: ended, nothing is lost")
                return group.stopped_by_signal()
            if failure.code == USER_ERROR:
                return USER_ERROR
            if complete is not None and (group.rank_0_ended_well or complete()):
                report(f"{failure}, when the run was complete: nothing is lost")
                if not group.rank_0_ended_well:
                    conclude()
                return 0
            now = progress() if progress else 0
            advanced = now > before if progress else time.monotonic() - started > START_SECONDS
            # A Python error that strikes twice in the same stretch is in the program or the data,
            # and will strike again. A signal, such as of a machine short of memory, may not.
            if failure.is_error and failure.code == last_code and not advanced:
                report(f"{failure}; the same happened before, without progress: {_GIVING_UP}")
                return 1
            if attempt == max_restarts:
                used = f"restarts are used up ({max_restarts})" if max_restarts else "not restarted"
                report(f"{failure}; {used}: {_GIVING_UP}")
                return 1
            report(f"{failure}; all start again, restart {attempt + 1} of {max_restarts}")
            before, last_code = now, failure.code
    raise AssertionError("the last attempt returns")


_GIVING_UP = "stopping. The newest checkpoint is kept; the same command goes on from it"


def worker_command(argv: Sequence[str] | None = None) -> list[str]:
    """The command line of this process, to be started again: ``deepseek``, a script or a module.

    Raises:
        UserError: it was started in a way that cannot be repeated, as a notebook.
    """
    program, *options = sys.argv if argv is None else argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if Path(program).name == "deepseek" or (spec is not None and spec.name == "deepseek.__main__"):
        return [sys.executable, "-m", "deepseek", *options]
    if spec is not None:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *options]
    if not Path(program).is_file():
        raise UserError(
            f"several processes need a program to start, and {program or 'an interactive session'} "
            "is not a file: put the code into a script, or start it with torchrun"
        )
    return [sys.executable, program, *options]


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    told: bool = False
    """Whether a signal was passed on: a second one would mean to stop at once."""

    @property
    def code(self) -> int | None:
        """None while it runs; -N if signal N killed it."""
        return self.process.poll()

    def tell(self, number: int) -> None:
        """Pass a signal on, to the worker alone: its data loaders end with it."""
        if not self.told:
            self.told = True
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it, and what it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class _Failure:
    rank: int
    code: int
    deaf: tuple[int, ...] = ()
    """Ranks that did not end when they were asked to."""

    @property
    def is_error(self) -> bool:
        """Of the program itself, not a signal or a lost connection."""
        return self.code > 0 and self.code != LOST_PEER_EXIT_CODE

    def __str__(self) -> str:
        deaf = f" (did not answer SIGTERM: {', '.join(map(str, self.deaf))})" if self.deaf else ""
        if self.code == LOST_PEER_EXIT_CODE:
            return f"rank {self.rank} lost contact with another rank{deaf}"
        if self.code >= 0:
            return f"rank {self.rank} ended with exit code {self.code}{deaf}"
        watchdog = (
            ", as torch does when a collective of NCCL times out: see its lines above, and "
            "flight_recorder in the run folder"
        )
        cause = signal_name(-self.code) + (watchdog if self.code == -signal.SIGABRT else "")
        return f"rank {self.rank} was killed by {cause}{deaf}"


class _Signals:
    """The supervisor's own stop signals: the first is passed on, one that insists kills."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self._requests = StopRequests(self._pass_on, self._kill)

    @property
    def first(self) -> int | None:
        """The one that was passed on."""
        return self._requests.first

    def __enter__(self) -> _Signals:
        self._requests.listen()
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.release()

    def _pass_on(self, number: int) -> None:
        for worker in self.workers:
            worker.tell(number)

    def _kill(self, number: int) -> None:
        for worker in self.workers:
            worker.kill()


class _WorkerGroup:
    """The workers of one attempt, as torchrun calls them."""

    def __init__(
        self, command: Sequence[str], num_processes: int, attempt: int, signals: _Signals
    ) -> None:
        self.signals = signals
        self.workers: list[_Worker] = []
        signals.workers = self.workers
        self._endings: list[_Failure] = []
        self.late = ""
        """Ranks that hung when all was done, in words."""
        try:
            with _listening_socket() as listener:
                for rank in range(num_processes):
                    self._start(command, rank, num_processes, attempt, listener)
        except BaseException:
            self._kill_all()
            raise

    @property
    def rank_0_ended_well(self) -> bool:
        """With all that it had to do."""
        return self.workers[0].code == 0

    def watch(self, complete: Callable[[], bool] | None) -> _Failure | None:
        """Until all have ended; what ended them, if it was a loss or an error.

        Args:
            complete: see ``supervise``; where given, and rank 0 has ended well, the others have
                nothing left to do.
        """
        try:
            while self._running() and not self._note_endings():
                time.sleep(POLL_SECONDS)
                if complete is not None and self.rank_0_ended_well:
                    self._wait(END_SECONDS)
                    late = [str(worker.rank) for worker in self._running()]
                    self.late = f"rank {', '.join(late)} still ran" if late else ""
                    break
            # One is lost, and the others with it, for they wait for each other at every step. An
            # error of the user has told what is wrong: the others would only say the same.
            if all(failure.code != USER_ERROR for failure in self._endings):
                shows = complete is not None and self.workers[0].code is None and complete()
                self._wait(END_SECONDS if shows else SETTLE_SECONDS)  # rank 0: sample, report
                self._note_endings()
            for worker in self._running():
                worker.tell(signal.SIGTERM)
                worker.process.send_signal(signal.SIGCONT)  # stopped, it would not hear
            self._wait(GRACE_SECONDS)
            deaf = tuple(worker.rank for worker in self._running())
        finally:
            self._kill_all()
        # The first that did not end only because another had.
        causes = [failure for failure in self._endings if failure.code != LOST_PEER_EXIT_CODE]
        return next((replace(ending, deaf=deaf) for ending in causes or self._endings), None)

    def stopped_by_signal(self) -> int:
        """128 + N if workers obeyed signal N, sent to one of them: they have saved; else 0."""
        return max((worker.process.returncode for worker in self.workers), default=0)

    def code_after_signal(self, number: int) -> int:
        """What the supervisor returns after it passed a signal on."""
        codes = [worker.process.returncode for worker in self.workers]
        if not any(codes):
            return 0
        positive = [code for code in codes if code > 0 and code != LOST_PEER_EXIT_CODE]
        return min(positive, default=128 + number)

    def _start(
        self,
        command: Sequence[str],
        rank: int,
        num_processes: int,
        attempt: int,
        listener: socket.socket,
    ) -> None:
        env = worker_environment(rank, num_processes, attempt, listener.getsockname()[1])
        inherited: tuple[int, ...] = ()
        if rank == 0:
            inherited = (listener.fileno(),)
            env[STORE_FD] = str(listener.fileno())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            process_group=0,  # a Ctrl-C of the terminal comes here alone, and is passed on
        )
        worker = _Worker(rank, process)
        self.workers.append(worker)
        if self.signals.first is not None:  # it came between two starts
            worker.tell(self.signals.first)

    def _running(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.code is None]

    def _note_endings(self) -> bool:
        """Whether any has ended badly; of those found at once, the likelier cause comes first."""
        noted = {ending.rank for ending in self._endings}
        ended = [
            _Failure(worker.rank, worker.code)
            for worker in self.workers
            if worker.code and worker.code <= 128 and worker.rank not in noted
        ]
        self._endings += sorted(
            ended, key=lambda failure: (failure.code != USER_ERROR, failure.code)
        )
        return bool(self._endings)

    def _wait(self, seconds: float) -> None:
        """Until all have ended, or as long as ``seconds``."""
        end = time.monotonic() + seconds
        while self._running() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _kill_all(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.process.wait()


def worker_threads(num_processes: int) -> int:
    """Of each process: what the user says, or an equal share of the cores."""
    return told_threads() or max(1, cores() // num_processes)


def worker_environment(rank: int, num_processes: int, attempt: int, port: int) -> dict[str, str]:
    """This process's environment, and what torchrun would set."""
    env = dict(os.environ, OMP_NUM_THREADS=str(worker_threads(num_processes)))
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return env | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        STARTED_BY: "supervisor",
    }


@contextmanager
def _listening_socket() -> Iterator[socket.socket]:
    """Bound before the workers start, so that nobody can take its port meanwhile."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield listener
