"""The process groups of a rank: each once, few, split off by one call, and what they are called.

On torch's fake backend, at sizes that no machine here has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepseek.config.layout import Layout
from deepseek.parallel.mesh import Meshes
from support.ranks import run_ranks

V3 = Layout(pp=16, dp_shard=128, ep=64)
"""Of 2,048 ranks, as ``deepseek_v3_671b``."""
LAYOUTS = [
    V3,
    Layout(pp=16, dp_replicate=2, dp_shard=16, tp=4, ep=32),
    Layout(dp_shard=2048),
    Layout(dp_replicate=4, dp_shard=512, ep=256),
    Layout(pp=2, dp_shard=1024, ep=8),
    Layout(tp=8, dp_shard=256),
    Layout(pp=4, dp_replicate=2, dp_shard=64, tp=4, ep=32, cp=8),
]


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[None]:
    """A process that takes itself for this rank; its collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def groups() -> list[list[int]]:
    """The ranks of every group of this process."""
    return [dist.get_process_group_ranks(g) for g in dist.distributed_c10d._world.pg_map]


def made(layout: Layout) -> Meshes:
    return Meshes(layout, "cpu", timedelta(minutes=1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_has_few_groups_and_none_twice(layout: Layout) -> None:
    last = layout.world_size - 1
    for rank in (0, 1, layout.world_size // 2 - 1, last):
        with rank_of(layout, rank):
            meshes = made(layout)
            found = groups()
            assert len(found) <= 10 + (layout.cp > 1)
            assert len({tuple(ranks) for ranks in found}) == len(found)
            for mesh in (meshes.dense, meshes.sparse):
                for dim, axis in enumerate(mesh.mesh_dim_names or ()):
                    index = [*(mesh.mesh == rank).nonzero()[0].tolist()]
                    line = mesh.mesh[(*index[:dim], slice(None), *index[dim + 1 :])].tolist()
                    assert dist.get_process_group_ranks(mesh.get_group(axis)) == line
                    assert dist.get_process_group_ranks(mesh[axis].get_group()) == line
            stage = range(rank // layout.stage_ranks * layout.stage_ranks, last + 1)
            assert dist.get_process_group_ranks(meshes.stage) == [*stage[: layout.stage_ranks]]
            alike = layout.cp * layout.tp  # between ranks with the same part of other sequences
            same_part = [r for r in stage[: layout.stage_ranks] if (r - rank) % alike == 0]
            assert dist.get_process_group_ranks(meshes.data) == same_part
            if meshes.cp is not None:
                first = rank - rank // layout.tp % layout.cp * layout.tp
                shared = [*range(first, first + alike, layout.tp)]
                assert dist.get_process_group_ranks(meshes.cp) == shared


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_under_nccl_one_call_splits_all_ranks(
    monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """A stand-in for ``split_group``, which needs an accelerator. No group brings gloo with it."""
    splits: list[dict[str, Any]] = []
    new_group = dist.new_group

    def split_group(
        split_ranks: list[list[int]], backend: str, timeout: timedelta, group_desc: str
    ) -> dist.ProcessGroup | None:
        splits.append({"ranks": split_ranks, "backend": backend, "timeout": timeout})
        mine = next((ranks for ranks in split_ranks if dist.get_rank() in ranks), None)
        return mine and new_group(mine, use_local_synchronization=True)  # type: ignore[return-value]

    monkeypatch.setattr(dist, "split_group", split_group)
    monkeypatch.setattr(dist, "new_group", lambda *args, **options: pytest.fail("not split"))
    with rank_of(layout, 5):
        bound = property(lambda group: torch.device("cuda:0"), lambda group, device: None)
        monkeypatch.setattr(type(dist.group.WORLD), "bound_device_id", bound)
        made(layout)
        assert len(splits) <= 9 + (layout.cp > 1) and len(splits) >= len(groups()) - 1
        everyone = list(range(layout.world_size))
        for split in splits:
            ranks = sorted(rank for group in split["ranks"] for rank in group)
            assert ranks == everyone
            assert split["backend"] == "cuda:nccl" and split["timeout"] == timedelta(minutes=1)


def test_what_passes_in_groups_of_the_same_ranks_is_told_apart() -> None:
    with rank_of(V3, 0):
        meshes = made(V3)
        named = {op: set(meshes.names(op).values()) for op in ("all_gather", "all_reduce")}
        assert named == {
            "all_gather": {"dp_shard", "edp"},
            "all_reduce": {"data+stage", "world"},
        }
    alone = Layout(dp_shard=4, ep=4)
    with rank_of(alone, 0):
        meshes = made(alone)
        assert set(meshes.names("all_gather").values()) == {"dp_shard"}
        assert set(meshes.names("all_to_all").values()) == {"ep"}
        assert meshes.names("send_recv") == {}


def test_steps_wait_less_long_than_other_work() -> None:
    def work(rank: int) -> list[float]:
        waited = []
        layout = Layout(dp_shard=2, tp=2)  # TP's groups: the world's connections must outlive this
        meshes = Meshes(layout, "cpu", timedelta(seconds=60), step_timeout=timedelta(seconds=0.2))
        for soon in (False, True):
            meshes.expect_steps(soon)
            if meshes.coordinate.tp == 1:
                time.sleep(1.5)
            began = time.monotonic()
            with pytest.raises(RuntimeError) if soon else nullcontext():
                dist.all_reduce(torch.ones(1), group=meshes.tp)
            waited.append(time.monotonic() - began)
        meshes.expect_steps(False)
        return waited

    patient, hasty = run_ranks(4, work)[0]
    assert patient > 1.2 > hasty
