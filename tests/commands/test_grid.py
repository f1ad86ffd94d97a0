"""``deepseek sweep``: the grid, what is skipped, what failure and signals do, the comparison."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepseek.commands.sweep import grid, sweep
from deepseek.config import ConfigError, UserError
from support.forked import FORK_WORKERS
from support.micro_runs import MicroRuns


def names(*words: str) -> list[str]:
    return [point.name for point in grid("deepseek_v3_tiny", words, Path("x"))]


def test_the_last_axis_turns_fastest_and_single_values_are_settings_of_all() -> None:
    words = ("model.optim.lr=1e-3,2e-3", "trainer.max_steps=7", "seed=1,2")
    points = grid("deepseek_v3_tiny", words, Path("x"))
    assert [point.name for point in points] == [
        "lr=1e-3,seed=1", "lr=1e-3,seed=2", "lr=2e-3,seed=1", "lr=2e-3,seed=2",
    ]  # fmt: skip
    assert [point.config.model.optim.lr for point in points] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert {point.config.trainer.max_steps for point in points} == {7}
    assert points[0].folder == Path("x/lr=1e-3,seed=1")


def test_commas_inside_brackets_and_quotes_divide_nothing() -> None:
    assert names("model.optim.betas=[0.9,0.95],[0.9,0.99]", "name='x,y'") == [
        "betas=_0.9_0.95_",
        "betas=_0.9_0.99_",
    ]


def test_names_that_end_alike_are_told_whole() -> None:
    assert names("model.vocab_size=4096,4100", "model.tokenizer.vocab_size=4096,4000")[0] == (
        "model.vocab_size=4096,model.tokenizer.vocab_size=4096"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "needs a setting with several values"),
        (["seed=1,"], "a value is missing beside a comma"),
        (["seed=1,1"], "two runs of the grid are the same"),
        (["seed=" + ",".join(map(str, range(10_100)))], "10,100 runs"),
    ],
)  # fmt: skip
def test_grids_that_make_no_sense(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid("deepseek_v3_tiny", words, Path("x"))


def test_every_point_is_checked_before_the_first_runs() -> None:
    with pytest.raises(ConfigError, match=r"run num_experts_per_tok=400 of the sweep"):
        grid("deepseek_v3_tiny", ["model.num_experts_per_tok=4,400"], Path("x"))


def test_a_run_outside_the_grid() -> None:
    with pytest.raises(UserError, match="the grid has runs 0 to 1"):
        sweep("deepseek_v3_tiny", ["seed=1,2"], Path("x"), only=2)


def test_a_sweep_runs_skips_what_is_done_and_compares(micro: MicroRuns) -> None:
    words = ("trainer.max_steps=2", "trainer.val_check_interval=2", "model.optim.lr=1e-3,3e-3")
    command = ("sweep", "--config", str(micro.config), "--output", "grid", *words,
               f"model.data.data_prefix={micro.folder / 'data'}")  # fmt: skip
    first = micro.cli(*command, before=FORK_WORKERS)
    assert first.code == 0, first.err
    assert re.search(r"lr=.e-3  <- best", first.out)
    assert (micro.folder / "grid" / "sweep.html").is_file()
    again = micro.cli(*command, before=FORK_WORKERS)
    assert again.code == 0, again.err
    assert again.out.count("is complete") == 2
    others = [*command, "model.optim.weight_decay=0.3"]  # which the folders' names do not tell
    refused = micro.cli(*others, before=FORK_WORKERS)
    assert (
        refused.code == 2
        and "was trained with other settings: model.optim.weight_decay 0.1 -> 0.3;" in refused.err
    )
    taken = micro.cli(*others, "--resume-with-changes", before=FORK_WORKERS)
    assert taken.code == 0 and taken.out.count("is complete") == 2
    longer = [*others, "trainer.max_steps=3", "--resume-with-changes"]
    went_on = micro.cli(*longer, before=FORK_WORKERS)
    assert went_on.code == 0, went_on.err
    assert went_on.out.count("weight_decay 0.1 -> 0.3") == 2


def test_a_failing_run_does_not_stop_the_others(micro: MicroRuns) -> None:
    (micro.folder / "half").mkdir()
    (micro.folder / "half" / "seed=1").write_text("no folder")
    ran = micro.cli(
        "sweep", "--config", micro.config, "--output", "half", "trainer.max_steps=1", "seed=1,2",
        f"model.data.data_prefix={micro.folder / 'data'}", before=FORK_WORKERS,
    )  # fmt: skip
    assert ran.code == 1
    assert "failed       seed=1" in ran.out
    assert "cannot make the run folder" in ran.err
    assert re.search(r"seed=2  <- best", ran.out)


def test_the_job_array_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep.sh"
    sweep("deepseek_v3_tiny", ["seed=1,2,3"], Path("runs of mine"), slurm=file)
    text = file.read_text()
    assert "#SBATCH --array=0-2" in text and "--resume-with-changes" not in text
    assert "--output 'runs of mine' --only $SLURM_ARRAY_TASK_ID" in text
    with pytest.raises(UserError, match="exists"):
        sweep("deepseek_v3_tiny", ["seed=1,2,3"], slurm=file)
    with pytest.raises(UserError, match="one node each"):
        sweep("deepseek_v3_32gpu", ["seed=1,2"], slurm=tmp_path / "x.sh")
