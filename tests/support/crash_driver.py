"""A process that crashes its children: the scenarios of test_manager_faults.py.

Importing torch takes seconds and a killed process must not be the test's own: this script imports
once, then forks a child per crash. It reads requests (one JSON list ``[scenario, {arguments}]`` a
line) and answers each with one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

from deepseek.checkpoint.checkpoint import newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.config.errors import UserError

torch.set_num_threads(1)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """About 200 kB that depend on the step in every number."""
    generator = torch.Generator().manual_seed(step)
    return {f"layer.{i}": torch.randn(25, 500, generator=generator) for i in range(4)}


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as failure:
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def answer_of(work: Callable[[], object]) -> object:
    """Result of ``work`` in a child, whose limits and locks end with it."""
    reading, writing = os.pipe()

    def child() -> None:
        os.write(writing, json.dumps(work()).encode())

    pid = in_child(child)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def what_is_left(folder: Path) -> dict[str, object]:
    """The newest sound checkpoint as a reader finds it, and whether every bit of it is right."""
    reports: list[str] = []
    checkpoint = newest_sound(folder, reports.append)
    if checkpoint is None:
        return {"step": 0, "exact": True, "reports": reports}
    version = checkpoint.state()["version"]
    expected = tensors_of(version)
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.load(found)
    exact = all(torch.equal(found[name], expected[name]) for name in expected)
    return {"step": checkpoint.step, "version": version, "exact": exact, "reports": reports}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name[0] == "." and p.name != ".lock")


def random_kills(folder: str, rounds: int, seed: int) -> object:
    """Kill a process that saves without pause, at a random moment after its first few saves."""
    chance = random.Random(seed)
    place, acknowledged, results = Path(folder), 0, []
    started = time.monotonic()
    with CheckpointManager(place.with_name("timing")) as manager:
        for step in range(5):
            manager.save(step, tensors_of(step), {"version": step})
    usual = (time.monotonic() - started) / 5
    for _ in range(rounds):
        reading, writing = os.pipe()

        def save_for_ever(start: int = acknowledged, writing: int = writing) -> None:
            manager, step = CheckpointManager(place), start
            os.write(writing, f"{start}\n".encode())
            while True:
                step += 1
                manager.save(step, tensors_of(step), {"version": step})
                os.write(writing, f"{step}\n".encode())

        pid = in_child(save_for_ever)
        os.close(writing)
        with os.fdopen(reading) as stream:
            for _ in range(1 + chance.randrange(3)):
                acknowledged = int(stream.readline())
            time.sleep(chance.uniform(0, 2 * usual))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged = max([acknowledged, *map(int, stream.read().split())])
        found = what_is_left(place)
        results.append({"acknowledged": acknowledged, "left": leftovers(place), **found})
        acknowledged = max(acknowledged, int(str(found["step"])))
    return results


def random_kills_in_background(folder: str, rounds: int, seed: int) -> object:
    """The same of a process that works on while it saves, and overwrites what is being saved."""
    chance = random.Random(seed)
    place, acknowledged, results = Path(folder), 0, []
    for _ in range(rounds):
        reading, writing = os.pipe()

        def save_for_ever(start: int = acknowledged, writing: int = writing) -> None:
            manager, step = CheckpointManager(place), start
            os.write(writing, f"{start}\n".encode())
            while True:
                step += 1
                tensors = tensors_of(step)
                manager.save_in_background(step, tensors, {"version": step})
                os.write(writing, f"{step - 1}\n".encode())  # which it has waited for
                for tensor in tensors.values():
                    tensor.fill_(float("nan"))

        pid = in_child(save_for_ever)
        os.close(writing)
        with os.fdopen(reading) as stream:
            for _ in range(2 + chance.randrange(3)):
                acknowledged = int(stream.readline())
            time.sleep(chance.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged = max([acknowledged, *map(int, stream.read().split())])
        found = what_is_left(place)
        results.append({"acknowledged": acknowledged, "left": leftovers(place), **found})
        acknowledged = max(acknowledged, int(str(found["step"])))
    return results


CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")


def crash_points(folder: str, step: int, version: int) -> object:
    """Save ``step`` again and again, dying before the n-th call that changes the disk."""
    source, results = Path(folder), []
    for point in range(1000):
        copy = source.with_name(f"{source.name}-{point}")
        shutil.copytree(source, copy)

        def save(copy: Path = copy, point: int = point) -> None:
            count = 0

            def deadly(call: Callable[..., object]) -> Callable[..., object]:
                def wrapped(*args: object, **kwargs: object) -> object:
                    nonlocal count
                    if count == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                    return call(*args, **kwargs)

                return wrapped

            manager = CheckpointManager(copy, keep=1)
            for name in CALLS:
                setattr(os, name, deadly(getattr(os, name)))
            manager.save(step, tensors_of(version), {"version": version})

        _, status = os.waitpid(in_child(save), 0)
        left = leftovers(copy)
        CheckpointManager(copy, keep=1).close()
        results.append({"left": left, "after": leftovers(copy), **what_is_left(copy)})
        shutil.rmtree(copy)
        if status == 0:
            return results
        assert os.WIFSIGNALED(status), status
    raise AssertionError("a save that never ends")


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def message_of(work: Callable[[], object]) -> str:
    try:
        return f"no error: {work()}"
    except UserError as failure:
        return str(failure)


def disk_full(folder: str, limits: list[int]) -> object:
    """A save under each limit of the size of a file, then one without."""

    def work() -> object:
        place = Path(folder)
        manager = CheckpointManager(place, keep=2)
        results = []
        for limit in limits:
            with file_limit(limit):
                text = message_of(lambda: manager.save(9, tensors_of(9), {"version": 9}))
            results.append({"message": text, "left": leftovers(place), **what_is_left(place)})
        manager.save(9, tensors_of(9), {"version": 9})
        return [*results, {"message": "", "left": leftovers(place), **what_is_left(place)}]

    return answer_of(work)


def hold(folder: str, with_loader: bool) -> object:
    """A writer that holds the folder, and perhaps a forked loader worker that outlives it."""
    reading, writing = os.pipe()

    def child() -> None:
        manager = CheckpointManager(Path(folder))
        worker = in_child(lambda: time.sleep(60)) if with_loader else 0
        os.write(writing, f"{worker}\n".encode())
        time.sleep(60)
        manager.close()

    pid = in_child(child)
    worker = int(os.read(reading, 100))
    os.close(writing)
    os.close(reading)
    return {"pid": pid, "worker": worker}


def kill(pid: int) -> object:
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return True


FULL = torch.arange(15, dtype=torch.float64).reshape(5, 3)


def two_ranks(folder: str) -> object:
    """Save and load as two gloo ranks; each rank's findings."""
    root = Path(folder)

    def rank(number: int) -> None:
        store = dist.FileStore(str(root / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=number, world_size=2)
        answer = as_rank(root / "checkpoints", number)
        (root / f"rank{number}.json").write_text(json.dumps(answer))
        dist.destroy_process_group()

    pids = [in_child(partial(rank, number)) for number in range(2)]
    for pid in pids:
        os.waitpid(pid, 0)
    return [json.loads((root / f"rank{number}.json").read_text()) for number in range(2)]


def as_rank(folder: Path, rank: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2,))
    common = torch.full((2,), 7.0)
    tensors = {
        "rows": distribute_tensor(FULL, mesh, [Shard(0)]),
        "one_row": distribute_tensor(FULL[:1], mesh, [Shard(0)]),
        "copied": distribute_tensor(FULL, mesh, [Replicate()]),
        "common": common,
        f"stage{rank}": torch.full((3,), float(rank)),
    }
    answer: dict[str, object] = {}
    manager = CheckpointManager(folder)

    # 1. What one process wrote.
    before = manager.newest_sound(lambda text: None)
    assert before is not None
    columns = zeros(5, 3, dtype=torch.float64, device_mesh=mesh, placements=[Shard(1)])
    before.load({"rows": columns})
    answer["from_one"] = columns.full_tensor().tolist()

    # 2. What two ranks write, in another layout than they load.
    answer["path"] = str(manager.save(2, tensors, {"from": rank}))
    after = manager.newest_sound(lambda text: None)
    assert after is not None
    rows = zeros(5, 3, dtype=torch.float64, device_mesh=mesh, placements=[Shard(1)])
    one_row = zeros(1, 3, dtype=torch.float64, device_mesh=mesh, placements=[Shard(0)])
    mine = torch.zeros(3)
    after.load({"rows": rows, "one_row": one_row, f"stage{rank}": mine})
    answer["step"], answer["state"] = after.step, after.state()
    answer["rows"], answer["one_row"] = rows.full_tensor().tolist(), one_row.full_tensor().tolist()
    answer["stage"] = mine.tolist()

    # 3. What fails on one rank fails on both.
    def attempt(**changes: torch.Tensor) -> str:
        return message_of(lambda: manager.save(3, {**tensors, **changes}, {"from": rank}))

    answer["differing"] = attempt(common=common + rank)
    answer["shapes"] = attempt(common=torch.zeros(2 + rank))
    state = {"loss": float("nan") if rank else 0.0}
    answer["state_of_one"] = message_of(lambda: manager.save(3, tensors, state))
    big = DTensor.from_local(torch.ones(50_000), mesh, [Shard(0)])
    with file_limit(100_000) if rank else contextlib.nullcontext():
        answer["disk_of_one"] = attempt(big=big)
    wrong = {"rows": torch.zeros(4 + rank, 3, dtype=torch.float64)}
    answer["load_of_one"] = message_of(lambda: after.load(wrong))
    answer["steps"] = manager.steps()
    answer["left"] = leftovers(folder)
    manager.close()
    return answer


SCENARIOS: dict[str, Callable[..., object]] = {
    "random_kills": random_kills,
    "random_kills_in_background": random_kills_in_background,
    "crash_points": crash_points,
    "disk_full": disk_full,
    "hold": hold,
    "kill": kill,
    "two_ranks": two_ranks,
}

if __name__ == "__main__":
    for line in sys.stdin:
        scenario, arguments = json.loads(line)
        print(json.dumps(SCENARIOS[scenario](**arguments)), flush=True)
