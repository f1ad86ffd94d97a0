"""One side of a comparison: its training step or its decoding, in a process of its own.

``ours`` is the training step as ``train`` runs it, the others are peers with the same weights. Each
process has its own setting of the allocator and its own peak of memory.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cases import CASES, DECODED, DECODING, QUICK, Case
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.layout import compiles
from deepseek.config.memory import state_memory
from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache
from deepseek.models.transformer import Transformer
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.parallel.mesh import SingleProcess
from deepseek.training.phases import measured_memory, resident_bytes
from deepseek.training.step import DeepSeekModel

ROOT = Path(__file__).parents[1]
PYTHON = {"automodel": ROOT / ".venv-nemo/bin/python"}
"""Of peers that have an environment of their own."""
PACKAGE = {
    "shipped": "transformers",
    "tuned": "transformers",
    "automodel": "nemo_automodel",
}
CLIP = 1.0
CPU = torch.device("cpu")


def left_out() -> dict[str, str]:
    """Peers that are not installed, and the way out."""
    found = {}
    for peer, package in PACKAGE.items():
        if peer not in PYTHON:
            if find_spec(package) is None:
                found[peer] = f"no {package} here; pip install {package} installs it"
            continue
        python = PYTHON[peer]
        asks = f"import importlib.util as u; exit(u.find_spec('{package}') is None)"
        if not python.exists() or subprocess.run([python, "-c", asks], check=False).returncode:
            folder = python.parents[1].name
            found[peer] = f"{folder} has no {package}; make {folder}/.ready installs it"
    return found


@dataclass(frozen=True)
class Run:
    """One step, or some decoded tokens."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Of the device: on a CPU what is resident."""
    besides_bytes: int
    """The same without imports and the states of training."""
    first_loss: float
    """Of the first run of all, in fp32, when all sides had the same weights and tokens."""


Call = Callable[[], tuple[float, int]]
"""One run: its loss, and the peak of memory as far as it has measured that itself."""
Logits = Callable[[Tensor], Tensor]
"""From tokens (B, S) to (B, S, V)."""


@contextmanager
def worker(
    side: str, case: Case, threads: int, device: str = "cpu"
) -> Iterator[Callable[[bool], Run]]:
    """A process that does one run whenever it is called, under autocast or not.

    It ends with what the caller does, however that ends.

    Args:
        side: ``ours``, or a peer.

    Raises:
        UserError: the process has ended by itself.
    """
    here, there = Pipe()
    told = {"side": side, "name": case.name, "threads": threads, "device": device}
    process = subprocess.Popen(
        [PYTHON.get(side, sys.executable), __file__, json.dumps(told | {"file": there.fileno()})],
        pass_fds=[there.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "training/nemo")},
        process_group=0,  # of Ctrl-C it need not know
    )
    there.close()

    def run(half: bool) -> Run:
        try:
            here.send(half)
            return Run(**here.recv())
        except (EOFError, OSError):
            raise UserError(ended(side, case, process.wait())) from None

    try:
        yield run
    except BaseException:
        process.kill()
        raise
    finally:
        here.close()
        process.wait()


def ended(side: str, case: Case, code: int) -> str:
    """What to tell of a process that has ended before it was told to.

    Args:
        code: as ``subprocess`` has it: below 0, by that signal.
    """
    why = f"with exit code {code}; what it said is above"
    if code < 0:
        states = state_memory(case.model).total / 2**30
        why = (
            f"by {signal.Signals(-code).name}. Mostly memory runs out: each side has {states:.1f} "
            "GiB of states, and what a step needs besides"
        )
    return f"{case.name}: the process of {side} ended {why}. Other cases: --cases"


# -- in that process --


def serve(file: int, side: str, name: str, threads: int, device: str) -> None:
    """Run when told, until the pipe is closed."""
    case = next(case for case in CASES + QUICK + DECODING if case.name == name)
    if side != "shipped" and device == "cpu":
        keep_freed_memory()
    torch.set_num_threads(threads)
    where = torch.device(device)
    make = import_side(side, case, where)
    answer(Connection(file), case, make, where)


def answer(pipe: Connection, case: Case, make: Callable[[], Call], device: torch.device) -> None:
    """A run whenever it is asked for, with or without autocast; until it is told None, or nobody is
    there to tell."""
    threads = torch.get_num_threads()
    owed = state_memory(case.model).total + (resident_bytes() if device.type == "cpu" else 0)
    call, first_loss = make(), None
    while True:
        try:
            half = pipe.recv()
        except EOFError:
            return
        if half is None:
            return
        peaks = []
        with measured_memory(device) as found:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                for _ in range(case.repeats):
                    loss, peak = call()
                    first_loss = loss if first_loss is None else first_loss
                    peaks.append(peak)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        assert torch.get_num_threads() == threads, "a library has changed the number of threads"
        peak, times = max(*peaks, found[0].peak), case.repeats
        taken = seconds / times, cpu_seconds / times
        pipe.send(asdict(Run(*taken, peak, peak - owed, first_loss)))


def import_side(side: str, case: Case, device: torch.device) -> Callable[[], Call]:
    """What makes the runs of a side; its library is imported."""
    if side == "ours":
        return lambda: (our_decode if case.decodes else our_step)(case, device)
    if side == "automodel":
        logging.disable(logging.WARNING)  # of kernels for GPUs that it does not find
        warnings.simplefilter("ignore")
        from nemo_automodel.components.models.deepseek_v3 import model  # noqa: F401

        return lambda: their_step(case, device, automodel(case.model))
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

    return lambda: (their_decode if case.decodes else their_step)(case, device)


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


def our_module(model: ModelConfig, device: torch.device) -> DeepSeekModel:
    """As ``train`` makes it for one process."""
    module = DeepSeekModel(model, seed=1, gradient_clip_val=CLIP, parallelize_later=True)
    module.parallelize(SingleProcess(), device)
    if compiles(model, device.type == "cuda"):
        module.model.compile_blocks()
    return module


def our_step(case: Case, device: torch.device = CPU) -> Call:
    """The training step as ``train`` runs it."""
    data = replace(case.model.data, seq_length=case.length)
    sizes = {"micro_batch_size": case.batch, "global_batch_size": case.batch}
    module = our_module(replace(case.model, data=data, **sizes), device)
    optimizer, tokens = module.configure_optimizers(), case.batches()
    positions_BS = torch.arange(case.length, device=device).expand(case.batch, -1).contiguous()

    def step() -> tuple[float, int]:
        tokens_BS = next(tokens).to(device)
        batch = {
            "tokens": tokens_BS,
            "labels": tokens_BS.roll(-1, 1),
            "positions": positions_BS,
            "documents": torch.zeros_like(tokens_BS, dtype=torch.int32),
        }
        record = module.train_step(batch, optimizer)
        return record.loss, record.memory_bytes or 0  # each phase begins the peak anew

    return step


def their_step(
    case: Case, device: torch.device = CPU, model: Any = None, logits_of: Logits | None = None
) -> Call:
    """The same with torch's own pieces.

    Args:
        model: transformers', unless it is given.
        logits_of: the forward pass, of models that are called otherwise than transformers'.
    """
    model = (their_model(case.model) if model is None else model).to(device)
    logits_of = logits_of or (lambda tokens_BS: model(tokens_BS, use_cache=False).logits)
    tokens, optimizer = case.batches(), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> tuple[float, int]:
        tokens_BS = next(tokens).to(device)
        logits_BSV = logits_of(tokens_BS).float()
        labels_BS = tokens_BS.roll(-1, 1)
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), 0

    return step


def our_decode(case: Case, device: torch.device) -> Call:
    """Some tokens after those in the cache; the mean of the last logits stands for a loss."""
    model = Transformer(case.model)
    model.init_weights(seed=1)
    model.to(device)
    tokens_BS = next(case.batches()).to(device)
    padding = torch.zeros(case.batch, dtype=torch.int64, device=device)
    room = case.length + DECODED
    caches = [
        LatentCache(case.batch, room, case.model, padding, torch.float32) for _ in model.layers
    ]
    positions_BS = torch.arange(case.length, device=device).expand(case.batch, -1)
    with torch.no_grad():
        model.last_logits(tokens_BS, positions_BS, caches)

    @torch.no_grad()
    def decode() -> tuple[float, int]:
        for cache in caches:
            cache.length = case.length
        for place in range(case.length, room):
            places_BS = torch.full((case.batch, 1), place, device=device)
            logits_BV = model.last_logits(tokens_BS[:, :1], places_BS, caches)
        return float(logits_BV.logsumexp(-1).mean()), 0

    return decode


def their_decode(case: Case, device: torch.device) -> Call:
    """The same by transformers' forward pass, in a loop."""
    from transformers import DynamicCache

    model, tokens_BS = their_model(case.model).to(device), next(case.batches()).to(device)
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
    serve(**json.loads(sys.argv[1]))
