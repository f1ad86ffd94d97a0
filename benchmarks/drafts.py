"""What drafts of the MTP module gain in decoding: one sequence, with them and without.

    OMP_NUM_THREADS=1 python benchmarks/drafts.py RUN_FOLDER

Prompts are texts of the run's validation data. Each is continued in both ways in turn, greedily
and drawn. The clock runs from the first new token to the last, so that the reading of the prompt
does not count; ``gain`` is the median of the prompts' own ratios. A pass of the main model with a
draft gives 1 + ``accepted`` tokens on average; ``pass_cost`` is what it takes, with the draft
before it, over a pass without: drafts pay where the first is more than the second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek.commands.entry import guarded
from deepseek.commands.generate import open_model
from deepseek.config import load_config
from deepseek.data.open_data import open_data
from deepseek.inference.generation import Sampling, stream_tokens
from deepseek.inference.speculative import Acceptance, stream_speculative
from deepseek.models.transformer import Transformer
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.run_folder import CONFIG_FILE


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    keep_freed_memory()
    model, _ = open_model(args.run_folder)
    length = f"model.data.seq_length={max(args.contexts)}"
    run = load_config(args.run_folder / CONFIG_FILE, [length])
    texts = open_data(run.model, run.seed).validation
    assert texts is not None
    places = [number * len(texts) // args.prompts for number in range(args.prompts)]
    prompts = [texts[place]["tokens"].tolist() for place in places]
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    for name, sampling in (("greedy", Sampling(temperature=0)), ("drawn", Sampling())):
        for context in args.contexts:
            cut = [prompt[:context] for prompt in prompts]
            result[f"{name}, context {context}"] = compared(model, cut, sampling, args.tokens)
    print(json.dumps(result, indent=1))


def compared(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, tokens: int
) -> dict[str, float]:
    """Both ways, prompt by prompt."""
    count, plain, drafted = Acceptance(), [], []
    for number, prompt in enumerate(prompts):
        settings = tokens, sampling, (), number
        plain.append(seconds(token for (token,) in stream_tokens(model, [prompt], *settings)))
        drafted.append(seconds(stream_speculative(model, prompt, *settings, count)))
    gain = statistics.median(a / b for a, b in zip(plain, drafted, strict=True))
    per_pass = count.tokens / count.passes
    return {
        "tokens_per_second": round((tokens - 1) / statistics.median(plain), 1),
        "with_drafts": round((tokens - 1) / statistics.median(drafted), 1),
        "gain": round(gain, 3),
        "accepted": round(count.accepted / count.guessed, 3),
        "pass_cost": round(per_pass / gain, 3),
    }


def seconds(stream: Iterator[Any]) -> float:
    """From the first token to the last."""
    next(stream)
    begin = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - begin


if __name__ == "__main__":
    guarded(main)
