"""Every command of the README and of the guides runs, shrunk where it trains."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "training" / "nemo" / "deepseek"
GUIDES = [ROOT / "README.md", *sorted((PACKAGE / "docs").glob("*.md"))]
SMALL = (
    "trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_val_batches=1 "
    "model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 "
    "model.intermediate_size=32 model.moe_intermediate_size=16 model.data.seq_length=32 "
    "model.vocab_size=512 model.tokenizer.vocab_size=512 model.global_batch_size=4 "
    "model.micro_batch_size=4 exp_manager.checkpoint_callback_params.every_n_train_steps=1"
).split()


def commands(guide: Path) -> list[str]:
    """The lines of the bash blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in blocks]
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands(ROOT / "README.md") if line.startswith("make")]
    assert targets == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.timeout(1200)  # dozens of commands, each a process that imports torch
def test_every_command_runs(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    text = "\n".join(path.read_text() for path in PACKAGE.glob("models/components/*.py"))
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(text[i * 900 : (i + 1) * 900])
    files_of_guides(tmp_path, text)
    env = os.environ | {
        "PYTHONPATH": str(PACKAGE.parent),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    scripts_from = tmp_path
    lines = [line for guide in GUIDES for line in commands(guide)]
    done: set[str] = set()
    for line in lines:
        if line.startswith("make ") or line in done:
            continue
        done.add(line)
        if line.startswith("cd "):
            scripts_from = ROOT / line.removeprefix("cd ")
            assert (scripts_from / "scripts").is_dir()
            continue
        for there, here in {"step_00000400": "step_00000002", "[20,21]": "[1,2]"}.items():
            line = line.replace(there, here)  # in a run of two steps
        words = shlex.split(line)
        if words[0] == "python":
            words[:2] = [sys.executable, str(scripts_from / words[1])]
        else:
            assert words[0] == "deepseek", line
            words[:1] = [sys.executable, "-m", "deepseek"]
        if "train" in words or words[1].endswith("train_deepseek.py"):
            words += SMALL
            if "--run-dir" not in words:
                words += ["exp_manager.exp_dir=runs"]
        if "prepare-data" in words and "--chat" not in words:
            words += ["--vocab-size", "400", "--workers", "1"]
        if "generate" in words:
            words += ["--max-new-tokens", "3"]
        ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
        assert "Traceback" not in ran.stderr, line


def files_of_guides(folder: Path, text: str) -> None:
    """What the guides take for granted: texts and conversations."""
    (folder / "src").mkdir()
    (folder / "src" / "code.py").write_text(text[:9000])
    rows = [{"text": text[start : start + 300]} for start in range(0, 9000, 300)]
    (folder / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"prompt": f"{i} + 2?", "response": f"{i + 2}"} for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_files_named_in_guides_exist(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text()):
        assert (guide.parent / target).exists(), target
