"""This machine's CPU as a cluster: what ``deepseek calibrate`` measured, for the model of time.

A process that has the machine alone computes with all cores, several with a share each, and they
share memory and caches. So each number of processes has measurements of its own.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from deepseek.config.activations import tokens_of_part
from deepseek.config.errors import UserError
from deepseek.config.layout import Layout, rank_stages
from deepseek.config.memory import gathered_bytes, largest_unit, reshards
from deepseek.config.processor import cores, processor
from deepseek.config.rank_need import rank_needs
from deepseek.config.schema import RunConfig
from deepseek.config.shared_memory import HALVES, region_bytes
from deepseek.planner.cpu_time import NUMBER, Links, Outside, Share, Work
from deepseek.planner.hardware import Device

FORMAT = 2
"""Of the file; another one is refused."""
DISTURBED = 0.15
"""Share of the machine that other work may take while it is measured."""
ALL = 1 << 20
"""More ranks than a machine has: all of them are near."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Of a CPU, that decide how fast products are: rented machines hide the model behind one name."""


@dataclass(frozen=True)
class Crew:
    """What was measured of so many processes at once."""

    processes: int
    threads: int
    """Of each."""
    resident: float
    """Bytes of a process before it has a model."""
    forward: Work
    """Seconds of a process that has its core; more processes than cores take turns."""
    backward: Work
    outside: Outside
    links: tuple[Links, ...]


@dataclass(frozen=True)
class CpuMachine:
    """A calibration."""

    name: str
    """Of the machine, by which it is known again."""
    cores: int
    memory: float
    """Bytes of the machine."""
    disturbed: float
    """Share of the machine that other programs took meanwhile."""
    crews: tuple[Crew, ...]

    def crew(self, processes: int) -> Crew:
        """The one that is most like so many processes."""
        return min(self.crews, key=lambda crew: abs(math.log(crew.processes / processes)))

    def device(self, processes: int) -> Device:
        """What each of so many processes has."""
        crew = self.crew(processes)
        share = Share(
            processes,
            self.cores,
            crew.resident,
            crew.forward,
            crew.backward,
            crew.outside,
            crew.links,
        )
        rate = 1 / crew.forward.flop
        return Device(
            "CPU",
            bf16=rate,
            fp8=rate,
            memory=self.memory / processes,
            hbm=NUMBER / crew.forward.number,
            nvlink=1 / crew.links[0].shared_byte,
            domain=ALL,
            network=1 / crew.links[0].shared_byte,
            price=None,
            source=self.name,
            price_note="",
            cpu=share,
        )


def resident_bytes(run: RunConfig, device: Device) -> int:
    """Of the fullest process of a run: what is in RAM at most, shared pages in each that has them.

    As ``train`` logs it, which is the kernel's own high-water mark.

    Args:
        run: with sound sizes.
        device: a share of a CPU, or a GPU: then of its memory.
    """
    needs = rank_needs(run)
    most = max(need.total for need in needs)
    if device.cpu is None:
        return most
    return round(device.cpu.resident + most + flat_bytes(run) + exchange_bytes(run))


def flat_bytes(run: RunConfig) -> int:
    """What FSDP has besides weights and gradients: each in one flat tensor, that is exchanged.

    Three times the weights of a unit: gathered, and its gradient on the way, of which a rank
    touches all that is its own, reads its part of the others' and keeps that part of the sum. Ranks
    that share memory have it for every unit, as long as they run; one rank alone, for one unit at a
    time.
    """
    model, layout = run.model, Layout.of_run(run)
    if layout.world_size == 1:
        return 0
    numbers = gathered_bytes(model, layout)
    if reshards(model, layout) or layout.pp > 1 and layout.dp_shard == 1:
        numbers //= max(1, model.num_hidden_layers // layout.pp)
    return 3 * numbers


def exchange_bytes(run: RunConfig) -> int:
    """What a process touches of the memory that its groups exchange through, with balanced experts.

    A page is in RAM of a process once it has written or read it: of both halves, what it writes
    itself and what is for it from each other rank. All of a group together take no more than their
    regions, ``GROUP_BYTES``.
    """
    model, layout = run.model, Layout.of_run(run)
    tokens, tp, cp, ep = tokens_of_part(model, layout), layout.tp, layout.cp, layout.ep
    choices = tokens // tp * model.num_experts_per_tok
    rows = _touched(NUMBER * choices * (model.hidden_size + 1), ep, regions=2)
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    widest = max(model.hidden_size, model.q_lora_rank or 0, latent)
    sequence = _touched(NUMBER * tokens * widest, tp, regions=tp)
    latents = _touched(NUMBER * tokens * cp * latent, cp, regions=cp)
    units = 0
    if layout.dp_shard > 1 and reshards(model, layout):
        largest = max(
            largest_unit(model, layout, rank_stages(model, pp)) for pp in range(layout.pp)
        )
        units = _touched(NUMBER * largest, layout.dp_shard, regions=layout.dp_shard)
    # Where all data shards have parts of the same sequences, they are one group.
    data = max(latents, units) if cp == layout.dp_shard else latents + units
    return rows + sequence + data


def _touched(whole: int, ranks: int, regions: int) -> int:
    """Of an exchange of so many bytes, of all ranks together.

    Args:
        regions: that one rank uses some of, at most.
    """
    return HALVES * min(2 * whole * (ranks - 1) // ranks, regions * region_bytes(ranks))


def machine_name() -> str:
    """This machine, by what a calibration depends on."""
    found = processor()
    flags = (found.get("flags") or found.get("Features") or "").split()
    model = found.get("model name") or platform.processor() or platform.machine()
    known = [flag for flag in FEATURES if flag in flags]
    return ", ".join([" ".join([model, *known]), f"{cores()} cores", f"torch {_torch()}"])


def _torch() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def read_machine(file: Path) -> CpuMachine:
    """A calibration.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, not {FORMAT}")
        machine: CpuMachine = _of(CpuMachine, tree)
        if not machine.crews or not all(crew.links for crew in machine.crews):
            raise ValueError("nothing was measured")
        return machine
    except OSError as error:
        raise UserError(
            f"--gpu {file}: cannot be read: {error.strerror}; make it with `deepseek calibrate` "
            "(--output FILE: elsewhere than for --gpu cpu)"
        ) from None
    except KeyError as error:
        raise UserError(f"--gpu {file}: is no calibration (no {error}); {_AGAIN}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--gpu {file}: is no calibration ({error}); {_AGAIN}") from None


_AGAIN = "make one with `deepseek calibrate --output FILE`"


def machine_text(machine: CpuMachine) -> str:
    """The file's content."""
    return json.dumps({"format": FORMAT, **_tree(machine)}, indent=1) + "\n"


def crew_of(tree: Mapping[str, Any]) -> Crew:
    """The first of a file's content."""
    crew: Crew = _of(CpuMachine, tree).crews[0]
    return crew


_PARTS: dict[str, type[Any]] = {
    "crews": Crew,
    "forward": Work,
    "backward": Work,
    "outside": Outside,
    "links": Links,
}
"""What keys of the file hold that are no numbers; of ``crews`` and ``links`` there are several."""


def _tree(value: Any) -> Any:
    if isinstance(value, Work):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: _tree(getattr(value, field.name)) for field in fields(value)}
    return [_tree(part) for part in value] if isinstance(value, tuple) else value


def _of(kind: type[Any], tree: Mapping[str, Any]) -> Any:
    names = Work._fields if kind is Work else [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for name in names:
        value = tree[name]
        if part := _PARTS.get(name):
            several = isinstance(value, list)
            values[name] = tuple(_of(part, v) for v in value) if several else _of(part, value)
        elif name == "name":
            values[name] = str(value)
        else:
            values[name] = _number(name, value)
    return kind(**values)


def _number(name: str, value: object) -> float:
    """Above 0: whatever is measured takes something, or is there."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (0 < number < math.inf or name == "disturbed" and number == 0):
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return number
