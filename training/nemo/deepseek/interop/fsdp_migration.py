"""A checkpoint of a PyTorch FSDP run to one of ours: weights and AdamW's state, tensor by tensor.

``plan_migration`` accounts for every tensor before a number is read: used, dropped by a rule, or
the reason for an error. ``write_migration`` goes by the plan, with one tensor of theirs in memory
at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint.shards import ChunkFile, files_of, write_checkpoint, write_chunks
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.files import Staging, has_size
from deepseek.interop.fsdp_names import NameTable, Slice, clean
from deepseek.interop.fsdp_source import Source
from deepseek.interop.huggingface import is_bias, listing, our_shapes

MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = re.compile(
    r"(?:(?P<root>.*?)\.)?state\.(?P<name>.+)\."
    r"(?P<leaf>exp_avg|exp_avg_sq|max_exp_avg_sq|step|momentum_buffer|square_avg|sum|exp_inf)"
)
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_STEP_NAMES = ("step", "global_step", "steps", "iteration", "train_step", "num_steps")
_COPIES = "copies of other tensors"
_UNNEEDED = "not needed, by the table"
_OLD_RUN = "state of the old run (data, random numbers, counters)"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """What a tensor or object of theirs becomes."""

    kind: str
    """``weight``, ``exp_avg``, ``exp_avg_sq``, or ``count`` (updates of a parameter)."""
    parts: tuple[Slice, ...]
    """Of ours, one after the other along the rows."""
    copy: bool = False
    """Repeats another tensor of theirs, and is not read."""


@dataclass(frozen=True)
class Migration:
    """What becomes of every tensor of a source."""

    source: Source
    shapes: Mapping[str, Shape]
    """Of our weights."""
    uses: Mapping[str, Use]
    """By their names; what is neither here nor dropped does not exist."""
    counts: Mapping[str, float]
    """Updates of each parameter of ours; empty without optimiser state."""
    idle: tuple[Slice, ...]
    """Experts without optimiser state, which are zeros in a stack of ours."""
    copies: Mapping[str, tuple[str, str]]
    """Weights that must equal another one of theirs: that one, and what to say if they do not."""
    dropped: Mapping[str, list[str]]
    """Tensors and objects that are not in the result, by reason."""
    notes: tuple[str, ...]

    def read_as(self, *kinds: str) -> dict[str, tuple[Slice, ...]]:
        """The tensors that are read as one of ``kinds``, and what they hold of ours."""
        return {
            key: use.parts
            for kind in kinds
            for key, use in self.uses.items()
            if use.kind == kind and not use.copy
        }

    @property
    def result_shapes(self) -> dict[str, Shape]:
        """Every tensor that is written."""
        out = {f"model.{name}": shape for name, shape in self.shapes.items()}
        for name in self.counts:
            out |= {f"optim.{name}.{kind}": self.shapes[name] for kind in MOMENTS}
            out[f"optim.{name}.step"] = ()
        return out

    @property
    def result_bytes(self) -> int:
        """About how much is written."""
        numbers = sum(torch.Size(shape).numel() for shape in self.result_shapes.values())
        return 4 * numbers + 2048 * len(self.uses)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(self.source.tensors[key].nbytes for key in self.read_as("weight", *MOMENTS))

    def counter(self) -> str | None:
        """The name under which the steps of the run are stored."""
        numbers = [
            n for n, value in self.source.objects.items() if type(value) is int and value >= 0
        ]
        tensors = [n for n, spec in self.source.tensors.items() if spec.shape in ((), (1,))]
        for names in (numbers, tensors):
            named = [n for n in names if n.rsplit(".", 1)[-1] in _STEP_NAMES]
            found = sorted((n for n in named if not _STATE.fullmatch(n)), key=len)
            if found:
                return found[0]
        return None

    def step(self) -> tuple[int, str] | None:
        """Optimiser steps done, and where that stands; None if nothing tells."""
        counter = self.counter()
        if counter is not None:
            value = self.source.objects.get(counter)
            if value is None:
                value = self.source.read([counter])[counter].item()
            return int(value), f"stored as `{counter}`"
        if self.counts:
            return int(max(self.counts.values())), "updates the optimiser made"
        return None


def plan_migration(
    source: Source, cfg: ModelConfig, names: NameTable, weights_only: bool = False
) -> Migration:
    """Account for every tensor.

    Args:
        source: the checkpoint.
        cfg: the model it is to fit.
        names: theirs to ours.
        weights_only: leave the optimiser's state where it is.

    Raises:
        UserError: tensors are missing, unexpected, of another shape or not floating point; lists
            them by their names and ours.
    """
    weights = weight_names(source)
    account = _Account(source, names, our_shapes(cfg), names.find_prefix(weights))
    account.take_weights(weights)
    states = {key: m for key in source.tensors if (m := _STATE.fullmatch(key))}
    if weights_only:
        account.dropped["optimiser state (--weights-only)"] += [*states]
    elif states:
        objects = {key: m for key in source.objects if (m := _STATE.fullmatch(key))}
        account.take_states({**states, **{k: m for k, m in objects.items() if m["leaf"] == "step"}})
    account.drop_objects()
    account.refuse()
    return Migration(
        source,
        account.shapes,
        account.uses,
        account.counts(),
        tuple(account.idle),
        account.copies,
        account.dropped,
        tuple(account.notes),
    )


@dataclass
class _Account:
    """Where the tensors of ``source`` go, as far as they have been looked at."""

    source: Source
    names: NameTable
    shapes: Mapping[str, Shape]
    prefix: str
    uses: dict[str, Use] = field(default_factory=dict)
    idle: list[Slice] = field(default_factory=list)
    copies: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names by what is wrong with them."""
    refused: set[str] = field(default_factory=set)
    """Of ours: what is there, but in another shape or of another kind."""
    taken: dict[tuple[str, str], set[int | None]] = field(default_factory=lambda: defaultdict(set))
    """Experts that are there, by kind and our name; None: the whole tensor."""

    def take_weights(self, weights: Mapping[str, str]) -> None:
        """Find a place for each weight (name without wrappers: name as it stands there)."""
        for name, key in weights.items():
            inside = name.startswith(self.prefix)
            short = name.removeprefix(self.prefix)
            parts = self.names.parts(short) if inside else None
            if parts is not None:
                self._take(key, "weight", parts)
            elif inside and short in self.names.copies:
                original = self.names.copies[short]
                theirs = weights.get(self.prefix + original)
                if theirs is None:
                    self.problems["missing"].append(f"{original}, which {short} repeats")
                else:
                    self.copies[key] = theirs, f"{short} differs from {original}"
                self._drop_copy(key, "weight", original)
            elif self.names.drops(short):
                self.dropped[_UNNEEDED].append(key)
            elif inside and not self._is_counter(key):
                self.problems["unexpected"].append(key)
            else:
                self.dropped[_OLD_RUN].append(key)
        self._missing("weight", self.shapes, "missing")

    def take_states(self, states: Mapping[str, re.Match[str]]) -> None:
        """Find a place for each state of the optimiser."""
        others = sorted({m["leaf"] for m in states.values()} - {*MOMENTS, "step"})
        if others:
            raise UserError(
                f"{self.source.path}: the optimiser keeps {', '.join(others)}, so it is not plain "
                "AdamW (exp_avg, exp_avg_sq, step), the one whose state is carried over; migrate "
                "with --weights-only and let the optimiser start anew"
            )
        ids = self._names_of_ids({match["name"] for match in states.values()})
        for key, match in states.items():
            kind = "count" if match["leaf"] == "step" else match["leaf"]
            name = clean(ids.get(match["name"], match["name"]))
            spellings = (name, name.removeprefix(self.prefix))  # the prefix is rare before states
            parts = self.names.parts(spellings[0]) or self.names.parts(spellings[1])
            original = next(
                (self.names.copies[n] for n in spellings if n in self.names.copies), None
            )
            if parts is not None and kind == "count":
                self.uses[key] = Use(kind, parts)
            elif parts is not None:
                self._take(key, kind, parts)
            elif original is not None:
                self._drop_copy(key, kind, original)
            elif any(map(self.names.drops, spellings)):
                self.dropped[_UNNEEDED].append(key)
            else:
                self.problems["unexpected"].append(key)
        parameters = {n: shape for n, shape in self.shapes.items() if not is_bias(n)}
        self._take_idle_experts(parameters)
        for kind in MOMENTS:
            self._missing(kind, parameters, f"missing optimiser states ({kind})")
        counted = {p.name for use in self.uses.values() if use.kind == "count" for p in use.parts}
        self.problems["missing optimiser states (step)"] += [
            self._named(name) for name in parameters if name not in counted
        ]

    def drop_objects(self) -> None:
        """What is no tensor has no place in the result."""
        self.dropped[_OLD_RUN] += self.source.unread + [
            name
            for name in self.source.objects
            if "param_groups." not in name
            and name.rsplit(".", 1)[-1] not in _STEP_NAMES
            and not _STATE.fullmatch(name)
        ]

    def refuse(self) -> None:
        """Raise ``UserError`` if anything is wrong."""
        problems = {kind: names for kind, names in self.problems.items() if names}
        if not problems:
            return
        states = {f"missing optimiser states ({kind})" for kind in (*MOMENTS, "step")}
        missing = problems.get("missing", [])
        # Of each missing parameter the states are missing as well.
        stateful = [name for name in missing if not name.endswith("gate.bias)")]
        lines = [
            f"  {len(names)} {kind}: "
            + ("of the same" if kind in states and names == stateful else listing(names))
            for kind, names in problems.items()
        ]
        if (
            missing
            and problems.keys() <= {"missing", *states}
            and all("mtp." in n for n in missing)
        ):
            advice = (
                "the checkpoint has no MTP modules; add model.num_nextn_predict_layers=0 to the "
                "command"
            )
        elif problems.keys() <= states:
            advice = (
                "frozen parameters have none; to start the optimiser anew, migrate with "
                "--weights-only"
            )
        else:
            advice = (
                "if only names differ: --write-names FILE, edit it, --names FILE; else check that "
                "checkpoint and configuration belong together"
            )
        found = [f"{self.source.path} does not fit the model configuration:", *lines]
        raise UserError("\n".join([*found, f"  {advice}"]))

    def counts(self) -> dict[str, float]:
        """Updates of each parameter of ours; the experts of a stack have one number."""
        keys = {key: use.parts for key, use in self.uses.items() if use.kind == "count"}
        keys = {key: parts for key, parts in keys.items() if not self.uses[key].copy}
        stored = self.source.read(key for key in keys if key in self.source.tensors)
        found: dict[str, set[float]] = defaultdict(set)
        for key, parts in keys.items():
            for part in parts:
                if part.name in self.shapes:
                    found[part.name].add(float(stored.get(key, self.source.objects.get(key, 0))))
        uneven = [
            f"{name} {min(counts):g} to {max(counts):g}"
            for name, counts in found.items()
            if len(counts) > 1
        ]
        if uneven:
            self.notes.append(
                f"in {len(uneven)} stacks the experts were updated differently often, here a stack "
                f"has one count, the largest is taken: {listing(uneven, 3)}"
            )
        return {name: max(counts) for name, counts in found.items()}

    def _take(self, key: str, kind: str, parts: tuple[Slice, ...]) -> None:
        if not self._fits(key, parts):
            return
        self.uses[key] = Use(kind, parts)
        for part in parts:
            mine = self.taken[kind, part.name]
            if part.expert in mine or (mine and (part.expert is None) != (None in mine)):
                self.problems["given twice"].append(f"{key} ({part})")
            mine.add(part.expert)

    def _drop_copy(self, key: str, kind: str, original: str) -> None:
        self.dropped[_COPIES].append(key)
        parts = self.names.parts(original)
        if parts is not None:
            self.uses[key] = Use(kind, parts, copy=True)

    def _fits(self, key: str, parts: tuple[Slice, ...]) -> bool:
        spec, shapes = self.source.tensors[key], []
        for part in parts:
            whole = self.shapes.get(part.name)
            if whole is None or (
                part.expert is not None and (len(whole) != 3 or part.expert >= whole[0])
            ):
                owner = "" if whole is None else f" of {whole}"
                self.problems["without a place in this model"].append(f"{key} ({part}{owner})")
                return False
            shapes.append(whole if part.expert is None else whole[1:])
        wanted = _joined(shapes)
        if spec.shape == wanted and spec.dtype in _PLAIN:
            return True
        self.refused |= {part.name for part in parts}
        if spec.shape != wanted:
            found = f"{key} {spec.shape} instead of {wanted}"
            self.problems["of another shape"].append(found)
        else:
            self.problems["neither fp32, bf16 nor fp16"].append(f"{key} {spec.dtype}")
        return False

    def _missing(self, kind: str, wanted: Mapping[str, Shape], problem: str) -> None:
        for name, shape in wanted.items():
            mine = self.taken[kind, name]
            if None in mine or (not mine and name in self.refused):
                continue
            left = sorted(set(range(shape[0])) - mine) if mine else []
            if left or not mine:
                few = ", ".join(map(str, left[:6])) + (", ..." if left[6:] else "")
                experts = f", experts {few}" if left else ""
                self.problems[problem].append(self._named(name) + experts)

    def _take_idle_experts(self, parameters: Mapping[str, Shape]) -> None:
        """An expert that never got a token has no state in torch; in a stack it is zeros."""
        for name, shape in parameters.items():
            first, second = (self.taken[kind, name] for kind in MOMENTS)
            if len(shape) == 3 and first and first == second and None not in first:
                idle = sorted(set(range(shape[0])) - first)
                self.idle += [Slice(name, expert) for expert in idle]
                first |= set(idle)
                second |= set(idle)
        if self.idle:
            self.notes.append(
                f"{len(self.idle)} matrices of experts have no optimiser state, since no token "
                "ever came to them: zeros"
            )

    def _names_of_ids(self, names: set[str]) -> dict[str, str]:
        """Names of parameters that the optimiser numbers."""
        if not all(name.isdigit() for name in names):
            return {}
        listed: dict[str, list[Any]] = {"params": [], "param_names": []}
        for key, value in sorted(self.source.objects.items()):
            leaf = key.rpartition(".")[2]
            if leaf in listed and "." in key and isinstance(value, list):
                listed[leaf] += value
        if len(listed["param_names"]) != len(listed["params"]) or not listed["params"]:
            raise UserError(
                f"{self.source.path}: the optimiser's state goes by numbers, not by names of "
                "parameters; save FSDP.optim_state_dict(model, optimizer) or "
                "get_optimizer_state_dict(model, optimizer), or migrate with --weights-only"
            )
        return {str(n): str(name) for n, name in zip(*listed.values(), strict=True)}

    def _is_counter(self, key: str) -> bool:
        return key in _STEP_NAMES and self.source.tensors[key].shape in ((), (1,))

    def _named(self, name: str) -> str:
        theirs = self.names.theirs(name)
        return name if theirs is None else f"{theirs} ({name})"


def write_migration(
    migration: Migration,
    staging: Staging,
    path: Path,
    step: int,
    state: dict[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Write the checkpoint into the directory ``path`` of ``staging``, or go on with it.

    Args:
        migration: the plan.
        staging: remembers which files are done.
        path: of the checkpoint; may be there from an earlier attempt.
        step: optimiser steps done.
        state: of the checkpoint.
        progress: called with the bytes of the source that are done.

    Raises:
        UserError: a copy in the source is none.
        OSError: of the disk.
    """
    source = migration.source
    for key, (original, difference) in migration.copies.items():
        both = source.read([key, original])
        if not torch.equal(both[key], both[original]):
            raise UserError(
                f"{source.path}: {difference}, which the MTP modules share here; drop them: "
                "model.num_nextn_predict_layers=0, and the names of their layers under drop: in "
                "the table"
            )
    path.mkdir(parents=True, exist_ok=True)
    files, done = [], 0
    keys = migration.read_as("weight", *MOMENTS)
    # As fp32.
    parts = files_of(keys, lambda key: 4 * torch.Size(source.tensors[key].shape).numel())
    for number, mine in enumerate(parts):
        note = staging.note(f"{number:05d}")
        file = None if note is None else ChunkFile.from_json(note)
        if file is None or not has_size(path / file.name, file.entry):
            place = path / f"__0_{number}.distcp"
            place.unlink(missing_ok=True)
            file = write_chunks(place, _chunks(migration, mine, first=number == 0))
            staging.done(f"{number:05d}", file.to_json())
        files.append(file)
        done += sum(source.tensors[key].nbytes for key in mine)
        progress(done)
    write_checkpoint(path, step, migration.result_shapes, torch.float32, files, state)


def _chunks(
    migration: Migration, keys: list[str], first: bool
) -> Iterator[tuple[str, Shape, Tensor]]:
    """Name of ours, offsets in it and numbers of what the tensors ``keys`` hold; the ``first``
    file also gets what no tensor of theirs holds."""
    if first:
        for name, count in migration.counts.items():
            yield f"optim.{name}.step", (), torch.tensor(count, dtype=torch.float32)
        for part in migration.idle:
            shape = migration.shapes[part.name][1:]
            for kind in MOMENTS:
                offsets = (part.expert or 0, *(0 for _ in shape))
                yield f"optim.{part.name}.{kind}", offsets, torch.zeros(1, *shape)
    for key in keys:
        use, numbers = migration.uses[key], migration.source.read([key])[key].float().contiguous()
        row = 0
        for part in use.parts:
            shape = migration.shapes[part.name][0 if part.expert is None else 1 :]
            piece, offsets = numbers, (0,) * len(shape)
            if len(use.parts) > 1:
                dim = max(len(shape) - 2, 0)
                piece = numbers.narrow(dim, row, shape[dim]).contiguous()
                row += shape[dim]
            if part.expert is not None:
                piece, offsets = piece.unsqueeze(0), (part.expert, *offsets)
            name = f"model.{part.name}" if use.kind == "weight" else f"optim.{part.name}.{use.kind}"
            yield name, offsets, piece


def weight_names(source: Source) -> dict[str, str]:
    """Weights of a source, without the names of wrappers: to the names as they stand there."""
    return {clean(name): name for name in source.tensors if not _STATE.fullmatch(name)}


def param_groups(objects: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the source's optimiser, by group; of the flattened form, by parameter."""
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in objects.items():
        match = re.fullmatch(r"(?:.*\.)?param_groups\.(.+)\.(\w+)", key)
        if match:
            groups[match[1]][match[2]] = value
    return dict(groups)


def _joined(shapes: list[Shape]) -> Shape:
    """One after the other along the last but one dim."""
    first = shapes[0]
    if len(shapes) == 1:
        return first
    dim = max(len(first) - 2, 0)
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])
