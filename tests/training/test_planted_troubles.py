"""Troubles planted in real runs are named in the log, on the terminal and in the report: the kind,
the layer or rank, the numbers and what to do."""

import html
from typing import Any

import pytest

from deepseek.commands.report import report
from deepseek.monitoring.record.alarms import SETTLING_RECORDS, STRAGGLER_RECORDS
from deepseek.monitoring.run_log import read_run
from support.forked import FORK_WORKERS, Ran
from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework

PLANTED = """
import torch
from deepseek.models.components.router import Router
from deepseek.training.step import DeepSeekModel
from deepseek.monitoring.record import alarms

alarms.CREEP_RECORDS = 4  # ten blocks of 4 records instead of 50
kept, choose, train = [], Router.choose, DeepSeekModel.training_step

def chosen(self, scores_TE):
    ids_TK = choose(self, scores_TE)
    if getattr(self, "collapsed", False):  # the same experts for every token
        ids_TK = torch.arange(self.top_k).expand_as(ids_TK).contiguous()
    return ids_TK

def planted(self, batch, index):
    step = self.finished_steps + 1
    if step == 3:
        self.model.routers()["mtp.0.block"].collapsed = True
    if step == 12:  # a number overflows somewhere
        handle = self.model.head.weight.register_hook(lambda grad: grad * float("inf"))
    if step == 36:
        self.model.head.weight.data *= 30
    train(self, batch, index)
    if step == 12:
        handle.remove()
    if step == 36:
        self.model.head.weight.data /= 30
    kept.append(torch.ones(2 * 2**20))  # 8 MiB that nobody lets go

Router.choose, DeepSeekModel.training_step = chosen, planted
"""
SLOW = (
    FORK_WORKERS
    + """
import os, time
from deepseek.models.components.moe import MoE
forward = MoE.forward

def slow(self, *args):
    if os.environ.get("RANK") == "1":
        time.sleep(0.04)
    return forward(self, *args)

MoE.forward = slow
"""
)


@pytest.fixture(scope="module")
def planted(micro: MicroRuns) -> tuple[Ran, dict[str, dict[str, Any]]]:
    ran = micro.train(
        "planted", "trainer.max_steps=40", "trainer.val_check_interval=0",
        "model.optim.lr=1e-4", before=PLANTED,
    ).assert_done()  # fmt: skip
    return ran, alarms(micro, "planted")


def alarms(micro: MicroRuns, name: str) -> dict[str, dict[str, Any]]:
    """By kind; of a kind there is one."""
    found = read_run(micro.folder / name).alarms()
    kinds = {alarm["kind"]: alarm for alarm in found}
    assert len(kinds) == len(found), found
    return kinds


def test_each_trouble_is_told_once_where_and_when_it_is(
    planted: tuple[Ran, dict[str, dict[str, Any]]],
) -> None:
    _, found = planted
    assert {kind: alarm["step"] for kind, alarm in found.items()} == {
        "router_collapse": 2 + SETTLING_RECORDS,
        "non_finite": 12,
        "dead_experts": 2 + SETTLING_RECORDS,
        "loss_spike": 36,
        "memory_creep": 40,
    }
    assert found["router_collapse"]["layer"] == "mtp.0.block"
    assert (
        "mtp.0.block uses 2.0 of 8 experts: experts 0, 1 take 100%"
        in (found["router_collapse"]["message"])
    )
    assert found["dead_experts"]["layer"] == "mtp.0.block"
    assert found["dead_experts"]["experts"] == [2, 3, 4, 5, 6, 7]
    assert found["dead_experts"]["since"] == 3
    assert "no weight was changed" in found["non_finite"]["message"]
    spike = found["loss_spike"]
    assert spike["loss"] > 2 * spike["median"] > 0
    creep = found["memory_creep"]
    assert creep["rank"] == 0
    assert 4 * 2**20 < creep["bytes_per_record"] < 16 * 2**20


def test_terminal_and_report_say_the_same(
    micro: MicroRuns, planted: tuple[Ran, dict[str, dict[str, Any]]]
) -> None:
    ran, found = planted
    page = report([micro.folder / "planted"], micro.folder / "planted.html").read_text()
    for kind, alarm in found.items():
        assert f"ALARM        step {alarm['step']}, {kind}: {alarm['message']}" in ran.out
        assert alarm["remedy"] in ran.out
        for words in (alarm["message"], alarm["remedy"]):
            assert html.escape(words) in page


def test_a_slow_rank_is_named(micro: MicroRuns) -> None:
    micro.train(
        "slow", "trainer.max_steps=24", "trainer.val_check_interval=0", "trainer.devices=2",
        "model.expert_model_parallel_size=2", before=SLOW,
    ).assert_done()  # fmt: skip
    straggler = alarms(micro, "slow")["straggler"]
    assert straggler["rank"] == 1 and straggler["ratio"] > 1.25
    assert straggler["step"] >= STRAGGLER_RECORDS
    assert straggler["message"].startswith("rank 1 computes ")
