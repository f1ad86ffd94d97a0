"""What a migration notes of the checkpoint that a run came from, so that there is a way back.

``Origin`` lies beside the run (``migrated.json``): the name, keys, dtype and shape of every tensor
and where its numbers went, and what is no tensor. ``fsdp_export.py`` writes by it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.interop.fsdp_migration import Migration
from deepseek.interop.fsdp_source import DcpFolder, Keys

ORIGIN = "migrated.json"
"""In the run folder."""


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
class Piece:
    """A file, or a folder of DCP."""

    place: str
    """In the folder; "": there is nothing beside it."""
    sharded: bool
    content: dict[str, Saved]


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run came from."""

    pieces: tuple[Piece, ...]
    lost: tuple[str, ...]
    """Names of what cannot be given back."""

    @classmethod
    def of(cls, migration: Migration) -> Origin:
        """What is to be noted of a migration."""
        source, counter = migration.source, migration.counter()
        roles = {move.key: ("weight", move.parts) for move in migration.weights}
        for kind, moves in migration.moments.items():
            roles |= {move.key: (kind, move.parts) for move in moves}
        roles |= {key: ("count", parts) for key, parts in migration.counts.items()}
        roles |= {key: roles[original] for key, original in migration.copies.items()}
        for key, (leaf, parts) in migration.copied_states.items():
            roles[key] = ("count" if leaf == "step" else leaf, parts)
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
            pieces.append(Piece(place, isinstance(piece, DcpFolder), content))
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
                Piece(
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


def unplain(value: Any) -> Any:
    """The inverse of ``_plain``."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {unplain(key): unplain(item) for key, item in inner}
    items = [unplain(item) for item in inner]
    return tuple(items) if kind == "tuple" else items
