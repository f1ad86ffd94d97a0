"""What one GPU says of this package, everything in one run: ``make gpu-check``.

    python benchmarks/gpu.py [--device cuda|cpu] [--out FILE]

Parts, each in a process of its own with a limit of its own, so that one run tells all that is wrong
and not only the first thing: an illegal access leaves no GPU for what follows in its process.

- ``device``: what it is, and the versions,
- ``tests``: those marked ``gpu``,
- ``losses``: of five fp32 steps against those of the CPU,
- ``group``: a process group of one rank over NCCL, with its time-outs, sums and objects,
- ``waits``: operators of one step after which the host waited, by CUDA's own sync debug mode,
- ``base``, ``slice``: tokens/s, MFU and peak memory against the predicted, of ``deepseek_v3_base``,
  and of V3's widths: 16 layers with 8 experts, or as many of both as are predicted to fit,
- ``compile``: losses and seconds of ``deepseek_v3_base`` with compiled blocks and without,
- ``transformers``: the same step of ``deepseek_v3_base`` there, where it is installed,
- ``torchtitan``: the first layers of its 16B model and the same of ours, where it is installed.

One JSON object comes out. Exit code 0: all parts are sound; 1: some are not; 2: there is no GPU.
``--device cpu`` runs every part in tiny sizes, to prove this file. **No GPU has run it yet.** All
limits together are ``LIMIT_S``; parts that come after it are told to have had no time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import Case
from sides import Call, our_module, our_step, their_step
from torch import Tensor

from deepseek.commands.entry import guarded
from deepseek.config import load_config
from deepseek.config.cost import flops_per_token
from deepseek.config.layout import Layout
from deepseek.config.rank_need import rank_need
from deepseek.config.schema import ModelConfig
from deepseek.models.transformer import Transformer
from deepseek.monitoring.record.run_record import peak_of
from deepseek.parallel.gradients import sum_over
from deepseek.parallel.mesh import Meshes

ROOT = Path(__file__).parents[1]
LIMIT_S = 470
"""Of all parts together."""
TESTS_S = 200
STEPS = 5
RELATIVE = 1e-4
"""Losses in fp32 of other kernels, with other orders of sums, over ``STEPS`` steps."""
HALF_RELATIVE = 2e-2
"""Losses in bf16: compiled blocks round less often."""
MEMORY_RELATIVE = 0.1
"""By which the peak may differ from what was predicted."""
TITAN_LAYERS = 2
"""Of torchtitan's 16B: one is dense, one has 64 experts; with AdamW 17 GiB."""
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "vocab_size": 512,
}
RESERVED = 2 << 30
"""Bytes of context and libraries, which no prediction counts."""

Step = Callable[[], float]
"""One optimiser step; its loss."""


def main(arguments: list[str] | None = None) -> int:
    """Run every part and print what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides the terminal")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-check: this machine has no GPU that torch can use; run it on one that has, or "
            "python benchmarks/gpu.py --device cpu to try the check itself in tiny sizes",
            file=sys.stderr,
        )
        return 2
    patience = CPU_PATIENCE if options.device == "cpu" else 1
    result, end = {}, time.perf_counter() + patience * LIMIT_S
    for name, (_, limit) in PARTS.items():
        begin = time.perf_counter()
        said = in_own_process(name, options.device, min(patience * limit, end - begin))
        result[name] = {**said, "seconds": round(time.perf_counter() - begin, 1)}
        print(f"{name}: {'FAILED' if _failed(said) else 'done'}", file=sys.stderr)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 1 if any(map(_failed, result.values())) else 0


def in_own_process(name: str, device: str, limit: float) -> dict[str, Any]:
    """What a part says; of one that ends without a word or takes longer (s), that."""
    if limit <= 0:
        return {"error": f"no time was left of {LIMIT_S} s"}
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_part, args=(name, device, limit, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            said: dict[str, Any] = ours.recv()
            process.join(5)
            return said
        return {"error": f"stopped after {limit:.0f} s"}
    except EOFError:
        process.join()
        return {"error": f"its process ended with exit code {process.exitcode}"}
    finally:
        with suppress(ProcessLookupError, PermissionError):  # and what it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have come to have a group
        process.join()


def _run_part(name: str, device: str, limit: float, answer: Connection) -> None:
    global _time_s
    os.setpgid(0, 0)
    _time_s = limit
    if device == "cpu":
        torch.set_num_threads(1)  # such sizes are not worth handing out
    try:
        said = PARTS[name][0](torch.device(device))
    except BaseException as error:
        said = {"error": repr(error), "traceback": traceback.format_exc()}
    answer.send(said)


def _failed(said: dict[str, Any]) -> bool:
    return "error" in said or said.get("sound") is False


# -- parts --


def device_part(device: torch.device) -> dict[str, Any]:
    """What runs this."""
    said: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        said |= {
            "name": properties.name,
            "capability": torch.cuda.get_device_capability(device),
            "bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": torch.cuda.nccl.version(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return said


def tests_part(device: torch.device) -> dict[str, Any]:
    """The tests marked ``gpu``; on a CPU it is only asked which there are."""
    marked = [str(f) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    if device.type == "cpu":
        command.append("--collect-only")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=max(_time_s - 10, 1), **options)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace").splitlines()
        return {"error": f"stopped after {error.timeout:.0f} s", "said": said[-20:]}
    return {"sound": done.returncode == 0, "said": done.stdout.splitlines()[-20:]}


def losses_part(device: torch.device) -> dict[str, Any]:
    """In fp32, without TF32, so that only the order of sums differs."""
    base = load_config("deepseek_v3_base").model
    model = replace(base, micro_batch_size=2, torch_compile=False, **SMALL)
    model = _of_length(model, 64)
    told = {}
    for kind in (torch.device("cpu"), device):
        torch.manual_seed(0)
        step, _ = train_step(model, kind, half=False)
        told[str(kind)] = [step() for _ in range(STEPS)]
    ours, theirs = told["cpu"], told[str(device)]
    worst = max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))
    return {"sound": worst < RELATIVE, "losses": told, "largest_relative": worst}


def group_part(device: torch.device) -> dict[str, Any]:
    """What ranks do to meet, by one of them: both backends, a shorter time-out, sums, objects."""
    from deepseek.checkpoint.ranks import Ranks
    from deepseek.launch.processes import Processes, join, leave

    join(Processes(), device.type, timedelta(seconds=20))
    meshes = Meshes(Layout(), device.type, timedelta(seconds=20), timedelta(seconds=10))
    meshes.expect_steps(True)
    summed = sum_over(torch.ones(4, device=device), meshes.world).tolist()
    told = Ranks().together(lambda: "here"), Ranks().gather(lambda: 1), Ranks().lead(lambda: 2)
    leave()
    sound = told == (["here"], [1], 2) and summed == [1.0] * 4
    return {"sound": sound, "sum": summed, "told": told}


def waits_part(device: torch.device) -> dict[str, Any]:
    """Without expert parallelism the host may wait once a step, for what it reports."""
    base = load_config("deepseek_v3_base").model
    model = replace(base, micro_batch_size=2, torch_compile=False, **SMALL)
    step, _ = train_step(_of_length(model, 64), device, half=True)
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)
    return {"sound": len(found) <= 1, "waits": dict(places)}


def base_part(device: torch.device) -> dict[str, Any]:
    """The shipped configuration for one GPU."""
    return speed(_base(device), device)


def slice_part(device: torch.device) -> dict[str, Any]:
    """V3's widths with up to 8 experts, two a token: its products, on one card."""
    model = replace(
        load_config("deepseek_v3_671b").model,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        vocab_size=32768,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        micro_batch_size=1,
        global_batch_size=1,
    )
    if device.type == "cpu":
        model = _of_length(replace(model, **SMALL), 64)
        return speed(model, device) | {"layers": model.num_hidden_layers}
    room = torch.cuda.get_device_properties(device).total_memory - RESERVED
    too_many = []
    for layers, experts in [(16, 8), (16, 4), *((layers, 2) for layers in range(16, 0, -1))]:
        smaller = replace(model, num_hidden_layers=layers, n_routed_experts=experts)
        if rank_need(smaller, Layout(), 0, 1, half=True).total < room:
            size = {"layers": layers, "experts": experts}
            try:
                said = speed(smaller, device)
            except torch.OutOfMemoryError:  # the prediction was wrong; what does fit is to be seen
                too_many.append(size)
                continue
            wrong = {"sound": False, "out_of_memory": too_many} if too_many else {}
            return said | size | wrong
    return {"error": f"not one layer of V3's widths fits into {room / 2**30:.0f} GiB"}


def compile_part(device: torch.device) -> dict[str, Any]:
    """The first steps from the same weights, and how long later ones take."""
    told: dict[bool, tuple[list[float], float]] = {}
    model = _base(device)
    if device.type == "cpu":  # a block takes its compiler half a minute of a busy machine
        model = replace(
            model, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0
        )
    for compiled in (False, True):
        torch.manual_seed(0)
        step, _ = train_step(replace(model, torch_compile=compiled), device, half=True)
        told[compiled] = [step() for _ in range(2)], _seconds(step, device)
    (plain, plain_s), (compiled, compiled_s) = told[False], told[True]
    worst = max(abs(a - b) / abs(a) for a, b in zip(plain, compiled, strict=True))
    said = {"plain_s": plain_s, "compiled_s": compiled_s, "times_faster": plain_s / compiled_s}
    return {"sound": worst < HALF_RELATIVE, "largest_relative": worst} | said


def transformers_part(device: torch.device) -> dict[str, Any]:
    """Their model in the shape of ``deepseek_v3_base``, with our weights, as in ``make bench``."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return {"skipped": "transformers is not installed"}
    case = _case(replace(_base(device), num_nextn_predict_layers=0))
    return _beside(their_step(case, device), case, device)


def torchtitan_part(device: torch.device) -> dict[str, Any]:
    """Their model, of which flex attention has no backward pass on CPUs: there only the forward."""
    try:
        from torchtitan.models.deepseek_v3 import model_registry
    except ImportError as error:
        return {"skipped": f"torchtitan is not installed, or not whole: {error}"}
    titan = model_registry("16B" if device.type == "cuda" else "debugmodel").model
    titan.layers = titan.layers[:TITAN_LAYERS]
    model = as_titan(titan)
    with device:
        theirs = titan.build()
    theirs.init_states(buffer_device=device)
    case = _case(model)
    positions_BS = torch.arange(case.length, device=device).expand(case.batch, -1)
    masks = theirs.get_attention_masks(positions_BS)

    def logits(tokens_BS: Tensor) -> Tensor:
        found: Tensor = theirs(tokens_BS, positions_BS, masks)
        return found

    if device.type == "cpu":
        train_step(model, device, half=False)
        with torch.no_grad():
            mean = float(logits(next(case.batches())).mean())
            return {"skipped": "flex attention has no backward pass", "mean_logit": mean}
    return _beside(their_step(case, device, theirs, logits), case, device)


def as_titan(titan: Any) -> ModelConfig:
    """Ours with the sizes of a configuration of torchtitan, whose first layer is dense."""
    dense, last = titan.layers[0], titan.layers[-1]
    attention, moe = last.attention, last.moe
    base = load_config("deepseek_v3_base").model
    return replace(
        _of_length(replace(base, micro_batch_size=2), 4096 if titan.dim > 1024 else 128),
        vocab_size=titan.vocab_size,
        hidden_size=titan.dim,
        num_hidden_layers=len(titan.layers),
        first_k_dense_replace=1,
        num_attention_heads=attention.n_heads,
        q_lora_rank=attention.q_lora_rank or None,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        intermediate_size=dense.feed_forward.w1.out_features,
        moe_intermediate_size=moe.routed_experts.inner_experts.hidden_dim,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.shared_experts.w1.out_features
        // moe.routed_experts.inner_experts.hidden_dim,
        num_experts_per_tok=moe.router.top_k,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        rope_scaling=None,
    )


def _case(model: ModelConfig) -> Case:
    """One micro-batch a step."""
    return Case("", model, model.micro_batch_size, model.data.seq_length)


def _beside(theirs: Call, case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of their step and of ours, products in bf16."""
    with _quick_start(case.model):
        ours = our_step(case, device)
    with torch.autocast(device.type, torch.bfloat16):
        theirs_s, ours_s = (_seconds(lambda r=r: r()[0], device) for r in (theirs, ours))
    return {"theirs_s": theirs_s, "ours_s": ours_s, "times_faster": theirs_s / ours_s}


PARTS: dict[str, tuple[Callable[[torch.device], dict[str, Any]], float]] = {
    "device": (device_part, 20),
    "losses": (losses_part, 40),
    "group": (group_part, 30),
    "waits": (waits_part, 30),
    "base": (base_part, 80),
    "slice": (slice_part, 90),
    "compile": (compile_part, 65),
    "transformers": (transformers_part, 55),
    "torchtitan": (torchtitan_part, 45),
    "tests": (tests_part, TESTS_S),
}
"""Each part, and the seconds that it may take; the longest comes last. What ``base`` compiles is
found again by ``compile`` in the compiler's cache. Ten seconds of each are imports."""
CPU_PATIENCE = 4
"""So many times as long on a CPU, for which blocks are C++, and which may have other work."""
_time_s = 0.0
"""That the part in this process may take."""


# -- what they share --


def speed(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Tokens/s, MFU, and the most bytes of the device against those predicted."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step, tokens = train_step(model, device, half=True)
    seconds = _seconds(step, device)
    depth = model.num_nextn_predict_layers > 0
    flops = flops_per_token(model, model.data.seq_length, with_mtp=depth) * tokens / seconds
    peak = peak_of(device, None)
    micro_batches = model.global_batch_size // model.micro_batch_size
    predicted = rank_need(model, Layout(), 0, micro_batches, half=True).total
    measured = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    ratio = predicted / measured if measured else None
    return {
        "sound": ratio is None or abs(ratio - 1) <= MEMORY_RELATIVE,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": flops / peak.flops if peak.flops else None,
        "peak": peak.source,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "predicted_over_measured": ratio,
    }


def train_step(model: ModelConfig, device: torch.device, half: bool) -> tuple[Step, int]:
    """The product's own optimiser step without a trainer, and its tokens."""
    with _quick_start(model):
        module = our_module(model, device)
    optimizer = module.configure_optimizers()
    batch = _batch(model, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return module.train_step(batch, optimizer).loss

    return step, batch["tokens"].numel()


def _quick_start(model: ModelConfig) -> AbstractContextManager[Any]:
    """Inside, large models get start values on their device: drawing 10^10 numbers on the CPU takes
    minutes."""
    init = _fill if model.hidden_size > 1024 else Transformer.init_weights
    return mock.patch.object(Transformer, "init_weights", init)


@torch.no_grad()
def _fill(model: Transformer, seed: int) -> None:
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.006)
    for buffer in model.buffers():
        buffer.zero_()


def _seconds(step: Step, device: torch.device) -> float:
    """Median of ``STEPS`` after two that warm up; a step ends with a number on the host."""
    times = []
    for _ in range(STEPS + 2):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _base(device: torch.device) -> ModelConfig:
    model = load_config("deepseek_v3_base").model
    if device.type == "cpu":
        model = _of_length(replace(model, micro_batch_size=1, **SMALL), 64)
    return replace(model, global_batch_size=2 * model.micro_batch_size)


def _of_length(model: ModelConfig, length: int) -> ModelConfig:
    return replace(
        model,
        global_batch_size=model.micro_batch_size,
        data=replace(model.data, seq_length=length),
    )


def _batch(model: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, one document a sequence; drawn on the CPU, so alike everywhere."""
    shape = (model.global_batch_size, model.data.seq_length)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    return {
        "tokens": tokens_BS,
        "labels": tokens_BS.roll(-1, 1),
        "positions": torch.arange(shape[1], device=device).expand(shape),
        "documents": torch.zeros(shape, dtype=torch.int32, device=device),
    }


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
