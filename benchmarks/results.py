"""``results.json``: what was measured last, by command and case, each with its conditions.

python benchmarks/results.py    writes its tables into docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from deepseek.commands.entry import guarded
from deepseek.config.errors import UserError
from deepseek.planner.cpu import machine_name

RESULTS = Path(__file__).with_name("results.json")
GUIDE = Path(__file__).parents[1] / "training/nemo/deepseek/docs/performance.md"
CPU = "train_step cpu"
NOTICED_GIB = 0.05
"""Less is told as nothing: processes that do the same differ by as much."""


def whole(text: str) -> int:
    """A number of rounds or threads, of an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return number


def results_file(text: str) -> Path:
    """The file of an argument, in which ``keep`` can keep: asked before half an hour of measuring,
    not behind it."""
    file = Path(text)
    try:
        if file.exists():
            read(file)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{file.parent}: no folder that can be written to")
    return file


def read(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What ``keep`` has kept.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; remove it") from None
    commands = list(kept.values()) if isinstance(kept, dict) else [None]
    if not all(isinstance(cases, dict) for cases in commands) or not all(
        isinstance(found, dict) for cases in commands for found in cases.values()
    ):
        raise UserError(f"{file} holds no results: remove it")
    return kept


def conditions(device: str = "cpu") -> dict[str, Any]:
    """When and where, and what else the machine has to do."""
    name = torch.cuda.get_device_name() if device == "cuda" else machine_name()
    return {
        "date": date.today().isoformat(),
        "machine": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def keep(file: Path, command: str, case: str, found: dict[str, Any]) -> None:
    """Replace what was found of a case by a command; of others what is there stays.

    Args:
        found: with its ``conditions``; if these are the same but for the load, it adds to what is
            there, and its mappings to those.
    """
    kept = read(file) if file.exists() else {}
    # What was measured last stands last: tables have the order of a whole run.
    before = kept.setdefault(command, {}).pop(case, {})
    if all(before.get(name) == found[name] for name in ("date", "machine", "threads", "torch")):
        both = {name for name, value in found.items() if isinstance(value, dict)} & set(before)
        found = before | found | {name: before[name] | found[name] for name in both}
    kept[command][case] = found
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(kept, indent=1) + "\n")
    aside.replace(file)


# -- tables --

Kept = Mapping[str, Mapping[str, Mapping[str, Any]]]


def written(text: str, kept: Kept) -> str:
    """The guide with each table as ``kept`` has it; of a command that did not run, as it is.

    Raises:
        UserError: a command has kept something else, as another version of it does.
    """

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if COMMANDS[name] not in kept:
            return found[0]
        try:
            rows, where = list(TABLES[name](kept)), told(kept[COMMANDS[name]].values())
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"what {COMMANDS[name]} has kept gives no table of {name} ({error!r}): another "
                "version of it has measured that; measure anew, or remove the results"
            ) from None
        return "\n".join([f"<!-- table: {name} -->", *rows, "", where, "<!-- end -->"])

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def told(cases: Iterable[Mapping[str, Any]]) -> str:
    """Conditions of all that a table tells."""
    cases = list(cases)
    each = [sorted({str(c[name]) for c in cases}) for name in ("machine", "threads", "date")]
    machine, threads, days = (" and ".join(names) for names in each)
    loads = [case["load"] for case in cases]
    load = f"load average of the minute before {min(loads):.1f} to {max(loads):.1f}"
    return f"({machine}; threads: {threads}; fp32; {load}; {days})"


def line(*cells: Any) -> str:
    """Of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    """Its first two."""
    return [line(*cells), "|" + "---|" * len(cells)]


def training(kept: Kept) -> Iterable[str]:
    """Steps beside each peer."""
    yield from head(
        "model", "beside", "tokens/s, ours / theirs", "times as fast", "GiB besides states"
    )
    for name, case in kept[CPU].items():
        for row in case["rows"]:
            if "besides" in row and row["dtype"] == "float32":
                gib = f"{row['ours_besides_gib']:.2f} / {row['theirs_besides_gib']:.2f}"
                speed = f"{row['ours_tok_s']:,.0f} / {row['theirs_tok_s']:,.0f}"
                yield line(name, row["peer"], speed, f"{row['times_faster']:.2f}", gib)


def experts(kept: Kept) -> Iterable[str]:
    """Speed of a group's other cases over that of its first."""
    yield from head("model", "in the run beside", "ours", "theirs")
    for name, case in kept[CPU].items():
        for row in case["rows"]:
            if "ours_of_first" in row:
                speeds = f"{row['ours_of_first']:.2f}", f"{row['theirs_of_first']:.2f}"
                yield line(name, row["peer"], *speeds)


def decoding(kept: Kept) -> Iterable[str]:
    """Tokens a second of all sequences."""
    yield from head("context and batch", "tokens/s, ours / theirs", "times as fast")
    for name, case in kept[CPU].items():
        for row in case["rows"]:
            if "besides" not in row:
                speed = f"{row['ours_tok_s']:,.0f} / {row['theirs_tok_s']:,.0f}"
                yield line(name.removeprefix("decode, "), speed, f"{row['times_faster']:.1f}")


def breakdown(kept: Kept) -> Iterable[str]:
    """Share of a step, of what the machine can, and of its library's products."""
    apart = {name: case["breakdown"] for name, case in kept[CPU].items() if "breakdown" in case}
    yield from head("share of a step, of its limit, of own shapes", *apart)
    for component in next(iter(apart.values())):
        yield line(component, *(_share(parts[component]) for parts in apart.values()))


def _share(row: Mapping[str, float | None]) -> str:
    limits = (row.get(name) for name in ("of_limit", "of_own"))
    return ", ".join([f"{row['share']:.0%}", *(f"{x:.2f}" for x in limits if x is not None)])


def ablations(kept: Kept) -> Iterable[str]:
    """Times as long without, and memory."""
    cases = kept["ablations"]
    parts = {
        name: [case.get(p, {}) for p in ("steps", "processes")] for name, case in cases.items()
    }
    yield from head("without", *cases)
    rows = [part for both in parts.values() for part in both]
    for name in dict.fromkeys(name for part in rows for name in part):
        beside = next(part[name]["beside"] for part in rows if name in part)
        what = name + (f" (both without {', '.join(beside)})" if beside else "")
        yield line(what, *(_cell([part.get(name, {}) for part in both]) for both in parts.values()))


def _cell(parts: list[Mapping[str, float]]) -> str:
    found = parts[0] | parts[1]  # what is timed in one process has no times in its own
    said = [f"{found['times']:.2f} ({found['cpu_times']:.2f})"] if "times" in found else []
    if "gib" in found and abs(more := found["gib"] - found["with_gib"]) >= NOTICED_GIB:
        said += [f"{more:+.2f} GiB"]
    return ", ".join(said)


def recompute(kept: Kept) -> Iterable[str]:
    """Time and memory of each policy."""
    yield from head("case", "granularity", "seconds of a step", "times as long", "GiB")
    for name, case in kept["recompute"].items():
        for policy, row in case["policies"].items():
            numbers = f"{row['seconds']:.2f}", f"{row['times']:.2f}", f"{row['gib']:.2f}"
            yield line(name, f"`{policy}`", *numbers)


TABLES: dict[str, Callable[[Kept], Iterable[str]]] = {
    table.__name__: table
    for table in (training, experts, decoding, breakdown, ablations, recompute)
}
COMMANDS = dict.fromkeys(TABLES, CPU) | {name: name for name in ("ablations", "recompute")}


def main() -> None:
    """Write the tables."""
    if not RESULTS.exists():
        raise UserError(f"{RESULTS}: nothing has been measured; run benchmarks/train_step.py first")
    GUIDE.write_text(written(GUIDE.read_text(), read(RESULTS)))


if __name__ == "__main__":
    guarded(main)
