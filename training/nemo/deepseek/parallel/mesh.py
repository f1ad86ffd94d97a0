"""Two meshes over the same ranks, and every process group there is.

    dense  = (pp, dp_replicate, dp_shard, tp)
    sparse = (pp, dp_replicate, edp, ep)        edp = dp_shard * tp / ep

The innermost axis varies fastest with the rank, so a TP group, and an EP group, is made of
neighbouring ranks. Experts borrow their ranks from TP and data parallelism, never from the
pipeline.

A mesh has axes; a tensor has dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepseek.config.schema import ModelConfig

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
SPARSE_AXES = ("pp", "dp_replicate", "edp", "ep")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, model: ModelConfig, world_size: int) -> Layout:
        """The configured sizes over ``world_size`` ranks; what is left over shards the data."""
        pp, tp = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
        replicate = model.data_parallel_replicate_size
        shard, rest = divmod(world_size, pp * tp * replicate)
        assert rest == 0 and shard > 0, "config/rules.py checks the arithmetic"
        layout = cls(pp, replicate, shard, tp, model.expert_model_parallel_size)
        assert (layout.dp_shard * layout.tp) % layout.ep == 0
        return layout

    @property
    def edp(self) -> int:
        """Ranks that share each expert's shards."""
        return self.dp_shard * self.tp // self.ep

    @property
    def dp(self) -> int:
        """Ranks with batches of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.tp


class Meshes:
    """The meshes of this rank, and its place in them.

    Args:
        layout: sizes; their product is the world size.
        device_type: ``cpu`` or ``cuda``.
        timeout: of every collective in every group.
    """

    def __init__(self, layout: Layout, device_type: str, timeout: timedelta) -> None:
        self.layout = layout
        sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp)
        self.dense = init_device_mesh(device_type, sizes, mesh_dim_names=DENSE_AXES)
        sizes = (layout.pp, layout.dp_replicate, layout.edp, layout.ep)
        self.sparse = init_device_mesh(device_type, sizes, mesh_dim_names=SPARSE_AXES)
        for mesh in (self.dense, self.sparse):
            for axis in mesh.mesh_dim_names or ():
                group = mesh.get_group(axis)
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        self.pp = self.dense["pp"]
        self.tp = self.dense["tp"]
        self.ep = self.sparse["ep"]
        self.ends = self._ends(timeout)

    @property
    def dp_rank(self) -> int:
        """Which share of each batch this rank reads."""
        replicate, shard = self.dense["dp_replicate"], self.dense["dp_shard"]
        return replicate.get_local_rank() * self.layout.dp_shard + shard.get_local_rank()

    @property
    def dense_shards(self) -> DeviceMesh:
        """Over which dense parameters are sharded (and replicated, if so configured)."""
        if self.layout.dp_replicate > 1:
            return self.dense["dp_replicate", "dp_shard"]
        return self.dense["dp_shard"]

    @property
    def expert_shards(self) -> DeviceMesh:
        """Over which each EP rank's experts are sharded (and replicated)."""
        if self.layout.dp_replicate > 1:
            return self.sparse["dp_replicate", "edp"]
        return self.sparse["edp"]

    def _ends(self, timeout: timedelta) -> dist.ProcessGroup | None:
        """The ranks that hold the first and the last stage of this pipeline.

        They share the embedding, of which the last stage has a copy for MTP. Every rank takes part
        in making every group.
        """
        if self.layout.pp == 1:
            return None
        ranks = self.dense.mesh.flatten(1)
        mine = None
        for column in range(ranks.shape[1]):
            pair = [int(ranks[0, column]), int(ranks[-1, column])]
            group = dist.new_group(pair, timeout=timeout, group_desc=f"ends_{column}")
            if dist.get_rank() in pair:
                mine = group
        return mine
