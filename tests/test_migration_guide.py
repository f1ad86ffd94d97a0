"""The migration guide's own files and commands are run, and print what it says."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "training" / "nemo" / "deepseek" / "docs" / "nemo_migration_guide.md"
ACCELERATE = """\
distributed_type: FSDP
num_processes: 2
num_machines: 1
mixed_precision: 'no'
fsdp_config:
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_transformer_layer_cls_to_wrap: DeepseekV3DecoderLayer
  fsdp_offload_params: false
"""
ARGUMENTS = {
    "learning_rate": 0.001,
    "max_steps": 40,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "group_by_length": True,
    "fp16": False,
}
DRIVER = Path(__file__).parent / "support" / "migration_guide_driver.py"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def files() -> dict[str, str]:
    """Blocks whose first line is the name of a file."""
    found = {}
    for block in blocks("python") + blocks("yaml"):
        name = re.match(r"# (\w+\.(?:py|yaml))\n", block)
        if name:
            found[name[1]] = block
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Each command with the lines it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def in_order(expected: list[str], output: str) -> str | None:
    """The first line said that is not printed, in this order; ``...`` stands for anything."""
    printed = iter(output.splitlines())
    for line in expected:
        pattern = ".*".join(re.escape(piece) for piece in line.split("..."))
        if not any(re.fullmatch(pattern, other) for other in printed):
            return line
    return None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str], int, str]]:
    folder = tmp_path_factory.mktemp("guide")
    for name, text in files().items():
        (folder / name).write_text(text)
    (folder / "accelerate.yaml").write_text(ACCELERATE)
    (folder / "args.json").write_text(json.dumps(ARGUMENTS))
    (folder / "texts").mkdir()
    for path in (ROOT / "training" / "nemo" / "deepseek" / "models" / "components").glob("*.py"):
        (folder / "texts" / f"{path.stem}.txt").write_text(path.read_text())
    listed = [*commands(), ("python check.py logits fsdp2/step_21.pt again", [])]  # another step's
    env = os.environ | {
        "PYTHONPATH": str(ROOT / "training" / "nemo"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "250",
        "DEEPSEEK_FRAMEWORK": "lightning",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    ran = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "support" / "migration_guide_driver.py"),
            str(folder),
        ],
        input=json.dumps([command for command, _ in listed]),
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout.splitlines()[-1])
    return [(*said, *got) for said, got in zip(listed, done, strict=False)]


def test_every_command_prints_what_the_guide_says(
    results: list[tuple[str, list[str], int, str]],
) -> None:
    for command, expected, code, output in results[:-1]:
        assert code == 0, f"{command}\n{output}"
        lost = in_order(expected, output)
        assert lost is None, f"{command}\nnot printed: {lost}\n{output}"
    assert len(results) == len(commands()) + 1


def test_the_rungs_are_all_there(results: list[tuple[str, list[str], int, str]]) -> None:
    """Each check prints a number within its limit, and one of another step is not within it."""
    checked = {}
    *said, (_, _, code, output) = results
    assert code == 1 and output.rstrip().endswith(": NO"), output
    for command, _, _, output in said:
        match = re.search(r": ([\d.e+-]+), limit ([\d.e+-]+): ok", output)
        if match:
            checked[tuple(command.split()[2:])] = float(match[1]), float(match[2])
    kinds = {words[0] for words in checked}
    assert kinds == {"logits", "loss", "update", "overlay", "back", "same"}
    assert all(difference <= limit for difference, limit in checked.values())


def test_fragments_are_python() -> None:
    for block in blocks("python"):
        ast.parse(block)
