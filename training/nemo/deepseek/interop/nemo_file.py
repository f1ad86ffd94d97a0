"""A ``.nemo`` file: the whole model of a checkpoint of any layout, as NeMo keeps models.

It is a tar of ``model_config.yaml`` (the ``model`` section) and ``model_weights.ckpt`` (of
``torch.save``). NeMo needs a model whole in memory on one rank to write it; here one process takes
it tensor by tensor from a checkpoint, and the disk holds what is whole. What NeMo wrote is read
too.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import mmap
import os
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.schema import ModelConfig
from deepseek.config.yaml_file import MAX_BYTES, dump_yaml, read_yaml
from deepseek.files import require_room, sync_folder, zip_damage
from deepseek.interop.huggingface import account, our_shapes
from deepseek.parallel.mesh import local, local_slices

SUFFIX = ".nemo"
_CONFIG, _WEIGHTS, _ORIGIN = "model_config.yaml", "model_weights.ckpt", "deepseek.json"
_NEMOS_KEYS = ("target", "nemo_version")
"""What NeMo adds to the ``model`` section."""
_MOST_MEMBERS = 1000
"""Of a file that is looked through: NeMo's hold weights, configuration and some texts."""


class NemoWriter:
    """The weights of a checkpoint on their way to a ``.nemo`` file, one tensor in memory at a time.

    Args:
        checkpoint: of any layout; its optimiser state is not read.
        config: of the model in it, without adapters.

    Raises:
        UserError: the checkpoint does not hold exactly this model.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        shapes = checkpoint.tensor_shapes()
        held = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        expected = {f"model.{name}": shape for name, shape in our_shapes(config).items()}
        account(f"the weights of {checkpoint.path}", held, expected)
        dtypes = checkpoint.tensor_dtypes()
        self._checkpoint, self._config = checkpoint, config
        self._specs = {name: TensorSpec(dtypes[name], shape) for name, shape in expected.items()}
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())
        """Of the weights."""

    def write(self, path: Path, progress: Callable[[int], None] = lambda done: None) -> None:
        """Write ``path``, replacing what is there once the new file is whole.

        On the way the disk holds the weights twice.

        Args:
            path: should end in ``.nemo``.
            progress: called with the bytes that are done.

        Raises:
            UserError: the disk refuses or has no room, or the checkpoint cannot be read.
        """
        from deepseek.frameworks import NEMO_TARGET  # brings Lightning along, which readers spare

        require_room(path.absolute().parent, 2 * self.nbytes, "the .nemo file")
        partial = path.with_name(f".{path.name}.partial")
        model = {**asdict(self._config), "target": NEMO_TARGET}
        texts = {
            _CONFIG: dump_yaml(model).encode(),
            _ORIGIN: json.dumps({"step": self._checkpoint.step}).encode(),
        }
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self._save_weights(partial / "numbers", partial / _WEIGHTS, progress)
            with open(partial / path.name, "wb") as file:
                with tarfile.open(fileobj=file, mode="w:", format=tarfile.GNU_FORMAT) as tar:
                    for name, text in texts.items():
                        _add(tar, name, io.BytesIO(text), len(text))
                    with open(partial / _WEIGHTS, "rb") as weights:
                        _add(tar, _WEIGHTS, weights, os.fstat(weights.fileno()).st_size)
                file.flush()
                os.fsync(file.fileno())
            (partial / path.name).replace(path)
            sync_folder(path.absolute().parent)
        except OSError as failure:
            raise UserError(f"writing {path} failed: {failure.strerror}") from failure
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _save_weights(self, scratch: Path, path: Path, progress: Callable[[int], None]) -> None:
        """Fill tensors that lie in the file ``scratch``, and hand them to ``torch.save``.

        Pages of a mapped file are not memory that is held: the system writes them out and drops
        them.
        """
        with open(scratch, "w+b") as file:
            # Room is taken first: a mapped page without room on the disk would end the process.
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            mapped = mmap.mmap(file.fileno(), self.nbytes)
        tensors: dict[str, Tensor] = {}
        done = 0
        for name, spec in self._specs.items():
            count = math.prod(spec.shape)
            flat = torch.frombuffer(mapped, dtype=spec.dtype, count=count, offset=done)
            tensors[name] = flat.view(spec.shape)
            self._checkpoint.load({name: tensors[name]})
            done += spec.nbytes
            progress(done)
        try:
            torch.save(tensors, path)
        except RuntimeError as failure:  # torch's own about a disk that refuses
            raise UserError(f"writing {path} failed: {str(failure).splitlines()[0]}") from None
        scratch.unlink()


@dataclass(frozen=True)
class NemoFile(Checkpoint):
    """A ``.nemo`` file as a checkpoint of weights, which any layout loads."""

    _weights: Mapping[str, Tensor] = field(repr=False)
    """Whole, mapped from a file."""

    @classmethod
    def open(cls, path: Path, ranks: Ranks | None = None) -> NemoFile:
        """Unpack the file ``path`` into the folder for temporary files, verify it and open it.

        A collective over ``ranks``: one of each machine unpacks. The system drops the unpacked
        weights with the last tensor.

        Raises:
            UserError: it is no ``.nemo`` file of this model class, its check sums are wrong, or
                there is no room to unpack it.
        """
        ranks = ranks or Ranks()
        machines = ranks.together(socket.gethostname)
        unpacks = machines.index(machines[ranks.rank])
        with contextlib.ExitStack() as held:

            def unpack() -> Path | None:
                if ranks.rank != unpacks:
                    return None
                folder = tempfile.TemporaryDirectory(prefix="deepseek-nemo-")
                return _unpack(path, Path(held.enter_context(folder)))

            unpacked = ranks.together(unpack)[unpacks]
            assert unpacked is not None
            opened: list[NemoFile] = []
            ranks.together(lambda: opened.append(cls._of(path, unpacked, ranks)))
        return opened[0]

    @classmethod
    def _of(cls, path: Path, folder: Path, ranks: Ranks) -> NemoFile:
        """What ``path`` holds, which lies in ``folder``."""
        state, weights = _state(path, folder), _weights(path, folder)
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [])
            for name, tensor in weights.items()
        }
        return cls(path, state["step"], state, Metadata(tensors), ranks, weights)

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            local(tensor).detach().copy_(self._weights[name][local_slices(tensor)])


def step_in(path: Path) -> int | None:
    """Optimiser steps done by the model in a ``.nemo`` file of ours; None if it does not say."""
    try:
        with tarfile.open(path, "r:") as tar:
            stream = tar.extractfile(f"./{_ORIGIN}")
            return None if stream is None else _step(stream.read(MAX_BYTES))
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError):
        return None


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode = size, 0o644
    tar.addfile(info, content)


def _unpack(path: Path, folder: Path) -> Path:
    """Unpack the members that count into ``folder``, and verify the check sums of the weights."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = list(itertools.islice(tar, _MOST_MEMBERS + 1))
            if len(found) > _MOST_MEMBERS:
                raise tarfile.TarError(f"it has more than {_MOST_MEMBERS:,} members")
            members = {member.name.removeprefix("./"): member for member in found}
            weights = members[_WEIGHTS]
            require_room(folder, weights.size, "the unpacked file (TMPDIR says where it lies)")
            limits = {_CONFIG: MAX_BYTES, _ORIGIN: MAX_BYTES, _WEIGHTS: path.stat().st_size}
            for name in limits.keys() & members.keys():
                member = members[name]
                if not member.isreg() or member.size > limits[name]:
                    raise tarfile.TarError(f"{name} is no file, or of {member.size:,} bytes")
                tar.extract(member, folder, filter="data")
    except OSError as failure:
        raise UserError(f"{path}: cannot be unpacked: {failure.strerror}") from failure
    except (tarfile.TarError, KeyError) as wrong:
        raise _no_nemo_file(path, wrong) from wrong
    try:
        damage = zip_damage(folder / _WEIGHTS)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as wrong:
        raise _no_weights(path, wrong) from wrong
    if damage is not None:
        raise UserError(f"{path} is damaged: {damage}; copy it again")
    return folder


def _state(path: Path, folder: Path) -> dict[str, Any]:
    """The state that a checkpoint would have."""
    origin = folder / _ORIGIN
    try:
        document = read_yaml((folder / _CONFIG).read_text(), f"{path}: {_CONFIG}")
        step = _step(origin.read_bytes()) if origin.exists() else 0
    except (OSError, KeyError, TypeError, ValueError) as wrong:
        raise _no_nemo_file(path, wrong) from wrong
    if document.problems:
        raise ConfigError(document.problems, f"{path}: {_CONFIG}")
    model = document.tree
    if not isinstance(model, dict) or "kv_lora_rank" not in model:
        raise UserError(
            f"{path} holds a model of another kind: its {_CONFIG} has no kv_lora_rank; give a "
            "file that `deepseek nemo export` or a run of this program wrote"
        )
    ours = {key: value for key, value in model.items() if key not in _NEMOS_KEYS}
    return {"step": step, "config": {"model": ours}, "imported": {"from": str(path)}}


def _step(origin: bytes) -> int:
    """What ``_ORIGIN`` says."""
    return int(json.loads(origin)["step"])


def _weights(path: Path, folder: Path) -> dict[str, Tensor]:
    """By name, mapped; what is written to them does not reach the file."""
    try:
        found = torch.load(folder / _WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
    except Exception as failure:  # a broken file may bring about anything
        raise _no_weights(path, failure) from None
    for name, value in found.items() if isinstance(found, dict) else [("all of it", found)]:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UserError(f"{path}: {name} is no plain tensor")
    return found


def _no_nemo_file(path: Path, why: Exception) -> UserError:
    return UserError(
        f"{path} is no .nemo file: a tar, not compressed, of {_CONFIG} and {_WEIGHTS} ({why})"
    )


def _no_weights(path: Path, why: Exception) -> UserError:
    lines = str(why).strip().splitlines() or [type(why).__name__]
    return UserError(f"{path}: its weights are no file of torch.save, or damaged: {lines[0][:200]}")
