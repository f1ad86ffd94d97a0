"""The way back: a run that came from FSDP, written as the checkpoint that it came from.

``export_fsdp`` reads a checkpoint of the run by what its migration noted of the source
(``fsdp_origin.py``) and writes the same names in the same form. Numbers that were not trained since
are bitwise the same.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.metadata import METADATA
from deepseek.checkpoint.streamed import described, files_of, write_chunks
from deepseek.config.errors import UserError
from deepseek.files import HashingWriter, sync_folder, write_durably
from deepseek.interop.fsdp_names import Part
from deepseek.interop.fsdp_origin import Origin, Piece, Saved, unplain
from deepseek.interop.fsdp_source import Keys
from deepseek.interop.huggingface import listing

_CACHED = 3
"""Tensors of ours that are kept: the stacks of a layer's experts, of which theirs come in turn."""


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

    def _write_file(self, path: Path, piece: Piece, step: Callable[[Saved], None]) -> None:
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

    def _write_dcp(self, path: Path, piece: Piece, step: Callable[[Saved], None]) -> None:
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
        names = [Part.read(text).name for text in saved.parts]
        if saved.kind == "weight":
            return [f"model.{name}" for name in names]
        if saved.kind == "count":
            return [f"optim.{names[0]}.step"]
        return [f"optim.{name}.{saved.kind}" for name in names]

    def _value(self, saved: Saved) -> Any:
        if saved.kind == "object":
            return unplain(saved.value)
        if saved.kind == "step":
            numbers = torch.tensor(float(self.checkpoint.step), dtype=torch.float64)
        else:
            experts = [Part.read(text).expert for text in saved.parts]
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
