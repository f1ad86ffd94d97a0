"""Every command of the command line with right and wrong input: exit codes, messages, no traceback.

0: done; 1: a check failed; 2: something the user can mend.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deepseek import __version__
from deepseek.cli import app
from deepseek.config.load import shipped_configs
from deepseek.monitoring.run_log import read_run
from support.forked import Forked
from support.micro_runs import MicroRuns

ESCAPE = "\x1b"


# -- the command line itself --


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["train", "--help"], ["generate", "-h"]])
def test_help(cli: Forked, words: list[str]) -> None:
    ran = cli(*words).assert_done()
    assert "Usage: deepseek" in ran.out and ran.err == ""


def test_help_lists_every_command(cli: Forked) -> None:
    out = cli("--help").out
    names = (
        "train",
        "test",
        "validate",
        "launch",
        "prepare-data",
        "generate",
        "ls",
        "rm",
        "cp",
        "cat",
    )
    for command in names:
        assert re.search(rf"^\W*{command}\s", out, re.MULTILINE), command


def test_verbose_shows_what_a_rank_applies(cli: Forked) -> None:
    code = """
import logging
from deepseek.commands import train
train.train = lambda *options: logging.getLogger("deepseek.parallel").info("TP 2: divided")
"""
    for options, told in (([], ""), (["--verbose"], "rank 3       TP 2: divided\n")):
        words = ["train", "deepseek_v3_tiny", *options]
        assert cli.start(*words, before=code, env={"RANK": "3"}).wait().err == told


def test_every_word_and_option_is_explained() -> None:
    def verbs(command: Any) -> Iterator[Any]:
        inner = getattr(command, "commands", {}).values()
        yield from [verb for one in inner for verb in verbs(one)] if inner else [command]

    for verb in verbs(get_command(app)):
        assert verb.help and verb.help.endswith("."), verb.name
        for parameter in verb.params:
            words = getattr(parameter, "help", None) or ""
            assert len(words) > 10 and words.endswith("."), (verb.name, parameter.name, words)


def test_no_command_shows_the_help(cli: Forked) -> None:
    ran = cli()
    assert ran.code == 2 and "Usage: deepseek" in ran.out + ran.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nonsense"], ["No such command 'nonsense'"]),
        (["generate"], ["Missing argument", "run"]),
        (["cp", "deepseek_v3_tiny"], ["give the file to write after the configuration"]),
        (["generate", "r", "--max-new-tokens", "many"], ["--max-new-tokens", "valid integer"]),
        (["ls", "--all"], ["No such option: --all"]),
        (["train", "--confg", "x"], ["there is no option --confg; --help lists them"]),
        (["train", "--resume"], ["there is no option --resume"]),
        (["validate", "deepseek_v3_tiny", "-x"], ["there is no option -x"]),
        (["launch", "--slurm"], ["give a configuration, NAME or --config NAME"]),
        (["cat", "--config", "a.yaml", "b.yaml"], ["--config a.yaml and b.yaml: give one"]),
        (["test", "model.n_group=7"], ["model.n_group=7: one configuration is taken here"]),
        (["emit", "megatron", "deepseek_v3_tiny"], ["give the new file after"]),
    ],
)
def test_words_that_are_not_understood(cli: Forked, words: list[str], parts: list[str]) -> None:
    cli(*words).assert_refused(*parts)


def test_the_version(cli: Forked) -> None:
    assert cli("--version").assert_done().out == f"deepseek {__version__}\n"


# verb -> words before and behind the configuration; all of them read it before anything else
READERS: dict[str, tuple[list[str], list[str]]] = {
    "train": ([], ["seed=3"]),
    "sweep": ([], ["seed=3,4"]),
    "test": ([], []),
    "validate": ([], ["seed=3"]),
    "plan": ([], ["seed=3"]),
    "scaling": ([], ["seed=3"]),
    "estimate": ([], ["seed=3"]),
    "launch": ([], ["--slurm", "seed=3"]),
    "doctor": ([], ["seed=3"]),
    "cat": ([], ["--resolved"]),
    "cp": ([], ["copied.yaml"]),
    "emit automodel": ([], ["new.yaml", "seed=3"]),
    "emit megatron": ([], ["new.yaml", "seed=3"]),
    "migrate fsdp-checkpoint": (["source", "target"], ["seed=3"]),
}


def verbs(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_a_configuration_is_given_bare_or_by_its_option(cli: Forked) -> None:
    """The same broken one, with the same words of all verbs."""
    takes = [name for name, command in verbs(get_command(app)) if "config" in names_of(command)]
    assert sorted(takes) == sorted(READERS)
    for verb, (before, behind) in READERS.items():
        for config in [["nowhere"], ["--config", "nowhere"], ["--config=nowhere"]]:
            ran = cli(*verb.split(), *before, *config, *behind)
            ran.assert_refused("nowhere")
            told = "no shipped configuration nowhere"
            assert told in ran.err or verb in ("cp", "cat"), (verb, ran.err)


def names_of(command: Any) -> set[str]:
    return {parameter.name for parameter in command.params}


def test_completion_in_a_shell(cli: Forked) -> None:
    """Verbs, shipped configurations, and keys of settings."""
    for words, found in (
        ("deepseek val", {"validate"}),
        ("deepseek train --config moon", {"moonlight_16b"}),
        ("deepseek validate moon", {"moonlight_16b"}),
        ("deepseek train model.hid", {"model.hidden_size="}),
    ):
        asked = f"_DEEPSEEK_COMPLETE=complete_bash COMP_CWORD={len(words.split()) - 1}"
        code = f"import os\nos.environ.update(dict(e.split('=') for e in {asked!r}.split()))\n"
        code += f"os.environ['COMP_WORDS'] = {words!r}\n"
        assert set(cli(before=code).out.split()) == found


def test_a_reader_that_goes_away(cli: Forked) -> None:
    code = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
    ran = cli("cat", "deepseek_v3_tiny", before=code)
    assert ran.code == 141 and ran.err == ""


# -- train --


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config", "deepseek_v3_tyni"], ["no shipped configuration deepseek_v3_tyni"]),
        (["--config", "missing.yaml"], ["there is no file missing.yaml"]),
        (["--config", "."], ["is a folder; give a YAML file"]),
        (["trainer.max_steps"], ["written section.key=value"]),
        (["trainer.max_steps=many"], ["trainer.max_steps=many"]),
        (["trainer.max_step=5"], ["did you mean", "trainer.max_steps"]),
        (["trainer.devices=3"], ["does not divide model.global_batch_size=4"]),
        (["model.data.data_prefix=nowhere"], ["nowhere.bin", "deepseek prepare-data"]),
        (["trainer.accelerator=gpu"], ["torch finds no GPU here"]),
        (["--run-dir", "/proc/run"], ["cannot make the run folder /proc/run", "--run-dir"]),
        (
            ["--run-dir", "micro.yaml"],
            ["cannot make the run folder", "micro.yaml: Not a directory"],
        ),
        (["exp_manager.exp_dir=/proc/runs"], ["cannot make the run folder", "exp_dir"]),
    ],
)
def test_trainings_that_cannot_start(
    micro: MicroRuns, words: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = "import torch\ntorch.cuda.is_available = lambda: False"
    config = [] if "--config" in words else ["--config", micro.config]
    data = [] if "data_prefix" in words[0] else [f"model.data.data_prefix={micro.folder / 'data'}"]
    ran = micro.cli("train", *config, *data, *words, before=blind)
    ran.assert_refused(*parts)
    assert "framework" not in ran.out


def test_every_problem_at_once(cli: Forked) -> None:
    ran = cli("train", "model.vocab_size=-3", "trainer.foo=1", "model.n_group=7", "seed=x")
    ran.assert_refused("4 problems", "model.vocab_size=-3", "trainer.foo=1", "n_group=7", "seed=x")


def test_a_vocabulary_too_small_for_the_data(micro: MicroRuns) -> None:
    ran = micro.train("small_vocabulary", "model.vocab_size=280")
    ran.assert_refused("model.vocab_size=280", "300 ids", "set model.vocab_size=384")


@pytest.mark.framework
def test_training_prints_where_and_what_next(micro: MicroRuns) -> None:
    ran = micro.train("printed", "trainer.max_steps=2", "trainer.log_every_n_steps=2")
    lines = ran.assert_done().out.splitlines()
    folder = str(micro.folder / "printed")
    assert lines[0].split() == ["run", "folder", folder]
    assert f"sample it    deepseek generate {folder}" in lines
    assert sum(line.startswith("step  ") and "/2 loss" in line for line in lines) == 1
    assert ran.err == "" and ESCAPE not in ran.out


def test_a_sample_at_the_end_and_of_a_run_that_is_complete(micro: MicroRuns) -> None:
    words = ["train", "--config", micro.config, "--run-dir", "sampled", "--sample"]
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    for told in ("run folder", "is complete"):
        ran = micro.cli(*words, data, "trainer.max_steps=1").assert_done()
        assert told in ran.out
        text = ran.out.split("sample:\n")[1]
        (row,) = read_run(micro.folder / "sampled").samples  # once, though it was taken twice
        assert (row["step"], row["prompt"]) == (1, "")
        assert row["text"].split() == text.split() != []


def test_a_report_at_the_end_and_of_a_run_that_is_complete(micro: MicroRuns) -> None:
    words = ["train", "--config", micro.config, "--run-dir", "reported", "--report"]
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    ran = micro.cli(*words, data, "trainer.max_steps=1").assert_done()
    page = micro.folder / "reported" / "report.html"
    last = ran.out.splitlines()[-1]
    assert last.startswith(f"report       {page}")
    page.unlink()
    again = micro.cli(*words, data, "trainer.max_steps=1").assert_done()
    assert "is complete" in again.out and page.stat().st_size > 1e6


def test_a_report_that_nothing_can_draw_is_refused_before_the_run(micro: MicroRuns) -> None:
    hide = "import sys\nsys.modules['plotly.offline'] = None"
    words = ["train", "--config", micro.config, "--run-dir", "undrawn", "--report"]
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    micro.cli(*words, data, before=hide).assert_refused("plotly", "pip install plotly")
    assert not (micro.folder / "undrawn").exists()


@pytest.mark.parametrize("module", ["deepseek", "deepseek.cli"])
def test_the_command_as_a_module(module: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", module, "cat", "missing"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2 and "missing" in ran.stderr


@pytest.mark.parametrize(
    ("words", "ours", "idle"),
    [
        ("--help", "__main__ cli commands commands.entry config config.errors console", "yaml"),
        ("validate --config deepseek_v3_671b", "", "numpy rich.markdown deepseek.commands.plan"),
    ],
)
def test_a_command_starts_without_what_it_has_no_use_for(words: str, ours: str, idle: str) -> None:
    """It takes as long to start as its imports take."""
    command = [sys.executable, "-X", "importtime", "-m", "deepseek", *words.split()]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.split("|")[-1].strip() for line in ran.stderr.splitlines()}
    frameworks = {"torch", "lightning", "pytorch_lightning", "nemo", "omegaconf"}
    assert not modules & (frameworks | set(idle.split()))
    taken = {name.partition(".")[2] for name in modules if name.startswith("deepseek.")}
    assert not ours or taken | {"__main__"} == set(ours.split())


def test_dashes_before_a_setting_are_tolerated(micro: MicroRuns) -> None:
    ran = micro.train("dashes", "--trainer.max_steps=1", "--model.micro_batch_size=4")
    assert "4 sequences x 32 = 128 tokens in 1 x 4 per forward pass" in ran.assert_done().out


FRAMEWORK = """
import importlib.metadata as metadata
import os, sys
os.environ["DEEPSEEK_FRAMEWORK"] = "{choice}"
real = metadata.version
metadata.version = lambda name: {versions}.get(name) or real(name)
for name in ("deepseek.frameworks", "deepseek.commands.fit"):
    del sys.modules[name]
"""


@pytest.mark.framework
@pytest.mark.parametrize(
    ("choice", "versions", "parts"),
    [
        ("jax", {}, ["DEEPSEEK_FRAMEWORK=jax: must be auto, nemo or lightning"]),
        ("auto", {"nemo_toolkit": "3.0.0", "lightning": "2.6.6"}, ["installed is 2.6.6", "pip"]),
        ("nemo", {"nemo_toolkit": "3.0.0", "lightning": "2.5.1"}, ["lightning>2.2.1,<=2.4.0"]),
    ],
)
def test_frameworks_that_cannot_train(
    micro: MicroRuns, choice: str, versions: dict[str, str], parts: list[str]
) -> None:
    code = FRAMEWORK.format(choice=choice, versions=versions)
    micro.train("no_framework", before=code).assert_refused(*parts)
    assert micro.cli("ls", before=code).code == 0  # what needs no framework works


# -- ls, cp, cat, validate --


def test_ls_of_configurations(cli: Forked) -> None:
    out = cli("ls").assert_done().out
    for name in shipped_configs():
        assert name in out
    assert "671.03 B" in out or "684" in out


def test_cp(cli: Forked, tmp_path: Path) -> None:
    assert "deepseek validate mine.yaml" in cli("cp", "deepseek_v3_tiny", "mine.yaml", cwd=tmp_path
                                                ).assert_done().out  # fmt: skip
    shipped = cli("cat", "deepseek_v3_tiny").out.splitlines()
    named = ["name: mine" if line.startswith("name: ") else line.rstrip() for line in shipped]
    mine = [line.partition("  #")[0].rstrip() if line.startswith("name: ") else line.rstrip()
            for line in cli("cat", tmp_path / "mine.yaml").out.splitlines()]  # fmt: skip
    assert mine == named
    cli("validate", tmp_path / "mine.yaml").assert_done()
    cli("cp", "deepseek_v3_tiny", tmp_path / "mine.yaml").assert_refused("exists")
    cli("cp", "deepseek_v3_tiny", tmp_path).assert_done()
    assert (tmp_path / "deepseek_v3_tiny.yaml").read_text().startswith("#")
    cli("cp", "deepseek_v3_tini", tmp_path / "x").assert_refused("deepseek_v3_tini")
    cli("cp", "deepseek_v3_tiny", "/proc/x.yaml").assert_refused("cannot write /proc/x.yaml")
    cli("cp", "deepseek_v3_tiny", tmp_path / "no" / "x").assert_refused("cannot write")
    assert not (tmp_path / "x").exists()


def test_cat(cli: Forked, micro: MicroRuns) -> None:
    plain = cli("cat", "deepseek_v3_distributed").assert_done().out
    assert "extends: deepseek_v3_base" in plain and "#" in plain
    resolved = cli("cat", "deepseek_v3_distributed", "--resolved").assert_done().out
    assert "extends" not in resolved and "num_hidden_layers: 24" in resolved
    cli("cat", "nothing").assert_refused("nothing")
    cli("cat", ".").assert_refused("is a folder")
    cli("cat", micro.folder / "data.bin").assert_refused("cannot read", "give a YAML file")
    cli("cat", micro.folder / "data.bin", "--resolved").assert_refused("data.bin")


def test_validate(cli: Forked, micro: MicroRuns) -> None:
    out = cli("validate", micro.config).assert_done().out
    assert "is sound" in out and f"deepseek train --config {micro.config}" in out
    cli("validate", micro.config, "model.n_group=3").assert_refused("model.n_group=3", "1 problem")
    cli("validate", "nothing").assert_refused("nothing")
    assert "671,026,404,352" in cli("validate", "deepseek_v3_671b").assert_done().out


# -- prepare-data --


def test_prepare_data_then_train(micro: MicroRuns, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"abc def {number}\n" * 60)
    words = ["prepare-data", "texts", "--output", "out/p", "--vocab-size", "270", "--workers", "1"]
    ran = micro.cli(*words, cwd=tmp_path).assert_done()
    assert "6 documents" in ran.out
    assert "deepseek train model.data.data_prefix=out/p" in ran.out
    data = "model.data.data_prefix=out/p"
    micro.cli("train", "--config", micro.config, data, "trainer.max_steps=1", cwd=tmp_path
              ).assert_done()  # fmt: skip
    # The same again returns at once; other settings under the same name are refused.
    assert "6 documents" in micro.cli(*words, cwd=tmp_path).assert_done().out
    micro.cli(*[*words[:4], "--vocab-size", "280"], cwd=tmp_path).assert_refused("out/p")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ["nowhere does not exist"]),
        (["text.jsonl", "--vocab-size", "3"], ["vocab_size=3 is too small"]),
        (["text.jsonl", "--workers", "-1"], ["workers=-1"]),
        (["text.jsonl", "--json-key", "body"], ["no key 'body'", "--json-key"]),
        (["text.jsonl", "--tokenizer", "nowhere"], ["tokenizer nowhere does not exist"]),
        (["text.jsonl", "--tokenizer", "text.jsonl"], ["text.jsonl"]),
        (["text.jsonl", "--output", "/proc/x/p"], ["/proc/x"]),
        (["data.bin"], ["data.bin: not UTF-8"]),
    ],
)
def test_prepare_data_refuses(micro: MicroRuns, words: list[str], parts: list[str]) -> None:
    output = [] if "--output" in words else ["--output", "refused"]
    micro.cli("prepare-data", *words, *output).assert_refused(*parts)
    assert not list(micro.folder.glob("refused.bin"))


# -- test --


ONE_CHECK = """
import deepseek.commands.check as t
t.CHECKS[:] = [lambda config: iter([t.Check("arithmetic", "{measured}", "4", {passed})])]
"""


@pytest.mark.parametrize("config", ["deepseek_v3_tiny", "deepseek_v3_671b", "moonlight_16b"])
def test_the_checks_pass(cli: Forked, config: str) -> None:
    cli.preload("transformers.models.deepseek_v3.modeling_deepseek_v3")
    ran = cli("test", "--config", config).assert_done()
    assert re.search(r"\d\d checks passed in", ran.out) and "FAILED" not in ran.out
    assert f"model of {config}" in ran.out and ran.err == ""


def test_a_failed_check_is_exit_code_1(cli: Forked) -> None:
    ran = cli("test", before=ONE_CHECK.format(measured="5", passed=False))
    assert ran.code == 1 and ran.err == ""
    assert "FAILED" in ran.out and "1 of 2 checks failed" in ran.out
    ran = cli("test", before=ONE_CHECK.format(measured="4", passed=True)).assert_done()
    assert "2 checks passed" in ran.out


def test_checks_of_a_broken_configuration(cli: Forked) -> None:
    cli("test", "--config", "nothing").assert_refused("nothing")


# -- colour --

TERMINAL = """
import sys
sys.stdout.isatty = lambda: True
sys.stderr.isatty = lambda: True
import os
os.environ["TERM"] = "{term}"
os.environ.update({more})
"""
COLOUR = re.compile("\x1b\\[[0-9;]*m")


def test_no_escapes_without_a_terminal(micro: MicroRuns) -> None:
    for words in (["ls"], ["ls", "run"], ["validate", "deepseek_v3_tiny"], ["--help"]):
        ran = micro.cli(*words).assert_done()
        assert ESCAPE not in ran.out + ran.err, words
    assert ESCAPE not in micro.cli("nonsense").err


@pytest.mark.framework
def test_a_bar_and_colours_on_a_terminal(micro: MicroRuns) -> None:
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=2"]
    code = TERMINAL.format(term="xterm-256color", more={"FORCE_COLOR": "1"})
    ran = micro.train("bar", *steps, before=code).assert_done()
    assert COLOUR.search(ran.out) and "val loss" in ran.out
    assert "step      3/3" in ran.out and ran.err == ""
    plain = TERMINAL.format(term="xterm-256color", more={"NO_COLOR": "1"})
    ran = micro.train("no_colour", *steps, before=plain).assert_done()
    colours = [code for code in COLOUR.findall(ran.out) if re.search(r"[34]\d", code)]
    assert "step      3/3" in ran.out and colours == []
    dumb = TERMINAL.format(term="dumb", more={})
    ran = micro.train("dumb", *steps, before=dumb).assert_done()
    assert ESCAPE not in ran.out and "step      2/3" in ran.out


@pytest.mark.framework
def test_log_of_the_run_is_json(micro: MicroRuns) -> None:
    lines = (micro.folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["event"] for row in rows if "event" in row][:1] == ["started"]
    assert [row["step"] for row in rows if "event" not in row] == [
        1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]  # fmt: skip
