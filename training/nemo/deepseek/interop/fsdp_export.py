"""The way back: a run that came from FSDP, written as the checkpoint that it came from.

A migration notes an ``Origin`` beside the run (``migrated.json``): the name, keys, dtype and shape
of every tensor and where its numbers went, and what is no tensor. ``export_fsdp`` reads a
checkpoint of the run by these notes and writes the same names in the same form. Numbers that were
not trained since are bitwise the same.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.metadata import METADATA
from deepseek.checkpoint.shards import TensorSpec, described, files_of, write_chunks
from deepseek.config.errors import UserError
from deepseek.files import HashingWriter, sync_folder, write_durably
from deepseek.interop.fsdp_migration import Migration
from deepseek.interop.fsdp_names import Slice
from deepseek.interop.fsdp_source import DcpFolder, Keys
from deepseek.interop.huggingface import listing

ORIGIN = "migrated.json"
"""In the run folder."""
_CACHED = 3
"""Tensors of ours that are kept: the stacks of a layer's experts, of which theirs come in turn."""


@dataclass(frozen=True)
class Saved:
    """A tensor or object of theirs."""

    keys: Keys
    kind: str
    """``weight``, ``exp_avg``, ``exp_avg_sq``, ``count`` (updates of a parameter), ``step`` (of the
    run), or ``object``."""
    parts: tuple[str, ...] = ()
    """Of ours, one after the other along the rows."""
    dtype: str | None = None
    """None: it is no tensor."""
    shape: tuple[int, ...] = ()
    value: Any = None
    """Of an object."""

    @property
    def spec(self) -> TensorSpec | None:
        """None: it is no tensor."""
        return None if self.dtype is None else TensorSpec(getattr(torch, self.dtype), self.shape)

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return self.spec.nbytes if self.spec else 0


@dataclass(frozen=True)
class StateDict:
    """A file, or a folder of DCP."""

    place: str
    """In the folder; "": there is nothing beside it."""
    sharded: bool
    content: dict[str, Saved]


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run came from."""

    pieces: tuple[StateDict, ...]
    lost: tuple[str, ...]
    """Names of what cannot be given back."""

    @classmethod
    def of(cls, migration: Migration) -> Origin:
        """What is to be noted of a migration."""
        source = migration.source
        roles = {key: (use.kind, use.parts) for key, use in migration.uses.items()}
        counter = migration.counter()
        if counter is not None:
            roles[counter] = ("step", ())
        pieces, lost = [], list(source.unread)
        for place, piece in source.pieces():
            content = {}
            for name, spec in piece.tensors.items():
                if name not in roles:
                    lost.append(name)
                    continue
                kind, parts = roles[name]
                dtype = str(spec.dtype).removeprefix("torch.")
                keys = piece.paths[name]
                content[name] = Saved(keys, kind, tuple(map(str, parts)), dtype, tuple(spec.shape))
            for name, value in piece.objects.items():
                kind, parts = roles.get(name, ("object", ()))
                try:
                    noted = _plain(value)
                except TypeError:
                    lost.append(name)
                    continue
                content[name] = Saved(piece.paths[name], kind, tuple(map(str, parts)), value=noted)
            pieces.append(StateDict(place, isinstance(piece, DcpFolder), content))
        return cls(tuple(pieces), tuple(lost))

    def to_json(self) -> bytes:
        """For ``read``."""
        return json.dumps({"version": 1, **asdict(self)}).encode()

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """What lies in a run folder.

        Raises:
            UserError: nothing does, or it is damaged.
        """
        path = folder / ORIGIN
        try:
            data = json.loads(path.read_bytes())
            pieces = [
                StateDict(
                    piece["place"],
                    piece["sharded"],
                    {name: _saved(entry) for name, entry in piece["content"].items()},
                )
                for piece in data["pieces"]
            ]
            return cls(tuple(pieces), tuple(data["lost"]))
        except FileNotFoundError:
            raise UserError(
                f"{folder} did not come from FSDP: it has no {ORIGIN}, which `deepseek migrate "
                "fsdp-checkpoint` writes; give the folder that has it with --like, or write "
                f"Hugging Face files: deepseek hf export {folder} DIR"
            ) from None
        except OSError as failure:
            raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise UserError(
                f"{path} is damaged ({failure!r}); migrate the FSDP checkpoint again into another "
                "folder and give that with --like"
            ) from failure

    @property
    def is_file(self) -> bool:
        """One file, not a folder."""
        return len(self.pieces) == 1 and not self.pieces[0].place and not self.pieces[0].sharded


class FsdpExport:
    """Writes a checkpoint of ours in the form of its origin.

    Args:
        checkpoint: of the run.
        origin: what it came from.

    Raises:
        UserError: the checkpoint lacks what the origin had.
    """

    def __init__(self, checkpoint: Checkpoint, origin: Origin) -> None:
        self.checkpoint, self.origin = checkpoint, origin
        self._shapes = checkpoint.tensor_shapes()
        self._loaded: OrderedDict[str, Tensor] = OrderedDict()
        wrong = sorted(
            {
                name
                for piece in origin.pieces
                for saved in piece.content.values()
                for name in self._ours(saved)
                if name not in self._shapes
            }
        )
        if wrong:
            raise UserError(
                f"{checkpoint.path} lacks {len(wrong)} tensors that its origin had: "
                f"{listing(wrong)}; give a checkpoint of the run that was migrated, adapters "
                "merged and optimiser state not left out"
            )

    @property
    def total_bytes(self) -> int:
        """Of all tensors that are written."""
        entries = [saved for piece in self.origin.pieces for saved in piece.content.values()]
        return sum(saved.nbytes for saved in entries)

    def write(self, target: Path, progress: Callable[[int], None]) -> None:
        """Write the file ``target``, or fill the folder.

        Raises ``OSError``, and ``UserError`` if a tensor has changed its shape.
        """
        done = 0

        def step(saved: Saved) -> None:
            nonlocal done
            done += saved.nbytes
            progress(done)

        for piece in self.origin.pieces:
            place = target / piece.place if piece.place else target
            place.parent.mkdir(parents=True, exist_ok=True)
            if piece.sharded:
                place.mkdir(parents=True, exist_ok=True)
                self._write_dcp(place, piece, step)
            else:
                self._write_file(place, piece, step)

    def _write_file(self, path: Path, piece: StateDict, step: Callable[[Saved], None]) -> None:
        whole: dict[Any, Any] = {}
        for saved in piece.content.values():
            _put(whole, saved.keys, self._value(saved))
            step(saved)
        path.unlink(missing_ok=True)
        stream = HashingWriter(path, lambda entry: None)
        try:
            torch.save(_lists(whole), stream)
            stream.close()
        except RuntimeError:  # torch's own about a disk that refuses
            if stream.failure is not None:
                raise stream.failure from None
            raise
        finally:
            stream.raw.close()

    def _write_dcp(self, path: Path, piece: StateDict, step: Callable[[Saved], None]) -> None:
        specs = {name: saved.spec for name, saved in piece.content.items() if saved.spec}
        tensors = {name: piece.content[name] for name in specs}
        objects = {name: saved for name, saved in piece.content.items() if name not in specs}
        files = []
        for number, names in enumerate(files_of(specs, lambda name: tensors[name].nbytes)):
            file = path / f"__0_{number}.distcp"
            file.unlink(missing_ok=True)
            files.append(write_chunks(file, self._chunks(tensors, names, step)))
        metadata = described(files, specs)
        file = path / f"__0_{len(files)}.distcp"
        file.unlink(missing_ok=True)
        with HashingWriter(file, lambda entry: None) as stream:
            for name, saved in objects.items():
                start = stream.tell()
                torch.save(self._value(saved), stream)
                place = _StorageInfo(file.name, start, stream.tell() - start)
                metadata.state_dict_metadata[name] = BytesStorageMetadata()
                metadata.storage_data[MetadataIndex(name)] = place
        metadata.planner_data = {name: saved.keys for name, saved in piece.content.items()}
        (path / METADATA).unlink(missing_ok=True)
        write_durably(path / METADATA, pickle.dumps(metadata))
        sync_folder(path)

    def _chunks(
        self, tensors: dict[str, Saved], names: Iterable[str], step: Callable[[Saved], None]
    ) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        for name in names:
            yield name, (0,) * len(tensors[name].shape), self._value(tensors[name])
            step(tensors[name])

    def _ours(self, saved: Saved) -> list[str]:
        """Names of ours that its numbers are in."""
        names = [Slice.read(text).name for text in saved.parts]
        if saved.kind == "weight":
            return [f"model.{name}" for name in names]
        if saved.kind == "count":
            return [f"optim.{names[0]}.step"]
        return [f"optim.{name}.{saved.kind}" for name in names]

    def _value(self, saved: Saved) -> Any:
        if saved.kind == "object":
            return _unplain(saved.value)
        if saved.kind == "step":
            numbers = torch.tensor(float(self.checkpoint.step), dtype=torch.float64)
        else:
            experts = [Slice.read(text).expert for text in saved.parts]
            loaded = zip(self._ours(saved), experts, strict=False)  # a count has one of ours
            pieces = [
                self._read(name) if e is None or saved.kind == "count" else self._read(name)[e]
                for name, e in loaded
            ]
            numbers = (
                torch.cat(pieces, dim=max(pieces[0].dim() - 2, 0)) if pieces[1:] else pieces[0]
            )
        if saved.dtype is None:
            return type(saved.value)(numbers.item())
        if numbers.numel() != torch.Size(saved.shape).numel():
            raise UserError(
                f"{self.checkpoint.path}: {'.'.join(map(str, saved.keys))} had the shape "
                f"{list(saved.shape)} and has {list(numbers.shape)} now: this is another model"
            )
        made = numbers.reshape(saved.shape).to(getattr(torch, saved.dtype))
        return made.clone(memory_format=torch.contiguous_format)  # nothing else in its storage

    def _read(self, name: str) -> Tensor:
        if name not in self._loaded:
            tensor = torch.empty(self._shapes[name])
            self.checkpoint.load({name: tensor})
            self._loaded[name] = tensor
            while len(self._loaded) > _CACHED:
                self._loaded.popitem(last=False)
        return self._loaded[name]


def export_fsdp(
    checkpoint: Checkpoint, origin: Origin, target: Path, progress: Callable[[int], None]
) -> None:
    """Write ``target``, which does not exist: whole under its name, or not there.

    Raises:
        UserError: the checkpoint lacks what the origin had.
        OSError: of the disk.
    """
    export = FsdpExport(checkpoint, origin)
    new = target.absolute().parent / f".{target.absolute().name}.partial"
    new.parent.mkdir(parents=True, exist_ok=True)
    if new.is_dir():  # of work that was cut short, perhaps of another step
        shutil.rmtree(new)
    export.write(new, progress)
    if new.is_dir():
        sync_folder(new)
    os.replace(new, target)
    sync_folder(new.parent)


class _List(dict[int, Any]):
    """A list that is being filled."""


def _put(whole: dict[Any, Any], keys: Keys, value: Any) -> None:
    """Put a value below its keys; what is between is made."""
    inner: dict[Any, Any] = whole
    for key, following in zip(keys, keys[1:], strict=False):
        made: dict[Any, Any] = _List() if isinstance(following, int) else {}
        inner = inner.setdefault(key[0] if isinstance(key, tuple) else key, made)
    last = keys[-1]
    inner[last[0] if isinstance(last, tuple) else last] = value


def _lists(value: Any) -> Any:
    """With lists where lists were."""
    if isinstance(value, _List):
        return [_lists(value[index]) for index in sorted(value)]
    return {key: _lists(inner) for key, inner in value.items()} if type(value) is dict else value


def _saved(entry: dict[str, Any]) -> Saved:
    keys = tuple(tuple(key) if isinstance(key, list) else key for key in entry["keys"])
    shape, parts = tuple(entry["shape"]), tuple(entry["parts"])
    if entry["dtype"] is not None and not isinstance(vars(torch).get(entry["dtype"]), torch.dtype):
        raise ValueError(f"{entry['dtype']} is no dtype")
    return Saved(keys, entry["kind"], parts, entry["dtype"], shape, entry["value"])


def _plain(value: Any) -> Any:
    """Plain data as JSON that keeps what is a tuple. Raises ``TypeError`` for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    raise TypeError(type(value).__name__)


def _unplain(value: Any) -> Any:
    """The inverse of ``_plain``."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {_unplain(key): _unplain(item) for key, item in inner}
    items = [_unplain(item) for item in inner]
    return tuple(items) if kind == "tuple" else items
