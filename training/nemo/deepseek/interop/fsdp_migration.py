"""A checkpoint of a PyTorch FSDP run to one of ours: weights and AdamW's state, tensor by tensor.

``Migration`` accounts for every tensor before a number is read: used, dropped by a rule, or the
reason for an error. Then it writes, with one tensor of theirs in memory at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint.streamed import ChunkFile, files_of, write_checkpoint, write_chunks
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.files import Staging, has_size
from deepseek.interop.fsdp_names import NameTable, Part, clean
from deepseek.interop.fsdp_source import Source
from deepseek.interop.huggingface import is_bias, listing, our_shapes

_STATE = re.compile(
    r"(?:(?P<root>.*?)\.)?state\.(?P<name>.+)\."
    r"(?P<leaf>exp_avg|exp_avg_sq|max_exp_avg_sq|step|momentum_buffer|square_avg|sum|exp_inf)"
)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_STEP_NAMES = ("step", "global_step", "steps", "iteration", "train_step", "num_steps")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """A tensor of theirs and where it goes."""

    key: str
    parts: tuple[Part, ...]
    """One after the other along the rows."""


class Migration:
    """What becomes of every tensor.

    Args:
        source: the checkpoint.
        cfg: the model it is to fit.
        names: theirs to ours.
        weights_only: leave the optimiser's state where it is.

    Raises:
        UserError: tensors are missing, unexpected, of another shape or not floating point; lists
            them by their names and ours.
    """

    def __init__(
        self, source: Source, cfg: ModelConfig, names: NameTable, weights_only: bool = False
    ) -> None:
        self.source, self.names = source, names
        self.shapes: dict[str, Shape] = our_shapes(cfg)
        self.dropped: dict[str, list[str]] = defaultdict(list)
        """Tensors and objects that are not in the result, by reason."""
        self.notes: list[str] = []
        self.weights: list[Move] = []
        self.moments: dict[str, list[Move]] = {kind: [] for kind in _MOMENTS}
        self.steps: dict[str, float] = {}
        """Updates of each parameter of ours; empty without optimiser state."""
        self.counts: dict[str, tuple[Part, ...]] = {}
        """Counters of updates of theirs, and what they are of."""
        self.copied_states: dict[str, tuple[str, tuple[Part, ...]]] = {}
        """Optimiser states of weights that repeat another: which state of what."""
        self._zeros: list[Part] = []
        self._refused: set[str] = set()
        """Of ours: what is there, but in another shape or of another kind."""
        self._problems: dict[str, list[str]] = defaultdict(list)
        states = {name: match for name in source.tensors if (match := _STATE.fullmatch(name))}
        plain_steps = {
            name: match
            for name in source.objects
            if (match := _STATE.fullmatch(name)) and match["leaf"] == "step"
        }
        self._take_weights([name for name in source.tensors if name not in states])
        if weights_only:
            self.dropped["optimiser state (--weights-only)"] += [*states]
        elif states:
            self._take_states({**states, **plain_steps})
        self._drop_objects()
        self._refuse(cfg)

    @property
    def result_shapes(self) -> dict[str, Shape]:
        """Every tensor that is written."""
        out = {f"model.{name}": shape for name, shape in self.shapes.items()}
        for name in self.steps:
            out |= {f"optim.{name}.{kind}": self.shapes[name] for kind in _MOMENTS}
            out[f"optim.{name}.step"] = ()
        return out

    @property
    def result_bytes(self) -> int:
        """About how much is written."""
        shapes = self.result_shapes.values()
        pieces = len(self.weights) + sum(map(len, self.moments.values())) + len(self.steps)
        return sum(4 * torch.Size(shape).numel() for shape in shapes) + 2048 * pieces

    def step(self) -> tuple[int, str] | None:
        """Optimiser steps done, and where that stands; None if nothing tells."""
        counter = self.counter()
        if counter is not None:
            value = self.source.objects.get(counter)
            if value is None:
                value = self.source.read([counter])[counter].item()
            return int(value), f"stored as `{counter}`"
        if self.steps:
            return int(max(self.steps.values())), "updates the optimiser made"
        return None

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

    @property
    def copies(self) -> dict[str, str]:
        """Weights of theirs that repeat another one of theirs."""
        return {key: original for key, original in self._originals.values()}

    def write(
        self,
        staging: Staging,
        path: Path,
        step: int,
        state: dict[str, Any],
        progress: Callable[[int], None],
    ) -> None:
        """Write the checkpoint into the directory ``path`` of ``staging``, or go on with it.

        Raises:
            UserError: a copy in the source is none.
            OSError: of the disk.
        """
        self._compare_copies()
        path.mkdir(parents=True, exist_ok=True)
        jobs = [("model.", "", move) for move in self.weights]
        for kind in _MOMENTS:
            jobs += [("optim.", f".{kind}", move) for move in self.moments[kind]]
        files, done = [], 0
        for number, part in enumerate(files_of(jobs, self._nbytes)):
            note = staging.note(f"{number:05d}")
            file = None if note is None else ChunkFile.from_json(note)
            if file is None or not has_size(path / file.name, file.entry):
                place = path / f"__0_{number}.distcp"
                place.unlink(missing_ok=True)
                file = write_chunks(place, self._pieces(part, first=number == 0))
                staging.done(f"{number:05d}", file.to_json())
            files.append(file)
            done += sum(self.source.tensors[move.key].nbytes for _, _, move in part)
            progress(done)
        self._check_written(files)
        write_checkpoint(path, step, self.result_shapes, torch.float32, files, state)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that are read."""
        moves = [*self.weights, *(move for moves in self.moments.values() for move in moves)]
        return sum(self.source.tensors[move.key].nbytes for move in moves)

    # -- accounting --

    def _take_weights(self, keys: Sequence[str]) -> None:
        cleaned = {clean(key): key for key in keys}
        prefix = self._prefix = self.names.find_prefix(cleaned)
        taken: dict[str, set[int | None]] = defaultdict(set)
        self._originals: dict[str, tuple[str, str]] = {}
        for name, key in cleaned.items():
            short = name.removeprefix(prefix)
            parts = self.names.parts(short) if name.startswith(prefix) else None
            if parts is not None:
                if self._fits(key, parts, self._problems):
                    self.weights.append(Move(key, parts))
                    self._note_taken(key, parts, taken)
            elif name.startswith(prefix) and short in self.names.copies:
                original = self.names.copies[short]
                place = cleaned.get(prefix + original)
                if place is None:
                    self._problems["missing"].append(f"{original}, which {short} repeats")
                else:
                    self._originals[short] = (key, place)
                self.dropped["copies of other tensors"].append(key)
            elif self.names.drops(short):
                self.dropped["not needed, by the table"].append(key)
            elif name.startswith(prefix) and not self._is_counter(key):
                self._problems["unexpected"].append(key)
            else:
                self.dropped["state of the old run (data, random numbers, counters)"].append(key)
        self._missing(taken, self.shapes, "missing")

    def _is_counter(self, key: str) -> bool:
        return key in _STEP_NAMES and self.source.tensors[key].shape in ((), (1,))

    def _take_states(self, states: Mapping[str, re.Match[str]]) -> None:
        others = sorted({m["leaf"] for m in states.values()} - {*_MOMENTS, "step"})
        if others:
            raise UserError(
                f"{self.source.path}: the optimiser keeps {', '.join(others)}, so it is not plain "
                "AdamW (exp_avg, exp_avg_sq, step), the one whose state is carried over; migrate "
                "with --weights-only and let the optimiser start anew"
            )
        ids = self._names_of_ids(states)
        taken: dict[str, dict[str, set[int | None]]] = {k: defaultdict(set) for k in _MOMENTS}
        steps: dict[str, dict[Part, str]] = defaultdict(dict)
        prefix = self._prefix
        for key, match in states.items():
            name = clean(ids.get(match["name"], match["name"]))
            short = name.removeprefix(prefix)  # before optimiser states it stands rarely
            parts = self.names.parts(name) or self.names.parts(short)
            if parts is None:
                original = self.names.copies.get(name) or self.names.copies.get(short)
                if original is not None:
                    self.dropped["copies of other tensors"].append(key)
                    of = self.names.parts(original)
                    if of is not None:
                        self.copied_states[key] = (match["leaf"], of)
                elif self.names.drops(name) or self.names.drops(short):
                    self.dropped["not needed, by the table"].append(key)
                else:
                    self._problems["unexpected"].append(key)
            elif match["leaf"] == "step":
                self.counts[key] = parts
                for part in parts:
                    steps[part.name][part] = key
            elif self._fits(key, parts, self._problems):
                self.moments[match["leaf"]].append(Move(key, parts))
                self._note_taken(key, parts, taken[match["leaf"]])
        parameters = {n: shape for n, shape in self.shapes.items() if not is_bias(n)}
        self._idle_experts(taken, parameters)
        for kind in _MOMENTS:
            self._missing(taken[kind], parameters, f"missing optimiser states ({kind})")
        self._problems["missing optimiser states (step)"] += [
            self._named(name) for name in parameters if name not in steps
        ]
        self._read_steps(steps)

    def _names_of_ids(self, states: Mapping[str, re.Match[str]]) -> dict[str, str]:
        """Names of parameters that the optimiser numbers."""
        numbers = {match["name"] for match in states.values()}
        if not all(number.isdigit() for number in numbers):
            return {}
        names = [
            str(name)
            for key, value in sorted(self.source.objects.items())
            if key.endswith(".param_names") and isinstance(value, list)
            for name in value
        ]
        params = [
            number
            for key, value in sorted(self.source.objects.items())
            if key.endswith(".params") and isinstance(value, list)
            for number in value
        ]
        if len(names) != len(params) or not names:
            raise UserError(
                f"{self.source.path}: the optimiser's state goes by numbers, not by names of "
                "parameters; save FSDP.optim_state_dict(model, optimizer) or "
                "get_optimizer_state_dict(model, optimizer), or migrate with --weights-only"
            )
        return {str(number): name for number, name in zip(params, names, strict=True)}

    def _fits(self, key: str, parts: tuple[Part, ...], problems: dict[str, list[str]]) -> bool:
        spec = self.source.tensors[key]
        shapes = []
        for part in parts:
            whole = self.shapes.get(part.name)
            if whole is None:
                problems["without a place in this model"].append(f"{key} ({part})")
                return False
            inside = part.expert is None or (len(whole) == 3 and part.expert < whole[0])
            if not inside:
                problems["without a place in this model"].append(f"{key} ({part} of {whole})")
                return False
            shapes.append(whole if part.expert is None else whole[1:])
        wanted = _joined(shapes)
        if spec.shape != wanted or spec.dtype not in _PLAIN:
            self._refused |= {part.name for part in parts}
        if spec.shape != wanted:
            problems["of another shape"].append(f"{key} {spec.shape} instead of {wanted}")
            return False
        if spec.dtype not in _PLAIN:
            problems["neither fp32, bf16 nor fp16"].append(f"{key} {spec.dtype}")
            return False
        return True

    def _note_taken(
        self, key: str, parts: tuple[Part, ...], taken: dict[str, set[int | None]]
    ) -> None:
        for part in parts:
            mine = taken[part.name]
            if part.expert in mine or (mine and (part.expert is None) != (None in mine)):
                self._problems["given twice"].append(f"{key} ({part})")
            mine.add(part.expert)

    def _missing(
        self, taken: dict[str, set[int | None]], wanted: Mapping[str, Shape], kind: str
    ) -> None:
        for name, shape in wanted.items():
            mine = taken.get(name, set())
            if None in mine or (mine and mine == set(range(shape[0]))):
                continue
            if not mine and name in self._refused:
                continue
            experts = (
                ""
                if not mine
                else f", experts {_few({e for e in range(shape[0]) if e not in mine})}"
            )
            self._problems[kind].append(self._named(name) + experts)

    def _named(self, name: str) -> str:
        theirs = self.names.theirs(name)
        return name if theirs is None else f"{theirs} ({name})"

    def _idle_experts(
        self,
        taken: dict[str, dict[str, set[int | None]]],
        parameters: Mapping[str, Shape],
    ) -> None:
        """An expert that never got a token has no state in torch; in a stack it is zeros."""
        count = 0
        for name, shape in parameters.items():
            mine = [taken[kind].get(name, set()) for kind in _MOMENTS]
            if len(shape) != 3 or not mine[0] or mine[0] != mine[1] or None in mine[0]:
                continue
            idle = sorted(set(range(shape[0])) - mine[0])  # type: ignore[arg-type]
            self._zeros += [Part(name, expert) for expert in idle]
            for kind in _MOMENTS:
                taken[kind][name] |= set(idle)
            count += len(idle)
        if count:
            self.notes.append(
                f"{count} matrices of experts have no optimiser state, since no token ever came to "
                "them: zeros"
            )

    def _read_steps(self, steps: dict[str, dict[Part, str]]) -> None:
        keys = {key for of_part in steps.values() for key in of_part.values()}
        numbers = {
            name: float(tensor)
            for name, tensor in self.source.read(
                k for k in keys if k in self.source.tensors
            ).items()
        }
        numbers |= {
            key: float(self.source.objects[key]) for key in keys if key in self.source.objects
        }
        uneven = []
        for name, of_part in steps.items():
            if name not in self.shapes:
                continue
            counts = {numbers[key] for key in of_part.values()}
            self.steps[name] = max(counts)
            if len(counts) > 1:
                uneven.append(f"{name} {min(counts):g} to {max(counts):g}")
        if uneven:
            self.notes.append(
                f"in {len(uneven)} stacks the experts were updated differently often, here a stack "
                f"has one count, the largest is taken: {listing(uneven, 3)}"
            )

    def _drop_objects(self) -> None:
        others = self.source.unread + [
            name
            for name in self.source.objects
            if "param_groups." not in name
            and name.rsplit(".", 1)[-1] not in _STEP_NAMES
            and not _STATE.fullmatch(name)
        ]
        if others:
            self.dropped["state of the old run (data, random numbers, counters)"] += others

    def _refuse(self, cfg: ModelConfig) -> None:
        lines = [
            f"  {len(names)} {kind}: "
            + ("of the same" if names == self._stateful_missing(kind) else listing(names))
            for kind, names in self._problems.items()
            if names
        ]
        if not lines:
            return
        missing = self._problems["missing"]
        kinds = {kind for kind, names in self._problems.items() if names}
        states = {f"missing optimiser states ({kind})" for kind in (*_MOMENTS, "step")}
        if kinds <= {"missing", *states} and missing and all("mtp." in n for n in missing):
            advice = (
                "the checkpoint has no MTP modules; add model.num_nextn_predict_layers=0 to the "
                "command"
            )
        elif kinds <= states:
            advice = (
                "frozen parameters have none; to start the optimiser anew, migrate with "
                "--weights-only"
            )
        else:
            advice = (
                "if only names differ: --write-names FILE, edit it, --names FILE; else check that "
                "checkpoint and configuration belong together"
            )
        raise UserError(
            "\n".join(
                [f"{self.source.path} does not fit the model configuration:", *lines, f"  {advice}"]
            )
        )

    def _stateful_missing(self, kind: str) -> list[str] | None:
        """For missing optimiser states: the missing weights, of which each has a state."""
        if not kind.startswith("missing optimiser"):
            return None
        return [
            name for name in self._problems.get("missing", []) if not name.endswith("gate.bias)")
        ]

    # -- writing --

    def _compare_copies(self) -> None:
        for short, (key, original) in self._originals.items():
            both = self.source.read([key, original])
            if not torch.equal(both[key], both[original]):
                raise UserError(
                    f"{self.source.path}: {short} differs from {self.names.copies[short]}, which "
                    "the MTP modules share here; drop them: model.num_nextn_predict_layers=0, and "
                    "the names of their layers under drop: in the table"
                )

    def _nbytes(self, job: tuple[str, str, Move]) -> int:
        """As fp32."""
        return 4 * torch.Size(self.source.tensors[job[2].key].shape).numel()

    def _pieces(
        self, jobs: list[tuple[str, str, Move]], first: bool
    ) -> Iterator[tuple[str, Shape, Tensor]]:
        if first:
            for name, count in self.steps.items():
                yield f"optim.{name}.step", (), torch.tensor(count, dtype=torch.float32)
            for part in self._zeros:
                shape = self.shapes[part.name][1:]
                for kind in _MOMENTS:
                    place = (part.expert or 0, *(0 for _ in shape))
                    yield f"optim.{part.name}.{kind}", place, torch.zeros(1, *shape)
        for before, after, move in jobs:
            numbers = self.source.read([move.key])[move.key].float().contiguous()
            row = 0
            for part in move.parts:
                shape = self.shapes[part.name][0 if part.expert is None else 1 :]
                piece = numbers
                if len(move.parts) > 1:
                    dim = max(len(shape) - 2, 0)
                    piece = numbers.narrow(dim, row, shape[dim]).contiguous()
                    row += shape[dim]
                offsets: Shape = (0,) * len(shape)
                if part.expert is not None:
                    piece, offsets = piece.unsqueeze(0), (part.expert, *offsets)
                yield f"{before}{part.name}{after}", offsets, piece

    def _check_written(self, files: list[ChunkFile]) -> None:
        """Written = expected, number by number."""
        shapes = self.result_shapes
        found = dict.fromkeys(shapes, 0)
        for file in files:
            for chunk in file.chunks:
                found[chunk.name] += torch.Size(chunk.sizes).numel()
        wrong = [name for name, shape in shapes.items() if found[name] != torch.Size(shape).numel()]
        if wrong:
            raise UserError(f"{len(wrong)} tensors were not written whole: {listing(wrong)}")


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


def _few(numbers: set[int]) -> str:
    listed = sorted(numbers)
    return ", ".join(map(str, listed[:6])) + (", ..." if len(listed) > 6 else "")
