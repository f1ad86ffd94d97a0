"""All-gather and reduce-scatter through shared memory give what torch's own give, at any size, and
fall back to them where memory cannot be shared. FSDP's flat tensors lie in that memory, and nothing
else does."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config import RunConfig, load_config, shared_memory
from deepseek.config.layout import Layout
from deepseek.config.shared_memory import ALIGNMENT, GROUP_BYTES
from deepseek.parallel import cpu_memory
from deepseek.parallel.cpu_memory import (
    SharedMemory,
    _AllGather,
    _ReduceScatter,
    _UnitMemory,
    keep_freed_memory,
    use_in_fsdp,
)
from deepseek.parallel.mesh import Meshes, local
from deepseek.planner.cpu import exchange_bytes
from deepseek.training.step import DeepSeekModel
from support.layouts import Case, batches, small_config, spread
from support.micro_runs import MicroRuns
from support.ranks import RankFailed, run_ranks

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
SMALL_REGION = 4096


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).mul(100).to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    """The sum as one process adds it up, first rank first."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def exchanges(rank: int, size: int, lengths: list[int], dtype: torch.dtype) -> bool:
    """Gathers and sums of these lengths, nothing between them, the ranks at their own pace."""
    before = len(os.listdir("/proc/self/fd"))
    for number, length in enumerate(lengths):
        if number % size == rank:
            time.sleep(0.002)  # now this rank is the last, now another
        parts = [numbers(length, dtype, 100 * number + r) for r in range(size)]
        gathered = torch.empty(size * length, dtype=dtype)
        own = parts[rank]
        if number % 2:  # as FSDP does: the input is a part of the output
            own = gathered[rank * length : (rank + 1) * length].copy_(own)
        cpu_memory.all_gather(gathered, own, group())
        assert torch.equal(gathered, torch.cat(parts))
        wholes = [numbers(size * length, dtype, 9000 + 100 * number + r) for r in range(size)]
        part = torch.empty(length, dtype=dtype)
        cpu_memory.reduce_scatter(part, wholes[rank].clone(), group())
        assert torch.equal(part, in_order(wholes)[rank * length : (rank + 1) * length])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # that of the memory
    return cpu_memory.group_memory(group()) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_length_gives_the_same(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths below, at and above what fits into the memory at once, and none at all."""
    monkeypatch.setattr(shared_memory, "REGION_BYTES", SMALL_REGION)
    fits = SMALL_REGION // dtype.itemsize
    others = size - 1  # among whom a region is divided
    lengths = [1, 0, 7, fits // others, fits // others + 1, fits, 5 * fits + 3, 2, 3 * fits, 1]
    shared = run_ranks(size, exchanges, size, lengths, dtype)
    assert shared == [True] * size


def placed(rank: int, size: int, kinds: str, dtype: torch.dtype) -> None:
    """Gathers (g) and sums (s) of what was written into the memory in the first place."""
    length = 1000
    shared = cpu_memory.open_memory(group(), size * length * dtype.itemsize)
    assert shared is not None
    for number, kind in enumerate(kinds):
        parts = [numbers(length, dtype, 100 * number + r) for r in range(size)]
        wholes = [numbers(size * length, dtype, 9000 + 100 * number + r) for r in range(size)]
        whole_bytes = size * length * dtype.itemsize
        mine = slice(rank * length, (rank + 1) * length)
        if kind == "g":
            gathered = shared.region(0)[:whole_bytes].view(dtype)
            cpu_memory.all_gather(gathered, gathered[mine].copy_(parts[rank]), group(), shared)
            if number % size == rank:
                time.sleep(0.01)  # others are about to write what comes next
            assert torch.equal(gathered, torch.cat(parts))
        else:
            written = shared.region(rank)[:whole_bytes].view(dtype).copy_(wholes[rank])
            part = torch.empty(length, dtype=dtype)
            cpu_memory.reduce_scatter(part, written, group(), shared)
            assert torch.equal(part, in_order(wholes)[mine])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_lies_in_the_memory_is_not_overwritten_before_all_have_read_it(
    size: int, dtype: torch.dtype
) -> None:
    """In any order of gathers and sums, whoever is the slowest to read."""
    run_ranks(size, placed, size, "gsgsggggssssgsggss", dtype)


def test_all_of_a_group_take_a_bounded_piece_of_memory() -> None:
    """However many ranks."""

    def work(rank: int) -> int:
        memory = cpu_memory.group_memory(group())
        assert memory is not None
        return memory.region_bytes

    assert run_ranks(2, work) == [shared_memory.REGION_BYTES] * 2
    (region, *_) = run_ranks(8, work)
    assert 2 * 8 * region == shared_memory.GROUP_BYTES


def test_groups_do_not_share_memory() -> None:
    """Two groups of the same rank, used in turn and at different paces."""

    def work(rank: int) -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair = pairs[rank // 2]
        for step in range(20):
            own = torch.full((1000,), float(10 * step + rank))
            pair_out, all_out = torch.empty(2000), torch.empty(4000)
            cpu_memory.all_gather(pair_out, own, pair)
            cpu_memory.all_gather(all_out, own, group())
            first = rank // 2 * 2
            assert pair_out[::1000].tolist() == [10 * step + first, 10 * step + first + 1]
            assert all_out[::1000].tolist() == [10 * step + r for r in range(4)]

    run_ranks(4, work)


@pytest.mark.parametrize("where", ["nowhere", "other machine", "other process table"])
def test_without_shared_memory_the_backend_does_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without such memory; ranks on two machines; a container beside a container."""

    def work(rank: int) -> bool:
        if where == "nowhere":
            monkeypatch.delattr(os, "memfd_create")
        elif where == "other machine":
            monkeypatch.setattr(cpu_memory, "_machine", lambda: (f"machine {rank // 2}",))
        elif rank == 2:

            def refuse(path: str, *args: Any) -> int:
                raise PermissionError(13, "Permission denied", path)

            monkeypatch.setattr(os, "open", refuse)
        own = torch.full((4,), float(rank + 1))
        gathered, part = torch.empty(12), torch.empty(4)
        cpu_memory.all_gather(gathered, own, group())
        assert gathered.tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
        cpu_memory.reduce_scatter(part, gathered * (rank + 1), group())
        assert part.tolist() == [6.0 * (rank + 1)] * 4
        return cpu_memory.group_memory(group()) is None

    assert run_ranks(3, work) == [True] * 3


def test_a_killed_rank_does_not_leave_the_others_waiting() -> None:
    def work(rank: int) -> None:
        gathered, own = torch.empty(2000), torch.ones(1000)
        cpu_memory.all_gather(gathered, own, group())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        cpu_memory.all_gather(gathered, own, group())

    begin = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(2, work)
    assert time.monotonic() - begin < 20


# -- FSDP's flat tensors --


def flat_tensors(rank: int, case: Case) -> tuple[list[bool], bool, bool]:
    """Of each gather and sum, whether it lay in the unit's memory; whether a result does; and
    whether the group has memory, too."""
    driven = spread(case)
    seen: list[bool] = []
    leaked: list[bool] = []
    find = cpu_memory._FlatTensors._placed

    def placed(self: Any, flat: Tensor, group: Any) -> Tensor:
        found = find(self, flat, group)
        seen.append(self._unit.memory is not None and found is flat)
        return found

    def watch(name: str) -> None:
        original = getattr(cpu_memory, name)

        def watched(*given: Any) -> None:
            original(*given)
            if len(given) < 4:  # not FSDP's
                return
            shared: SharedMemory | None = given[3]
            if shared is not None:
                parameters = driven.module.model.parameters()
                stay = [given[0]] if name == "reduce_scatter" else map(local, parameters)
                leaked.extend(map(shared.holds, stay))

        setattr(cpu_memory, name, watched)

    setattr(cpu_memory._FlatTensors, "_placed", placed)  # noqa: B010
    watch("all_gather")
    watch("reduce_scatter")
    driven.run(batches(case))
    return seen, any(leaked), any(cpu_memory._memories.values())


@pytest.mark.parametrize(
    ("world", "sizes", "units"),
    [
        (2, {"micro_batch_size": 4}, 1),
        (3, {"global_batch_size": 12, "micro_batch_size": 2}, 1),
        # a unit of experts in each MoE block
        (4, {"expert_model_parallel_size": 2, "micro_batch_size": 2}, 5),
        pytest.param(4, {"tensor_model_parallel_size": 2}, 5, marks=pytest.mark.nightly),
        # a unit for each block
        pytest.param(4, {"pipeline_model_parallel_size": 2}, 3, marks=pytest.mark.nightly),
    ],
)
def test_weights_that_stay_are_read_where_they_were_written(
    world: int, sizes: dict[str, Any], units: int
) -> None:
    """From the second step on; the first tells how much there is, and they are brought there."""
    case = Case(small_config(**sizes), world, steps=3)
    for seen, leaked, of_group in run_ranks(world, flat_tensors, case):
        exchanges = len(seen) // 3
        assert exchanges >= 2 * units
        assert seen == [False] * exchanges + [True] * (2 * exchanges)
        assert not leaked
        assert of_group == ("tensor_model_parallel_size" in sizes)


@pytest.mark.parametrize("why", ["given back", "too large", "no such memory"])
def test_memory_is_not_taken_where_it_is_spared_or_missing(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "too large":
        monkeypatch.setattr(cpu_memory, "FSDP_BYTES", 1000)
    elif why == "no such memory":
        monkeypatch.delattr(os, "memfd_create")
    config = small_config(reshard_after_forward=why == "given back", micro_batch_size=4)
    case = Case(config, 2, steps=2)
    for seen, _, of_group in run_ranks(2, flat_tensors, case):
        assert seen
        assert not any(seen)
        assert of_group == (why != "no such memory")


def test_a_gradient_as_large_as_the_gathered_weights_has_memory_of_its_own() -> None:
    """Weights gathered in bf16, gradients summed in fp32, two ranks: both have as many bytes."""

    def work(rank: int) -> list[bool]:
        world = dist.group.WORLD
        assert world is not None
        unit = _UnitMemory(wanted=True)
        gather, scatter = _AllGather(unit), _ReduceScatter(unit)
        found = []
        for _ in range(2):
            output = gather.allocate((64,), dtype=torch.bfloat16, device=CPU)
            own = output[32 * rank :][:32].fill_(rank)
            gather(output, own, world)
            assert output[::32].tolist() == [0.0, 1.0]
            whole = scatter.allocate((64,), dtype=torch.float32, device=CPU).fill_(rank + 1)
            part: Tensor = scatter.allocate((32,), dtype=torch.float32, device=CPU)
            scatter(part, whole, world, dist.ReduceOp.SUM)
            assert part.tolist() == [3.0] * 32
            memory = unit.memory
            assert memory is not None
            found += [memory.holds(tensor) for tensor in (output, whole, part)]
        return found

    assert run_ranks(2, work) == [[False] * 3 + [True, True, False]] * 2


class Unit:
    """What ``use_in_fsdp`` sees of an FSDP unit, used as FSDP uses it."""

    def set_custom_all_gather(self, comm: Any) -> None:
        self.all_gather = comm

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        self.reduce_scatter = comm

    def gather(self, rank: int, number: float) -> Tensor:
        world = dist.group.WORLD
        output: Tensor = self.all_gather.allocate((64,), dtype=torch.float32, device=CPU)
        self.all_gather(output, output[32 * rank :][:32].fill_(number + rank), world)
        return output

    def sum(self, number: float) -> Tensor:
        whole = self.reduce_scatter.allocate((64,), dtype=torch.float32, device=CPU).fill_(number)
        part: Tensor = self.reduce_scatter.allocate((32,), dtype=torch.float32, device=CPU)
        self.reduce_scatter(part, whole, dist.group.WORLD, dist.ReduceOp.SUM)
        return part


def test_what_a_unit_has_gathered_stays_while_others_exchange() -> None:
    """FSDP gathers a unit's weights while another computes, whose gradients are then summed."""

    def work(rank: int) -> None:
        early, other = Unit(), Unit()
        use_in_fsdp([early, other], 1000)  # type: ignore[list-item]
        for unit in (early, other):  # tells how much there is
            unit.gather(rank, 0.0)
            unit.sum(0.0)
        gathered = early.gather(rank, 10.0)
        for number in (20.0, 30.0, 40.0):
            assert other.gather(rank, number)[::32].tolist() == [number, number + 1]
            assert other.sum(number).tolist() == [2 * number] * 32
        assert gathered[::32].tolist() == [10.0, 11.0]

    run_ranks(2, work)


# -- freed memory is used again, so that a step does not wait for the system to clear it --


PROGRAM = """
import resource
import torch
from deepseek.parallel.cpu_memory import keep_freed_memory

def step():
    tensors = [torch.ones(size) for size in (9_000_000, 3_000_000, 40_000)]
    return sum(float(tensor[0]) for tensor in tensors)
def faults():
    "Pages that the system clears in 20 steps of 48 MB."
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
left = faults()
print(left, keep_freed_memory(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of the GNU C library")
def test_freed_memory_is_used_again(micro: MicroRuns, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = micro.cli.start(tmp_path / "program.py", program="python").wait().assert_done()
    left, taken, kept = done.out.split()
    assert taken == "True" and int(kept) < int(left) / 10
    assert int(left) > 40_000


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def touched(rank: int, run: RunConfig) -> int:
    """Bytes of the memory of groups that are in this process after two steps, each of two
    micro-batches, with as many rows for each expert."""
    model = run.model
    module = DeepSeekModel(model, seed=1, parallelize_later=True)
    meshes = Meshes(Layout.of_run(run), "cpu", timedelta(minutes=1))
    module.parallelize(meshes, CPU)
    for router in module.model.routers().values():
        router.choose = partial(all_in_turn, model.num_experts_per_tok)
    optimizer = module.configure_optimizers()
    tokens = torch.arange(model.data.seq_length).expand(2 * model.micro_batch_size, -1).contiguous()
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "positions": tokens,
        "documents": torch.zeros_like(tokens, dtype=torch.int32),
    }
    for _ in range(2):
        module.train_step(batch, optimizer)
    found, is_group = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if places := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            size = int(places[2], 16) - int(places[1], 16)
            is_group = "memfd:deepseek" in line and size == GROUP_BYTES + ALIGNMENT
        elif is_group and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def all_in_turn(top_k: int, scores_TE: Tensor) -> Tensor:
    """(T, K) experts, of which each gets as many tokens as any other."""
    tokens, experts = scores_TE.shape
    return torch.arange(tokens * top_k).remainder(experts).view(tokens, top_k)


@pytest.mark.parametrize(
    "change",
    [
        {"expert_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2},
        {"reshard_after_forward": True},
        {},
    ],
)
def test_what_groups_touch_is_what_the_planner_counts(change: dict[str, Any]) -> None:
    """But for a page of those that wait, and those at the ends. FSDP's own memory is another."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1024}
    sizes |= {"micro_batch_size": 2, "num_nextn_predict_layers": 0, "tokenizer.vocab_size": 512}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32}
    parts = 1 if "tensor_model_parallel_size" in change else 2
    sizes |= {"global_batch_size": 4 * parts, "data.seq_length": 256}
    settings = [f"model.{name}={value}" for name, value in (sizes | change).items()]
    where = ["trainer.precision=32", "trainer.accelerator=cpu", "trainer.devices=2"]
    run = load_config("deepseek_v3_tiny", [*where, *settings])
    counted = exchange_bytes(run)
    assert (counted >= 1 << 18) == bool(change)
    for found in run_ranks(2, touched, run):
        assert counted <= found <= counted + 24 * ALIGNMENT * bool(change)
