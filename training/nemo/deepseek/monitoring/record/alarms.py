"""Alarms: what the detectors find is said once and stands in the log."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from deepseek.console import say
from deepseek.frameworks import Callback
from deepseek.monitoring.record.detectors import Alarm, Seen, detectors
from deepseek.monitoring.record.expert_monitor import ExpertMonitor
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.rank_monitor import RankMonitor

MOST_SHOWN = 3
"""Alarms of one kind that are shown of one step; the log has all."""


class Alarms(Callback):
    """Shows every step to the detectors. On rank 0, after the monitors and the log.

    Args:
        log: where the events go.
        experts: its newest record is looked at; None: there is none.
        ranks: the same.
    """

    def __init__(
        self, log: MetricsLog, experts: ExpertMonitor | None, ranks: RankMonitor | None
    ) -> None:
        self._log = log
        self._experts, self._ranks = experts, ranks
        self._detectors = detectors()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Look at the step that has ended."""
        begin = time.perf_counter()
        metrics = pl_module.step_metrics
        experts = self._experts.latest if self._experts else None
        ranks = self._ranks.latest if self._ranks else None
        seen = Seen(
            metrics.step,
            metrics.loss,
            metrics.grad_norm,
            metrics.skipped,
            experts if experts and experts.step == metrics.step else None,
            ranks if ranks and ranks.step == metrics.step else None,
        )
        alarms = [alarm for detector in self._detectors for alarm in detector.look(seen)]
        for alarm in alarms:
            told = {"kind": alarm.kind, "message": alarm.message, "remedy": alarm.remedy}
            self._log.event("alarm", metrics.step, **told, **alarm.numbers)
        for line in shown(metrics.step, alarms):
            say(line)
        self._log.add_cost(time.perf_counter() - begin)


def shown(step: int, alarms: list[Alarm]) -> list[str]:
    """Lines for people, a few of each kind."""
    lines: list[str] = []
    count: Counter[str] = Counter()
    for alarm in alarms:
        count[alarm.kind] += 1
        if count[alarm.kind] <= MOST_SHOWN:
            lines.append(f"ALARM        step {step}, {alarm.kind}: {alarm.message}")
            lines.append(f"             {alarm.remedy}")
    for kind, number in count.items():
        if number > MOST_SHOWN:
            lines.append(f"ALARM        step {step}, {kind}: {number - MOST_SHOWN} more in the log")
    return lines
