"""The planner on this machine: what it predicts of small layouts, and what they take.

    python benchmarks/cpu_planner.py [--calibration cpu.json] [--only REGEX] [--json FILE]
    python benchmarks/cpu_planner.py --calibration cpu.json --measured FILE

Without a calibration one is made first. Every layout then trains for some steps with
`deepseek train`; compared are the median step and the largest resident memory of a process (pages
that it shares with others included, as `train` logs it). Right before a layout, one process trains
(the first of them): what it takes longer than is predicted, the machine has slowed down since it
was calibrated, and so much longer the layout may take, too. Rented machines were seen to change
their rate by 1.8 within minutes. Some 12 minutes on two free cores; one that does other work tells
little. With `--measured` nothing is run: what a file of `--json` has measured is predicted once
more.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from deepseek.commands.entry import guarded
from deepseek.config import RunConfig, load_config
from deepseek.config.layout import world_size
from deepseek.planner.cpu import CpuMachine, read_machine, resident_bytes
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


def sizes(
    hidden: int, heads: int, layers: int, length: int, batch: int = 8, micro_batch: int = 2
) -> list[str]:
    """Settings of another model and batch."""
    return [
        f"model.hidden_size={hidden}",
        f"model.num_attention_heads={heads}",
        f"model.num_hidden_layers={layers}",
        f"model.intermediate_size={3 * hidden}",
        f"model.data.seq_length={length}",
        f"model.global_batch_size={batch}",
        f"model.micro_batch_size={micro_batch}",
    ]


def experts(number: int, chosen: int) -> list[str]:
    """Settings of other experts."""
    return [
        f"model.n_routed_experts={number}",
        f"model.num_experts_per_tok={chosen}",
    ]


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
    "1 process, 384 wide": [*sizes(384, 6, 6, 128), "model.moe_intermediate_size=96"],
    "1 process, 64 experts": [*sizes(256, 8, 3, 1024, 2, 1), *experts(64, 6)],
    "2, TP 2, 512 wide": [
        "trainer.devices=2",
        f"{TP}=2",
        *sizes(512, 8, 3, 512, 4, 1),
        "model.moe_intermediate_size=192",
    ],
    "2, EP 2, 8 experts": [
        "trainer.devices=2",
        f"{EP}=2",
        *sizes(192, 4, 5, 384),
        *experts(8, 2),
        "model.moe_intermediate_size=320",
        "model.num_nextn_predict_layers=0",
    ],
    "4, FSDP, 128 wide": [
        "trainer.devices=4",
        *sizes(128, 4, 6, 512, 8, 1),
        "model.vocab_size=8192",
        "model.num_nextn_predict_layers=0",
    ],
    "4, PP 2, TP 2": ["trainer.devices=4", f"{PP}=2", f"{TP}=2", *sizes(320, 8, 6, 256)],
}
"""The last six have other sizes."""
ONE = "1 process"
"""What trains before each of the others."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--only", default="", help="layouts whose name this regular expression has")
    parser.add_argument("--json", type=Path, help="file for all figures, after every layout")
    parser.add_argument("--measured", type=Path, help="a file of --json: predict it once more")
    options = parser.parse_args(arguments)
    chosen = {n: settings for n, settings in LAYOUTS.items() if re.search(options.only, n)}
    measured = json.loads(options.measured.read_text()) if options.measured else {}
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = options.calibration or Path(folder) / "cpu.json"
        if options.calibration is None:
            deepseek("calibrate", "--output", str(file))
        machine = read_machine(file)
        for number, (name, layout) in enumerate(chosen.items()):
            run = load_config("deepseek_v3_tiny", [*CONFIG, *layout])
            if options.measured and name not in measured:
                continue
            took = measured.get(name) or measured_beside_one(Path(folder) / str(number), name)
            figures[name] = took | predicted(run, machine)
            if name != ONE:
                one = load_config("deepseek_v3_tiny", CONFIG)
                figures[name]["predicted_one_s"] = predicted(one, machine)["predicted_s"]
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
            print(line(name, figures[name]), flush=True)
    means = [statistics.mean(abs(error(row, what)) for row in figures.values()) for what in WHAT]
    print("mean error: time {:.1%}, memory {:.1%}".format(*means))


WHAT = ("s", "bytes")


def measured_beside_one(folder: Path, name: str) -> dict[str, float]:
    """What ``measure`` finds, and before it the seconds of one process."""
    if name == ONE:
        return measure(folder, LAYOUTS[name])
    one = measure(folder.with_name(f"{folder.name}_one"), LAYOUTS[ONE])
    return measure(folder, LAYOUTS[name]) | {"measured_one_s": one["measured_s"]}


def measure(folder: Path, layout: list[str]) -> dict[str, float]:
    """Medians of its steps, and the most memory of a process."""
    deepseek("train", "deepseek_v3_tiny", "--run-dir", str(folder), *CONFIG, *layout)
    log = [json.loads(text) for text in (folder / "metrics.jsonl").open()]
    steps = [row for row in log if "loss" in row][WARM:]
    median = {
        f"measured_{name}": statistics.median(row[key] for row in steps)
        for name, key in (
            ("s", "seconds"),
            ("passes_s", "forward_backward_seconds"),
            ("optimizer_s", "optimizer_seconds"),
        )
    }
    return median | {"measured_bytes": max(row["memory_bytes"] for row in steps)}


def predicted(run: RunConfig, machine: CpuMachine) -> dict[str, float]:
    """Seconds of a step by what takes them, and the memory of the fullest process."""
    device = machine.device(world_size(run))
    estimate = predict_step(run, device, world_size(run))
    parts = {f"predicted {part}": seconds for part, seconds in estimate.parts.items()}
    return {
        "predicted_s": estimate.seconds,
        "predicted_bytes": resident_bytes(run, device),
        **parts,
    }


def error(row: dict[str, float], what: str) -> float:
    """Of a prediction, as a share of what was measured; of time, if the machine had stayed as fast
    as one process tells that it was."""
    slower = 1.0
    if what == "s" and "measured_one_s" in row:
        slower = row["measured_one_s"] / row["predicted_one_s"]
    return slower * row[f"predicted_{what}"] / row[f"measured_{what}"] - 1


def line(name: str, row: dict[str, float]) -> str:
    """Of the table."""
    return (
        f"{name:<34} {row['predicted_s']:7.3f} s {row['measured_s']:7.3f} s {error(row, 's'):+7.1%}"
        f"   {row['predicted_bytes'] / 2**20:6.0f} MiB {row['measured_bytes'] / 2**20:6.0f} MiB "
        f"{error(row, 'bytes'):+7.1%}"
    )


def deepseek(*words: str) -> None:
    """The command; what it prints is told if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "deepseek", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"deepseek {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    guarded(main)
