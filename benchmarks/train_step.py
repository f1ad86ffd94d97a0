"""Training steps and decoding against Hugging Face transformers, same weights: a table.

    make bench                                  all of it; 15 minutes on two free cores
    python benchmarks/train_step.py --quick     one small model; a minute

Each side runs in a process of its own, so that its allocator setting and its peak memory are its
own, and the two take turns, A B A B ..., so that a machine whose speed drifts slows both alike; the
figure is the median of the ratios, pair by pair. The peer runs as it is best on a CPU: grouped_mm
experts and SDPA attention; ``shipped`` leaves the C library's allocator as it is, ``tuned`` gives
the peer the setting that we make for ourselves. A whole step is timed: forward, backward, global
norm, clipping, AdamW. ``benchmarks/results.json`` keeps what is printed, with the machine, its load
and its rates of products in the same run; the share of that rate is in CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.config.cost import flops_per_token
from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache
from deepseek.models.transformer import Transformer
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.training.step import DeepSeekModel

RESULTS = Path(__file__).with_name("results.json")
DECODED = 8
"""Tokens of one measurement of decoding."""
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


CASES = [
    Case("S: 32 wide experts", WIDE, 2, 512),
    Case("F: 64 fine experts", FINE, 4, 512),
    Case("sequence of 4,096", SMALL, 1, 4096),
    Case("8 experts", EIGHT, 2, 512),
    Case("128 experts", replace(EIGHT, n_routed_experts=128), 2, 512),
    Case("decode, batch 1", SMALL, 1, 1024, decodes=True),
    Case("decode, batch 8", SMALL, 8, 1024, decodes=True),
    Case("decode, batch 32", SMALL, 32, 1024, decodes=True),
]
QUICK = [
    Case("small", SMALL, 2, 256),
    Case("decode, batch 4", SMALL, 4, 256, decodes=True),
]


def main() -> None:
    """Print the table, keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, two rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = 2 if args.quick else args.rounds
    rates = {dtype: product_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()},
        "cases": [],
    }
    print(
        f"{args.threads} threads, load {result['load']:.1f}, "
        f"GFLOP in a CPU second {result['gflops']}"
    )
    print(f"{'case':<20} {'dtype':<9} {'peer':<8} {'ours':>9} {'theirs':>9}  times  share  memory")
    for case in QUICK if args.quick else CASES:
        for half in (False,) if case.decodes else (False, True):
            for tuned in (True,) if args.quick else (False, True):
                row = measure(case, half, tuned, args.threads, rounds)
                dtype = "bfloat16" if half else "float32"
                if not case.decodes:
                    flops = flops_per_token(case.model, case.length, False)
                    total = case.batch * case.length * flops
                    row["share_of_rate"] = round(total / row["ours_cpu_s"] / rates[dtype], 3)
                result["cases"].append({"case": case.name, "dtype": dtype, **row})
                show(result["cases"][-1])
    result["load_after"] = os.getloadavg()[0]
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {args.output}")


def show(row: dict[str, Any]) -> None:
    """One line; tokens a second, share of the rate of products, peak memory ours / theirs."""
    share = f"{row['share_of_rate']:6.2f}" if "share_of_rate" in row else "     -"
    print(
        f"{row['case']:<20} {row['dtype']:<9} {row['peer']:<8} {row['ours_tok_s']:>9,.1f} "
        f"{row['transformers_tok_s']:>9,.1f} {row['times_faster']:6.2f} {share}  "
        f"{row['ours_peak_gib']:.2f} / {row['transformers_peak_gib']:.2f} GiB",
        flush=True,
    )


def measure(case: Case, half: bool, tuned: bool, threads: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn."""
    tokens = case.batch * (DECODED if case.decodes else case.length)
    with worker(True, case, half, True, threads) as ours:
        with worker(False, case, half, tuned, threads) as theirs:
            pairs = [(ours(), theirs()) for _ in range(rounds + 1)]
    first, *pairs = pairs  # the first warms up, with the same weights and tokens on both sides
    mine, peer = first[0].loss, first[1].loss
    assert abs(mine - peer) <= (2e-2 if half else 1e-4) * abs(peer), f"losses {mine} and {peer}"
    sides: dict[str, list[Run]] = {
        "ours": [run for run, _ in pairs],
        "transformers": [run for _, run in pairs],
    }
    found: dict[str, Any] = {"peer": "tuned" if tuned else "shipped"}
    for name, runs in sides.items():
        found[f"{name}_tok_s"] = round(tokens / statistics.median(run.seconds for run in runs), 2)
        found[f"{name}_cpu_s"] = round(statistics.median(run.cpu_seconds for run in runs), 4)
        found[f"{name}_peak_gib"] = round(max(run.peak_bytes for run in runs) / 2**30, 3)
    found["times_faster"] = round(statistics.median(b.seconds / a.seconds for a, b in pairs), 3)
    found["times_faster_cpu"] = round(
        statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs), 3
    )
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


# -- one side, in a process of its own --


@dataclass(frozen=True)
class Run:
    """One step, or some decoded tokens."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    loss: float


@contextmanager
def worker(ours: bool, case: Case, half: bool, tuned: bool, threads: int) -> Iterator[Any]:
    """A process that does one run whenever it is called."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, ours, case, half, tuned, threads))
    process.start()
    there.close()

    def run() -> Run:
        here.send(True)
        return Run(**here.recv())

    try:
        yield run
    finally:
        here.close()
        process.join()


def serve(pipe: Any, ours: bool, case: Case, half: bool, tuned: bool, threads: int) -> None:
    """Run when told, until the pipe is closed."""
    if tuned:
        keep_freed_memory()
    torch.set_num_threads(threads)
    run = (
        (our_decode if ours else their_decode)
        if case.decodes
        else (our_step if ours else their_step)
    )
    call = run(case)
    assert torch.get_num_threads() == threads, "a library has changed the number of threads"
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        begin, cpu_begin = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = call()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(asdict(Run(seconds, cpu_seconds, peak, loss)))


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


def our_step(case: Case) -> Callable[[], float]:
    """The training step as ``train`` runs it."""
    data = replace(case.model.data, seq_length=case.length)
    sizes = {"micro_batch_size": case.batch, "global_batch_size": case.batch}
    module = DeepSeekModel(replace(case.model, data=data, **sizes), seed=1, gradient_clip_val=CLIP)
    optimizer, tokens = module.configure_optimizers(), batches(case)
    positions_BS = torch.arange(case.length).expand(case.batch, -1).contiguous()

    def step() -> float:
        tokens_BS = next(tokens)
        batch = {
            "tokens": tokens_BS,
            "labels": tokens_BS.roll(-1, 1),
            "positions": positions_BS,
            "documents": torch.zeros_like(tokens_BS, dtype=torch.int32),
        }
        return module.train_step(batch, optimizer).loss

    return step


def their_step(case: Case) -> Callable[[], float]:
    """The same with torch's own pieces."""
    model, tokens = their_model(case.model), batches(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        tokens_BS = next(tokens)
        logits_BSV = model(tokens_BS, use_cache=False).logits.float()
        labels_BS = tokens_BS.roll(-1, 1)
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_decode(case: Case) -> Callable[[], float]:
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
    def decode() -> float:
        for cache in caches:
            cache.length = case.length
        for place in range(case.length, room):
            places_BS = torch.full((case.batch, 1), place)
            logits_BV = model.last_logits(tokens_BS[:, :1], places_BS, caches)
        return float(logits_BV.logsumexp(-1).mean())

    return decode


def their_decode(case: Case) -> Callable[[], float]:
    """The same by transformers' forward pass, in a loop."""
    from transformers import DynamicCache

    model, tokens_BS = their_model(case.model), next(batches(case))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens_BS, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode() -> float:
        if (added := cache.get_seq_length() - case.length) > 0:
            cache.crop(-added)
        for _ in range(DECODED):
            logits_BSV = model(tokens_BS[:, :1], past_key_values=cache, use_cache=True).logits
        return float(logits_BSV[:, -1].logsumexp(-1).mean())

    return decode


if __name__ == "__main__":
    main()
