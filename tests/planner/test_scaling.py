"""Clusters that grow: speed, failures, and the picture of both."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import deepseek
from deepseek.commands.scaling import scaling
from deepseek.config import UserError
from deepseek.config.schema import changed
from deepseek.planner.hardware import gpu_named
from deepseek.planner.scaling_curve import Failures, daly_interval, scaled, young_interval
from support.tiny_runs import small_run

H100 = gpu_named("H100")


def test_intervals() -> None:
    assert young_interval(60, 3600 * 4) == pytest.approx(math.sqrt(2 * 60 * 14400))
    assert daly_interval(1e-9, 1e6) == pytest.approx(young_interval(1e-9, 1e6), rel=1e-4)
    assert daly_interval(100, 10) == 10


def test_the_interval_is_the_best_one_and_the_goodput_what_chance_gives() -> None:
    """Against all other intervals, and against failures drawn at random."""
    failures = Failures(mtbf_hours=2000, write_rate=1e9, restart_seconds=300)
    told = failures.of(1000, 60e9)  # a failure every 2 hours, a minute for a checkpoint
    mean, save, restart = 7200.0, 60.0, 300.0
    assert (told.between_failures, told.save) == (mean, save)

    def share(interval: float) -> float:
        lost = mean * math.exp(restart / mean) * math.expm1((interval + save) / mean)
        return interval / lost

    assert told.share == pytest.approx(share(told.interval))
    assert told.share > max(share(told.interval * factor) for factor in (0.5, 0.7, 1.4, 2)) - 1e-4
    chance = np.random.default_rng(0)
    spent, done, wanted = 0.0, 0, 4000
    while done < wanted:  # from a failure to the next: whole intervals count, the rest is lost
        life = chance.exponential(mean)
        whole = min(wanted - done, int(life // (told.interval + save)))
        done += whole
        spent += life if done < wanted else whole * (told.interval + save)
        if done < wanted:  # a restart may fail as well
            while (again := chance.exponential(mean)) < restart:
                spent += again
            spent += restart
    assert wanted * told.interval / spent == pytest.approx(told.share, rel=0.03)


def test_a_cluster_that_only_fails() -> None:
    assert Failures(mtbf_hours=1).of(10**6, 1e12).share == 0


def test_weak_and_strong() -> None:
    run = changed(small_run(2), {"model.global_batch_size": 16})
    weak = list(scaled(run, H100, math.inf, [2, 4, 8], weak=True))
    strong = list(scaled(run, H100, math.inf, [2, 4, 8], weak=False))
    assert [p.plan.run.model.global_batch_size for p in weak] == [16, 32, 64]
    assert {p.plan.run.model.global_batch_size for p in strong} == {16}
    for points in (weak, strong):
        assert [p.gpus for p in points] == [2, 4, 8]
        assert all(gain >= -1e-9 for p in points for gain in p.gains.values())
    assert strong[-1].plan.estimate.tokens_per_s_per_gpu < (
        strong[0].plan.estimate.tokens_per_s_per_gpu
    )  # each has less to do
    assert strong[-1].tokens_per_second <= weak[-1].tokens_per_second
    assert strong[0].goodput.share > strong[-1].goodput.share


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scaling.svg"
    settings = ["model.global_batch_size=8"]
    scaling("deepseek_v3_tiny", settings, nodes=1, gpus_per_node=2, up_to=5, output=file)
    out = capsys.readouterr().out
    for words in ("weak scaling: the batch grows", "strong scaling: the batch stays 8", "goodput"):
        assert words in out
    drawn = ElementTree.fromstring(file.read_text())
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"2", "4", "GPUs", "with failures", "% of the time in steps that count"} <= set(texts)
    circles = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert len(circles) == 2 * (2 + 3 + 2 + 2)


@pytest.mark.nightly
def test_the_document_says_what_its_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(deepseek.__file__).parent / "docs"
    told, file = (folder / "scaling.md").read_text(), tmp_path / "scaling.svg"
    settings = ["model.global_batch_size=3840"]
    assert f"--nodes 64 {settings[0]} --output" in told
    scaling("deepseek_v3_671b", settings, gpu="H800", nodes=64, output=file)
    assert file.read_text() == (folder / "scaling.svg").read_text()
    rows = re.findall(r"│ ([\d,]+) +│.*?│ +([\d,]+) +│ +(\d+ %) ", capsys.readouterr().out)
    weak, strong = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(weak) == len(strong) == 6 and (weak[0][0], weak[-1][0]) == ("512", "16,384")
    for number in (weak[-1][1], weak[0][1], strong[-1][2]):
        assert number in told, number


def test_what_is_refused() -> None:
    for settings, options, words in (
        ([], {"up_to": 1}, r"--up-to 1: the first cluster has 8 GPUs"),
        (
            ["model.tensor_model_parallel_size=2"],
            {},
            r"tensor_model_parallel_size would be ignored",
        ),
        ([], {"memory": 2.001, "up_to": 8}, r"nothing fits 8 to 8 H100; see deepseek plan"),
    ):
        with pytest.raises(UserError, match=words):
            scaling("deepseek_v3_tiny", settings, nodes=1, gpus_per_node=8, **options)  # type: ignore[arg-type]
