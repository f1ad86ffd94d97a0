"""Runs the commands of a guide one after the other, each in a fork of one process.

``python migration_guide_driver.py FOLDER < commands.json``: a list of commands in, for each its
exit code and output out. All of a command is real but the start of an interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import socket
import sys
import traceback
from pathlib import Path


def main() -> None:
    os.chdir(sys.argv[1])
    sys.path.insert(0, sys.argv[1])
    preload()
    results = []
    for number, command in enumerate(json.load(sys.stdin)):
        output = Path(f"output_{number}.txt")
        codes = run(shlex.split(command), output)
        results.append([max(codes, key=abs), output.read_text()])
    print(json.dumps(results))


def preload() -> None:
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

    import deepseek.cli
    import deepseek.commands.convert
    import deepseek.commands.fit
    import deepseek.commands.migrate
    import deepseek.interop.open_weights  # noqa: F401


def run(words: list[str], output: Path) -> list[int]:
    """Exit codes of the processes of one command."""
    env: list[dict[str, str]] = [{}]
    if words[:2] == ["torchrun", "--nproc-per-node"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        count = int(words[2])
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
        words = ["python", *words[3:]]
    children = [child(words, output, more) for more in env]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def child(words: list[str], output: Path, env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(env)
    code: object = 0
    try:
        sys.argv = words[1:] if words[0] == "python" else words
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            assert words[0] == "deepseek", words
            from deepseek.cli import main as deepseek

            deepseek()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(int(code) if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
