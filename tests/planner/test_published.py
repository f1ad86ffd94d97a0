"""Rows of published runs: read whatever they lack, FLOPs as published, memory as measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deepseek.config import UserError, load_config
from deepseek.config.cost import count_parameters
from deepseek.planner.architecture import Architecture
from deepseek.planner.flops import Convention, flops_per_token
from deepseek.planner.hardware import GPUS
from deepseek.planner.job import OURS, Job
from deepseek.planner.known_models import KNOWN, known_model
from deepseek.planner.layer_time import block_times
from deepseek.planner.megatron_memory import rank_bytes
from deepseek.planner.published import predict_row, read_row
from deepseek.planner.step_time import predict, traffic

ROW: dict[str, Any] = {
    "name": "MBridge 26.04 DeepSeek-V3 GB200",
    "gpu": "GB200",
    "gpus": 256,
    "model": "DeepSeek-V3 671B",
    "tp": 1,
    "pp": 4,
    "vpp": 4,
    "ep": 64,
    "dp": 64,
    "cp": 1,
    "precision": "MXFP8",
    "seq_len": 4096,
    "global_batch": 4096,
    "micro_batch": 1,
    "mtp": True,
    "flop_convention": "causal 3xfwd + MTP",
}
PRODUCTION = ROW | {
    "name": "DeepSeek-V3 production layout",
    "gpu": "H800",
    "gpus": 2048,
    "pp": 16,
    "vpp": 2,
    "dp": 128,
    "precision": "FP8-block",
    "global_batch": 15360,
    "mtp": "not counted in FLOPs",
    "routing": "real training",
    "flop_convention": "causal 3xfwd, no MTP; also non-causal 432",
}
"""arXiv:2505.09343 table 4: 19.926 s a step, 385 TFLOP/s, 13.95 s of it in overlapped passes."""


def test_flops_as_published() -> None:
    """GFLOP of a token, from TFLOP/s over tokens/s of published tables, to 0.3 %."""
    for model, convention, giga in (
        ("DeepSeek-V3 671B", "causal 3xfwd, no MTP; also non-causal 432", 249.71),
        ("DeepSeek-V3 671B", "causal 3xfwd + MTP", 259.96),
        ("DeepSeek-V3 671B", "non-causal, without MTP", 280.2),
        ("Kimi-K2 1T", "causal 3xfwd", 204.43),
        ("Qwen3-235B-A22B", "causal 3xfwd", 147.94),
    ):
        counted = flops_per_token(known_model(model), 4096, Convention.of_text(convention))
        assert counted == pytest.approx(giga * 1e9, rel=0.003), (model, convention)


def test_both_ways_to_count_agree() -> None:
    """Sizes alone give the FLOPs that ``config/cost.py`` counts weight by weight."""
    model = load_config("deepseek_v3_671b").model
    sizes = Architecture.of_model(model)
    assert sizes == KNOWN["DeepSeek-V3"]
    for convention in (Convention(), Convention(False, False), Convention(True, False)):
        assert flops_per_token(sizes, 4096, convention) == flops_per_token(model, 4096, convention)
    counts = count_parameters(model)
    norms = 61 * (counts.norms_per_layer + 1536 + 512) + counts.final_norm
    assert sizes.parameters == counts.total - norms


def test_names_of_models() -> None:
    assert known_model("V3").layers == 61
    assert known_model("Kimi-K2-Instruct").experts == 384
    assert known_model("DeepSeek-V2-Lite").layers == 27
    assert known_model("moonshotai/Moonlight-16B-A3B").vocab == 163840
    proxy = known_model("DeepSeek-V3 4-layer proxy")
    assert (proxy.layers, proxy.dense_layers, proxy.mtp) == (4, 1, 0)
    for text in ("DeepSeek-V4-Flash", "abacus", ""):
        with pytest.raises(UserError, match="model"):
            known_model(text)


def test_peak_memory_as_measured() -> None:
    """GiB that Megatron allocated on 8 B200, 4 blocks of V3's and V2's shape, to 4 %.

    github.com/MooreThreads/SimuMax, docs: bf16, 4096 tokens; nothing here is fitted to it.
    """
    for version, (ep8, first, last) in {
        "V3": (104.3, 71.24, 114.0),
        "V2": (45.63, 31.58, 44.7),
    }.items():
        row = ROW | {
            "name": f"SimuMax {version}-4L",
            "gpu": "B200",
            "gpus": 8,
            "model": f"DeepSeek-{version} 4-layer proxy",
            "vpp": 1,
            "dp": None,
            "precision": "BF16",
            "mtp": False,
            "global_batch": 32,
        }
        whole = read_row(row | {"pp": 1, "ep": 8}).job
        split = read_row(row | {"pp": 2, "ep": 4}).job
        for job, rank, measured in ((whole, 0, ep8), (split, 0, first), (split, 1, last)):
            assert rank_bytes(job, rank).total / 2**30 == pytest.approx(measured, rel=0.04)


def test_deepseeks_own_step() -> None:
    reading = read_row(PRODUCTION)
    step = predict(reading.job, reading.device, reading.convention)
    assert step.seconds == pytest.approx(19.926, rel=0.1)
    assert step.tflops_per_gpu == pytest.approx(385, rel=0.1)
    kinds = step.kinds()
    assert kinds["FB"] == pytest.approx(13.95, rel=0.1)
    assert kinds["bubble"] == pytest.approx(2.06, rel=0.1)
    assert step.timeline().seconds == pytest.approx(step.seconds - 0.29, rel=0.03)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_newer_releases_overlap_and_graphs_are_faster() -> None:
    old = predict_row(ROW)["tflops_per_gpu"]
    assert predict_row(ROW | {"name": "MBridge 25.09"})["tflops_per_gpu"] < old
    assert predict_row(ROW | {"notes": "full-iteration CUDA graph"})["tflops_per_gpu"] > old
    hopper = {"name": "MBridge 25.11", "gpu": "H100", "precision": "FP8-block", "pp": 8}
    hopper = ROW | hopper | {"gpus": 1024, "dp": 128}
    overlapped = predict_row(hopper | {"notes": "1F1B EP overlap"})
    assert overlapped["tflops_per_gpu"] > predict_row(hopper)["tflops_per_gpu"]


def test_what_a_program_does_is_read_from_its_row() -> None:
    def job_of(**changes: Any) -> Job:
        return read_row(ROW | changes).job

    newest = job_of(name="MBridge 26.08", gpu="GB300").system
    assert newest.graphs and newest.fp8_attention and newest.hidden_all_to_all == 0.93
    assert not job_of(name="MBridge 26.08").system.fp8_attention
    for older in ({}, {"vpp": 1}, {"precision": "BF16"}, {"notes": "Muon optimizer"}):
        system = job_of(
            **{"name": "MBridge 26.04" if not older else "MBridge 26.08"} | older
        ).system
        assert system.loops_experts and not system.graphs, older
    qwen = {"model": "Qwen3-235B-A22B", "gpu": "H100", "tp": 2, "pp": 8, "ep": 32, "mtp": False}
    nccl, deepep = job_of(**qwen), job_of(**qwen, name="Megatron-Core MoE")
    assert nccl.system.every_copy and not deepep.system.every_copy
    gpu = GPUS["H100"]
    assert traffic(nccl, gpu)["experts"][0] > 2 * traffic(deepep, gpu)["experts"][0]


def test_a_host_that_launches_each_expert_is_slower_than_the_gpu() -> None:
    """16 experts of a rank take their host as long for one sequence as for two; graphs do not."""
    row = ROW | {"name": "MBridge 26.02", "model": "Qwen3-30B-A3B", "gpu": "B200", "gpus": 8}
    row |= {"pp": 1, "vpp": 1, "ep": 8, "dp": 8, "global_batch": 512, "mtp": False}

    def seconds(**changes: Any) -> float:
        return float(predict_row(row | changes)["step_time_s"])

    assert seconds() > 1.7 * seconds(micro_batch=2)
    graphs = {"notes": "CUDA graphs"}
    assert seconds(**graphs) < 1.4 * seconds(**graphs, micro_batch=2)
    block = block_times(read_row(row).job, GPUS["B200"]).moe
    assert block.forward.compute + block.backward.compute == pytest.approx(8.8e-3, rel=0.15)


def test_full_recomputation_is_as_the_program_does_it() -> None:
    """Ours ends before the experts' last product, of three, and exchanges once."""
    job = replace(read_row(ROW).job, recompute="full", system=OURS)
    others = replace(OURS, drops_last_product=False)
    ours, whole = (
        block_times(replace(job, system=system), GPUS["H100"]).moe for system in (OURS, others)
    )
    saved = whole.backward.experts - ours.backward.experts
    assert saved == pytest.approx(whole.forward.experts / 3)
    returned = whole.backward.all_to_all - ours.backward.all_to_all
    alone = replace(job, system=replace(OURS, shared_beside=False))
    exchange = block_times(alone, GPUS["H100"]).moe.forward.all_to_all
    assert returned == pytest.approx(exchange / 2)
    # What the shared expert computes hides as much of one of the two ways, and no more.
    shared = ours.forward.all_to_all
    assert exchange / 2 <= shared < exchange
    job = replace(job, architecture=replace(job.architecture, shared=32))
    assert block_times(job, GPUS["H100"]).moe.forward.all_to_all == pytest.approx(exchange / 2)


def test_rows_with_gaps_are_predicted_and_say_what_was_assumed() -> None:
    for gap in ("tp", "pp", "vpp", "ep", "dp", "cp", "precision", "seq_len", "micro_batch",
                "global_batch", "gpus", "mtp", "flop_convention"):  # fmt: skip
        for row in (ROW | {gap: None}, {k: v for k, v in ROW.items() if k != gap}):
            found = predict_row(row)
            assert found["tokens_per_s_per_gpu"] > 0, (gap, found)
            if gap not in ("vpp", "dp", "cp", "mtp", "flop_convention"):
                assert any(text.startswith(f"{gap}=") for text in found["assumed"]), gap
    as_text = predict_row({k: str(v) if isinstance(v, int) else v for k, v in ROW.items()})
    assert as_text["step_time_s"] > 0


@pytest.mark.parametrize(
    ("change", "same", "assumed"),
    [
        ({"seq_len": "4K", "gpus": "256 GPUs", "ep": "64 (8 nodes)", "pp": "PP4"}, {}, []),
        ({"cp": "n/a", "tp": "-"}, {"cp": 1}, ["tp=1"]),
        ({"dp": 5}, {}, ["dp=64"]),
        ({"precision": "float8"}, {"precision": "FP8-block"}, []),
        ({"precision": "NVFP4", "gpu": "H100"}, {"precision": "FP8", "gpu": "H100"},
            ["precision=FP8"]),
        ({"precision": "FP8", "gpu": "A100"}, {"precision": "bfloat16", "gpu": "A100"},
            ["precision=BF16"]),
        ({"model": "deepseek_v3_671b"}, {}, []),
    ],
)  # fmt: skip
def test_the_same_in_other_words(
    change: dict[str, Any], same: dict[str, Any], assumed: list[str]
) -> None:
    found, meant = predict_row(ROW | change), predict_row(ROW | same)
    assert found["assumed"] == assumed
    assert found["step_time_s"] == meant["step_time_s"]


def test_products_in_four_bits_are_faster_where_there_are_some() -> None:
    for gpu in ("B200", "GB300"):
        row = ROW | {"gpu": gpu, "model": "Llama-3-70B", "ep": 1}
        eight, four = (predict_row(row | {"precision": p}) for p in ("MXFP8", "NVFP4"))
        assert 1.1 < eight["step_time_s"] / four["step_time_s"] < 1.6 and not four["assumed"]


def test_weights_that_are_sharded_alone_need_no_layout() -> None:
    row = {"name": "FSDP2", "gpu": "H100", "gpus": 128, "model": "Llama-3-8B"}
    assert predict_row(row)["tokens_per_s_per_gpu"] > 5000
    assert "fits" not in predict_row(row | {"name": "x"})
    assert not predict_row(ROW | {"gpus": 1, "pp": 1, "vpp": 1, "ep": 1})["fits"]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"gpu": "Ascend 910B"}, "GPU 'Ascend 910B' is not known"),
        ({"gpu": None}, "gpu is missing"),
        ({"model": ""}, "model is missing"),
        ({"model": "352B MoE"}, "model '352B MoE' is not known"),
        ({"model": 7}, "model '7'"),
        ({"model": "DeepSeek-V3.2-Exp"}, "an indexer that chooses what attention looks at"),
        ({"precision": "garbage"}, "precision 'garbage' is not known; use BF16, FP8"),
        ({"global_batch": "8M tokens"}, "global_batch must be a whole number, got '8M tokens'"),
        ({"tp": None, "pp": None, "ep": None}, "a row needs a layout"),
        ({"pp": 5}, "does not divide 256 gpus"),
        ({"ep": 96}, "ep 96 does not divide"),
        ({"pp": "many"}, "pp must be a whole number, got 'many'"),
        ({"tp": 0}, "tp must be a whole number of 1 or more, got 0"),
        ({"seq_len": 1.5}, "seq_len must be a whole number"),
        ({"global_batch": 8}, "global_batch 8 is less than dp 64"),
        ({"gpus": float("nan")}, "gpus must be a whole number"),
        ({"gpus": [256]}, "gpus must be a whole number"),
        ({"vpp": 4000}, "stages are more than 61 layers"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(change: dict[str, Any], why: str) -> None:
    found = predict_row(ROW | change)
    assert why in found["why_not"] and found["tflops_per_gpu"] is None
    json.dumps(found)
