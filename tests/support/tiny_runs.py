"""Runs of ``deepseek_v3_tiny`` in layouts of several ranks."""

from __future__ import annotations

from functools import cache

from deepseek.config import RunConfig, load_config

SMALL = [
    "model.num_hidden_layers=6",
    "model.global_batch_size=48",
    "model.micro_batch_size=1",
]


def small_run(
    world: int, nodes: int = 1, tp: int = 1, pp: int = 1, ep: int = 1, *more: str
) -> RunConfig:
    layout = [
        f"trainer.devices={world // nodes}",
        f"trainer.num_nodes={nodes}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"model.expert_model_parallel_size={ep}",
    ]
    return load_config("deepseek_v3_tiny", [*SMALL, *layout, *more])


@cache
def worlds() -> list[RunConfig]:
    """Layouts with all kinds of axes and schedules."""
    return [
        small_run(2, ep=2),
        small_run(8, tp=2, ep=4),
        small_run(8, 1, 2, 2, 4, "model.data_parallel_replicate_size=1"),
        small_run(16, 4, 2, 2, 2, "model.data_parallel_replicate_size=2"),
        small_run(8, 2, 1, 4, 2, "model.pipeline_schedule=GPipe"),
        small_run(4, 1, 1, 2, 2, "model.pipeline_schedule=DualPipeV"),
        small_run(4, 1, 1, 2, 2, "model.optim.name=muon", "model.num_nextn_predict_layers=2"),
        small_run(3),
    ]
