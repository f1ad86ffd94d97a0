"""Every command of the README and of the guides runs, shrunk where it trains."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from support.forked import SOURCE, TESTS
from support.kernels import cache_with_kernels
from support.micro_runs import MicroRuns

ROOT = TESTS.parent
PACKAGE = SOURCE / "deepseek"
README = ROOT / "README.md"
GUIDES = [README, *sorted((PACKAGE / "docs").glob("*.md"))]
SMALL = (
    "trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_val_batches=1 "
    "model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 "
    "model.intermediate_size=32 model.moe_intermediate_size=16 model.data.seq_length=32 "
    "model.vocab_size=512 model.tokenizer.vocab_size=512 model.global_batch_size=4 "
    "model.micro_batch_size=4 exp_manager.checkpoint_callback_params.every_n_train_steps=1 "
    "exp_manager.monitor.peak_tflops=0.1"
).split()
IN_TWO_STEPS = {"step_00000400": "step_00000002", "[20,21]": "[1,2]"}
"""What a guide says of a longer run."""


def commands(guide: Path) -> list[str]:
    """The lines of the bash blocks, comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in blocks]
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def shrunk(line: str, folder: Path) -> list[str]:
    """Its words, with settings that make it quick: small data, once there are some."""
    for there, here in IN_TWO_STEPS.items():
        line = line.replace(there, here)
    words = shlex.split(line)
    if "train" in words or words[1].endswith("train_deepseek.py"):
        words += SMALL
        if "--run-dir" not in words:
            words += ["exp_manager.exp_dir=runs"]
        if "data_prefix" not in line and (folder / "data" / "mine.bin").exists():
            words += ["model.data.data_prefix=data/mine"]
    if "prepare-data" in words and "--chat" not in words:
        words += ["--vocab-size", "400", "--workers", "1"]
    if "generate" in words:
        words += ["--max-new-tokens", "3"]
    return words


def run(micro: MicroRuns, folder: Path, lines: list[str]) -> None:
    scripts_from = folder
    for line in dict.fromkeys(lines):
        if line.startswith("make "):
            continue
        if line.startswith("cd "):
            scripts_from = ROOT / line.removeprefix("cd ")
            assert (scripts_from / "scripts").is_dir()
            continue
        program, *words = shrunk(line, folder)
        assert program in ("deepseek", "python"), line
        if program == "python":
            words[0] = str(scripts_from / words[0])
        cache = cache_with_kernels(folder / "cache")
        ran = micro.cli.start(*words, cwd=folder, program=program, env=cache).wait()
        assert ran.code == 0, f"{line}\n{ran.out}\n{ran.err}"
        assert "Traceback" not in ran.err, line


@pytest.fixture(scope="session")
def after_the_readme(micro: MicroRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's reader has: texts, conversations, ``my_run``, ``mine``."""
    folder = tmp_path_factory.mktemp("guides") / "reader"
    (folder / "texts").mkdir(parents=True)
    for part in ("docs", "ops"):  # of the clone
        shutil.copytree(PACKAGE / part, folder / "training/nemo/deepseek" / part)
    text = "\n".join(path.read_text() for path in PACKAGE.glob("models/components/*.py"))
    for i in range(30):
        (folder / "texts" / f"{i}.txt").write_text(text[i * 900 : (i + 1) * 900])
    (folder / "src").mkdir()
    (folder / "src" / "code.py").write_text(text[:9000])
    (folder / "prompts.txt").write_text("def \nimport torch\n")
    rows = [{"text": text[start : start + 300]} for start in range(0, 9000, 300)]
    (folder / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"prompt": f"{i} + 2?", "response": f"{i + 2}"} for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    for made in ("--output data/mine", "deepseek cp", "--run-dir my_run"):
        lines = [line for line in commands(README) if made in line or line.startswith("cd ")]
        run(micro, folder, lines)
    return folder


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_command_runs(
    micro: MicroRuns, after_the_readme: Path, tmp_path: Path, guide: Path
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(after_the_readme, folder)
    lines = commands(guide)
    if guide.name == "monitoring.md":  # it compares two runs of the reader's
        for name in ("base", "sft"):
            shutil.copytree(folder / "my_run", folder / "runs" / name)
    if guide == README:  # it makes them itself, of the default corpus
        for name in ("my_run", "data", "mine.yaml"):
            shutil.move(folder / name, tmp_path / name)
    for name, made in (("training.md", "my_run"), ("data.md", "data")):  # made by the guide itself
        if guide.name == name:
            shutil.move(folder / made, tmp_path / made)
    run(micro, folder, lines)


def test_the_guides_go_into_the_wheel(micro: MicroRuns) -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["deepseek"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert set(GUIDES[1:]) <= packed
    assert {path for path in (PACKAGE / "ops" / "native").iterdir() if path.is_file()} <= packed | {
        *(PACKAGE / "ops" / "native").glob("*.py")
    }
    assert Path(micro.cli("docs").assert_done().out.strip()) == PACKAGE / "docs"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in commands(README) if line.startswith("make")]
    assert targets == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_files_named_in_guides_exist(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text()):
        assert (guide.parent / target).exists(), target
