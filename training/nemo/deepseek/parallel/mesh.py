"""The two meshes over the ranks, every process group there is, and what of a tensor lies here.

A mesh has axes (``config/layout.py`` names them); a tensor has dims. Every group is made here, so
that it has a name and the configured time-out.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from deepseek.config.layout import DENSE_AXES, SPARSE_AXES, Layout


class Meshes:
    """The meshes of this rank, and its coordinates in them; making them is a collective.

    Args:
        layout: sizes; their product is the world size.
        device_type: ``cpu`` or ``cuda``.
        timeout: of every collective in every group.

    Attributes:
        pp, tp, ep: groups of this rank along these axes.
        data: the ranks that read other batches and hold the same stages and the same TP shard.
        stage: all ranks that hold the same stages.
        ends: the two ranks that hold the first and the last stage of this rank's pipeline, or None
            if there is one stage, or this rank holds neither.
        world: all ranks.
    """

    def __init__(self, layout: Layout, device_type: str, timeout: timedelta) -> None:
        assert dist.get_world_size() == layout.world_size
        self.layout = layout
        self.device_type = device_type
        self.timeout = timeout
        self.rank = dist.get_rank()
        self.coordinate = layout.coordinate(self.rank)
        self.dense = init_device_mesh(device_type, layout.dense_sizes, mesh_dim_names=DENSE_AXES)
        self.sparse = init_device_mesh(device_type, layout.sparse_sizes, mesh_dim_names=SPARSE_AXES)
        for mesh in (self.dense, self.sparse):
            for axis in mesh.mesh_dim_names or ():
                dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(axis))
        self.pp = self.dense.get_group("pp")
        self.tp = self.dense.get_group("tp")
        self.ep = self.sparse.get_group("ep")
        ranks = self.dense.mesh
        self.data = self._group("data", ranks.movedim(3, 1).flatten(2).flatten(0, 1).tolist())
        self.stage = self._group("stage", ranks.flatten(1).tolist())
        self.ends = self._ends()
        # Not torch's default group, which may be that of an axis: its traffic is told apart.
        self.world = self._group("world", [ranks.flatten().tolist()])

    @property
    def data_rank(self) -> int:
        """Which share of each batch this rank reads."""
        return self.coordinate.dp_replicate * self.layout.dp_shard + self.coordinate.dp_shard

    @property
    def dense_shards(self) -> DeviceMesh:
        """Over which dense parameters are sharded (and replicated, if so configured)."""
        if self.layout.dp_replicate > 1:
            return self.dense["dp_replicate", "dp_shard"]
        return self.dense["dp_shard"]

    @property
    def expert_shards(self) -> DeviceMesh:
        """Over which the experts of each EP rank are sharded (and replicated)."""
        if self.layout.dp_replicate > 1:
            return self.sparse["dp_replicate", "edp"]
        return self.sparse["edp"]

    def names(self) -> dict[dist.ProcessGroup, str]:
        """Every group of this rank that has other ranks, and what it is called.

        torch gives two axes that both span all ranks one group: ``tp+ep``.
        """
        meshes = ((self.dense, DENSE_AXES), (self.sparse, SPARSE_AXES))
        named: list[tuple[str, dist.ProcessGroup | None]] = [
            (axis, mesh.get_group(axis)) for mesh, axes in meshes for axis in axes
        ]
        named += [("data", self.data), ("stage", self.stage), ("world", self.world)]
        named += [("ends", self.ends)]
        names: dict[dist.ProcessGroup, str] = {}
        for name, group in named:
            if group is not None and dist.get_world_size(group) > 1:
                names[group] = f"{names[group]}+{name}" if group in names else name
        return names

    def _ends(self) -> dist.ProcessGroup | None:
        """First and last stage share the embedding, of which the last has a copy for MTP."""
        if self.layout.pp == 1:
            return None
        ranks = self.dense.mesh.flatten(1)
        pairs = [[int(first), int(last)] for first, last in zip(ranks[0], ranks[-1], strict=True)]
        return self._group("ends", pairs)

    def _group(self, name: str, members: list[list[int]]) -> dist.ProcessGroup | None:
        """The one of these disjoint groups that has this rank. Every rank makes every group."""
        mine = None
        for index, ranks in enumerate(members):
            group = dist.new_group(ranks, timeout=self.timeout, group_desc=f"{name}_{index}")
            if self.rank in ranks:
                mine = group
        return mine


class SingleProcess:
    """In place of ``Meshes`` in one process: no groups, nothing to wait for."""

    layout = Layout()
    rank = 0
    coordinate = layout.coordinate(0)
    data_rank = 0
    tp = data = stage = ends = world = None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, with gradient; a plain tensor does in whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole ``local`` is, one slice per dim."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for size, start in zip(sizes, starts, strict=True))


def whole_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` of matrices (..., rows, columns), for tensors that may be divided over ranks.

    Where a rank has whole matrices of a stack, it takes them as they are. Else this is a
    collective: the tensor is gathered, and each rank keeps its part of the result.
    """

    def apply(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return function(tensor)
        part = local(tensor)
        if _cuts_matrices(tensor):
            part = function(tensor.full_tensor())[local_slices(tensor)].contiguous()
        elif part.numel():
            part = function(part)
        return DTensor.from_local(
            part,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    return apply


def _cuts_matrices(tensor: DTensor) -> bool:
    """True if some rank has only a part of a matrix; the same on every rank.

    Not told from what is here: of a matrix of one row, one rank has everything.
    """
    placed = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    # Not is_shard(): it is False for the strided shards of FSDP over TP.
    return any(
        size > 1 and placement != Replicate() and cast(Shard, placement).dim >= tensor.dim() - 2
        for placement, size in placed
    )
