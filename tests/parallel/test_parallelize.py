"""What is applied to the model, in which order; which weights a rank computes with as it keeps
them, and which it gathers first."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.feed_forward import RMSNorm
from deepseek.models.components.moe import GroupedExperts
from deepseek.models.components.router import Router
from deepseek.parallel import cpu_memory
from deepseek.parallel.mesh import SingleProcess, local
from support.device_waits import unwatched, watched
from support.exchanges import without_shared_memory
from support.layouts import Case, Driven, batches, small_config, spread
from support.ranks import run_in_turn, run_ranks


def addresses(rank: int, case: Case) -> tuple[set[int], set[int]]:
    """Of the experts' first weights: where they are kept, and where they are computed with."""
    driven = spread(case)
    experts = [m for m in driven.module.model.modules() if isinstance(m, GroupedExperts)]
    kept = {local(module.w1).data_ptr() for module in experts}
    used: set[int] = set()
    for module in experts:
        module.register_forward_pre_hook(lambda m, _: used.add(local(m.w1).data_ptr()))
    driven.run(batches(case))
    return kept, used


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world", "layouts", "as_kept"),
    [
        (2, [EP2, EP2 | TP2], True),
        (4, [EP2, EP2 | {"data_parallel_replicate_size": 2}], False),  # parts of each expert
    ],
)
def test_experts_of_one_rank_are_not_copied(
    world: int, layouts: list[dict[str, Any]], as_kept: bool
) -> None:
    configs = [small_config(num_hidden_layers=2, micro_batch_size=2, **sizes) for sizes in layouts]
    cases = [Case(config, world, seed=1, steps=1) for config in configs]
    assert {case.layout.keeps_experts for case in cases} == {as_kept}
    for kept, used in sum(run_in_turn(world, addresses, cases), []):
        assert len(kept) == len(used)
        assert kept == used if as_kept else not kept & used


def waits(rank: int, case: Case) -> list[str]:
    """Of the last of two steps."""
    driven, steps = spread(case), list(batches(case))
    unwatched(driven.optimizer)
    driven.run(steps[:1])
    watch = watched(lambda: driven.run(steps[1:]))
    assert watch.calls > 200, "the watch saw nothing"
    return watch.waits


def test_the_host_waits_for_exchanges_of_experts_and_once_a_step() -> None:
    """Each MoE layer waits once a micro-batch for the sizes of what arrives, with EP alone, and
    not again where it recomputes."""
    zero_bubble = PP2 | {"pipeline_schedule": "ZBVZeroBubble"}
    recomputed = [EP2 | {"activations_checkpoint_granularity": n} for n in ("full", "selective")]
    two = {"num_hidden_layers": 2}  # one of experts, and that of MTP
    without: list[dict[str, Any]] = [two, two | TP2, PP2, zero_bubble]
    layouts = [(sizes, 0) for sizes in without]
    layouts += [(two | sizes, 2) for sizes in (EP2, EP2 | TP2, *recomputed)]
    configs = [small_config(global_batch_size=4, **sizes) for sizes, _ in layouts]
    cases = [Case(config, 2, torch.float32) for config in configs]
    for (sizes, layers), case, found in zip(
        layouts, cases, run_in_turn(2, waits, cases), strict=True
    ):
        micro_batches = case.config.global_batch_size // case.layout.dp
        assert found == [["tolist"] * (layers * micro_batches + 1)] * 2, sizes


def exchanges(rank: int, case: Case) -> int:
    """All-to-alls of a step."""
    driven, calls = spread(case), list[int]()
    send = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, *args: Any, **named: Any) -> Any:
        calls.append(x.numel())
        return send(out, x, *args, **named)

    with without_shared_memory(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        driven.run(batches(case))
    return len(calls)


def test_exchanges_of_experts() -> None:
    """Counts, rows there and back in the forward pass. In the backward pass the same two of rows;
    only full recomputation sends rows once more, and nothing brings results back again."""
    for granularity, backward in ((None, 2), ("selective", 2), ("full", 3)):
        config = small_config(
            expert_model_parallel_size=2,
            num_hidden_layers=2,
            num_nextn_predict_layers=0,
            activations_checkpoint_granularity=granularity,
        )
        case = Case(config, 2, torch.float32, steps=1)
        passes = case.config.global_batch_size // case.layout.dp // case.config.micro_batch_size
        assert run_ranks(2, exchanges, case) == [(3 + backward) * passes] * 2


def bytes_sent(rank: int, case: Case) -> tuple[int, int, int]:
    """Of a step: gathered weights, hidden states between stages, and what units know in fp32."""
    gathered, sent = list[int](), list[int]()
    gather, send = cpu_memory.all_gather, dist.batch_isend_irecv

    def note_gather(output: Tensor, *args: Any) -> None:
        gathered.append(output.nbytes)
        gather(output, *args)

    def note_send(operations: list[Any]) -> Any:
        sent.extend(p2p.tensor.nbytes for p2p in operations if p2p.op is dist.isend)
        return send(operations)

    driven = spread(case)
    exact = [m for m in driven.module.model.modules() if isinstance(m, (RMSNorm, Router))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_memory, "all_gather", note_gather)
        patch.setattr(dist, "batch_isend_irecv", note_send)
        driven.run(batches(case))
    return sum(gathered), sum(sent), sum(4 * m.weight.numel() for m in exact)


def test_bf16_halves_what_ranks_send() -> None:
    """Weights and hidden states; norms and routers are gathered in fp32, as gradients are sent."""
    config = small_config(**PP2, num_nextn_predict_layers=0)
    cases = [Case(config, 4, torch.float32, autocast=on, steps=1) for on in (False, True)]
    for (fp32, sent, exact), (bf16, half, _) in zip(
        *run_in_turn(4, bytes_sent, cases), strict=True
    ):
        assert 2 * half == sent > 0
        assert 2 * bf16 == fp32 + exact and exact < 0.1 * fp32


def told(rank: int, case: Case) -> list[str]:
    """What ``parallelize`` logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.getLogger("deepseek.parallel")
    log.addHandler(Keep())
    log.setLevel(logging.INFO)
    spread(case)
    return lines


def test_each_step_says_what_it_applied() -> None:
    """One line a step with its sizes, in their order; what is not applied says nothing."""
    sizes = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    }
    for rank, lines in enumerate(run_ranks(4, told, Case(small_config(**sizes), 4))):
        assert lines[:4] == [
            "TP 2: matrices, vocabulary and sequences are divided",
            "EP 2: 4 of 8 experts of a layer here",
            f"PP 2: stages [{rank // 2}] of 2, 1F1B",
            f"FSDP 1 (experts 1) x 1 replicas: {4 - rank // 2} units, weights kept after the "
            "forward pass",  # three blocks and the stage; a block, an MTP module and the stage
        ]
        assert lines[4].endswith(" weights here, on cpu") and len(lines) == 5
    case = Case(small_config(reshard_after_forward=True, data_parallel_replicate_size=2), 4)
    for lines in run_ranks(4, told, case):
        assert lines[0] == (
            "FSDP 2 (experts 2) x 2 replicas: 6 units, weights given back after the forward pass"
        )
        assert len(lines) == 2


def test_one_process_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deepseek.parallel"):
        Driven(Case(small_config(), 1), SingleProcess())
    assert caplog.messages == []
