"""Runs the command line in forked children of one process that has imported everything once.

Importing torch and Lightning takes seconds; a test of the command line wants dozens of runs. As a
script this file is that process: it reads a request (one JSON object) a line and answers each with
one line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "training" / "nemo"


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
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_for_tests(**environment),
        )

    def __call__(self, *args: object, cwd: Path | None = None, before: str = "") -> Ran:
        """Run to the end. ``before``: Python that the child executes first."""
        return self.start(*args, cwd=cwd, before=before).wait()

    def start(self, *args: object, cwd: Path | None = None, before: str = "") -> Started:
        """Start and leave running."""
        self._count += 1
        files = [self._folder / f"{self._count}.{kind}" for kind in ("out", "err")]
        for file in files:
            file.touch()
        pid = self.ask(
            do="start",
            args=[str(arg) for arg in args],
            cwd=str(cwd or self._folder),
            before=before,
            files=[str(file) for file in files],
        )
        self._running.add(pid)
        return Started(self, pid, *files)

    def ask(self, **request: Any) -> int:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))

    def wait(self, pid: int) -> int:
        """Until the command ends; its exit code."""
        code = self.ask(do="wait", pid=pid)
        self._running.discard(pid)
        return code

    def close(self) -> None:
        """End the process, and what a failed test left running."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


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
    """The environment of a process that a test starts: ours, with this source tree in front."""
    env = {k: v for k, v in os.environ.items() if k != "DEEPSEEK_FRAMEWORK"}
    path = os.pathsep.join(filter(None, [str(SOURCE), env.get("PYTHONPATH", "")]))
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


# -- the process --


def serve() -> None:
    """Answer requests until standard input ends."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        answer = child(request) if request["do"] == "start" else ended(request["pid"])
        print(answer, file=answers, flush=True)


def preload() -> None:
    """What a training run imports."""
    import deepseek.checkpoint.callback
    import deepseek.cli
    import deepseek.commands.test_model
    import deepseek.commands.train
    import deepseek.data.prepare
    import deepseek.inference.generate
    import deepseek.monitoring.metrics_log
    import deepseek.monitoring.progress
    import deepseek.monitoring.run_record  # noqa: F401


def child(request: dict[str, Any]) -> int:
    """Fork; the child is the command."""
    pid = os.fork()
    if pid:
        return pid
    for name, flags, number in (
        (os.devnull, os.O_RDONLY, 0),
        (request["files"][0], os.O_WRONLY | os.O_CREAT, 1),
        (request["files"][1], os.O_WRONLY | os.O_CREAT, 2),
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    code: Any = 0
    try:
        from deepseek.cli import main

        os.chdir(request["cwd"])
        sys.argv = ["deepseek", *request["args"]]
        exec(request["before"], {})
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    serve()
