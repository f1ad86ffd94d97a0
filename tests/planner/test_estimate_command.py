"""``deepseek estimate``: one layout, and tables of published runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from deepseek.commands.estimate import estimate, estimate_published
from deepseek.config import UserError, load_config
from deepseek.config.cost import flops_per_token
from deepseek.planner.fitted_rows import FITTED_ROWS
from deepseek.planner.hardware import gpu_named
from deepseek.planner.step_time import StepEstimate, predict_step, traffic

ROW = {
    "name": "MBridge 26.02 DeepSeek-V3 GB200 MXFP8 GBS4096",
    "source": "docs",
    "gpu": "GB200",
    "gpus": 256,
    "model": "DeepSeek-V3 671B",
    "tp": 1,
    "pp": 4,
    "vpp": 4,
    "ep": 64,
    "precision": "MXFP8",
    "seq_len": 4096,
    "global_batch": 4096,
    "micro_batch": 1,
    "mtp": True,
    "notes": "",
}


def test_one_layout_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    estimate("deepseek_v3_671b", gpu="h800")
    told = capsys.readouterr().out
    for part in (
        "37.5",
        "H800",
        "tokens/s",
        "MFU",
        "dense bf16 peak",
        "pipeline bubble",
        "over NVLink",
    ):
        assert part in told, part
    estimate("deepseek_v3_671b", ["model.micro_batch_size=2"], "H200", 1024, as_json=True)
    found = json.loads(capsys.readouterr().out)
    run = load_config("deepseek_v3_671b")
    assert found["flops_per_token"] == pytest.approx(flops_per_token(run.model, 4096, True))
    assert found["gpus"] == 1024 and found["parameters"] > 671e9
    assert sum(found["seconds"].values()) == pytest.approx(found["step_time_s"])
    assert len(found["memory_bytes"]) == len(found["stages"]) == 16
    # 4096 tokens, 7 of 8 experts of each in other nodes, sent in bf16 there and home, both ways.
    sent = found["sent_bytes"]["experts"]["network"]
    micro_batches = 15360 * 16 / 1024 / 2
    assert sent == pytest.approx(2 * 4 * micro_batches * 2 * 4096 * 7168 * 4 * 7, rel=0.05)
    for once in ("model.moe_ranks_per_node=8", "model.moe_token_dispatcher_type=deepep"):
        estimate("deepseek_v3_671b", ["model.micro_batch_size=2", once], "H200", 1024, as_json=True)
        figures = json.loads(capsys.readouterr().out)
        assert figures["sent_bytes"]["experts"]["network"] == pytest.approx(sent / 2, rel=1e-3)
        assert figures["not_counted"] == []


def test_settings_of_the_exchange_and_those_that_time_does_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = []
    for more in ([], ["model.moe_dispatch_fp8=true", "model.optim.cpu_offload=true"]):
        estimate("deepseek_v3_671b", more, "H800", as_json=True)
        found.append(json.loads(capsys.readouterr().out))
    sent = [figures["sent_bytes"]["experts"]["network"] for figures in found]
    assert sent[1] / sent[0] == pytest.approx((1 + 1 / 128 + 2) / 4)
    assert found[1]["step_time_s"] < found[0]["step_time_s"]
    assert [figures["not_counted"] for figures in found] == [[], ["model.optim.cpu_offload=true"]]
    estimate("deepseek_v3_base", ["model.fp8_recipe=blockwise"], "H100")
    told = capsys.readouterr().out
    assert "not counted  model.fp8_recipe=blockwise: memory is with it, time as without" in told


def test_exchanges_that_are_smaller_or_hidden() -> None:
    """258 bytes of 256 numbers there, 512 home; and two passes at a time take as long as what they
    compute, with what the exchange takes of it, or as both exchanges."""
    layout = ["model.pipeline_schedule=DualPipeV", "model.expert_model_parallel_size=64"]

    def told(*settings: str, gpu: str = "H800") -> StepEstimate:
        chosen = [*layout, *(f"model.{each}=true" for each in settings)]
        return predict_step(load_config("deepseek_v3_671b", chosen), gpu_named(gpu), 2048)

    fp8, overlap = "moe_dispatch_fp8", "overlap_moe_expert_parallel_comm"
    usual, small, hidden, both = told(), told(fp8), told(overlap), told(fp8, overlap)
    sent = [traffic(step.job, step.device)["experts"][0] for step in (usual, small)]
    assert sent[1] == pytest.approx(sent[0] * (258 + 512) / 1024)
    assert both.seconds < min(small.seconds, hidden.seconds) < usual.seconds
    assert hidden.parts["exchanges exposed"] < 1e-9 < usual.parts["exchanges exposed"]
    bound = told(overlap, gpu="B200")  # here both exchanges take longer
    for step in (hidden, both, bound):
        after = step.parts["data-parallel exchange exposed"] + step.parts["optimizer"]
        assert step.timeline().seconds == pytest.approx(step.seconds - after, rel=0.015)
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
    for step, by_links in ((hidden, False), (bound, True)):
        near, far = step.stages[1], step.stages[30]  # of the second rank
        links = near.links_forward + far.links_backward
        compute = near.forward - near.hidden_forward + far.backward - far.hidden_backward
        assert (links > compute) == by_links
        pairs = [i for i in step.timeline().intervals if i.kind == "FB" and i.stage == 1]
        assert pairs[0].end - pairs[0].start == pytest.approx(max(links, compute))


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    estimate("deepseek_v3_671b", ["model.pipeline_model_parallel_size=1"], "H100", 64)
    assert "are more than the 80.00 GiB of one H100" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gpu, gpus, why",
    [
        ("H10", None, "GPU 'H10' is not known; use H100"),
        ("H100", 100, "--gpus 100: nodes of 8 processes make 96 or 104"),
        ("H100", 0, "--gpus 0: a cluster has at least 1"),
        ("H100", 8, "8 processes is not a multiple of tensor 1 x pipeline 16"),
    ],
)
def test_impossible_clusters_are_refused(gpu: str, gpus: int | None, why: str) -> None:
    with pytest.raises(UserError, match=why):
        estimate("deepseek_v3_671b", gpu=gpu, gpus=gpus)


def test_published_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    known = next(iter(FITTED_ROWS.values()))[0]
    rows = [ROW | {"name": "mine"}, ROW | {"name": known}, {"name": "none"}, 7, ROW | {"pp": 5}]
    file.write_text(json.dumps(rows))
    estimate_published(file)
    found = json.loads(capsys.readouterr().out)
    assert [row.get("kind") for row in found] == ["predicted", "fitted", None, None, None]
    assert 3000 < found[0]["tokens_per_s_per_gpu"] < 5000 and found[0]["peak_mem_gib"] > 50
    assert [row["why_not"] for row in found[2:4]] == ["gpu is missing", "a row must be an object"]
    assert found[4]["step_time_s"] is None


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    for text, why in (
        ("{", "is not JSON"),
        ('{"a": 1}', "must be a list of rows"),
        ('[{"name": "a", "pp": 1, "pp": 2}]', "row 'a' has the key 'pp' 2 times; keep one"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            estimate_published(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        estimate_published(tmp_path / "none.json")


def test_any_row_is_predicted_or_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of all kinds in every place end in an answer, and the answer is JSON."""
    odd = (None, "", 0, -1, 3, 7.5, 1e30, "256", "many", True, [1], {"a": 1}, "H100", "Kimi-K2")
    draw = random.Random(0)
    rows = []
    for _ in range(300):
        changes = draw.sample(list(ROW), draw.randrange(1, 4))
        rows.append(ROW | {key: draw.choice(odd) for key in changes})
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(rows))
    estimate_published(file)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(rows)
    for row in found:
        assert (row["step_time_s"] or 0) > 0 or row["why_not"], row
