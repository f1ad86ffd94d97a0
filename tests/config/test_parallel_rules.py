"""The rules of pipelines against torch's own schedules, and of weights against built models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import schedules

from deepseek.config import ConfigError, RunConfig, changed, check, load_config
from deepseek.config.errors import divisors

RUNTIME_ONLY = (schedules.UNSHARD, schedules.RESHARD, schedules.REDUCE_GRAD)


def torch_takes(name: str, pp: int, held: int, micro_batches: int) -> bool:
    """True if torch builds the schedule, and its dry run comes to an end."""
    made = schedules.get_schedule_class(name)
    stages = [
        SimpleNamespace(
            num_stages=pp * held,
            group_size=pp,
            group_rank=0,
            stage_index=index,
            is_first=index == 0,
            is_last=index == pp * held - 1,
            submod=torch.nn.Identity(),
            has_backward=True,
        )
        for index in range(held)
    ]
    try:
        if issubclass(made, schedules.PipelineScheduleSingle):
            made(stages[0], micro_batches)
            return True
        schedule = made(stages, micro_batches)
        actions = {
            rank: [
                part
                for action in actions
                if action.computation_type not in RUNTIME_ONLY
                for part in (action.sub_actions or [action])
            ]
            for rank, actions in schedule.pipeline_order_with_comms.items()
        }
        holders = schedule.stage_index_to_group_rank
        schedules._simulate_comms_compute(actions, holders.__getitem__, pp * held)
    except ValueError:
        return False
    return True


def rules_take(name: str, pp: int, held: int, micro_batches: int) -> bool:
    values = {
        "trainer.devices": pp,
        "model.num_hidden_layers": pp * held,
        "model.pipeline_model_parallel_size": pp,
        "model.pipeline_schedule": name,
        "model.virtual_pipeline_model_parallel_size": held if name.startswith("Interleaved") else 1,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 2 * micro_batches,
    }
    problems = check(changed(RunConfig(), values))
    assert {problem.field for problem in problems} <= {"model.global_batch_size"}
    return not problems


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("GPipe", 1),
        ("1F1B", 1),
        ("Interleaved1F1B", 2),
        ("Interleaved1F1B", 3),
        ("InterleavedZeroBubble", 2),
        ("InterleavedZeroBubble", 3),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
def test_micro_batches_are_those_that_torch_takes(name: str, held: int) -> None:
    taken = []
    for pp in (2, 3, 4):
        for count in range(1, 14):
            expected = torch_takes(name, pp, held, count)
            assert rules_take(name, pp, held, count) == expected, (pp, count)
            taken.append(expected)
    assert any(taken)
    assert all(taken) == (name in ("GPipe", "ZBVZeroBubble"))


def test_the_offered_batches_are_taken() -> None:
    """Every way out of a wrong number of micro-batches is one."""
    base = [
        "trainer.devices=3",
        "model.num_hidden_layers=6",
        "model.pipeline_model_parallel_size=3",
        "model.pipeline_schedule=Interleaved1F1B",
        "model.virtual_pipeline_model_parallel_size=2",
        "model.micro_batch_size=2",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("deepseek_v3_tiny", [*base, "model.global_batch_size=20"])
    (problem,) = caught.value.problems
    assert problem.way_out == (
        "use model.global_batch_size=18 or 24, or for model.micro_batch_size one of 4, 5, 10, 20"
    )
    for batch in (18, 24):
        load_config("deepseek_v3_tiny", [*base, f"model.global_batch_size={batch}"])
    for micro in (4, 5, 10, 20):
        more = ["model.global_batch_size=20", f"model.micro_batch_size={micro}"]
        load_config("deepseek_v3_tiny", [*base, *more])


def test_divisors_of_sizes_and_of_absurd_numbers() -> None:
    for number in range(1, 400):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
    assert divisors(10**18)[:5] == [1, 2, 4, 5, 8] and divisors(10**18)[-1] == 10**18
