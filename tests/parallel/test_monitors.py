"""The monitors in every layout: counts of the whole batch, whoever holds the layers, and what each
rank did; written by rank 0 alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepseek.config import changed
from deepseek.config.layout import Layout
from deepseek.frameworks import Callback
from deepseek.models.components import moe as mixture
from deepseek.models.components.moe import MoE
from deepseek.models.components.moe_node import moe_node
from deepseek.monitoring.array_history import read_traffic
from deepseek.monitoring.array_log import ArrayReader, Record, read_arrays
from deepseek.monitoring.record.expert_monitor import MARGIN_TOKENS, ExpertMonitor, expert_layers
from deepseek.monitoring.record.rank_monitor import COLUMNS, RankMonitor, RecordSchedule
from deepseek.monitoring.record.recorder import CommunicationRecorder
from deepseek.parallel.mesh import Meshes, SingleProcess
from deepseek.training.phases import Memory, Phases
from deepseek.training.step import SaveRecord
from support.kernels import without_kernels
from support.layouts import Case, Driven, batches, small_config, spread
from support.ranks import run_ranks

TRAINER = SimpleNamespace(loggers=[])


def watched(driven: Driven, callbacks: list[Any]) -> list[dict[str, Any]]:
    """Steps as a trainer takes them; the row of each."""
    module, found = driven.module, []
    for callback in callbacks:
        callback.on_train_start(TRAINER, module)
    for index, batch in enumerate(batches(driven.case)):
        for callback in callbacks:
            callback.on_train_batch_start(TRAINER, module, batch, index)
        driven.run([batch])
        module.step_record.data_seconds = 0.125
        for callback in callbacks:
            callback.on_train_batch_end(TRAINER, module, None, batch, index)
        found.append(module.step_record.row())
    for callback in callbacks:
        callback.on_train_end(TRAINER, module)
    return found


def monitors(folder: Path, leads: bool, every: int = 1) -> list[Any]:
    return [
        RankMonitor(folder, RecordSchedule(every), leads, ranks_per_node=2),
        ExpertMonitor(folder / "experts.arrays", RecordSchedule(every), leads),
    ]


# -- experts --


def brute_force(case: Case) -> Iterator[tuple[list[np.ndarray], list[float]]]:
    """Of each step: per layer, how often the real tokens of one process choose each expert, and the
    mean margin by sorting; nothing of the model's own counting is used."""
    config = replace(case.config, activations_checkpoint_granularity=None)
    driven = Driven(Case(config, 1, steps=3), SingleProcess())
    chosen: dict[int, list[tuple[Any, Any, Any]]] = {}
    layers = [m for m in driven.module.model.modules() if isinstance(m, MoE)]
    for row, moe in enumerate(layers):

        def hear(moe: MoE, args: Any, _: Any, row: int = row) -> None:
            with torch.no_grad():
                routing = moe.gate(args[0].flatten(0, 1))
            bias = 0 if moe.gate.bias is None else moe.gate.bias
            real = args[1].flatten()
            chosen.setdefault(row, []).append(
                (routing.expert_ids_TK[real], (routing.scores_TE + bias)[real], routing.scores_TE)
            )

        moe.register_forward_hook(hear)
    for batch in batches(case):
        chosen.clear()
        driven.run([batch])
        counts, margins = [], []
        for row in range(len(layers)):
            ids = np.concatenate([ids.numpy().ravel() for ids, _, _ in chosen[row]])
            counts.append(np.bincount(ids, minlength=config.n_routed_experts))
            margins.append(_margin(config, np.concatenate([s.numpy() for _, s, _ in chosen[row]])))
        yield counts, margins


def _margin(config: Any, scores_TE: np.ndarray) -> float:
    """By hand: of each token's two best groups, the K-th best score less the next one."""
    found = []
    for scores_E in scores_TE:
        groups = np.split(scores_E, config.n_group)
        sums = [np.sort(group)[-2:].sum() for group in groups]
        kept = np.argsort(sums)[::-1][: config.topk_group]
        best = np.sort(np.concatenate([groups[group] for group in kept]))[::-1]
        found.append(best[config.num_experts_per_tok - 1] - best[config.num_experts_per_tok])
    return float(np.mean(found))


def experts_of_rank(rank: int, cases: dict[str, Case], folder: Path) -> list[list[int]]:
    return [_experts(rank, case, folder / name) for name, case in cases.items()]


def _experts(rank: int, case: Case, folder: Path) -> list[int]:
    """Collectives of each record."""
    driven = spread(case)
    monitor = ExpertMonitor(folder / "experts.arrays", RecordSchedule(1), leads=rank == 0)
    counted: list[int] = []
    original, end = dist.all_reduce, monitor.on_train_batch_end

    def counting(trainer: Any, module: Any, *args: Any) -> None:
        counted.append(0)

        def one(*args: Any, **options: Any) -> Any:
            counted[-1] += 1
            return original(*args, **options)

        dist.all_reduce = one
        end(trainer, module, *args)
        dist.all_reduce = original

    monitor.on_train_batch_end = counting  # type: ignore[method-assign]
    watched(driven, [monitor])
    return counted


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 ep2": (2, {"expert_model_parallel_size": 2, "micro_batch_size": 4}),
    "tp2 ep2": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "micro_batch_size": 8},
    ),
    "cp2 ep2": (
        2,
        {"context_parallel_size": 2, "expert_model_parallel_size": 2, "micro_batch_size": 8},
    ),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
    "pp2 in a V": (
        2,
        {
            "pipeline_model_parallel_size": 2, "pipeline_schedule": "DualPipeV",
            "micro_batch_size": 2, "num_hidden_layers": 4,
        },
    ),
    "recomputation, accumulation": (
        2,
        {"expert_model_parallel_size": 2, "activations_checkpoint_granularity": "full"},
    ),
    "pp2 dp2 ep2, dense start": (
        4,
        {
            "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2,
            "num_hidden_layers": 5, "first_k_dense_replace": 2, "num_nextn_predict_layers": 2,
            "micro_batch_size": 2,
        },
    ),
    "replicas": (4, {"data_parallel_replicate_size": 2, "expert_model_parallel_size": 2}),
}  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_counts_are_those_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    cases = {
        name: Case(small_config(**{"num_hidden_layers": 2} | changes), world, steps=3)
        for name, (size, changes) in LAYOUTS.items()
        if size == world
    }
    for name, case in cases.items():
        assert not case.problems()
        (tmp_path / name).mkdir()
    counted = run_ranks(world, experts_of_rank, cases, tmp_path)
    assert counted == [[[1, 1, 1]] * len(cases)] * world
    for name, case in cases.items():
        assert_counts(case, tmp_path / name)


def assert_counts(case: Case, folder: Path) -> None:
    config = case.config
    records = list(read_arrays(folder / "experts.arrays"))
    assert [record.step for record in records] == [1, 2, 3]
    first_batch_is_all = config.micro_batch_size * case.layout.dp == config.global_batch_size
    for record, (counts, margins) in zip(records, brute_force(case), strict=True):
        assert record.meta["layers"] == expert_layers(config)
        assert record.meta["ep"] == config.expert_model_parallel_size
        assert record.arrays["tokens"].tolist() == np.array(counts).tolist()
        assert (record.arrays["margin"] > 0).all()
        if first_batch_is_all:
            np.testing.assert_allclose(record.arrays["margin"], margins, rtol=1e-5)


def test_layers_keep_their_numbers() -> None:
    config = small_config(num_hidden_layers=12, first_k_dense_replace=3, num_nextn_predict_layers=2)
    assert expert_layers(config) == [
        *(f"layers.{i}" for i in range(3, 12)), "mtp.0.block", "mtp.1.block"]  # fmt: skip
    assert expert_layers(small_config(first_k_dense_replace=4, num_nextn_predict_layers=0)) == []


def alone(config: Any, folder: Path, every: int = 1) -> tuple[Driven, list[dict[str, Any]]]:
    driven = Driven(Case(config, 1, steps=3), SingleProcess())
    return driven, watched(driven, monitors(folder, True, every))


def test_one_process_and_the_facts_of_its_rows(tmp_path: Path) -> None:
    config = small_config(micro_batch_size=8)
    driven, facts = alone(config, tmp_path)
    records = list(read_arrays(tmp_path / "experts.arrays"))
    for record, fact, (counts, margins) in zip(
        records, facts, brute_force(driven.case), strict=True
    ):
        tokens_LE = np.array(counts)
        assert record.arrays["tokens"].tolist() == tokens_LE.tolist()
        np.testing.assert_allclose(record.arrays["margin"], margins, rtol=1e-5)
        worst = (tokens_LE.max(axis=1) / tokens_LE.mean(axis=1)).max()
        assert fact["load_max_over_mean"] == pytest.approx(worst, abs=1e-4)
        assert fact["dead_experts"] == (tokens_LE == 0).sum()
        assert fact["monitor_seconds"] > 0
    bias_LE = np.array([r.bias.tolist() for r in driven.module.model.routers().values()])
    assert np.abs(bias_LE).max() > 0
    np.testing.assert_array_equal(records[-1].arrays["bias"], bias_LE.astype(np.float32))


def test_margins_are_a_sample_of_long_batches(tmp_path: Path) -> None:
    config = small_config(micro_batch_size=8, n_group=1, topk_group=1)
    config = changed(config, {"data.seq_length": 100})
    driven, _ = alone(config, tmp_path)
    spaced = -(-800 // MARGIN_TOKENS)
    assert spaced == 7
    seen: list[float] = []
    driven = Driven(Case(config, 1, steps=3), SingleProcess())
    router = next(iter(driven.module.model.routers().values()))

    def hear(module: Any, args: Any, routing: Any) -> None:
        scores_TE = (routing.scores_TE + module.bias)[::spaced].detach().numpy()
        best_TE = np.sort(scores_TE, axis=1)[:, ::-1]
        real = (batch["documents"].flatten() >= 0).numpy()[::spaced]
        seen.append(float((best_TE[:, 1] - best_TE[:, 2])[real].mean()))

    router.register_forward_hook(hear)
    for batch in batches(driven.case):
        driven.run([batch])
    records = list(read_arrays(tmp_path / "experts.arrays"))
    np.testing.assert_allclose([r.arrays["margin"][0] for r in records], seen, rtol=1e-5)


def test_a_mixture_that_is_one_node_tells_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the modules that it stands for: of padding, margins and rows."""
    config, nodes = small_config(micro_batch_size=8, moe_z_loss_coeff=0.0), list[bool]()

    def noted(*given: Any) -> Any:
        y_BSD = moe_node(*given)
        nodes.append(y_BSD is not None)
        return y_BSD

    monkeypatch.setattr(mixture, "moe_node", noted)
    records = []
    for name in ("node", "modules"):
        (folder := tmp_path / name).mkdir()
        driven = Driven(Case(config, 1, dtype=torch.float32), SingleProcess())
        with nullcontext() if name == "node" else without_kernels():
            watched(driven, monitors(folder, True))
        records.append(
            [next(read_arrays(folder / f"{kind}.arrays")) for kind in ("experts", "ranks")]
        )
    assert set(nodes[: len(nodes) // 2]) == {True} and set(nodes[len(nodes) // 2 :]) == {False}
    (experts, ranks), (experts_of_modules, ranks_of_modules) = records
    assert experts.arrays["tokens"].tolist() == experts_of_modules.arrays["tokens"].tolist()
    margins = (each.arrays["margin"] for each in (experts, experts_of_modules))
    np.testing.assert_allclose(*margins, rtol=1e-4)
    tokens = config.global_batch_size * config.data.seq_length * config.num_experts_per_tok
    for name, rows in (("received_rows", 4 * tokens), ("largest_received_rows", tokens)):
        assert [column(each, name).tolist() for each in (ranks, ranks_of_modules)] == [[rows]] * 2


def test_without_bias_without_experts_without_choice(tmp_path: Path) -> None:
    alone(small_config(topk_method="greedy", n_group=1, topk_group=1), tmp_path / "greedy")
    record = next(read_arrays(tmp_path / "greedy" / "experts.arrays"))
    assert record.arrays.keys() == {"tokens", "margin"}
    _, facts = alone(
        small_config(first_k_dense_replace=4, num_nextn_predict_layers=0), tmp_path / "dense"
    )
    assert not (tmp_path / "dense" / "experts.arrays").exists()
    assert "dead_experts" not in facts[0]
    every = small_config(n_routed_experts=2, n_group=1, topk_group=1)
    _, facts = alone(every, tmp_path / "both")
    record = next(read_arrays(tmp_path / "both" / "experts.arrays"))
    assert not record.arrays["margin"].any() and facts[0]["load_max_over_mean"] == 1.0


def test_every_second_step_and_listeners_that_go(tmp_path: Path) -> None:
    driven, facts = alone(small_config(), tmp_path, every=2)
    assert [record.step for record in read_arrays(tmp_path / "experts.arrays")] == [2]
    assert [record.step for record in read_arrays(tmp_path / "ranks.arrays")] == [2]
    assert ["dead_experts" in fact for fact in facts] == [False, True, False]
    assert all("data_seconds" in fact and "memory_bytes" in fact for fact in facts)
    for module in driven.module.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "listener", None) is None


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    watched_one, _ = alone(small_config(), tmp_path)
    plain = Driven(watched_one.case, SingleProcess())
    plain.run(batches(plain.case))
    a, b = watched_one.tensors(), plain.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_that_cannot_be_written_ends_the_records_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("experts.arrays", "ranks.arrays"):
        (tmp_path / name).mkdir(parents=True)
    _, facts = alone(small_config(), tmp_path)
    assert len(facts) == 3 and all("dead_experts" in fact for fact in facts)
    told = capsys.readouterr().err
    assert told.count("expert loads are no longer recorded") == 1
    assert told.count("ranks are no longer recorded") == 1


# -- ranks --


def ranks_of_rank(rank: int, case: Case, folder: Path, slow: int | None) -> list[dict[str, Any]]:
    driven = spread(case)
    if rank == slow:
        for module in driven.module.model.modules():
            if isinstance(module, MoE):
                module.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return watched(driven, monitors(folder, rank == 0))


def column(record: Record, name: str) -> np.ndarray:
    return record.arrays["ranks"][:, record.meta["columns"].index(name)]


def chosen_of_rank(rank: int, case: Case, folder: Path) -> list[list[int]]:
    """Of each step and EP rank: choices of this rank's tokens that go there, padding included."""
    driven, per_rank = spread(case), case.config.n_routed_experts // case.layout.ep
    found: list[list[int]] = []
    recomputed = torch._C._current_graph_task_id

    def hear(module: Any, args: Any, routing: Any) -> None:
        if recomputed() == -1:
            ids = routing.expert_ids_TK.flatten() // per_rank
            found[-1] = (
                np.array(found[-1]) + torch.bincount(ids, minlength=case.layout.ep).numpy()
            ).tolist()

    for router in driven.module.model.routers().values():
        router.register_forward_hook(hear)
    step = driven.module.train_step

    def new_row(*args: Any) -> Any:
        found.append([0] * case.layout.ep)
        return step(*args)

    driven.module.train_step = new_row
    watched(driven, monitors(folder, rank == 0))
    return found


@pytest.mark.parametrize("granularity", [None, "full"])
def test_rows_that_come_to_a_rank_are_counted_exactly(
    tmp_path: Path, granularity: str | None
) -> None:
    config = small_config(
        expert_model_parallel_size=2, micro_batch_size=2,
        activations_checkpoint_granularity=granularity,
    )  # fmt: skip
    case = Case(config, 4, steps=3)
    chosen_R = run_ranks(4, chosen_of_rank, case, tmp_path)
    records = list(read_arrays(tmp_path / "ranks.arrays"))
    micro_batches = config.global_batch_size // (4 * config.micro_batch_size)
    for step, record in enumerate(records):
        # EP groups are (0, 1) and (2, 3): a rank gets what both of its group send it.
        wanted = [
            sum(chosen_R[source][step][rank % 2] for source in (rank // 2 * 2, rank // 2 * 2 + 1))
            for rank in range(4)
        ]
        assert column(record, "received_rows").tolist() == wanted
        largest = column(record, "largest_received_rows")
        layers = 4
        assert (largest * layers * micro_batches >= wanted).all() and (largest <= wanted).all()
    tokens = config.global_batch_size * config.data.seq_length
    assert column(records[0], "received_rows").sum() == tokens * config.num_experts_per_tok * 4


def test_memory_of_each_phase_and_rank(tmp_path: Path) -> None:
    """What one rank holds for a moment in its optimiser is in that phase's peak, and only there."""
    case = Case(small_config(expert_model_parallel_size=2), 2, steps=3)
    run_ranks(2, hungry_of_rank, case, tmp_path)
    for record in list(read_arrays(tmp_path / "ranks.arrays"))[1:]:
        found = {name: column(record, name) for name in COLUMNS}
        more = found["optimizer_peak_bytes"] - found["optimizer_allocated_bytes"]
        assert more[1] > 48 * 2**20 > 24 * 2**20 > more[0]
        for phase in ("forward_backward", "optimizer"):
            assert (found[f"{phase}_peak_bytes"] >= found[f"{phase}_allocated_bytes"]).all()
        assert (found["peak_memory_bytes"] >= found["optimizer_peak_bytes"]).all()
        assert found["checkpoint_peak_bytes"].tolist() == [7e6, 7e6]
        assert found["checkpoint_reserved_bytes"].tolist() == [6e6, 6e6]
        assert found["checkpoint_allocated_bytes"].tolist() == [5e6, 5e6]


def hungry_of_rank(rank: int, case: Case, folder: Path) -> None:
    driven = spread(case)
    step = driven.optimizer.step

    def hungry(*args: Any, **options: Any) -> Any:
        if rank == 1:
            torch.ones(2**24)  # 64 MiB, for a moment
        return step(*args, **options)

    driven.optimizer.step = hungry  # type: ignore[method-assign]
    driven.module.save_record = SaveRecord(0, 1.0, Memory(5_000_000, 6_000_000, 7_000_000))
    watching = RankMonitor(folder, RecordSchedule(1), rank == 0)
    watched(driven, [watching])


def test_a_slow_rank_computes_and_the_others_wait(tmp_path: Path) -> None:
    case = Case(small_config(expert_model_parallel_size=2), 2, steps=3)
    facts = run_ranks(2, ranks_of_rank, case, tmp_path, 1)
    records = list(read_arrays(tmp_path / "ranks.arrays"))
    assert [record.step for record in records] == [1, 2, 3]
    for record in records[1:]:  # the first step warms up
        assert record.meta["columns"] == list(COLUMNS)
        compute, wait = column(record, "compute_seconds"), column(record, "wait_seconds")
        assert compute[1] > compute[0] + 0.4  # 4 layers, 4 micro-batches: 0.8 s
        assert wait[0] > 0.4 > wait[1]
        parts = compute + wait + column(record, "transfer_seconds")
        np.testing.assert_allclose(parts, column(record, "step_seconds"), rtol=1e-4)
        np.testing.assert_array_equal(column(record, "data_seconds"), 0.125)
        assert (column(record, "memory_bytes") > 1e6).all()
    for fact, record in zip(facts[0], records, strict=True):
        assert fact["all_to_all_seconds"] > 0
        assert fact["memory_bytes"] == pytest.approx(column(record, "peak_memory_bytes").max())
    assert not any("all_to_all_seconds" in fact for fact in facts[1])  # rank 0 speaks for all


def test_traffic_and_collectives_are_written(tmp_path: Path) -> None:
    config = small_config(expert_model_parallel_size=2, micro_batch_size=2)
    case = Case(config, 4, steps=3)
    run_ranks(4, ranks_of_rank, case, tmp_path, None)
    record = next(read_arrays(tmp_path / "traffic.arrays"))
    matrix = record.arrays["bytes"].astype(np.int64)
    # On their way to the experts rows bring their routing weights, in the same dtype.
    row_bytes = (config.hidden_size + 1) * 8
    assert record.meta == {"row_bytes": row_bytes, "node_of_rank": [0, 0, 1, 1]}
    # What goes out comes back, and nothing leaves the EP groups (0, 1) and (2, 3).
    assert matrix.shape == (4, 2)
    there, back, stays = matrix[::2, 1], matrix[1::2, 0], [*matrix[::2, 0], *matrix[1::2, 1]]
    assert (there == back).all() and (there > 0).all() and not any(stays)
    traffic = read_traffic(ArrayReader(tmp_path / "traffic.arrays"), [])
    assert traffic is not None and traffic.bytes_per_step.shape == (4, 4)
    assert traffic.bytes_per_step[2, 3] > 0 and not traffic.bytes_per_step[:2, 2:].any()
    rows = [json.loads(line) for line in (tmp_path / "collectives.jsonl").read_text().splitlines()]
    found = {(row["group"], row["op"]): row for row in rows if row["step"] == 2}
    dispatch = found["ep", "all_to_all"]
    tokens = config.global_batch_size * config.data.seq_length
    counts = 4 * 4 * config.n_routed_experts * 8  # layers, ranks
    there_and_home = 2 * (row_bytes + config.hidden_size * 8)  # and the gradients' ways
    whole = 4 * tokens * config.num_experts_per_tok * there_and_home + counts
    assert (dispatch["bytes"], dispatch["count"]) == (whole, 20)
    assert 0 < dispatch["p50"] <= dispatch["p95"] <= dispatch["max"]
    assert dispatch["busbw"] == pytest.approx(dispatch["algbw"] / 2)  # half stays at home
    assert 0 < dispatch["exposed_share"] < 1


def test_torch_is_as_before_after_an_error(tmp_path: Path) -> None:
    case = Case(small_config(expert_model_parallel_size=2), 2, steps=3)

    def work(rank: int) -> bool:
        before = dist.all_reduce
        driven = spread(case)
        watching = monitors(tmp_path, rank == 0)
        for callback in watching:
            callback.on_train_start(TRAINER, driven.module)
            callback.on_train_batch_start(TRAINER, driven.module)
        assert dist.all_reduce is not before
        for callback in watching:
            callback.on_exception(TRAINER, driven.module, ValueError())
        hooks = [m._forward_hooks for m in driven.module.model.routers().values()]
        return dist.all_reduce is before and not any(hooks)

    assert run_ranks(2, work) == [True, True]


def test_one_process_has_ranks_and_no_collectives(tmp_path: Path) -> None:
    _, facts = alone(small_config(), tmp_path)
    record = next(read_arrays(tmp_path / "ranks.arrays"))
    assert record.arrays["ranks"].shape == (1, len(COLUMNS))
    assert column(record, "wait_seconds")[0] == column(record, "transfer_seconds")[0] == 0
    assert not (tmp_path / "traffic.arrays").exists()
    assert not (tmp_path / "collectives.jsonl").exists()
    assert facts[0]["forward_backward_seconds"] > facts[0]["optimizer_seconds"] > 0
    assert "all_to_all_seconds" not in facts[0]


LATE = 0.8


class _Late(Callback):
    """One rank is busy with its step for longer."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.meshes.rank == 1:
            time.sleep(LATE)


def costs_of_rank(rank: int, case: Case, folder: Path) -> list[float]:
    facts = watched(spread(case), [_Late(), *monitors(folder, rank == 0)])
    return [fact["monitor_seconds"] for fact in facts]


def test_waiting_for_a_rank_that_is_busy_is_not_a_cost_of_watching(tmp_path: Path) -> None:
    case = Case(small_config(expert_model_parallel_size=2, micro_batch_size=4), 2, steps=3)
    for costs in run_ranks(2, costs_of_rank, case, tmp_path):
        assert all(0 < cost < LATE / 2 for cost in costs), costs


# -- at scale --


def test_records_are_as_rare_as_their_cost_asks() -> None:
    """2,048 ranks, steps of 20 s, 1.2 s for a record: a 600th of the time at most, from the third
    one on."""
    schedule, due, step = RecordSchedule(None, 2048), [], 0
    while step < 50:
        step += 1
        if schedule.is_due(step):
            schedule.recorded(step, cost=1.2 if due else 0.0, step_seconds=20.0)
            assert schedule.is_due(step)  # the other monitor asks after this one has
            due.append(step)
    assert due == [1, 2, 8, 14, 20, 26, 32, 38, 44, 50]
    assert [RecordSchedule(None, 64).is_due(step) for step in (1, 2, 3)] == [True] * 3
    assert [RecordSchedule(2, 2048).is_due(step) for step in (1, 2, 3)] == [False, True, False]


def test_a_record_of_many_ranks_is_not_their_square(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What goes over the network, into the files and of rank 0's time for a record of DeepSeek-V3's
    2,048 ranks, and of 4,096."""
    sent: list[int] = []

    def sum_of_all(table: torch.Tensor, group: Any) -> None:
        sent.append(table.numel() * 8)
        table[:] = table.sum(dim=0) * torch.rand(len(table), 1, dtype=table.dtype)

    monkeypatch.setattr("deepseek.monitoring.record.rank_monitor.sum_over", sum_of_all)
    written, seconds = [], []
    for ranks in (2048, 4096):
        layout = Layout(pp=16, dp_shard=ranks // 16, ep=64)
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            meshes = Meshes(layout, "cpu", timedelta(minutes=1))
            recorder = CommunicationRecorder(meshes)
            folder = tmp_path / str(ranks)
            monitor = RankMonitor(folder, RecordSchedule(1), leads=True, ranks_per_node=8)
            monitor._recorder = recorder
            recorder.start()
            dist.all_reduce(torch.zeros(1), group=meshes.stage)
            dist.all_to_all_single(torch.zeros(64, 8), torch.ones(64, 8), group=meshes.ep)
            recorder.stop()
            model = torch.nn.Linear(1, 1)
            module: Any = SimpleNamespace(
                meshes=meshes, model=model, phases=Phases(), save_record=None
            )
            used = Memory(1, 1, 1)
            module.phases.memory = {"forward_backward": used, "optimizer": used}
            row: Any = SimpleNamespace(step=1, data_seconds=0, optimizer_seconds=0, memory_bytes=0)
            began = time.process_time()
            monitor._record(module, row, 1.0, recorder.summary())
            seconds.append(time.process_time() - began)
        finally:
            dist.destroy_process_group()
        written.append(sum(file.stat().st_size for file in folder.iterdir()))
        assert len(list(folder.iterdir())) == 3
    assert seconds[0] < 0.01 * 20, seconds  # a step of such a run takes 20 s; measured: 0.03 s
    assert written[0] < 1e6 and written[1] < 2.2 * written[0], written
    assert sent[1] == 2 * sent[0] and sent[0] < 4e6  # a row of all ranks made it 40 MB
