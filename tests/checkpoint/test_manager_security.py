"""A hostile ``.metadata``: it is a pickle, and must not run, mislead or leave the directory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from deepseek.checkpoint import metadata as module
from deepseek.checkpoint.checkpoint import describe, newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.config.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
    return CheckpointManager(tmp_path / "checkpoints").save(1, tensors, {})


def forge(path: Path, content: bytes) -> None:
    """Another ``.metadata``, with the size and digest that go with it."""
    (path / ".metadata").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][".metadata"] = {"size": len(content), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))


def refusal(path: Path) -> str:
    """Message of opening it, the same by every door."""
    with pytest.raises(UserError) as caught:
        newest_sound(path.parent, lambda text: None)
    (row,) = describe(path.parent)
    assert row.problem is not None and row.problem in str(caught.value)
    return row.problem


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def genuine(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def test_payload_does_not_run(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "made-by-the-pickle"
    attack = Call(os.mkdir, str(target))
    pickle.loads(pickle.dumps(attack))
    assert target.exists()  # the payload is live
    target.rmdir()
    hidden = genuine(path)
    hidden.planner_data = {"a": attack}
    in_storage = genuine(path)
    in_storage.storage_data["c"] = attack
    for content in (attack, hidden, in_storage):
        # Before protocol 2 pickle calls a helper first, which is refused before the payload.
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            forge(path, pickle.dumps(content, protocol))
            text = refusal(path)
            assert f"{path / '.metadata'}: refused: it asks to load" in text
            assert "mkdir" in text and "do not use this checkpoint" in text
            assert not target.exists()


STOP = b"."
NAMES = [
    "builtins eval",
    "builtins getattr",
    "torch load",
    "torch serialization",
    "torch.serialization load",
    "torch.distributed.checkpoint.metadata torch.load",
    "torch.distributed.checkpoint.metadata Metadata.__init__.__globals__",
    "torch.distributed.checkpoint.filesystem FileSystem",
    "torch Size.__new__",
    "deepseek.checkpoint.metadata _Unused",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_other_name_is_given(path: Path, name: str) -> None:
    owner, attribute = name.split(" ")
    stacked = b"\x8c" + bytes([len(owner)]) + owner.encode()
    stacked += b"\x8c" + bytes([len(attribute)]) + attribute.encode() + b"\x93"
    classic = f"c{owner}\n{attribute}\n".encode()
    for content in (b"\x80\x04" + stacked + STOP, classic + STOP):
        forge(path, content)
        assert f"it asks to load {owner}.{attribute}, which no" in refusal(path)


def test_persistent_object(path: Path) -> None:
    forge(path, b"Pfile\n.")
    assert "it asks to load the persistent object 'file'" in refusal(path)


@pytest.mark.parametrize("name", ["TensorStorageMetadata", "StorageMeta", "Metadata"])
def test_a_class_cannot_be_altered(path: Path, name: str) -> None:
    """BUILD on the class itself instead of an instance would set its attributes for all."""
    kinds = [getattr(dcp_metadata, name), *module._CLASSES.values()]
    before = [dict(vars(kind)) for kind in kinds]
    owner = f"c{dcp_metadata.__name__}\n{name}\n".encode()
    forge(path, owner + b"(N}V__setstate__\nI1\nstb.")
    assert "not the metadata of a checkpoint" in refusal(path)
    assert before == [dict(vars(kind)) for kind in kinds]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04N.",
        b"\x80\x04}.",
        b"garbage",
        b"\xff" * 100,
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(Metadata({}, storage_data=None)),
        pickle.dumps(Metadata({"a": BytesStorageMetadata()}, storage_data={})),
        pickle.dumps(Metadata({"a": BytesStorageMetadata()}, storage_data={}))[:-20],
    ],
)
def test_what_is_no_metadata(path: Path, content: bytes) -> None:
    forge(path, content)
    assert f"{path / '.metadata'}: not the metadata of a checkpoint" in refusal(path)


def storage(metadata: Metadata, name: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def of_a(**changes: object) -> Callable[[Metadata], None]:
    """Sets attributes of the tensor ``a``, of its only chunk, or of where that lies."""

    def change(metadata: Metadata) -> None:
        entry: Any = metadata.state_dict_metadata["a"]
        for name, value in changes.items():
            owners = (storage(metadata, "a"), entry.chunks and entry.chunks[0], entry)
            setattr(next(owner for owner in owners if hasattr(owner, name)), name, value)

    return change


def named(name: object, value: object) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["a"] if value == "a" else value
        metadata.state_dict_metadata[name] = entry  # type: ignore

    return change


def nowhere(metadata: Metadata) -> None:
    metadata.storage_data = {i: v for i, v in metadata.storage_data.items() if i.fqn != "a"}


HUGE = torch.Size([10**9, 10**9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_a(relative_path="../../outside"), "files are missing, such as ../../outside"),
        (of_a(relative_path=7), "files are missing, such as 7"),
        (of_a(length=10**9), "__0_0.distcp is cut short: it has"),
        (of_a(offset=-1), "at -1 of '__0_0.distcp'"),
        (of_a(length=True), "True bytes at"),
        (of_a(transform_descriptors=["stream.zstd"]), "a is stored by an extension of DCP"),
        (of_a(sizes=torch.Size([1, 3])), "a: 1 chunks hold 3 of 6 numbers"),
        (of_a(sizes=HUGE, size=HUGE), "a: the chunk at (0, 0) is in no file"),
        (of_a(sizes=torch.Size([-2, -3])), "a: a chunk of shape (-2, -3) at (0, 0) does not fit"),
        (
            of_a(offsets=torch.Size([1, 0])),
            "a: a chunk of shape (2, 3) at (1, 0) does not fit into (2, 3)",
        ),
        (nowhere, "a: the chunk at (0, 0) is in no file"),
        (of_a(chunks=[]), "a: 0 chunks hold 0 of 6 numbers"),
        (of_a(chunks=None), "not the metadata of a checkpoint"),
        (of_a(properties=None), "not the metadata of a checkpoint"),
        (of_a(size=(2, 1.5)), "not the metadata of a checkpoint"),
        (named(7, "a"), "the name of a tensor is 7"),
        (named("a", 3), "not the metadata of a checkpoint"),
        (named("c", BytesStorageMetadata()), "c is in no file"),
        (named("a", BytesStorageMetadata()), "a is no tensor, which no checkpoint holds here"),
    ],
)
def test_metadata_that_misleads(
    path: Path, change: Callable[[Metadata], None], message: str
) -> None:
    metadata = genuine(path)
    change(metadata)
    forge(path, pickle.dumps(metadata))
    assert message in refusal(path)


def test_the_genuine_one_passes_the_forge(path: Path) -> None:
    """The tests above change what they mean to change: an unchanged copy opens."""
    forge(path, pickle.dumps(genuine(path)))
    checkpoint = newest_sound(path.parent, pytest.fail)
    assert checkpoint is not None
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(0)}
    checkpoint.load(tensors)
    assert tensors["a"].flatten().tolist() == [0, 1, 2, 3, 4, 5] and tensors["b"] == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", ".", "..", "manifest.json", "x\0"])
def test_manifest_cannot_name_other_places(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "a name, size or digest is malformed" in refusal(path)


def test_shard_that_is_a_pickle(path: Path, tmp_path: Path) -> None:
    """A payload in place of a tensor in a shard, digests and all."""
    target = tmp_path / "made-by-the-shard"
    shard = path / "__0_0.distcp"
    metadata = genuine(path)
    torch.save(Call(os.mkdir, str(target)), shard)
    info = storage(metadata, "a")
    info.offset, info.length = 0, shard.stat().st_size
    metadata.state_dict_metadata.pop("b")
    metadata.storage_data = {i: v for i, v in metadata.storage_data.items() if i.fqn == "a"}
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest["files"][shard.name] = {"size": shard.stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    forge(path, pickle.dumps(metadata))
    checkpoint = newest_sound(path.parent, pytest.fail)
    assert checkpoint is not None
    with pytest.raises(UserError, match="reading from .* failed: rank 0: UnpicklingError"):
        checkpoint.load({"a": torch.zeros(2, 3)})
    assert not target.exists()
