"""A ``.nemo`` file: the whole model of a checkpoint of any layout, as NeMo keeps models.

It is a tar of ``model_config.yaml`` (the ``model`` section) and ``model_weights.ckpt`` (of
``torch.save``). NeMo itself has a model whole in memory, twice on the disk, and needs it on one
rank; here one process takes it tensor by tensor from a checkpoint. What NeMo wrote is read too.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.shards import TensorSpec, read_tensors
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.schema import ModelConfig
from deepseek.config.strict_yaml import dump_yaml, read_yaml
from deepseek.files import sync_folder
from deepseek.frameworks import NEMO_TARGET
from deepseek.interop.huggingface import account, our_shapes
from deepseek.interop.torch_file import FilePart, TensorsInFile, write_tensors

SUFFIX = ".nemo"
_CONFIG, _WEIGHTS, _ORIGIN = "model_config.yaml", "model_weights.ckpt", "deepseek.json"
_NEMOS_KEYS = ("target", "nemo_version")
"""What NeMo adds to the ``model`` section."""
_BLOCK = 512
"""Of a tar, bytes."""


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

        Args:
            path: should end in ``.nemo``.
            progress: called with the bytes that are done.

        Raises:
            UserError: the disk refuses, or the checkpoint cannot be read.
        """
        partial = path.with_name(f".{path.name}.partial")
        model = dump_yaml({**asdict(self._config), "target": NEMO_TARGET})
        origin = json.dumps({"step": self._checkpoint.step})
        done = 0

        def numbers(name: str) -> Tensor:
            nonlocal done
            spec = self._specs[name]
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            self._checkpoint.load({name: tensor})
            done += spec.nbytes
            progress(done)
            return tensor

        try:
            with open(partial, "wb") as file:
                _add(file, _CONFIG, lambda part: part.write(model.encode()))
                _add(file, _ORIGIN, lambda part: part.write(origin.encode()))
                _add(file, _WEIGHTS, lambda part: write_tensors(part, self._specs, numbers))
                file.write(bytes(2 * _BLOCK))  # the end of a tar
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            sync_folder(path.absolute().parent)
        except OSError as failure:
            raise UserError(f"writing {path} failed: {failure.strerror}") from failure
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


@dataclass(frozen=True)
class NemoFile(Checkpoint):
    """A ``.nemo`` file as a checkpoint of weights, which any layout loads."""

    _weights: TensorsInFile = field(repr=False)

    @classmethod
    def open(cls, path: Path, ranks: Ranks | None = None) -> NemoFile:
        """Verify the file ``path`` and open it; a collective over ``ranks``.

        Raises:
            UserError: it is no ``.nemo`` file of this model class, or its check sums are wrong.
        """
        ranks = ranks or Ranks()
        opened: list[NemoFile] = []

        def read() -> None:
            state, start, size = _read_tar(path)
            weights = TensorsInFile(path, start, size)
            metadata = _metadata(weights)
            opened.append(cls(path, state["step"], state, metadata, ranks, weights))

        ranks.together(read)
        weights = opened[0]._weights
        mine = sorted(weights.entries)[ranks.rank :: ranks.size]
        problems = [p for part in ranks.together(lambda: weights.damage(mine)) for p in part]
        if problems:
            raise UserError(f"{path} is damaged: {'; '.join(problems)}")
        return opened[0]

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        read_tensors(_Reader(self._weights, self._metadata), self.path, tensors, self.ranks)


def open_weights(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """A checkpoint, whether a folder of ours or a ``.nemo`` file; a collective over ``ranks``."""
    return (NemoFile if path.suffix == SUFFIX else Checkpoint).open(path, ranks)


def step_in(path: Path) -> int | None:
    """Optimiser steps done by the model in a ``.nemo`` file of ours; None if it does not say."""
    try:
        return int(_read_tar(path)[0]["step"])
    except UserError:
        return None


def _add(file: Any, name: str, write: Callable[[FilePart], object]) -> None:
    """A member of the tar; how large it is shows once it is written."""
    header = file.tell()
    file.write(bytes(_BLOCK))
    part = FilePart(file, header + _BLOCK)
    write(part)
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode = part.size, 0o644
    file.seek(header)
    file.write(info.tobuf(tarfile.GNU_FORMAT))  # PAX would need another block for large sizes
    file.seek(header + _BLOCK + part.size)
    file.write(bytes(-part.size % _BLOCK))


def _read_tar(path: Path) -> tuple[dict[str, Any], int, int]:
    """The state that a checkpoint would have, and first byte and size of the weights."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = {member.name.removeprefix("./"): member for member in tar.getmembers()}
            texts = {}
            for name in (_CONFIG, _ORIGIN):
                content = tar.extractfile(members[name]) if name in members else None
                texts[name] = content.read().decode() if content is not None else None
        weights = members[_WEIGHTS]
        model = read_yaml(texts[_CONFIG] or "", _CONFIG).tree
        step = int(json.loads(texts[_ORIGIN] or "{}").get("step", 0))
    except OSError as failure:
        raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure
    except (
        tarfile.TarError,
        KeyError,
        ValueError,
        AttributeError,
        ConfigError,
    ) as wrong:
        raise UserError(
            f"{path} is no .nemo file: a tar, not compressed, of {_CONFIG} and {_WEIGHTS} ({wrong})"
        ) from wrong
    if not isinstance(model, dict) or "kv_lora_rank" not in model:
        raise UserError(
            f"{path} holds a model of another kind: its {_CONFIG} has no kv_lora_rank; give a "
            "file that `deepseek nemo export` or a run of this program wrote"
        )
    ours = {key: value for key, value in model.items() if key not in _NEMOS_KEYS}
    return (
        {"step": step, "config": {"model": ours}, "imported": {"from": str(path)}},
        (weights.offset_data),
        weights.size,
    )


def _metadata(weights: TensorsInFile) -> Metadata:
    """As DCP describes tensors, each in one piece."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for name, place in weights.tensors.items():
        size = torch.Size(place.spec.shape)
        whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        tensors[name] = TensorStorageMetadata(TensorProperties(place.spec.dtype), size, [whole])
        places[MetadataIndex(name, whole.offsets)] = place
    return Metadata(state_dict_metadata=tensors, storage_data=places)


class _Reader(StorageReader):
    """Gives DCP the pieces that it asks for."""

    def __init__(self, weights: TensorsInFile, metadata: Metadata) -> None:
        self._weights, self._described = weights, metadata

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._described

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self._weights.read(item.storage_index.fqn)
            pieces = zip(item.storage_offsets, item.lengths, strict=True)
            for dim, (start, length) in enumerate(pieces):
                piece = piece.narrow(dim, start, length)
            place = planner.resolve_tensor(item).detach()
            place.copy_(piece)
            planner.commit_tensor(item, place)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
