"""The planner on this machine: what it predicts of 12 small layouts, and what they take.

    python benchmarks/cpu_planner.py [--calibration cpu.json] [--json]

Without a calibration one is made first. Every layout then trains for some steps with
`deepseek train`; compared are the median step and the largest resident memory of a process.
A machine that does other work tells little. Some 6 minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from deepseek.config import load_config
from deepseek.config.layout import world_size
from deepseek.config.memory import rank_needs
from deepseek.planner.cpu import read_machine
from deepseek.planner.step_time import predict_step

STEPS, WARM = 7, 2
CONFIG = [
    "trainer.precision=32",
    "trainer.accelerator=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=0",
    "exp_manager.create_checkpoint_callback=false",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
]
TP, PP, EP = (f"model.{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
RECOMPUTE = "model.activations_checkpoint_granularity=full"
LAYOUTS: dict[str, list[str]] = {
    "1 process": [],
    "1 process, recompute": [RECOMPUTE],
    "1 process, micro-batches of 8": ["model.micro_batch_size=8"],
    "2, FSDP": ["trainer.devices=2"],
    "2, FSDP, 4 micro-batches": ["trainer.devices=2", "model.micro_batch_size=1"],
    "2, TP 2": ["trainer.devices=2", f"{TP}=2"],
    "2, EP 2": ["trainer.devices=2", f"{EP}=2"],
    "2, PP 2": ["trainer.devices=2", f"{PP}=2"],
    "2, PP 2, recompute": ["trainer.devices=2", f"{PP}=2", RECOMPUTE],
    "4, FSDP, EP 4": ["trainer.devices=4", f"{EP}=4"],
    "4, TP 2, EP 2": ["trainer.devices=4", f"{TP}=2", f"{EP}=2"],
    "4, PP 2, EP 2": ["trainer.devices=4", f"{PP}=2", f"{EP}=2"],
}


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.calibration or Path(folder) / "cpu.json"
        if options.calibration is None:
            deepseek("calibrate", "--output", str(file))
        machine = read_machine(file)
        rows = []
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            settings = [*CONFIG, *layout]
            run = load_config("deepseek_v3_tiny", settings)
            device = machine.device(world_size(run))
            predicted = predict_step(run, device, world_size(run)).seconds
            resident = device.process + max(need.total for need in rank_needs(run))
            where = Path(folder) / str(number)
            deepseek("train", "deepseek_v3_tiny", "--run-dir", str(where), *settings)
            log = [json.loads(line) for line in (where / "metrics.jsonl").open()]
            steps = [row for row in log if "loss" in row][WARM:]
            took = statistics.median(row["seconds"] for row in steps)
            held = max(row["memory_bytes"] for row in steps)
            rows.append(
                {
                    "layout": name,
                    "predicted_s": predicted,
                    "measured_s": took,
                    "error": predicted / took - 1,
                    "predicted_bytes": round(resident),
                    "measured_bytes": held,
                    "memory_error": resident / held - 1,
                }
            )
            if not options.json:
                print(
                    f"{name:<30} {predicted:7.3f} s {took:7.3f} s {rows[-1]['error']:+7.1%}   "
                    f"{resident / 2**20:6.0f} MiB {held / 2**20:6.0f} MiB "
                    f"{rows[-1]['memory_error']:+7.1%}",
                    flush=True,
                )
    means = {
        f"mean_{key}": statistics.mean(abs(float(row[key])) for row in rows)
        for key in ("error", "memory_error")
    }
    if options.json:
        print(json.dumps({**means, "machine": machine.name, "layouts": rows}, indent=1))
    else:
        print(
            f"mean error: time {means['mean_error']:.1%}, memory {means['mean_memory_error']:.1%}"
        )


def deepseek(*words: str) -> None:
    """The command; what it prints is told if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "deepseek", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"deepseek {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
