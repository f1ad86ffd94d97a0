"""What ``deepseek validate`` prints: of a model, its layout, and clusters that are not there."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek.commands.validate import (
    Table,
    placement_notes,
    placement_tables,
    ranks_text,
    size_text,
    summary,
    validate,
    validate_report,
)
from deepseek.config import ConfigError, RunConfig, UserError, load_config, shipped_configs
from deepseek.config.layout import Layout
from deepseek.config.memory import gathered_bytes, state_memory
from deepseek.config.rank_need import host_needs, rank_need
from deepseek.config.schema import PeftConfig, changed
from deepseek.data.indexed import IndexedWriter
from deepseek.models.transformer import Transformer
from support.tiny_runs import small_run

# -- the model in numbers --


def report(name: str, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    return validate_report(load_config(name, overrides))


def test_v3() -> None:
    assert report("deepseek_v3_671b") == [
        ("parameters", "671.03 B (671,026,404,352)"),
        ("active per token", "37.55 B (37,552,282,624), 36.63 B without the input embedding"),
        ("1 MTP module", "11.61 B (11,610,067,968)"),
        ("FLOPs per token", "259.99 GFLOP in training (causal, at 4,096 tokens, with MTP)"),
        ("weights", "2.48 TiB (fp32)"),
        ("gradients", "2.48 TiB (fp32)"),
        ("optimiser states", "4.97 TiB (adamw, fp32)"),
        ("states together", "9.93 TiB, without activations, over 2,048 processes"),
        ("KV cache per token", "70,272 bytes (bf16)"),
        (
            "tokens per step",
            "62,914,560 (15,360 sequences x 4,096, in 120 micro-batches of 1 per rank)",
        ),
        ("tokens of the run", "14.80 T (235,240 steps)"),
        ("FLOPs of the run", "3.85e+24"),
    ]


def test_one_process_and_no_mtp() -> None:
    rows = dict(report("deepseek_v3_tiny", ["model.num_nextn_predict_layers=0", "seed=5"]))
    assert not [name for name in rows if "MTP" in name]
    assert "MFLOP in training" in rows["FLOPs per token"]
    assert "MTP" not in rows["FLOPs per token"]
    assert "processes" not in rows["states together"]
    assert "per rank" not in rows["tokens per step"]
    assert rows["KV cache per token"] == "1,280 bytes (fp32)"


def test_a_batch_that_grows_as_v3s_did() -> None:
    """16 sizes from 3,072 to 14,592, of 7,156,500 samples each, then the whole batch."""
    ramp = "model.rampup_batch_size=[3072,768,114504000]"
    rows = dict(report("deepseek_v3_671b", [ramp]))
    steps = sum(7_156_500 / size for size in range(3072, 15360, 768))
    told = re.fullmatch(
        r"(\S+) T \(from 3,072 sequences in (\S+) steps, 469\.\d+ B tokens; 235,240 steps\)",
        rows["tokens of the run"],
    )
    assert told is not None, rows["tokens of the run"]
    done = int(told[2].replace(",", ""))
    assert steps <= done < steps + 16
    assert float(told[1]) == pytest.approx(
        (469e9 + (235240 - done) * 15360 * 4096) / 1e12, abs=0.02
    )


def test_two_modules() -> None:
    rows = dict(report("deepseek_v3_tiny", ["model.num_nextn_predict_layers=2"]))
    assert "2 MTP modules" in rows


def test_adapters_alone_are_trained() -> None:
    """Counted from the built model; frozen weights have no gradient and no optimiser state."""
    whole = report("deepseek_v3_tiny")
    tiny = load_config("deepseek_v3_tiny")
    peft = PeftConfig(dim=4, target_modules=["wq_a", "w2", "experts.w1"])
    run = replace(tiny, model=replace(tiny.model, peft=peft))
    rows = dict(validate_report(run))
    with torch.device("meta"):
        parameters = dict(Transformer(run.model).named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    frozen = sum(p.numel() for p in parameters.values()) - trained
    assert rows["trained by LoRA"].split(", ")[0].endswith(f"({trained:,})")
    assert f"{trained / frozen:.2%} of the weights" in rows["trained by LoRA"]
    memory = state_memory(run.model)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    biases = run.model.n_routed_experts * (run.model.num_moe_layers + 1)
    assert memory.weights == 4 * (frozen + trained + biases)
    assert state_memory(run.model, "muon").optimizer == 4 * trained
    assert rows["parameters"] == dict(whole)["parameters"]
    assert "trained by LoRA" not in dict(whole)


def test_flops_of_the_run_are_tokens_times_flops() -> None:
    rows = dict(report("moonlight_16b"))
    tokens = 2048 * 8192 * 10_000
    per_token = float(rows["FLOPs per token"].split()[0]) * 1e9
    assert float(rows["FLOPs of the run"]) == pytest.approx(tokens * per_token, rel=5e-3)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_row_says_something(name: str) -> None:
    rows = report(name)
    assert len(dict(rows)) == len(rows) >= 11
    assert all(what and value for what, value in rows)


# -- its layout --


def tables_of(run: RunConfig) -> dict[str, Table]:
    return {table.title.split(":")[0]: table for table in placement_tables(run)}


def test_the_tables_of_8_ranks_by_hand() -> None:
    run = small_run(8, 2, 2, 2, 4, "model.pipeline_layers_per_stage=[4, 2]")
    groups, stages, experts, weights, memory = placement_tables(run)
    assert groups.title == "8 ranks on 2 nodes of 4"
    assert list(groups.rows) == [
        ("PP", "2", "4", "0, 4", "yes"),
        ("data shards", "2", "4", "0, 2", "no"),
        ("TP", "2", "4", "0-1", "no"),
        ("EP", "4", "2", "0-3", "no"),
    ]
    wait = "by their work ranks wait 16.4 % for the costliest"
    assert stages.title == f"2 pipeline stages (1F1B); {wait}"
    assert [row[:4] for row in stages.rows] == [
        ("0", "0-3 (1 dense, 3 MoE)", "embedding", "0-3 (PP 0)"),
        ("1", "4-5 (2 MoE)", "norm, head, MTP, a copy of the embedding", "4-7 (PP 1)"),
    ]
    assert list(experts.rows) == [
        ("0-3", "0", "0, 4"),
        ("4-7", "1", "1, 5"),
        ("8-11", "2", "2, 6"),
        ("12-15", "3", "3, 7"),
    ]
    shapes = {row[0]: row[1:] for row in weights.rows}
    assert shapes["embed.weight"] == ("4096 x 256", "2048 x 256", "1024 x 256")
    assert shapes["attn.wq_a.weight"] == ("96 x 256", "96 x 256", "48 x 256")
    assert shapes["attn.wq_b.weight"] == ("384 x 96", "192 x 96", "96 x 96")
    assert shapes["attn.wo.weight"] == ("256 x 256", "256 x 128", "128 x 128")
    assert shapes["ffn.experts.w2"] == ("16 x 256 x 128", "4 x 256 x 128", "4 x 256 x 128")
    assert shapes["eh_proj.weight"] == ("256 x 512", "256 x 512", "128 x 512")
    assert [row[0] for row in memory.rows] == ["0-3", "4-7"]
    layout = Layout.of_run(run)
    for pp, row in enumerate(memory.rows):
        need = rank_need(run.model, layout, pp, micro_batches=24, half=False)
        assert row[1:] == (*map(size_text, need), size_text(need.total))
    assert placement_notes(run) == []


def test_a_v_schedule_puts_both_ends_on_the_first_ranks() -> None:
    run = small_run(4, 1, 1, 2, 1, "model.pipeline_schedule=DualPipeV")
    rows = placement_tables(run)[1].rows
    assert [row[3] for row in rows] == ["0-1 (PP 0)", "2-3 (PP 1)", "2-3 (PP 1)", "0-1 (PP 0)"]
    assert rows[0][2] == "embedding" and rows[3][2].startswith("norm, head")


def test_groups_wider_than_a_node_are_noted() -> None:
    assert placement_notes(small_run(4, nodes=4, ep=4)) == [
        "EP 4 is wider than a node of 1: tokens of every layer travel between nodes"
    ]
    assert placement_notes(small_run(4, nodes=4, tp=2)) == [
        "TP 2 is wider than a node of 1: activations of every layer travel between nodes"
    ]
    assert placement_notes(small_run(12, nodes=2, ep=4, pp=3)) == [
        "EP 4 does not divide a node of 6: tokens of every layer travel between nodes"
    ]
    assert placement_notes(small_run(8, nodes=2, ep=4)) == []


def test_v3_on_2048_ranks_in_less_than_a_second() -> None:
    run = load_config("deepseek_v3_671b")
    start = time.process_time()  # this process's own: a neighbour takes none of it
    tables = tables_of(run)
    notes = placement_notes(run)
    assert time.process_time() - start < 3  # one second where nothing else runs
    assert "2,048 ranks on 256 nodes of 8" in tables
    assert notes == ["EP 64 is wider than a node of 8: tokens of every layer travel between nodes"]
    experts = tables["experts of the MoE layers, on the ranks that hold the layer"].rows
    assert len(experts) == 17 and experts[8][0] == "... 48 more"
    assert experts[0] == ("0-3", "0", "0, 64, ..., 1984")
    assert experts[-1] == ("252-255", "63", "63, 127, ..., 2047")


def test_weights_that_stay_gathered_are_told() -> None:
    """All of them, or in a larger model those of the units that compute."""
    large = ["model.hidden_size=4096", "model.vocab_size=65536"]
    for run, all_stay in ((small_run(4, ep=2), True), (small_run(2, 1, 1, 1, 1, *large), False)):
        (row,) = placement_tables(run)[-1].rows
        whole = size_text(gathered_bytes(run.model, Layout.of_run(run)))
        assert (row[2] == whole) is all_stay


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (range(3, 4), "3"),
        (range(0, 8, 8), "0"),
        (range(16), "0-15"),
        (range(0, 32, 8), "0, 8, 16, 24"),
        (range(1, 41, 8), "1, 9, ..., 33"),
    ],
)
def test_ranks_as_text(numbers: range, text: str) -> None:
    assert ranks_text(numbers) == text


# -- another number of processes --

ONE_SEQUENCE = ["model.micro_batch_size=1", "model.global_batch_size=64"]


@pytest.mark.parametrize(
    ("config", "world", "devices", "nodes"),
    [
        ("deepseek_v3_8gpu", 8, 8, 1),
        ("deepseek_v3_8gpu", 4, 4, 1),
        ("deepseek_v3_8gpu", 32, 8, 4),
        ("deepseek_v3_distributed", 8, 4, 2),
        ("deepseek_v3_32gpu", 32, 8, 4),
        ("deepseek_v3_tiny", 4, 4, 1),
        ("deepseek_v3_tiny", 16, 8, 2),
    ],
)
def test_a_world_fills_one_node_or_whole_nodes(
    config: str, world: int, devices: int, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    validate(config, ONE_SEQUENCE, world)
    out = capsys.readouterr().out
    assert out.startswith(f"for {world} processes: ")
    assert f"trainer.devices={devices} trainer.num_nodes={nodes}" in out.splitlines()[-1]
    noun = "node" if nodes == 1 else "nodes"
    assert f"{world} ranks on {nodes} {noun} of {devices}" in out


def test_it_begins_with_five_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    validate("deepseek_v3_32gpu")
    assert capsys.readouterr().out.splitlines()[:6] == [
        "deepseek_v3_32gpu is sound",
        "model        1.35 B parameters (55.24 M of them MTP), 349.88 M active per token",
        "layout       32 processes on 4 nodes: DP 8, TP 2, PP 2 (1F1B, 2 stages), EP 8",
        "step         128 sequences x 1,024 = 131,072 tokens in 4 x 4 per forward pass; "
        "20,000 steps, 2.62 B tokens",
        "memory       4.57 GiB of a GPU on the fullest rank, of which 572.26 MiB are weights and "
        "optimiser states",
        "data         built-in corpus, prepared by the first run that needs it",
    ]
    validate("deepseek_v3_tiny", ["trainer.accelerator=cpu"])
    assert (
        "of tensors, of which 118.18 MiB are weights and optimiser states; Python"
        in capsys.readouterr().out
    )
    one, two = tmp_path / "one", tmp_path / "two"
    for prefix in (one, two):
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(9))
    (tmp_path / "one.json").write_text('{"tokens": 1234567}')
    blend = f"model.data.data_prefix=[0.3, {one}, 0.7, {two}]"
    validate("deepseek_v3_tiny", ["model.num_nextn_predict_layers=0", blend])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:6])
    assert lines["layout"] == "1 process" and "MTP" not in lines["model"]
    assert lines["data"] == f"0.3 of {one} (1,234,567 tokens), 0.7 of {two}"


def test_the_configured_world_needs_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    validate("deepseek_v3_32gpu")
    without = capsys.readouterr().out
    for part in (
        "4 nodes of 8",
        "2 pipeline stages",
        "experts of",
        "shapes:",
        "memory of one rank",
    ):
        assert part in without
    assert "note:" not in without
    validate("deepseek_v3_tiny")
    assert "ranks" not in capsys.readouterr().out


def test_a_width_given_by_override_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["trainer.devices=2", "model.expert_model_parallel_size=4"]
    validate("deepseek_v3_tiny", [*ONE_SEQUENCE, *more], world=8)
    out = capsys.readouterr().out
    assert "8 ranks on 4 nodes of 2" in out
    assert "note: EP 4 is wider than a node of 2" in out


def test_the_command_to_train_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    validate("deepseek_v3_tiny", ["name=a run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "train it with: deepseek train --config deepseek_v3_tiny 'name=a run'"


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (0, "--world 0: a cluster has at least 1 process; use 1 or more"),
        (20, "--world 20: nodes of 8 processes make 16 or 24; use one of these, or give "),
    ],
)
def test_a_world_of_broken_nodes_is_refused(world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate("deepseek_v3_8gpu", [], world)


def test_the_arithmetic_of_the_world_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        validate("deepseek_v3_8gpu", [], world=2)
    (problem,) = caught.value.problems
    assert problem.field == "model.expert_model_parallel_size"
    assert "= 1 x 2 = 2" in problem.rule and problem.way_out == "use one of 1, 2"
    with pytest.raises(ConfigError, match=r"trainer\.devices=many: must be a whole number"):
        validate("deepseek_v3_8gpu", ["trainer.devices=many"], world=8)


# -- does it fit --


def test_what_lies_on_the_host_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a process and of its node, and of the ranks at each place of the pipeline."""
    run = small_run(
        4, 1, 1, 2, 1, "model.cpu_offloading_activations=true", "trainer.accelerator=gpu"
    )
    hosts = host_needs(run)
    assert hosts[0] > hosts[1] > 0, "the first stage has more under way"
    told = dict(summary(run, on_gpu=True))["memory"]
    assert f"{size_text(hosts[0])} of the host's memory for activations, " in told
    assert f"{size_text(4 * hosts[0])} of a node at most" in told
    *_, memory = placement_tables(run)
    assert memory.columns[-1] == "activations on the host"
    assert [row[-1] for row in memory.rows] == [size_text(host) for host in hosts]
    run = changed(run, {"model.optim.cpu_offload": True})
    both = dict(summary(run, on_gpu=True))["memory"]
    assert "of the host's memory for activations and moments, " in both
    run = changed(run, {"model.cpu_offloading_activations": False})
    told = dict(summary(run, on_gpu=True))["memory"]
    *_, memory = placement_tables(run)
    (moments,) = re.findall(r"([\d.]+ \w+) of the host's for moments", memory.title)
    assert f"; {moments} of the host's memory for moments, " in told


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    validate("deepseek_v3_671b", memory=80)
    assert (
        "needs 30.21 GiB (ranks 1920-2047) and 2 GiB for context and NCCL of --memory 80: fits"
        in capsys.readouterr().out
    )
    validate("deepseek_v3_671b", memory=33)
    assert "--memory 33: tight, since what is told may be 5 % short" in capsys.readouterr().out
    validate("deepseek_v3_tiny", memory=80)
    assert "needs 290.98 MiB and 2 GiB for context and NCCL of --memory 80: fits" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("overrides", "world", "memory", "words"),
    [
        (["model.pipeline_schedule=GPipe"], None, 80, "use model.pipeline_schedule=1F1B"),
        (
            ["model.activations_checkpoint_granularity=null"],
            None,
            80,
            "use model.activations_checkpoint_granularity=full",
        ),
        (["model.pipeline_model_parallel_size=1"], 256, 60, "use trainer.num_nodes=64"),
        ([], None, 20, "use more model.pipeline_model_parallel_size, or a larger --memory"),
        ([], None, 2, "--memory 2: of a GPU, in GiB, 2 of which are its context's"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    overrides: list[str], world: int | None, memory: float, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate("deepseek_v3_671b", overrides, world, memory)
    assert words in str(caught.value)
