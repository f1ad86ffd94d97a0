"""``deepseek plan`` as people use it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deepseek.commands.plan import plan
from deepseek.config import ConfigError, UserError, load_config
from deepseek.config.layout import Layout
from deepseek.config.rank_need import RankNeed

TINY = "deepseek_v3_tiny"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    plan(TINY, nodes=2, gpus_per_node=4, tokens=1e12, top=3, explain=True)
    out = capsys.readouterr().out
    for words in (
        "deepseek_v3_tiny on 8 H100 (2 x 4)",
        "the dense bf16 peak; FLOPs causal",
        "fastest layouts",
        "tok/s/GPU",
        "on the rank with most work",
        "of the fullest rank",
        "what would make it faster",
        "next bottleneck: ",
        "+ products in FP8",
    ):
        assert words in out, words


def test_json_has_the_same_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    plan(TINY, nodes=1, gpus_per_node=4, tokens=1e9, top=2, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["gpus"] == 4 and told["gpu"] == "H100" and len(told["layouts"]) == 2
    first = told["layouts"][0]
    assert "network" in told["gain_if_twice_as_fast"]
    assert first["gpu_hours"] == pytest.approx(first["days"] * 24 * 4)
    assert first["days"] * 86400 * 4 * first["tokens_per_s_per_gpu"] == pytest.approx(1e9)
    assert first["memory_bytes"] == max(sum(r.values()) for r in first["bytes_of_ranks"])


def test_the_file_it_writes_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: deepseek_v3_tiny\nmodel:\n  global_batch_size: 32\n")
    for config, settings in ((TINY, ["seed=7", "model.tensor_model_parallel_size=2"]), (mine, [])):
        file = tmp_path / f"best{len(settings)}.yaml"
        plan(str(config), settings, nodes=1, gpus_per_node=4, write=file)
        run = load_config(file)
        assert Layout.of_run(run).world_size == 4
        if settings:
            assert run.seed == 7 and run.model.tensor_model_parallel_size == 2
        else:
            assert run.model.global_batch_size == 32
        with pytest.raises(UserError, match=r"exists"):
            plan(str(config), nodes=1, gpus_per_node=4, write=file)


def test_the_picture_has_every_piece(tmp_path: Path) -> None:
    file, kept = tmp_path / "plan.html", ["model.pipeline_model_parallel_size=2"]
    plan(TINY, kept, nodes=1, gpus_per_node=2, memory=40, top=2, html=file)
    text = file.read_text()
    found = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None and TINY in text
    assert 'data-column="cost"' in text  # on a phone, where a row is too wide
    figures = json.loads(found[1])
    assert sorted(figures) == ["memory-0", "seconds-0", "timeline-0"]
    assert sum(len(bars["base"]) for bars in figures["timeline-0"]["data"]) >= 2 * 2
    assert len(figures["memory-0"]["data"]) == len(RankNeed._fields)
    assert figures["memory-0"]["layout"]["shapes"][0]["y0"] == 38


def test_a_layout_that_does_not_fit_its_cluster_is_no_obstacle() -> None:
    """Neither is one that is illegal on the configured GPUs."""
    plan(TINY, ["model.micro_batch_size=auto"], nodes=1, gpus_per_node=2)
    plan("deepseek_v3_8gpu", ["model.moe_dispatch_fp8=true"], nodes=1, gpus_per_node=2)


def test_what_is_refused() -> None:
    refused: list[tuple[dict[str, object], str]] = [
        ({"gpu": "H1000"}, r"GPU 'H1000' is not known; use H100, or one of .*B200"),
        ({"memory": 1.0}, r"--memory 1: of a GPU, in GiB, 2 of which"),
        ({"tokens": -1.0}, r"--tokens -1: must be above 0"),
        (
            {"memory": 2.01},
            r"nothing fits 8 H100: the least is 2.0 GiB .*; use .*--memory 3 or more",
        ),
        (
            {"overrides": ["model.tensor_model_parallel_size=1", *LONELY], "nodes": 3},
            r"no layout of 24 H100 is legal with model.global_batch_size=8 and .* as given; use "
            r"model.global_batch_size=24, or other --nodes",
        ),
        (
            {"overrides": ["model.expert_model_parallel_size=3"]},
            r"no layout of 8 H100 .*: model.expert_model_parallel_size=3: does not div",
        ),
        (
            {"overrides": ["model.moe_ranks_per_node=3"]},
            r"is legal with model.moe_ranks_per_node=3; use null, or other --nodes",
        ),
    ]
    for options, words in refused:
        settings = {"nodes": 1, "gpus_per_node": 8, **options}
        with pytest.raises(UserError, match=words):
            plan(TINY, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model.hidden_size=-1"):
        plan(TINY, ["model.hidden_size=-1"])


LONELY = ["model.pipeline_model_parallel_size=1", "model.global_batch_size=8"]
