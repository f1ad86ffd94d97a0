"""What a PyTorch FSDP run saved, whichever way: named tensors, and what is no tensor.

Three forms are read. FULL: one ``.pt`` file that one rank wrote. SHARDED, of FSDP1 or FSDP2: a
directory that ``torch.distributed.checkpoint`` (DCP) wrote. And the folders in which accelerate and
the Hugging Face Trainer keep weights and optimiser apart, each in one of the two forms. Nested
dictionaries become dotted names. Nothing in a file can run: ``.pt`` files are loaded with
``weights_only=True``, ``.metadata`` is taken apart by ``metadata.py``.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from deepseek.checkpoint.manifest import MANIFEST
from deepseek.checkpoint.metadata import METADATA, read_foreign_metadata
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.shards import TensorSpec, read_shards
from deepseek.config.errors import UserError
from deepseek.files import zip_damage
from deepseek.run_folder import CHECKPOINTS

SAVE_AGAIN = (
    "load it with the script and the number of ranks that wrote it, and save it again as "
    "FULL_STATE_DICT or SHARDED_STATE_DICT (docs/nemo_migration_guide.md, `LOCAL_STATE_DICT`)"
)
_FILES = (".pt", ".pth", ".bin", ".ckpt")
_LARGEST_OBJECT = 1 << 20
"""Bytes of what is no tensor, beyond which it is not looked at."""
_MOST_TIMES = 100
"""That one dictionary stands in a file."""
_RANK_FILE = re.compile(r"rank[_-]?\d+.*\.(pt|pth|bin|ckpt)$")
_LOCAL = re.compile(r"(^|\.)(_?flat_param)(\.|_|$)")


Keys = tuple[Any, ...]
"""Of nested dictionaries (text, or numbers in a tuple of one) and lists (numbers)."""


class Source(Protocol):
    """Tensors and objects by dotted name."""

    path: Path
    form: str
    """In words."""
    tensors: dict[str, TensorSpec]
    objects: dict[str, Any]
    """What is no tensor, as far as it is plain data."""
    unread: list[str]
    """Names of what is no tensor and no plain data either: never unpickled."""
    paths: dict[str, Keys]
    """The keys under which each tensor and object was saved."""

    def pieces(self) -> list[tuple[str, Source]]:
        """What it is made of, each with its name in the folder; "": it is one piece."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The whole tensors ``names``, in CPU memory."""

    def files(self) -> list[Path]:
        """Every file that is read."""


def open_source(path: Path, optimizer: Path | None = None) -> Source:
    """Open what lies at ``path``, with the optimiser state of ``optimizer`` if that lies apart.

    Raises:
        UserError: it is no checkpoint of FSDP, or one that a single process cannot put together, or
            it asks to load code; says what to do instead.
    """
    if optimizer is not None:
        return WeightsAndOptimizer(path, [_open_one(path), _open_one(optimizer)])
    if path.is_dir() and not (path / METADATA).is_file():
        parts = _parts_of_accelerate(path)
        if parts:
            source = WeightsAndOptimizer(path, [_open_one(part) for part in parts])
            step = _trainer_step(path)
            if step is not None:
                source.objects.setdefault("global_step", step)
            return source
    return _open_one(path)


class FullFile:
    """One ``.pt`` file with whole tensors. Raises ``UserError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.form = "FULL state dict, one file"
        self._values: dict[str, Tensor] = {}
        self.objects: dict[str, Any] = {}
        self.unread: list[str] = []
        self.paths: dict[str, Keys] = {}
        for keys, value in _entries(path, _load(path)):
            name = ".".join(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            self.paths[name] = keys
            if isinstance(value, DTensor):
                raise _local(path, f"{name} is one rank's shard")
            if isinstance(value, Tensor):
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise UserError(
                        f"{path}: {name} says {tuple(value.shape)} and holds fewer numbers, which "
                        "it repeats; save it with .contiguous()"
                    )
                self._values[name] = value
            else:
                self.objects[name] = value
        if not self._values:
            raise UserError(f"{path}: holds no tensor; give the file with the model's state dict")
        self.tensors = {
            name: TensorSpec(value.dtype, tuple(value.shape))
            for name, value in self._values.items()
        }
        _refuse_flat(path, self.tensors)
        self._refuse_aliases()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors lie in the mapped file until they are used."""
        return {name: self._values[name].detach() for name in names}

    def pieces(self) -> list[tuple[str, Source]]:
        return [("", self)]

    def files(self) -> list[Path]:
        return [self.path]

    def _refuse_aliases(self) -> None:
        """torch up to 2.13, FSDP1 on a CPU: both moments are views of one buffer, the second's."""
        for name, moment in self._values.items():
            square = self._values.get(f"{name}_sq") if name.endswith(".exp_avg") else None
            if square is not None and moment.numel() and moment.data_ptr() == square.data_ptr():
                raise UserError(
                    f"{self.path}: {name} and {name}_sq are the same numbers: FSDP1 with "
                    "use_orig_params=True spoils exp_avg when it gathers the optimiser's state on "
                    "a CPU; save it as SHARDED_STATE_DICT, or migrate with --weights-only"
                )


class DcpFolder:
    """A directory of DCP. Raises ``UserError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.form = "SHARDED state dict (DCP)"
        self._files = sorted(file for file in path.iterdir() if file.is_file())
        sizes = {file.name: file.stat().st_size for file in self._files}
        found = read_foreign_metadata(path, sizes)
        self._metadata = found.tensors
        self.tensors = {}
        for name, entry in self._metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.tensors[name] = TensorSpec(entry.properties.dtype, tuple(entry.size))
        _refuse_flat(path, self.tensors)
        self.objects: dict[str, Any] = {}
        self.unread: list[str] = []
        for name, (file, start, length) in found.objects.items():
            self._read_object(name, path / file, start, length)
        names = [*self.tensors, *self.objects]
        self.paths = {name: found.paths.get(name, (name,)) for name in names}

    def pieces(self) -> list[tuple[str, Source]]:
        return [("", self)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Put together from the shards."""
        specs = {name: self.tensors[name] for name in names}
        out = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        read_shards(self.path, self._metadata, out, Ranks())
        return out

    def files(self) -> list[Path]:
        return self._files

    def _read_object(self, name: str, file: Path, start: int, length: int) -> None:
        if length > _LARGEST_OBJECT:
            self.unread.append(name)
            return
        try:
            with open(file, "rb") as stream:
                stream.seek(start)
                content = io.BytesIO(stream.read(length))
        except OSError as failure:
            raise UserError(f"{file}: cannot be read: {failure.strerror}") from failure
        try:
            value = torch.load(content, weights_only=True, map_location="cpu")
        except Exception:  # whatever a pickle that is not plain data brings about
            self.unread.append(name)
        else:
            self.objects[name] = value


class WeightsAndOptimizer:
    """Weights and optimiser that lie apart."""

    def __init__(self, path: Path, parts: list[FullFile | DcpFolder]) -> None:
        self.path = path
        self.form = " + ".join(f"{part.path.name}: {part.form}" for part in parts)
        self._owner: dict[str, FullFile | DcpFolder] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.objects: dict[str, Any] = {}
        self.unread: list[str] = []
        for part in parts:
            twice = self.tensors.keys() & part.tensors.keys()
            if twice:
                raise UserError(f"{path}: {min(twice)} is in two of its parts")
            self.tensors |= part.tensors
            self.objects |= part.objects
            self.unread += part.unread
            self._owner |= dict.fromkeys(part.tensors, part)
        self.paths = {name: keys for part in parts for name, keys in part.paths.items()}
        self._parts = parts

    def pieces(self) -> list[tuple[str, Source]]:
        names = [part.path.name for part in self._parts]
        twice = len(set(names)) < len(names)
        return [
            (f"{number}_{part.path.name}" if twice else part.path.name, part)
            for number, part in enumerate(self._parts)
        ]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        out: dict[str, Tensor] = {}
        for part in self._parts:
            out |= part.read([name for name in wanted if self._owner[name] is part])
        return out

    def files(self) -> list[Path]:
        return [file for part in self._parts for file in part.files()]


def _open_one(path: Path) -> FullFile | DcpFolder:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .pt file or a folder of DCP")
    if path.is_file():
        if path.suffix == ".safetensors":
            raise _hugging_face(path.parent)
        if path.suffix == ".distcp" or path.name == METADATA:
            raise UserError(f"{path} is a part of a DCP checkpoint; give its folder, {path.parent}")
        if _RANK_FILE.search(path.name):
            raise _local(path, "it is one rank's file")
        return FullFile(path)
    if (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir():
        raise UserError(
            f"{path} is of this program already; deepseek train --run-dir continues a run, "
            "model.restore_from starts one from its weights"
        )
    if (path / METADATA).is_file():
        return DcpFolder(path)
    names = sorted(file.name for file in path.iterdir())
    ranks = [name for name in names if _RANK_FILE.search(name)]
    if any(name.startswith(("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_")) for name in names):
        raise UserError(
            f"{path} is a checkpoint of DeepSpeed; turn it into one file with the zero_to_fp32.py "
            "that lies beside it, and migrate that (weights only)"
        )
    if ranks:
        raise _local(path, f"{ranks[0]} is one rank's file")
    if any(name.endswith(".safetensors") for name in names):
        raise _hugging_face(path)
    inner = [name for name in names if (path / name / METADATA).is_file()]
    inner += [name for name in names if name.endswith(_FILES)]
    inside = f"give one of those inside: {', '.join(inner[:8])}" if inner else "give another"
    raise UserError(f"{path} is no checkpoint: a folder of DCP holds a .metadata file; {inside}")


def _parts_of_accelerate(path: Path) -> list[Path]:
    """Weights and optimiser of a folder of accelerate, if it is one."""
    parts = []
    for kind in ("pytorch_model_fsdp", "optimizer"):
        found = [path / f"{kind}_0", path / f"{kind}.bin"]
        parts += [place for place in found if place.is_file() or (place / METADATA).is_file()][:1]
    return parts if parts and parts[0].name.startswith("pytorch_model_fsdp") else []


def _trainer_step(path: Path) -> int | None:
    """What the Hugging Face Trainer noted beside them."""
    try:
        step = json.loads((path / "trainer_state.json").read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def _load(path: Path) -> object:
    """The content of a ``.pt`` file; nothing in it can run."""
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        damage = zip_damage(path) if zipped else None
        if damage is not None:
            raise UserError(f"{path} is damaged: {damage}; copy it again, or use another step")
        # Mapped, the numbers stay on the disk until they are used; old files cannot be.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except OSError as failure:
        if failure.errno != errno.EINVAL:  # of a part that lies beyond the end
            raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure
        raise UserError(f"{path} is cut short; copy it again, or use another step") from None
    except Exception as failure:  # a broken file may bring about anything
        text = str(failure)
        if re.search(r"ShardedTensor|_shard\.|DeviceMesh|DTensor|process group", text):
            raise _local(path, "it holds one rank's shards") from None
        asked = re.search(r"GLOBAL ([\w.]+)|unsupported (?:global|class) ([\w.]+)", text, re.I)
        if asked:
            raise UserError(
                f"{path}: refused: it asks to load {asked[1] or asked[2]}, which is code; only "
                "tensors and plain data are loaded. Save the state dicts alone: "
                "torch.save({'model': ..., 'optimizer': ..., 'step': ...}, path)"
            ) from None
        raise UserError(
            f"{path}: no file of torch.save, or damaged ({type(failure).__name__}); give a .pt "
            "file of state dicts, or copy it again from where it was written"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors"
        )
    return content


def _entries(path: Path, content: object) -> Iterator[tuple[Keys, Any]]:
    """What lies in dictionaries, and in lists of dictionaries; nothing without an end."""
    try:
        yield from _flat(content, (), Counter())
    except RecursionError:
        raise UserError(
            f"{path}: its dictionaries lie too deep or too often in one another, or in themselves; "
            "give a file of state dicts"
        ) from None


def _flat(value: object, keys: Keys, met: Counter[int]) -> Iterator[tuple[Keys, Any]]:
    """What lies in dictionaries, and in lists of dictionaries, as DCP looks into them.

    Args:
        value: any object.
        keys: under which it lies.
        met: counts how often each dictionary is entered, by its ``id``.
    """
    if isinstance(value, Mapping):
        met[id(value)] += 1
        if met[id(value)] > _MOST_TIMES:  # a few could hold each other without number
            raise RecursionError
        for key, inner in value.items():
            yield from _flat(inner, (*keys, key if isinstance(key, str) else (key,)), met)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, (*keys, index), met)
    else:
        yield keys, value


def _refuse_flat(path: Path, names: Iterable[str]) -> None:
    flat = [name for name in names if _LOCAL.search(name)]
    if flat:
        raise _local(path, f"{flat[0]} is a flat parameter without names")


def _local(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is a LOCAL_STATE_DICT ({why}), which only the ranks that wrote it can put "
        f"together; {SAVE_AGAIN}"
    )


def _hugging_face(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds Hugging Face weights without optimiser; deepseek hf import {folder} TARGET"
    )
