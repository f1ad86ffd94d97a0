"""The scripts from a clone that is not installed; PyTorch Lightning is enough."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.commands.entry import guarded, overrides_of, train_entry
from deepseek.config.errors import UserError
from deepseek.frameworks import USES_NEMO
from support.forked import SOURCE, Ran
from support.micro_runs import MicroRuns

PACKAGE = SOURCE / "deepseek"
# Standard error of a normal run: NeMo and Lightning have nothing to say to the user.
SILENT = ""

BLOCKED = """
import sys
from importlib import metadata
names = {names}
sys.modules.update(dict.fromkeys(names))  # what is None there cannot be imported
installed = metadata.Distribution.from_name
def from_name(name):
    if name in names:
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.Distribution.from_name = from_name
"""


def python(code: str, cwd: Path, *words: str, **more: str) -> Ran:
    """A new interpreter without this source tree on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEEPSEEK_FRAMEWORK")}
    ran = subprocess.run(
        [sys.executable, "-c", code, *words] if code else [sys.executable, *words],
        cwd=cwd,
        env=env | more,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_the_model_is_tested_from_a_clone(micro: MicroRuns) -> None:
    """The script finds the package by itself; other libraries are there already."""
    hide = f"""
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "deepseek"]:
    del sys.modules[name]
sys.path[:] = [path for path in sys.path if path != {str(SOURCE)!r}]
"""
    words = ["scripts/test_model.py", "--config", "deepseek_v3_base"]
    ran = micro.cli.start(*words, cwd=PACKAGE, program="python", before=hide).wait()
    assert "checks passed in" in ran.assert_done().out
    assert ran.err == SILENT


@pytest.mark.framework
def test_a_model_is_trained_from_a_clone(micro: MicroRuns, tmp_path: Path) -> None:
    words = ["--config", str(micro.config), "--run-dir", str(tmp_path / "run")]
    settings = [f"model.data.data_prefix={micro.folder / 'data'}", "--trainer.max_steps=12"]
    board = "exp_manager.create_tensorboard_logger=true"
    ran = python("", PACKAGE, "scripts/train_deepseek.py", *words, *settings, board).assert_done()
    assert ran.err == SILENT
    assert ("NeMo" in ran.out) == USES_NEMO
    lines = [line for line in ran.out.splitlines() if re.match(r"step +\d+(/| val)", line)]
    assert len(lines) == 15  # twelve steps, three validations
    micro.cli("generate", tmp_path / "run", "--max-new-tokens", "3").assert_done()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--help"], 0, ["usage:", "--config", "a.b=c", "--resume-with-changes", "--report"]),
        (["--config", "deepseek_v3_tiny", "--resume-from", "5"], 2, ["say of which run"]),
        (["--resume-from", "x"], 2, ["invalid int value"]),
        (["--config", "nothing"], 2, ["no shipped configuration nothing"]),
        (["--confg", "nothing"], 2, ["there is no option --confg"]),
        (["trainer.max_steps=x"], 2, ["trainer.max_steps=x"]),
        (["--config"], 2, ["expected one argument"]),
    ],
)
def test_words_of_the_training_script(
    words: list[str], code: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train_entry(words)
    assert end.value.code == code
    shown = "".join(capsys.readouterr())
    assert all(part in shown for part in parts), shown


def test_overrides_of() -> None:
    words = ["a.b=c", "--a.b=c", "++a=1", "-x=1", "word"]
    assert overrides_of(words) == words
    with pytest.raises(UserError, match="there is no option --resume; --help lists them"):
        overrides_of(["a.b=c", "--resume"])


def test_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int | str | None:
        def call() -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            guarded(call)
        return end.value.code

    assert raising(UserError("no text in x; give another")) == 2
    assert capsys.readouterr().err == "error: no text in x; give another\n"
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert raising(SystemExit(1)) == 1
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        guarded(lambda: 1 / 0)


WITHOUT = """
import runpy
from pathlib import Path
sys.path.insert(0, {source!r})
from deepseek.commands.prepare_data import prepare_data
from deepseek.config.errors import UserError

Path("texts").mkdir()
for number in range(8):
    Path(f"texts/{{number}}.txt").write_text(f"some words and {{number}}\\n" * 30)
Path("rows.parquet").write_bytes(b"PAR1")
Path("words.txt.zst").write_bytes(b"(\\xb5/\\xfd")
for name in ("rows.parquet", "words.txt.zst"):
    try:
        prepare_data([Path(name)], Path("never"))
    except UserError as error:
        print("REFUSED", error)
prepare_data([Path("texts")], Path("data"))

def script(*words):
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        print("EXIT", words[0].rsplit("/", 1)[1], end.code, flush=True)

script({scripts!r} + "/train_deepseek.py", "--config", {config!r}, "--run-dir", "run",
       "trainer.max_steps=2", "trainer.val_check_interval=1", "model.data.data_prefix=data",
       "exp_manager.create_tensorboard_logger=true")
script({scripts!r} + "/test_model.py")
from deepseek.commands.generate import generate_text
generate_text(Path("run"), ["some"], max_new_tokens=4)
assert not any(sys.modules[name] for name in names)
"""


@pytest.mark.framework
def test_lightning_is_enough(micro: MicroRuns, tmp_path: Path) -> None:
    names = {"typer", "rich", "tokenizers", "pyarrow", "zstandard", "tensorboard", "safetensors",
             "transformers", "nemo_toolkit", "omegaconf"}  # fmt: skip
    code = BLOCKED.format(names=names) + WITHOUT.format(
        source=str(SOURCE), scripts=str(PACKAGE / "scripts"), config=str(micro.config)
    )
    ran = python(code, tmp_path).assert_done()
    out = ran.out
    assert "REFUSED rows.parquet needs pyarrow; pip install pyarrow" in out
    assert "REFUSED words.txt.zst needs zstandard; pip install zstandard" in out
    assert "step      2/2" in out and "val loss" in out and "bits per byte" in out
    assert "tensorboard is not installed, so no event files are written" in out
    assert "EXIT train_deepseek.py" not in out  # it ends by itself
    assert "EXIT test_model.py 0" in out and "not installed: not compared" in out
    assert "> some" in out.splitlines()  # the prompt is quoted, the answer follows


def test_the_command_line_names_what_it_misses(tmp_path: Path) -> None:
    code = BLOCKED.format(names={"typer"}) + f"sys.path.insert(0, {str(SOURCE)!r})\n"
    ran = python(code + "import runpy; runpy.run_module('deepseek')", tmp_path, "ls")
    ran.assert_refused("pip install typer", "scripts/train_deepseek.py")


def test_a_data_worker_that_died_too_often_is_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dead() -> None:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    with pytest.raises(SystemExit) as end:
        guarded(dead)
    assert end.value.code == 1
    assert "a process that loads data died (DataLoader worker (pid(s) 7)" in capsys.readouterr().err
