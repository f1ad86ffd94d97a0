"""Training steps and decoding beside what others train DeepSeek-V3 with, same weights: a table.

    make bench                                  all of it; a quarter of an hour on two free cores
    python benchmarks/train_step.py --quick     one small model; a minute
    python benchmarks/train_step.py --decoding  decoding alone, with more lengths of context

Each side runs in a process of its own, so that its allocator setting and its peak memory are its
own, and the two take turns, A B A B ..., so that a machine whose speed drifts slows both alike; the
figure is the median of the ratios, pair by pair. Hugging Face transformers runs as it is best on a
CPU: grouped_mm experts and SDPA attention; ``shipped`` leaves the C library's allocator as it is,
``tuned`` gives it the setting that we make for ourselves. ``automodel`` is NVIDIA's AutoModel in
NeMo's environment (``make .venv-nemo/.ready``), tuned, with its fastest experts, in one case. What
is not installed is told, and left out. torchtitan has no training step on a CPU: its attention has
no backward pass there, and its experts multiply in bf16 alone; ``make gpu-check`` has it on a GPU.

A whole step is timed: forward, backward, global norm, clipping, AdamW. ``benchmarks/results.json``
keeps what is printed, with the machine, its load and its rates of products in the same run, and
where our steps' time goes (``breakdown.py``).

Two shares of a rate are given, both in CPU time: ``share`` is of a large square product, ``own`` of
the model's own matrices, each with the rows that it has in a step, forward and backward, one after
the other. Memory is the most that was resident within a run, ours / theirs. ``besides`` is that
ratio without what both must have: what was resident before the model was made, and weights,
gradients and AdamW's moments, 16 bytes a parameter. What is left are activations, room that
kernels work in, and freed memory in pieces that nothing fits in.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.config.cost import flops_per_token
from deepseek.config.memory import state_memory
from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache
from deepseek.models.transformer import Transformer
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.planner.cpu import machine_name
from deepseek.training.phases import resident_bytes, resident_peak_bytes, restart_resident_peak
from deepseek.training.step import DeepSeekModel

RESULTS = Path(__file__).with_name("results.json")
ROOT = Path(__file__).parents[1]
PYTHON = {"automodel": ROOT / ".venv-nemo/bin/python"}
"""Of peers that have an environment of their own."""
PACKAGE = {"automodel": "nemo_automodel"}
DECODED = 8
"""Tokens of one measurement of decoding."""
SHARES = ("share_of_rate", "share_of_own_rate", "besides")
CLIP = 1.0

SMALL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=1408,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=8192,
    initializer_range=0.02,
    moe_aux_loss_coeff=0.0,
)
WIDE = replace(
    SMALL,
    vocab_size=32000,
    hidden_size=768,
    num_hidden_layers=6,
    num_attention_heads=12,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=4608,
    moe_intermediate_size=768,
    num_experts_per_tok=6,
)
FINE = replace(
    SMALL,
    vocab_size=32000,
    num_hidden_layers=8,
    intermediate_size=1536,
    n_routed_experts=64,
    num_experts_per_tok=6,
)
LONG = replace(SMALL, max_position_embeddings=16384)
EIGHT = replace(SMALL, n_routed_experts=8, num_experts_per_tok=4, n_group=1, topk_group=1)


@dataclass(frozen=True)
class Case:
    """What both sides do."""

    name: str
    model: ModelConfig
    batch: int
    length: int
    """Of a training sequence, or of what is in the cache."""
    decodes: bool = False
    half: bool = False
    """In bf16 too."""
    peers: tuple[str, ...] = ()
    """Others than transformers."""
    apart: bool = False
    """Where the time of our step goes is told."""


CASES = [
    Case("S: 32 wide experts", WIDE, 2, 512, half=True, apart=True),
    Case("F: 64 fine experts", FINE, 4, 512, half=True, peers=("automodel",), apart=True),
    Case("sequence of 4,096", SMALL, 1, 4096),
    Case("8 experts", EIGHT, 2, 512),
    Case("128 experts", replace(EIGHT, n_routed_experts=128), 2, 512, apart=True),
    Case("decode, batch 1", SMALL, 1, 1024, decodes=True),
    Case("decode, batch 8", SMALL, 8, 1024, decodes=True),
    Case("decode, batch 32", SMALL, 32, 1024, decodes=True),
]
QUICK = [
    Case("small", SMALL, 2, 256, half=True, peers=("automodel",), apart=True),
    Case("decode, batch 4", SMALL, 4, 256, decodes=True),
]
DECODING = [
    Case(f"decode {length:,} x {batch}", LONG, batch, length, decodes=True)
    for length in (128, 1024, 8192)
    for batch in (1, 8, 32)
]
"""Context and batch."""


def main() -> None:
    """Print the table, keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, two rounds")
    parser.add_argument("--decoding", action="store_true", help="decoding at more lengths")
    parser.add_argument("--only", metavar="WORDS", default="", help="cases whose name begins so")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(**json.loads(args.serve))
    cases = QUICK if args.quick else DECODING if args.decoding else CASES
    if not (chosen := [case for case in cases if case.name.startswith(args.only)]):
        parser.error(f"--only {args.only!r}: there are {', '.join(case.name for case in cases)}")
    torch.set_num_threads(args.threads)
    rounds = 2 if args.quick else args.rounds
    rates = {dtype: product_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_name(),
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()},
        "left_out": left_out(),
        "cases": [],
        "breakdown": {},
    }
    print(
        f"{result['machine']}: {args.threads} threads, load {result['load']:.1f}, "
        f"GFLOP in a CPU second {result['gflops']}"
    )
    dtypes = [d for d, rate in rates.items() if rate > rates["float32"] / 4]  # some have no bf16
    for peer, why in result["left_out"].items():
        print(f"{peer} is left out: {why}")
    print(
        f"{'case':<20} {'dtype':<9} {'peer':<9} {'ours':>9} {'theirs':>9}"
        "  times  share    own besides memory"
    )
    for case in chosen:
        for row in measure(case, dtypes, args.threads, rounds, args.quick, result["left_out"]):
            if not case.decodes:
                flops = case.batch * case.length * flops_per_token(case.model, case.length, False)
                dtype, rate = row["dtype"], flops / row["ours_cpu_s"]
                row["share_of_rate"] = round(rate / rates[dtype], 3)
                row["share_of_own_rate"] = round(rate / own_rate(case, dtype), 3)
            result["cases"].append(row)
            show(row)
    for case in chosen:
        if case.apart:
            result["breakdown"][case.name] = breakdown(case, args.threads)
    result["load_after"] = os.getloadavg()[0]
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {args.output}")


def left_out() -> dict[str, str]:
    """Peers that are not installed, and the way out."""
    found = {}
    for peer, python in PYTHON.items():
        asks = f"import importlib.util as u; exit(u.find_spec('{PACKAGE[peer]}') is None)"
        if not python.exists() or subprocess.run([python, "-c", asks], check=False).returncode:
            folder = python.parents[1].name
            found[peer] = f"{folder} has no {PACKAGE[peer]}; make {folder}/.ready installs it"
    return found


def breakdown(case: Case, threads: int) -> Any:
    """Printed, and as it is kept: one step of ours, by what takes the time."""
    command = [sys.executable, ROOT / "benchmarks/breakdown.py", case.name]
    done = subprocess.run(
        [*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True
    )
    *table, found = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    return json.loads(found)


def show(row: dict[str, Any]) -> None:
    """One line; tokens a second, shares of the rates of products and of the peer's memory besides
    states, peak memory ours / theirs."""
    shares = [f"{row[s]:6.2f}" if s in row else "     -" for s in SHARES]
    print(
        f"{row['case']:<20} {row['dtype']:<9} {row['peer']:<9} {row['ours_tok_s']:>9,.1f} "
        f"{row['theirs_tok_s']:>9,.1f} {row['times_faster']:6.2f} {' '.join(shares)}  "
        f"{row['ours_peak_gib']:.2f} / {row['theirs_peak_gib']:.2f} GiB",
        flush=True,
    )


def measure(
    case: Case,
    dtypes: list[str],
    threads: int,
    rounds: int,
    quick: bool,
    left_out: Container[str],
) -> Iterator[dict[str, Any]]:
    """Both sides in turn, in fp32 and where asked in bf16, against each peer.

    Both begin anew for each, whose memory and ours then hold the same history. Decoding has one
    peer, in fp32: it allocates little.
    """
    peers = ("tuned",) if quick or case.decodes else ("shipped", "tuned")
    for peer in [*peers, *(other for other in case.peers if other not in left_out)]:
        with worker("ours", case, threads) as ours, worker(peer, case, threads) as theirs:
            for dtype in dtypes if case.half and peer in peers else dtypes[:1]:
                half = dtype == "bfloat16"
                pairs = [(ours(half), theirs(half)) for _ in range(rounds + 1)]
                yield compared(case, dtype, peer, pairs)


def compared(case: Case, dtype: str, peer: str, pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """A row of the table."""
    tokens = case.batch * (DECODED if case.decodes else case.length)
    first, *pairs = pairs  # the first warms up
    sides: dict[str, list[Run]] = {
        "ours": [run for run, _ in pairs],
        "theirs": [run for _, run in pairs],
    }
    found: dict[str, Any] = {
        "case": case.name,
        "dtype": dtype,
        "peer": peer,
        "load": os.getloadavg()[0],
    }
    for name, runs in sides.items():
        found[f"{name}_tok_s"] = round(tokens / statistics.median(run.seconds for run in runs), 2)
        found[f"{name}_cpu_s"] = round(statistics.median(run.cpu_seconds for run in runs), 4)
        found[f"{name}_peak_gib"] = round(max(run.peak_bytes for run in runs) / 2**30, 3)
    found["times_faster"] = round(statistics.median(b.seconds / a.seconds for a, b in pairs), 3)
    found["times_faster_cpu"] = round(
        statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs), 3
    )
    if not case.decodes:
        most = [max(run.besides_bytes for run in runs) for runs in sides.values()]
        found |= {f"{n}_besides_gib": round(b / 2**30, 3) for n, b in zip(sides, most, strict=True)}
        found["besides"] = round(most[0] / most[1], 3)
    mine, peer = first[0].first_loss, first[1].first_loss
    assert abs(mine - peer) <= 1e-4 * abs(peer), f"{case.name}: losses {mine} and {peer}"
    return found


def product_rate(dtype: torch.dtype) -> float:
    """FLOP of a large matrix product in a second of CPU time, the best of some."""
    x_SS = torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.process_time()  # of all threads: what else runs here does not count
        torch.mm(x_SS, x_SS)
        best = min(best, time.process_time() - begin)
        if best > 1:  # bf16 on a CPU that has no such products
            break
    return 2 * 1024**3 / best


def own_rate(case: Case, dtype: str) -> float:
    """FLOP in a second of CPU time of the model's own products, one after the other.

    Every matrix with the rows it has in a step, under balanced routing, and both products of the
    backward pass: those of attention's scores are not among them.
    """
    tokens, model = case.batch * case.length, case.model
    with torch.device("meta"):
        shapes = [w.shape for n, w in Transformer(model).named_parameters() if n != "embed.weight"]
    rows = tokens * model.num_experts_per_tok // model.n_routed_experts
    products: Counter[tuple[int, int, int]] = Counter()  # rows, outputs, inputs
    for shape in shapes:
        if len(shape) > 1:
            products[(rows if len(shape) == 3 else tokens, shape[-2], shape[-1])] += (
                shape[0] if len(shape) == 3 else 1
            )
    flop = seconds = 0.0
    for (n, outputs, inputs), times in products.items():
        x, w = torch.ones(n, inputs, dtype=getattr(torch, dtype)), torch.ones(outputs, inputs)
        w = w.to(x.dtype)
        taken = []
        for _ in range(4):
            begin = time.process_time()
            y = x @ w.t()
            y @ w
            y.t() @ x
            taken.append(time.process_time() - begin)
        flop += times * 6.0 * n * outputs * inputs
        seconds += times * min(taken)
    return flop / seconds


# -- one side, in a process of its own --


@dataclass(frozen=True)
class Run:
    """One step, or some decoded tokens."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    besides_bytes: int
    """The same without imports and the states of training."""
    first_loss: float
    """Of the first run of all, in fp32, when both sides had the same weights and tokens."""


Call = Callable[[], tuple[float, int]]
"""One run: its loss, and the peak of resident memory as far as it has measured that itself."""


@contextmanager
def worker(side: str, case: Case, threads: int) -> Iterator[Callable[[bool], Run]]:
    """A process that does one run whenever it is called, under autocast or not.

    Args:
        side: ``ours``, or a peer.
    """
    here, there = Pipe()
    told = {"file": there.fileno(), "side": side, "name": case.name, "threads": threads}
    process = subprocess.Popen(
        [PYTHON.get(side, sys.executable), __file__, "--serve", json.dumps(told)],
        pass_fds=[there.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "training/nemo")},
    )
    there.close()

    def run(half: bool) -> Run:
        here.send(half)
        return Run(**here.recv())

    try:
        yield run
    finally:
        here.close()
        process.wait()


def serve(file: int, side: str, name: str, threads: int) -> None:
    """Run when told, until the pipe is closed."""
    pipe, case = (
        Connection(file),
        next(case for case in CASES + QUICK + DECODING if case.name == name),
    )
    if side != "shipped":
        keep_freed_memory()
    torch.set_num_threads(threads)
    make = import_side(side, case)
    owed = resident_bytes() + state_memory(case.model).total
    call = make()
    assert torch.get_num_threads() == threads, "a library has changed the number of threads"
    first_loss = None
    while True:
        try:
            half = pipe.recv()
        except EOFError:
            return
        restart_resident_peak()
        begin, cpu_begin = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, peak = call()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        first_loss = loss if first_loss is None else first_loss
        peak = max(peak, resident_peak_bytes())
        pipe.send(asdict(Run(seconds, cpu_seconds, peak, peak - owed, first_loss)))


def import_side(side: str, case: Case) -> Callable[[], Call]:
    """What makes the runs of a side; its library is imported."""
    if side == "ours":
        return lambda: our_decode(case) if case.decodes else our_step(case)
    if side == "automodel":
        logging.disable(logging.WARNING)  # of kernels for GPUs that it does not find
        warnings.simplefilter("ignore")
        from nemo_automodel.components.models.deepseek_v3 import model  # noqa: F401

        return lambda: their_step(case, automodel(case.model))
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

    return lambda: their_decode(case) if case.decodes else their_step(case)


def batches(case: Case) -> Iterator[Tensor]:
    """The same random tokens on both sides."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(
            0, case.model.vocab_size, (case.batch, case.length), generator=generator
        )


def their_model(model: ModelConfig) -> Any:
    """transformers' model with our weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.utils import logging as transformers_logging

    from deepseek.interop.hf_config import hf_config
    from deepseek.interop.huggingface import to_hf

    transformers_logging.set_verbosity_error()
    ours = Transformer(model)
    ours.init_weights(seed=1)
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(**(hf_config(model) | {"attn_implementation": "sdpa"}))
    )
    theirs.set_experts_implementation("grouped_mm")
    theirs.load_state_dict(to_hf(ours.state_dict(), model, layout="stacked"))
    return theirs


def automodel(model: ModelConfig) -> Any:
    """AutoModel's with our weights: of its experts on a CPU the fastest, in one grouped product."""
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3ForCausalLM
    from transformers import DeepseekV3Config

    from deepseek.interop.hf_config import hf_config
    from deepseek.interop.huggingface import to_hf

    ours = Transformer(model)
    ours.init_weights(seed=1)
    theirs = DeepseekV3ForCausalLM.from_config(
        DeepseekV3Config(**hf_config(model), dtype="float32"),
        backend=BackendConfig(
            attn="sdpa",
            linear="torch",
            rms_norm="torch_fp32",
            experts="torch_mm",
            dispatcher="torch",
            rope_fusion=False,
            enable_hf_state_dict_adapter=True,
        ),
        moe_overrides={"gate_bias_update_factor": model.moe_router_bias_update_rate},
    )
    theirs.load_state_dict(theirs.state_dict_adapter.from_hf(to_hf(ours.state_dict(), model)))
    return theirs.float().train()


def our_step(case: Case) -> Call:
    """The training step as ``train`` runs it."""
    data = replace(case.model.data, seq_length=case.length)
    sizes = {"micro_batch_size": case.batch, "global_batch_size": case.batch}
    module = DeepSeekModel(replace(case.model, data=data, **sizes), seed=1, gradient_clip_val=CLIP)
    optimizer, tokens = module.configure_optimizers(), batches(case)
    positions_BS = torch.arange(case.length).expand(case.batch, -1).contiguous()

    def step() -> tuple[float, int]:
        tokens_BS = next(tokens)
        batch = {
            "tokens": tokens_BS,
            "labels": tokens_BS.roll(-1, 1),
            "positions": positions_BS,
            "documents": torch.zeros_like(tokens_BS, dtype=torch.int32),
        }
        record = module.train_step(batch, optimizer)
        return record.loss, record.memory_bytes or 0  # each phase begins the peak anew

    return step


def their_step(case: Case, model: Any = None) -> Call:
    """The same with torch's own pieces; ``model`` is transformers', unless it is given."""
    model, tokens = model or their_model(case.model), batches(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> tuple[float, int]:
        tokens_BS = next(tokens)
        logits_BSV = model(tokens_BS, use_cache=False).logits.float()
        labels_BS = tokens_BS.roll(-1, 1)
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), 0

    return step


def our_decode(case: Case) -> Call:
    """Some tokens after those in the cache; the mean of the last logits stands for a loss."""
    model = Transformer(case.model)
    model.init_weights(seed=1)
    tokens_BS, padding = next(batches(case)), torch.zeros(case.batch, dtype=torch.int64)
    room = case.length + DECODED
    caches = [
        LatentCache(case.batch, room, case.model, padding, torch.float32) for _ in model.layers
    ]
    with torch.no_grad():
        model.last_logits(tokens_BS, torch.arange(case.length).expand(case.batch, -1), caches)

    @torch.no_grad()
    def decode() -> tuple[float, int]:
        for cache in caches:
            cache.length = case.length
        for place in range(case.length, room):
            places_BS = torch.full((case.batch, 1), place)
            logits_BV = model.last_logits(tokens_BS[:, :1], places_BS, caches)
        return float(logits_BV.logsumexp(-1).mean()), 0

    return decode


def their_decode(case: Case) -> Call:
    """The same by transformers' forward pass, in a loop."""
    from transformers import DynamicCache

    model, tokens_BS = their_model(case.model), next(batches(case))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> tuple[float, int]:
        if (added := cache.get_seq_length() - case.length) > 0:
            cache.crop(-added)
        for _ in range(DECODED):
            logits_BSV = model(tokens_BS[:, :1], past_key_values=cache, use_cache=True).logits
        return float(logits_BSV[:, -1].logsumexp(-1).mean()), 0

    return decode


if __name__ == "__main__":
    main()
