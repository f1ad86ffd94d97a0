"""Runs the command line in forked children of one process that has imported everything once.

Importing torch and Lightning takes seconds; a test of the command line wants dozens of runs. Run as
``python -m support.forked`` this file is that process: it reads a request (one JSON object) a line
and answers each with one line.

``before=FORK_WORKERS`` makes forks of what a supervisor or torchrun starts, too: all of theirs is
real but the start of an interpreter for each rank.

A worker of xdist runs all tests, most of which import the same: there the process is a fork of the
worker, made before anything is collected, so that both have the imports for the price of one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

FORK_WORKERS = "from support.forked import fork_workers; fork_workers()\n"
TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "training" / "nemo"


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    """Exit code; -N if signal N killed it."""
    out: str
    err: str

    def assert_refused(self, *parts: str) -> None:
        """Exit code 2, a message on standard error that has the parts, and no traceback."""
        assert self.code == 2, f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        message = " ".join(self.err.replace("│", " ").split())
        for part in parts:
            assert part in message, message

    def assert_stopped(self, number: int = 15) -> Ran:
        """By a signal that it obeyed."""
        assert self.code == 128 + number, f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self

    def assert_done(self) -> Ran:
        """Exit code 0."""
        assert self.code == 0, f"{self.code}\n{self.out}\n{self.err}"
        return self


class Forked:
    """The client: ``cli("train", "--config", ...)``."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._count = 0
        self._folder = folder
        self._running: set[int] = set()
        values = environment_for_tests(**environment)
        usual = "DEEPSEEK_FRAMEWORK" not in values  # which counts when it is imported
        self._server = _prepared.pop() if usual and _prepared else _new_server(values)
        self.ask(do="environment", values=values)

    def __call__(self, *args: object, cwd: Path | None = None, before: str = "") -> Ran:
        """Run to the end. ``before``: Python that the child executes first."""
        return self.start(*args, cwd=cwd, before=before).wait()

    def start(
        self,
        *args: object,
        cwd: Path | None = None,
        before: str = "",
        program: str = "deepseek",
        env: Mapping[str, str] | None = None,
    ) -> Started:
        """Start ``deepseek``, ``torchrun`` or ``python FILE`` and leave it running.

        ``env``: on top of ours.
        """
        self._count += 1
        files = [self._folder / f"{self._count}.{kind}" for kind in ("out", "err")]
        for file in files:
            file.touch()
        pid = self.ask(
            do="start",
            args=[str(arg) for arg in args],
            cwd=str(cwd or self._folder),
            before=before,
            program=program,
            env=dict(env or {}),
            files=[str(file) for file in files],
        )
        self._running.add(pid)
        return Started(self, pid, *files)

    def preload(self, *modules: str) -> None:
        """Import what several of the commands to come would import, each for itself."""
        assert self.ask(do="import", modules=modules) == len(modules)

    def ask(self, **request: Any) -> int:
        """One request, one answer."""
        self._server.requests.write(json.dumps(request) + "\n")
        self._server.requests.flush()
        return int(json.loads(self._server.answers.readline()))

    def wait(self, pid: int) -> int:
        """Until the command ends; its exit code."""
        code = self.ask(do="wait", pid=pid)
        self._running.discard(pid)
        return code

    def orphans(self) -> list[int]:
        """Processes that run on though the command that started them has ended."""
        return [pid for pid in children(self._server.pid) if pid not in self._running]

    def close(self) -> None:
        """End the process, and what a failed test left running."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        os.kill(self._server.pid, signal.SIGKILL)
        os.waitpid(self._server.pid, 0)
        self._server.requests.close()
        self._server.answers.close()


@dataclass(frozen=True)
class _Server:
    """The process, as the client has it."""

    pid: int
    requests: IO[str]
    answers: IO[str]


_prepared: list[_Server] = []
"""A fork of this process that waits for its client."""


def _new_server(environment: dict[str, str]) -> _Server:
    """Of an interpreter of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None
    process.returncode = 0  # the client waits for it by its number
    return _Server(process.pid, process.stdin, process.stdout)


def prepare_server() -> None:
    """Import what commands import, and fork the process of the first client to come.

    What imports take note of (a logger of its stream, a library of its filters for warnings) is
    what a program of its own would have.
    """
    ours = sys.stdin, sys.stdout, sys.stderr
    streams = [open(number, "w" if number else "r", closefd=False) for number in range(3)]
    sys.stdin, sys.stdout, sys.stderr = streams
    imports()
    (requests, client_writes), (client_reads, answers) = os.pipe(), os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        sys.modules["__main__"] = importlib.import_module("support.forked")
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
        _log_as_a_program(dict(zip(ours, streams, strict=True)))
        try:
            serve(os.fdopen(requests), os.fdopen(answers, "w"))
        finally:
            os._exit(1)
    sys.stdin, sys.stdout, sys.stderr = ours
    os.close(requests)
    os.close(answers)
    _prepared.append(_Server(pid, os.fdopen(client_writes, "w"), os.fdopen(client_reads)))


def _log_as_a_program(streams: Mapping[Any, IO[str]]) -> None:
    """Without pytest's handlers, and not into its streams: the keys, for which the values are."""
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not type(h).__module__.startswith("_pytest")]
    for handler in (reference() for reference in logging._handlerList):  # type: ignore[attr-defined]
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            handler.setStream(streams[handler.stream])


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    forked: Forked
    pid: int
    out: Path
    err: Path

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until the text stands on its standard output."""
        end = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert time.monotonic() < end, self.out.read_text() + self.err.read_text()
            time.sleep(0.01)

    def wait(self) -> Ran:
        """Until it ends."""
        code = self.forked.wait(self.pid)
        return Ran(code, self.out.read_text(), self.err.read_text())


def environment_for_tests(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts: ours, with this checkout in front."""
    env = {k: v for k, v in os.environ.items() if k != "DEEPSEEK_FRAMEWORK"}
    path = os.pathsep.join(filter(None, [str(TESTS), str(SOURCE), env.get("PYTHONPATH", "")]))
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


def children(pid: int) -> list[int]:
    """The running children of a process, in the order of their start."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    pids = [int(word) for word in listed.read_text().split()] if listed.exists() else []
    return [child for child in pids if is_running(child)]


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- the process --


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    imports()
    parse_once()
    gc.freeze()  # no child searches this for garbage, nor copies its pages to do so
    gc.enable()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a command leaves behind becomes a child of ours
    for line in requests:
        request = json.loads(line)
        if request["do"] == "start":
            answer = child(request)
        elif request["do"] == "environment":
            os.environ.clear()
            os.environ.update(request["values"])
            answer = 0
        elif request["do"] == "import":
            answer = len(list(map(importlib.import_module, request["modules"])))
        else:
            answer = ended(request["pid"])
        print(answer, file=answers, flush=True)


def imports() -> None:
    """What commands import, also what they import late."""
    import torch.distributed.run  # noqa: F401

    import deepseek.checkpoint.callback
    import deepseek.commands.check
    import deepseek.commands.convert
    import deepseek.commands.evaluate
    import deepseek.commands.experts
    import deepseek.commands.fit
    import deepseek.commands.migrate
    import deepseek.commands.monitor
    import deepseek.commands.prepare_data
    import deepseek.commands.runs
    import deepseek.commands.train
    import deepseek.inference.speculative
    import deepseek.monitoring.record.metrics_log
    import deepseek.monitoring.record.progress
    import deepseek.monitoring.record.run_record  # noqa: F401


def parse_once() -> None:
    """Typer's parsing brings pydantic, and costs a command more than all that it does itself."""
    import typer.main

    from deepseek.cli import main

    typer.main.get_command = functools.cache(typer.main.get_command)  # the parser is built once
    for words in (["--help"], ["validate", "deepseek_v3_tiny"]):
        sys.argv = ["deepseek", *words]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with contextlib.suppress(SystemExit):
                main()


def child(request: dict[str, Any]) -> int:
    """Fork; the child is the command."""
    pid = os.fork()
    if pid:
        return pid
    for name, flags, number in (
        (os.devnull, os.O_RDONLY, 0),
        (request["files"][0], os.O_WRONLY | os.O_CREAT, 1),
        (request["files"][1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 2),
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # What nohup, or a shell's `&`, around the tests ignores is no concern of a command's.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(request["program"], request["args"], request["before"])


def become(program: str, args: Sequence[str], before: str = "") -> NoReturn:
    """Be ``deepseek``, ``torchrun`` or ``python`` until it ends, and end."""
    code: Any = 0
    # As a new interpreter filters warnings: pytest's are errors, or always shown.
    kept = [one for one in warnings.filters if one[0] not in ("error", "always")]
    warnings.resetwarnings()
    warnings.filters.extend(kept)  # type: ignore[attr-defined]
    try:
        import torch.distributed.run  # noqa: F401

        from deepseek.cli import main

        sys.argv = [program, *args]
        exec(before, {})
        if program == "deepseek":
            main()
        elif program == "torchrun":
            torch.distributed.run.main(list(args))
        else:
            sys.argv = list(args)
            sys.path.insert(0, str(Path(args[0]).resolve().parent))
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- in a command that starts others --


def fork_workers() -> None:
    """From here on, the supervisor, torchrun and ``sweep`` fork what they start."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    import deepseek.commands.sweep as sweep
    import deepseek.launch.supervisor as supervisor

    elastic = subprocess_handler.subprocess_handler
    sweep.subprocess = supervisor.subprocess = _ForkingSubprocess  # type: ignore[attr-defined]
    elastic.Popen = ForkedPopen  # type: ignore[misc, assignment]


class ForkedPopen:
    """A ``subprocess.Popen`` of ``python -u -m deepseek ARGS`` or ``python -u FILE ARGS`` that
    forks; it dies with its parent."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        process_group: int | None = None,
        start_new_session: bool = False,
        **_: object,
    ) -> None:
        self.args = args
        self.returncode: int | None = None
        parent = os.getpid()
        sys.stdout.flush()  # or the child says it, too
        self.pid = os.fork()
        if self.pid == 0:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            if process_group == 0 or start_new_session:
                os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _close_all_but({0, 1, 2, *pass_fds})
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            words = list(args)
            while sys.executable in words:  # twice: the supervisor's tether starts the other
                words = words[words.index(sys.executable) + 1 :]
            words = [word for word in words if word != "-u"]
            if words[:2] == ["-m", "deepseek"]:
                become("deepseek", words[2:])
            become("python", words)
        if process_group == 0 or start_new_session:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(self.pid, self.pid)  # whoever comes first

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _ForkingSubprocess:
    """What the supervisor and ``sweep`` use of the module ``subprocess``."""

    Popen = ForkedPopen
    DEVNULL = subprocess.DEVNULL


PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


def _close_all_but(kept: set[int]) -> None:
    """As ``Popen`` does: the listening socket of a dead rank 0 must not live on in another.

    The numbers stay taken: an object of pytest's that has one would read and write what came next.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.fstat(int(name))  # not the one that lists them
                os.dup2(nowhere, int(name))


if __name__ == "__main__":
    serve(sys.stdin, os.fdopen(os.dup(1), "w"))
