"""Predictions of published runs: rows of a table as jobs, and their errors.

A row is a mapping such as ``{"name": ..., "gpu": "H100", "gpus": 1024, "model": "DeepSeek-V3 671B",
"tp": 2, "pp": 8, "vpp": 4, "ep": 64, "precision": "FP8-block", "seq_len": 4096, "global_batch":
8192, "micro_batch": 1, "tflops_per_gpu": 368, ...}``. Whatever is missing or null is assumed where
something is usual, and said; a row that nothing can be made of says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepseek.config.errors import UserError
from deepseek.planner.architecture import Architecture
from deepseek.planner.flops import Convention
from deepseek.planner.hardware import Device, Efficiency, gpu_named
from deepseek.planner.job import Job, Ranks, even_stages
from deepseek.planner.known_models import known_model
from deepseek.planner.layer_time import EIGHT_BITS, FITTED, block_times
from deepseek.planner.megatron_memory import peak_bytes
from deepseek.planner.step_time import StepEstimate, predict
from deepseek.planner.systems import system_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """A row as a job."""

    job: Job
    device: Device
    convention: Convention
    assumed: tuple[str, ...]
    """What the row does not say."""


def read_row(row: Row) -> Reading:
    """The job of a row.

    Raises:
        UserError: why none can be made of it.
    """
    text = " ".join(str(row.get(key) or "") for key in ("name", "source", "notes"))
    for key in ("gpu", "model"):
        if not row.get(key):
            raise UserError(f"{key} is missing")
    device = gpu_named(str(row["gpu"]))
    model = known_model(str(row["model"]))
    assumed: list[str] = []
    sizes = {key: _count(row, key) for key in (
        "tp", "pp", "vpp", "ep", "cp", "dp", "gpus", "seq_len", "global_batch", "micro_batch"
    )}  # fmt: skip
    gpus = sizes["gpus"]
    if sizes["tp"] is None and sizes["pp"] is None and sizes["ep"] is None:
        alone = "fsdp" in text.lower() or (model.experts == 0 and "titan" in text.lower())
        if gpus is None or (gpus > 8 and not (alone and model.parameters < 1e9 * gpus)):
            raise UserError("tp, pp and ep are missing: a row needs a layout")
        sizes["ep"] = math.gcd(min(gpus, 8), max(1, model.experts))
        assumed += [f"ep={sizes['ep']}"] if model.experts else ["pp=1"]
        sizes["pp"] = 1

    def given(key: str, otherwise: int) -> int:
        value = sizes[key]
        if value is None:
            assumed.append(f"{key}={otherwise}")
            return otherwise
        return value

    tp, cp = given("tp", 1), sizes["cp"] or 1
    if gpus is None:
        if sizes["dp"] is None or sizes["pp"] is None:
            raise UserError("gpus is missing, and dp or pp")
        gpus = given("gpus", sizes["dp"] * sizes["pp"] * tp * cp)
    pp = sizes["pp"]
    if pp is None and sizes["dp"]:
        pp = given("pp", max(1, gpus // (sizes["dp"] * tp * cp)))
    if pp is None:
        pp = given("pp", _usual_pp(model, gpus, sizes["vpp"], sizes["ep"], tp * cp))
    if gpus % (tp * pp * cp):
        raise UserError(f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} gpus")
    dp = gpus // (tp * pp * cp)
    if sizes["dp"] not in (None, dp):
        assumed.append(f"dp={dp}")
    if model.experts:
        ep = given("ep", math.gcd(64, dp * tp * cp, model.experts))
        if dp * tp * cp % ep:
            raise UserError(f"ep {ep} does not divide the {dp * tp * cp} ranks of a stage")
        if model.experts % ep:
            raise UserError(f"ep {ep} does not divide {model.experts} experts")
    else:
        ep = 1
    vpp = sizes["vpp"] or 1
    if pp == 1:
        vpp = 1
    if pp * vpp > model.layers + model.mtp + 2:
        raise UserError(f"pp {pp} x vpp {vpp} stages are more than {model.layers} layers")
    micro = given("micro_batch", 1)
    batch = given("global_batch", dp * micro * max(16, 4 * pp))
    if batch < dp * micro:
        raise UserError(f"global_batch {batch} is less than dp {dp} x micro_batch {micro}")
    precision = _precision(row, device, assumed)
    mtp = row.get("mtp")
    trained = mtp is True or str(mtp or "no").lower() not in ("no", "none", "false", "0")
    if not trained:
        model = replace(model, mtp=0)
    convention = Convention.of_text(str(row.get("flop_convention") or ""), mtp is True)
    system = system_of(text, device, ep, precision, model, pp == 1 or vpp > 1)
    dual = system.name == "deepseek"
    schedule = (
        "1F1B" if pp == 1 else "DualPipe" if dual and pp % 2 == 0 else "Interleaved1F1B"
        if vpp > 1 else "1F1B"
    )  # fmt: skip
    natural = "real" in str(row.get("routing") or "") or "natural" in str(row.get("routing") or "")
    job = Job(
        model,
        given("seq_len", 4096),
        micro,
        batch,
        Ranks(tp, pp, vpp, ep, cp, dp),
        schedule,
        (),
        precision,
        "none",
        system,
        imbalance=NATURAL_IMBALANCE if natural else 1.0,
        optimizer="muon" if "muon" in text.lower() else "adamw",
        flushes=_flushes(text),
        exchanges=_flushes(text) if system.gathers_weights else 1,
    )
    job = _recomputing(with_even_stages(job, device), device, text)
    return Reading(job, device, convention, tuple(assumed))


FULL = 0.95
"""Of a GPU's memory, what a run plans with."""
NATURAL_IMBALANCE = 1.08
"""Rows of the fullest rank over the mean in natural routing: DeepSeek's chunk takes 138.8 ms in
production (arXiv:2505.09343 table 4) and 128 ms with forced balance (its public profile)."""


FIGURES = ("tflops_per_gpu", "tokens_per_s_per_gpu", "step_time_s", "mfu", "peak_mem_gib")
"""Of a row, with these names; all None where nothing is predicted."""


def predict_row(row: Row, efficiency: Efficiency = FITTED) -> dict[str, Any]:
    """What is predicted of a row, as plain values; ``why_not`` where nothing is."""
    name = row.get("name") if isinstance(row, Mapping) else None
    name = name if name is None else str(name)
    try:
        if not isinstance(row, Mapping):
            raise UserError("a row must be an object")
        reading = read_row(row)
        step = predict(reading.job, reading.device, reading.convention, efficiency)
    except UserError as error:
        return {"name": name, "why_not": str(error), **dict.fromkeys(FIGURES)}
    return {
        "name": name,
        **figures(step),
        "system": reading.job.system.name,
        "recompute": reading.job.recompute,
        "flop_convention": str(reading.convention),
        "assumed": list(reading.assumed),
        "fits": peak_bytes(reading.job).total < reading.device.memory,
    }


def measured_rate(row: Row) -> float | None:
    """Tokens/s of one GPU that a row gives, or that its batch and step time amount to."""
    rate = row.get("tokens_per_s_per_gpu")
    if rate:
        return float(rate)
    parts = [row.get(key) for key in ("global_batch", "seq_len", "step_time_s", "gpus")]
    if all(parts):
        batch, length, seconds, gpus = map(float, parts)  # type: ignore[arg-type]
        return batch * length / seconds / gpus
    return None


def figures(step: StepEstimate) -> dict[str, Any]:
    """The figures that published rows have, to five digits."""
    memory = peak_bytes(step.job).total / 2**30
    values = (step.tflops_per_gpu, step.tokens_per_s_per_gpu, step.seconds, step.mfu, memory)
    return {name: float(f"{value:.5g}") for name, value in zip(FIGURES, values, strict=True)}


def with_even_stages(job: Job, device: Device) -> Job:
    """With the model cut so that the costliest stage costs least."""
    blocks = block_times(job, device)
    costs = [
        block.forward.compute + block.backward.compute
        for block in (blocks.dense, blocks.moe, blocks.mtp, blocks.head)
    ]
    ranks = job.ranks
    count = ranks.pp * ranks.vpp if job.schedule == "Interleaved1F1B" else ranks.pp
    return replace(job, stages=even_stages(job.architecture, costs, count))


def _recomputing(job: Job, device: Device, text: str) -> Job:
    """With what the row says is recomputed, or as much as memory asks for."""
    lower = text.lower()
    if re.search(r"activation checkpointing|full recompute|recompute[^a-z]*full", lower):
        return replace(job, recompute="full")
    if "recompute" in lower or job.schedule == "DualPipe":
        return replace(job, recompute="selective")
    if peak_bytes(job).total < FULL * device.memory:
        return job
    return replace(job, recompute="full" if job.system.gathers_weights else "selective")


def _usual_pp(model: Architecture, gpus: int, vpp: int | None, ep: int | None, tp_cp: int) -> int:
    """The least power of two whose stages hold 60 B parameters' share, and that fits the rest."""
    least = ep or 1
    pp = 2 if (vpp or 1) > 1 else 1
    while pp * 2 * max(least, tp_cp) <= gpus and model.parameters / pp / max(1, least) > 5e9:
        pp *= 2
    return pp


def _flushes(text: str) -> int:
    """Times that the pipeline runs empty in a step, where notes tell of gradient accumulation."""
    found = re.search(r"\bGA\s*=?\s*(\d+)", text)
    return max(1, int(found[1])) if found else 1


PRECISIONS = {
    "nvfp4": r"fp4",
    "mxfp8": r"mx",
    "fp8": r"fp8|float8|8-bit|e4m3|w8a8|hybrid",
    "bf16": r"16|half|^$",
    "fp32": r"32",
}
"""What a row's precision may say, the first that does."""


def _precision(row: Row, device: Device, assumed: list[str]) -> str:
    value = row.get("precision")
    text = str(value or "").lower().strip()
    if not text:
        assumed.append("precision=BF16")
    found = next((name for name, said in PRECISIONS.items() if re.search(said, text)), None)
    if found is None:
        raise UserError(f"precision {value!r} is not known; use BF16, FP8, MXFP8, NVFP4 or FP32")
    if found == "nvfp4" and not device.fp4_share:
        assumed.append("precision=FP8")
        found = "fp8"
    if found in EIGHT_BITS and device.fp8 == device.bf16:
        assumed.append("precision=BF16")
        found = "bf16"
    return found


NOTHING = ("", "-", "none", "null", "nan", "n/a", "na", "?", "unknown", "tbd")
"""What stands in tables where a number is not known."""
NUMBER = re.compile(
    r"(?:[a-z]{2,4}\s*[= ]?\s*)?(\d[\d,_.]*(?:e\+?\d+)?)\s*(k)?"
    r"\s*(?:x|gpus?|tokens?|seq\w*|\(.*\))?"
)
"""Such as 64, 1,024, PP8, 128K, 4096 tokens or 64 (8 nodes)."""


def _count(row: Row, key: str) -> int | None:
    """A whole number of one or more, also written as text; None where there is none.

    Raises ``UserError`` for what is neither.
    """
    value = row.get(key)
    text = str(value).strip().lower() if not isinstance(value, bool) else ""
    if value is None or (not isinstance(value, float) and text in NOTHING):
        return None
    found = NUMBER.fullmatch(text)
    if found is None or (key == "global_batch" and "token" in text):
        raise UserError(f"{key} must be a whole number, got {value!r}")
    try:
        number = float(re.sub("[,_]", "", found[1])) * (1024 if found[2] else 1)
    except ValueError:
        raise UserError(f"{key} must be a whole number, got {value!r}") from None
    if not math.isfinite(number) or number != int(number) or not 1 <= number <= 10**9:
        raise UserError(f"{key} must be a whole number of 1 or more, got {value!r}")
    return int(number)
