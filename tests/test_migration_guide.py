"""The migration guide's own files and commands are run, and print what it says."""

from __future__ import annotations

import ast
import re
import shlex

import pytest

from support.forked import FORK_WORKERS, SOURCE
from support.micro_runs import MicroRuns, documents

PACKAGE = SOURCE / "deepseek"
GUIDE = PACKAGE / "docs" / "nemo_migration_guide.md"


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
def results(
    micro: MicroRuns, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, list[str], int, str]]:
    folder = tmp_path_factory.mktemp("guide")
    for name, text in files().items():
        (folder / name).write_text(text)
    # Not the guides, as readers are told: with each word in them other routers stand at a near tie,
    # and one that falls the other way is more than the limits of losses.
    (folder / "texts").mkdir()
    for number, text in enumerate(documents(400)):
        (folder / "texts" / f"{number}.md").write_text(text)
    micro.cli.preload("transformers.models.deepseek_v3.modeling_deepseek_v3")
    listed = [*commands(), ("python check.py logits fsdp2/step_21.pt again", [])]  # another step's
    results = []
    for command, expected in listed:
        program, *words = shlex.split(command)
        if program == "torchrun":  # at a port that is free
            words = ["--standalone", "--monitor-interval", "0.1", *words]
        env = {"COLUMNS": "250"}
        started = micro.cli.start(*words, cwd=folder, program=program, before=FORK_WORKERS, env=env)
        ran = started.wait()
        results.append((command, expected, ran.code, ran.out + ran.err))
    return results


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
