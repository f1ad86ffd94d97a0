"""A script as a user writes one: a small module, our strategy, and a Trainer.

Arguments: folder, steps, devices, precision; then ``kill``: rank 1 of the first attempt kills
itself in the middle. The losses go to ``losses.jsonl``, what the strategy does to ``facts.json``.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepseek.config.layout import Layout
from deepseek.console import say
from deepseek.frameworks import LightningModule, Trainer
from deepseek.launch.processes import quiet
from deepseek.launch.strategy import DeepSeekStrategy

SAMPLES, FEATURES, KILLED_AT = 8, 4, 3


class Toy(LightningModule):
    """Linear regression, data parallel by hand; its state is saved after every step."""

    def __init__(self, folder: Path, steps: int, kill: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.steps, self.kill = folder, steps, kill
        self.step = 0

    @property
    def meshes(self) -> Any:
        return self.trainer.strategy.meshes

    def configure_model(self) -> None:
        assert dist.is_initialized()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(FEATURES, 1, dtype=torch.float64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.linear.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(self.step, self.steps), batch_size=None)  # type: ignore[arg-type]

    def on_fit_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        saved = self.folder / "state.pt"
        if saved.exists():
            state = torch.load(saved)
            self.linear.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        self.trainer.strategy.barrier()  # all have read before rank 0 writes
        if self.trainer.is_global_zero:
            (self.folder / "facts.json").write_text(json.dumps(self.facts()))
        else:
            self.facts()
        epoch_loop = self.trainer.fit_loop.epoch_loop
        epoch_loop.manual_optimization.optim_step_progress.total.completed = self.step

    def facts(self) -> dict[str, Any]:
        strategy, rank = self.trainer.strategy, self.trainer.global_rank
        own = torch.tensor([float(rank + 1)])
        gloo: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        return {
            "started_by": strategy.processes.started_by,
            "attempt": strategy.processes.attempt,
            "world": [self.trainer.world_size, self.trainer.num_devices, self.trainer.num_nodes],
            "layout": self.meshes.layout.dp_shard,
            "backend": dist.get_backend(),
            "timeout": gloo.options._timeout.total_seconds(),
            "mean": strategy.reduce(own).item(),
            "sum": strategy.reduce(own, reduce_op="sum").item(),
            "max": strategy.reduce(own, reduce_op="max").item(),
            "own": own.item(),
            "gathered": strategy.all_gather(own).flatten().tolist(),
            "broadcast": strategy.broadcast({"from": rank}, src=self.trainer.world_size - 1),
            "all": strategy.reduce_boolean_decision(rank == 0),
            "any": strategy.reduce_boolean_decision(rank == 0, all=False),
            "sampler": strategy.distributed_sampler_kwargs,
            "sigterm": str(signal.getsignal(signal.SIGTERM)),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }

    def training_step(self, step: int, batch_idx: int) -> None:
        attempt = self.trainer.strategy.processes.attempt
        if self.kill and step == KILLED_AT and self.global_rank == 1 and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        everything = torch.Generator().manual_seed(int(step))
        x = torch.randn(SAMPLES, FEATURES, generator=everything, dtype=torch.float64)
        share = self.meshes.layout.dp
        mine = x.chunk(share)[self.meshes.data_rank]
        loss = ((self.linear(mine) - mine.sum(1, keepdim=True)) ** 2).sum() / SAMPLES
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        for parameter in self.linear.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        total = self.trainer.strategy.reduce(loss, reduce_op="sum").item()
        self.step = int(step) + 1
        if self.trainer.is_global_zero:
            with open(self.folder / "losses.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, "loss": total}) + "\n")
            state = {
                "step": self.step,
                "model": self.linear.state_dict(),
                "optimizer": optimizer.optimizer.state_dict(),
            }
            torch.save(state, self.folder / "state.tmp")
            os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        self.trainer.strategy.barrier()


def main() -> None:
    folder, steps, devices, precision, *more = sys.argv[1:]
    torch.set_num_threads(1)
    strategy = DeepSeekStrategy(
        lambda world_size: Layout(dp_shard=world_size), timedelta(seconds=120), max_restarts=1
    )
    quiet(strategy.processes)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=int(devices),
        precision=precision,
        max_steps=int(steps),
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Toy(Path(folder), int(steps), "kill" in more))
    say("the script goes on after fit")


if __name__ == "__main__":
    main()
