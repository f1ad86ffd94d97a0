"""This machine's CPU as a cluster: what ``deepseek calibrate`` measured, for the model of time.

A process that has the machine alone computes with all cores, several with a share each; so there
are two measurements, and the number of processes tells which one holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.planner.hardware import Device, Efficiency

FORMAT = 1
"""Of the file; another one is refused."""
ALL = 1 << 20
"""More ranks than a machine has: all of them are near."""


@dataclass(frozen=True)
class Speed:
    """Of one process."""

    products: float
    """FLOP/s of large fp32 products."""
    memory: float
    """Bytes/s of reading and writing."""
    attention: float
    """FLOP/s of attention's products, the mask's half not counted, in that of ``products``."""
    glue: float
    """Time between products, in that which DeepSeek's traffic would take this memory."""
    host: float
    """Seconds of a block, forward and backward, whatever its size."""
    update: float
    """Seconds of clipping and the optimiser for one number."""
    step: float
    """Seconds of a step whatever its size."""


@dataclass(frozen=True)
class Links:
    """Between processes of the machine, all at once."""

    gloo: float
    """Bytes/s that one sends."""
    gloo_message: float
    """Seconds of a message that carries nothing."""
    shared_memory: float
    """Bytes/s of collectives through memory that they share."""
    shared_message: float
    """Seconds of such a collective that carries nothing."""


@dataclass(frozen=True)
class CpuMachine:
    """A calibration."""

    name: str
    cores: int
    memory: float
    """Bytes of the machine."""
    process: float
    """Bytes of a process before it has a model."""
    alone: Speed
    """With all cores."""
    together: Speed
    """With one thread each, one process a core."""
    links: Links

    def device(self, processes: int) -> Device:
        """What each of so many processes has."""
        speed = self.alone if processes == 1 else self.together
        links = self.links
        return Device(
            "CPU",
            bf16=speed.products,
            fp8=speed.products,
            memory=self.memory / processes,
            hbm=speed.memory,
            nvlink=links.gloo,
            domain=ALL,
            network=links.gloo,
            price=None,
            source=self.name,
            price_note="",
            product_share=1.0,
            attention_share=speed.attention,
            attention_back_share=speed.attention,
            fp32=speed.products,
            exchange_start=3 * links.gloo_message,
            message=links.shared_message,
            shared_memory=links.shared_memory,
            update=speed.update,
            step=speed.step,
            cores=self.cores,
            process=self.process,
            efficiency=Efficiency(1.0, 1.0, speed.glue, 0.0, 1.0, speed.host),
        )


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_machine(file: Path) -> CpuMachine:
    """A calibration.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, not {FORMAT}")
        parts = {name: _of(kind, tree[name]) for name, kind in _PARTS.items()}
        memory, process = (float(tree[key]) for key in ("memory", "process"))
        return CpuMachine(str(tree["name"]), int(tree["cores"]), memory, process, **parts)
    except OSError as error:
        raise UserError(
            f"--gpu {file}: cannot be read: {error.strerror}; make it with `deepseek calibrate` "
            "(--output FILE: elsewhere than for --gpu cpu)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--gpu {file}: is no calibration ({type(error).__name__}: {error}); make one with "
            "`deepseek calibrate --output FILE`"
        ) from None


def machine_text(machine: CpuMachine) -> str:
    """The file's content."""
    return json.dumps({"format": FORMAT, **asdict(machine)}, indent=1) + "\n"


_PARTS = {"alone": Speed, "together": Speed, "links": Links}


def _of(kind: type[Any], tree: Mapping[str, object]) -> Any:
    values = {field.name: float(tree[field.name]) for field in fields(kind)}  # type: ignore[arg-type]
    if not all(0 <= value < float("inf") for value in values.values()):
        raise ValueError(f"a negative or infinite number in {values}")
    return kind(**values)
