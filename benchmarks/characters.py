"""Learning per second on a CPU: ``shakespeare_char`` against a dense GPT of nanoGPT's recipe.

    python benchmarks/characters.py                       the built-in corpus, byte by byte
    python benchmarks/characters.py --data data/shakespeare --steps 2000

nanoGPT's recipe for laptops, its known hyper-parameters: 4 layers, 4 heads, 128 wide, 12 sequences
of 64 tokens, no dropout, AdamW with betas (0.9, 0.99) at 1e-3, 100 steps of warm-up, then a cosine
to 1e-4. A step of the mixture takes longer and learns more, so each side has its own number of
steps, and its learning rate comes down at the end of them: ``trainer.max_steps`` as shipped for
ours, ``--steps`` for the dense one. The sides begin with the same tokens in the same order, are
validated on the same sequences, and take turns, the same part of its steps each, in one process;
the clock is of CPU time, so that what else runs here counts little, and stands still in
validations. The last line is what matters: CPU seconds and loss of each at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.commands.entry import guarded
from deepseek.config import load_config
from deepseek.config.schema import ModelConfig
from deepseek.data.loader import Batch, build_train_loader, build_validation_loader
from deepseek.data.open_data import open_data
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.training.step import DeepSeekModel

WIDTH, LAYERS, HEADS = 128, 4, 4


class DenseBlock(nn.Module):
    """Pre-norm attention and GELU feed-forward, four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        qkv_BSNH = self.qkv(self.norm_1(x_BSD)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        y_BNSH = F.scaled_dot_product_attention(*qkv_BSNH.chunk(3, dim=1), is_causal=True)
        x_BSD = x_BSD + self.out(y_BNSH.transpose(1, 2).flatten(2))
        return x_BSD + self.down(F.gelu(self.up(self.norm_2(x_BSD))))


class DenseGPT(nn.Module):
    """Learnt positions, head and embedding one matrix; start values as GPT-2's."""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.places = nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(*(DenseBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V)."""
        places_S = torch.arange(tokens_BS.shape[1])
        x_BSD = self.blocks(self.tokens(tokens_BS) + self.places(places_S))
        return F.linear(self.norm(x_BSD), self.tokens.weight)


@dataclass
class Side:
    """One of the two."""

    name: str
    step: Callable[[Batch], None]
    validate: Callable[[], float]
    """Nats a token."""
    steps: int
    """Of the whole run."""
    seconds: float = 0.0
    """Of CPU time, in steps."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Steps, seconds, validation loss."""


def main() -> None:
    """Print both curves, keep them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="prefix of prepared data, else the built-in corpus")
    parser.add_argument("--steps", type=int, default=2000, help="of the dense model")
    parser.add_argument("--turns", type=int, default=20, help="parts of the steps of each")
    parser.add_argument("--seed", type=int, default=1, help="of the start weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the configuration: a.b=c")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    data = [] if args.data is None else [f"model.data.data_prefix={args.data}"]
    run = load_config("shakespeare_char", [*data, *args.overrides])
    model = run.model
    opened = open_data(model)
    assert opened.validation is not None
    checked = list(build_validation_loader(opened.validation, model, limit_batches=20))
    sides = [
        ours(model, run.trainer.max_steps, args.seed, checked),
        dense(model, args.steps, args.seed, checked),
    ]
    batches = [iter(build_train_loader(opened.train, model, max_steps=s.steps)) for s in sides]
    print(f"{args.threads} threads, load {os.getloadavg()[0]:.1f}; CPU seconds", flush=True)
    for turn in range(args.turns):
        for side, source in zip(sides, batches, strict=True):
            done, end = (side.steps * part // args.turns for part in (turn, turn + 1))
            for _ in range(done, end):
                batch = next(source)
                begin = time.process_time()
                side.step(batch)
                side.seconds += time.process_time() - begin
            side.curve.append((end, round(side.seconds, 2), round(side.validate(), 4)))
        print("  ".join(map(newest, sides)), flush=True)
    print("at the end: " + ", ".join(map(newest, sides)))
    if args.output is not None:
        args.output.write_text(json.dumps({s.name: s.curve for s in sides}, indent=1) + "\n")


def newest(side: Side) -> str:
    """The end of its curve."""
    done, seconds, loss = side.curve[-1]
    return f"{side.name} step {done:>5} {seconds:6.1f} s {loss:.4f}"


def ours(model: ModelConfig, steps: int, seed: int, checked: Sequence[Batch]) -> Side:
    """The shipped configuration."""
    module = DeepSeekModel(model, seed=seed, max_steps=steps)
    optimizer = module.configure_optimizers()

    @torch.no_grad()
    def validate() -> float:
        module.on_validation_epoch_start()
        for number, batch in enumerate(checked):
            module.validation_step(batch, number)
        module.on_validation_epoch_end()
        assert module.validation_record is not None
        return module.validation_record.val_loss

    def step(batch: Batch) -> None:
        module.train_step(batch, optimizer)

    return Side("ours", step, validate, steps)


def dense(model: ModelConfig, steps: int, seed: int, checked: Sequence[Batch]) -> Side:
    """The dense model with the recipe's optimiser and schedule."""
    torch.manual_seed(seed)
    gpt = DenseGPT(model.vocab_size, model.data.seq_length)
    matrices = [p for p in gpt.parameters() if p.dim() > 1]
    vectors = [p for p in gpt.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    done = 0

    def loss_of(batch: Batch) -> Tensor:
        return F.cross_entropy(gpt(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    def step(batch: Batch) -> None:
        nonlocal done
        part = min(1.0, max(0, done - 100) / max(1, steps - 100))
        decayed = 1e-4 + 0.5 * (1 + math.cos(math.pi * part)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (done + 1) / 100 if done < 100 else decayed
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    @torch.no_grad()
    def validate() -> float:
        labels = [int((batch["labels"] >= 0).sum()) for batch in checked]
        losses = [float(loss_of(batch)) * n for batch, n in zip(checked, labels, strict=True)]
        return sum(losses) / sum(labels)

    return Side("dense", step, validate, steps)


if __name__ == "__main__":
    guarded(main)
