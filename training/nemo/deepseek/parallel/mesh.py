"""The two meshes over the ranks, every process group there is, and what of a tensor lies here.

A mesh has axes (``config/layout.py`` names them); a tensor has dims. Every group is made here, so
that it has a name and the configured time-out, and none is made twice: a communicator of NCCL takes
memory of the device, and one of gloo a socket to every other rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from deepseek.config.layout import DENSE_AXES, SPARSE_AXES, Layout

OPERATIONS_OF = {
    "pp": ("send_recv",),
    "dp_replicate": ("all_reduce",),
    "dp_shard": ("all_gather", "reduce_scatter"),
    "tp": ("all_gather", "reduce_scatter", "all_reduce"),
    "cp": ("all_gather", "reduce_scatter", "all_reduce"),
    "edp": ("all_gather", "reduce_scatter"),
    "ep": ("all_to_all",),
    "ep_across": ("all_to_all",),
    "ep_inside": ("all_to_all",),
    "data": ("all_reduce",),
    "stage": ("all_reduce",),
    "world": ("all_reduce",),
}
"""What passes in each group; so traffic is told apart where groups have the same ranks."""


class Meshes:
    """The meshes of this rank, and its coordinates in them; making them is a collective.

    Args:
        layout: sizes; their product is the world size.
        device_type: ``cpu`` or ``cuda``.
        timeout: of every collective in every group.
        step_timeout: of those of a step, after the first, if it is shorter; None: the same.

    Attributes:
        pp, tp, ep: groups of this rank along these axes.
        ep_across, ep_inside: the EP ranks that stand in other machines where this one does, and
            those of this machine; None if tokens do not travel by machine.
        cp: the ranks that share this one's sequences, each with its own part of them; None if there
            is no other.
        data: the ranks that read other batches and hold the same stages, the same TP shard and the
            same part of a sequence.
        stage: all ranks that hold the same stages.
        world: all ranks.
    """

    def __init__(
        self,
        layout: Layout,
        device_type: str,
        timeout: timedelta,
        step_timeout: timedelta | None = None,
    ) -> None:
        assert dist.get_world_size() == layout.world_size
        self.layout = layout
        self.device_type = device_type
        self.timeout = timeout
        self.step_timeout = min(step_timeout or timeout, timeout)
        self._timeout_now = timeout
        self.rank = dist.get_rank()
        self.coordinate = layout.coordinate(self.rank)
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        self.dense = self._mesh(DENSE_AXES, layout.dense_sizes)
        self.sparse = self._mesh(SPARSE_AXES, layout.sparse_sizes)
        self.pp = self.dense.get_group("pp")
        self.tp = self.dense.get_group("tp")
        self.ep = self.sparse.get_group("ep")
        self.ep_across: dist.ProcessGroup | None = None
        self.ep_inside: dist.ProcessGroup | None = None
        if layout.ep_node is not None:
            nodes = self.sparse.mesh.unflatten(-1, (-1, layout.ep_node))
            self.ep_across = self._group("ep_across", nodes.movedim(-2, -1).flatten(0, -2))
            self.ep_inside = self._group("ep_inside", nodes.flatten(0, -2))
        ranks = self.dense.mesh
        parts = ranks.unflatten(2, (-1, layout.cp))  # (pp, dp_replicate, sequences, cp, tp)
        self.cp: dist.ProcessGroup | None = None
        if layout.cp > 1:
            self.cp = self._group("cp", parts.movedim(3, -1).flatten(0, -2))
        self.data = self._group("data", parts.permute(0, 3, 4, 1, 2).flatten(3).flatten(0, 2))
        self.stage = self._group("stage", ranks.flatten(1))
        self.world = self._group("world", ranks.flatten().unsqueeze(0))

    def expect_steps(self, soon: bool) -> None:
        """From here on, how long this rank waits for others: as long as steps take, or as long as
        other work may (a checkpoint, data to be read). Not a collective."""
        timeout = self.step_timeout if soon else self.timeout
        if timeout != self._timeout_now:
            for group in {dist.group.WORLD, *self._made.values()} - {None}:
                _set_pg_timeout(timeout, group)
            self._timeout_now = timeout

    @property
    def data_rank(self) -> int:
        """Which share of each batch this rank reads."""
        at, layout = self.coordinate, self.layout
        return (at.dp_replicate * layout.dp_shard + at.dp_shard) // layout.cp

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

    def names(self, operation: str) -> dict[dist.ProcessGroup, str]:
        """The groups of this rank in which such calls pass between ranks, and what they are called.

        One that several axes share has all their names: ``tp+edp``.
        """
        names: dict[dist.ProcessGroup, str] = {}
        for name, operations in OPERATIONS_OF.items():
            mesh = self.sparse if name in SPARSE_AXES else self.dense
            group = getattr(self, name, None) or (
                mesh.get_group(name) if name in (mesh.mesh_dim_names or ()) else None
            )
            if operation in operations and group is not None and dist.get_world_size(group) > 1:
                names[group] = f"{names[group]}+{name}" if group in names else name
        return names

    def _mesh(self, axes: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
        ranks = torch.arange(self.layout.world_size, dtype=torch.int).view(sizes)
        groups = [
            self._group(axis, ranks.movedim(dim, -1).flatten(0, -2))
            for dim, axis in enumerate(axes)
        ]
        return DeviceMesh.from_group(
            cast(list[dist.ProcessGroup], groups), self.device_type, ranks, mesh_dim_names=axes
        )

    def _group(self, name: str, ranks_GR: Tensor) -> dist.ProcessGroup | None:
        """The one of these disjoint groups, a row each, that has this rank; made if it is new."""
        members = ranks_GR.tolist()
        key = tuple(map(tuple, members))
        if key not in self._made:
            self._made[key] = self._new_group(name, members)
        return self._made[key]

    def _new_group(self, name: str, members: list[list[int]]) -> dist.ProcessGroup | None:
        world = dist.group.WORLD
        assert world is not None
        if len(members[0]) == self.layout.world_size:
            return world
        options: dict[str, Any] = {"timeout": self.timeout, "group_desc": name}
        if world.bound_device_id is not None:  # NCCL, which splits all ranks into these by one call
            if "backend" in inspect.signature(dist.split_group).parameters:  # torch 2.13
                options["backend"] = "cuda:nccl"  # and no sockets of gloo for each
            return dist.split_group(split_ranks=members, **options)
        mine = next(ranks for ranks in members if self.rank in ranks)
        # Nobody waits for other groups.
        return dist.new_group(mine, use_local_synchronization=True, **options)


class SingleProcess:
    """In place of ``Meshes`` in one process: no groups, nothing to wait for."""

    layout = Layout()
    rank = 0
    coordinate = layout.coordinate(0)
    data_rank = 0
    tp = cp = data = stage = world = None

    def expect_steps(self, soon: bool) -> None:
        """Nothing: nobody is waited for."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, with gradient; a plain tensor does in whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(part: Tensor, like: Tensor) -> Tensor:
    """``part``, wherever it lies, as what this rank has of a tensor that is divided as ``like``."""
    if not isinstance(like, DTensor):
        return part
    # Not DTensor.from_local, which would move it to the mesh's device.
    assert like._spec.tensor_meta is not None
    meta = like._spec.tensor_meta._replace(dtype=part.dtype)
    return DTensor(part, replace(like._spec, tensor_meta=meta), requires_grad=False)


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
