"""The checkpoint store: what goes in comes out, damage is found, a writer starts cleanly."""

from __future__ import annotations

import fcntl
import json
import os
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint, describe, newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import complete_steps, damage_of
from deepseek.config.errors import UserError
from support.stored import bits, flip, flip_number, save, shard_of, value_of

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# -- what goes in comes out ------------------------------------------------------------------------


def odd_tensors() -> dict[str, Tensor]:
    """Every dtype of a run and some more, and the values that a cast would lose."""
    rare = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 3.1], dtype=torch.float32)
    payload = torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32)
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "rare.fp32": rare,
        "rare.nan_payload": payload,
        "rare.bf16": rare.bfloat16(),
        "rare.fp64": rare.double() / 3,
        "rare.fp16": rare.half(),
        "fp8": torch.arange(7.0).to(torch.float8_e4m3fn),
        "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "zero_dim.fp32": torch.tensor(0.1),
        "zero_dim.bf16": torch.tensor(0.1, dtype=torch.bfloat16),
        "zero_dim.int64": torch.tensor(2**40),
        "empty": torch.zeros(0, 4),
        "a view": base[1:3, 2:5],
        "transposed": base.T,
        "expanded": torch.tensor([1.0]).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_round_trip(manager: CheckpointManager, device: str) -> None:
    tensors = {name: tensor.to(device) for name, tensor in odd_tensors().items()}
    manager.save(3, tensors, {})
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None and checkpoint.step == 3
    assert checkpoint.tensor_names() == sorted(tensors)
    assert checkpoint.tensor_shapes() == {n: tuple(t.shape) for n, t in tensors.items()}
    assert checkpoint.tensor_dtypes() == {n: t.dtype for n, t in tensors.items()}
    found = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in tensors.items()
    }
    places = {name: tensor.data_ptr() for name, tensor in found.items()}
    checkpoint.load(found)
    for name, tensor in tensors.items():
        assert bits(found[name]) == bits(tensor), name
        assert found[name].data_ptr() == places[name], name


names = st.text(string.ascii_letters + string.digits + "._-/ é", min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])


@given(st.dictionaries(names, st.tuples(shapes, dtypes), min_size=1, max_size=6))
def test_any_names_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    tensors = {
        name: torch.randint(-99, 99, shape).to(dtype) for name, (shape, dtype) in kinds.items()
    }
    with CheckpointManager(tmp_path_factory.mktemp("any")) as manager:
        manager.save(0, tensors, {})
        checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None
    found = {name: torch.full_like(tensor, 100) for name, tensor in tensors.items()}
    checkpoint.load(found)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_targets_that_are_views_and_parameters(manager: CheckpointManager) -> None:
    manager.save(1, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, {})
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None
    whole, parameter = torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(2))
    checkpoint.load({"a": whole.T[1:3, :], "b": parameter})
    assert whole.T[1:3, :].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert whole.T[0].tolist() == [0, 0, 0]
    assert parameter.tolist() == [1, 1] and parameter.requires_grad


def test_a_view_does_not_drag_its_storage_along(manager: CheckpointManager) -> None:
    path = manager.save(1, {"row": torch.zeros(1000, 1000)[5]}, {})
    assert shard_of(path).stat().st_size < 10_000


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        path = CheckpointManager(tmp_path / name).save(4, odd_tensors(), {"seed": 1})
        manifests.append((path / "manifest.json").read_text())
    assert manifests[0] == manifests[1]


def test_a_plan_is_made_anew_only_for_other_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("full")

    made: list[int] = []
    plan = dcp.DefaultSavePlanner.create_local_plan
    monkeypatch.setattr(
        dcp.DefaultSavePlanner, "create_local_plan", lambda self: made.append(1) or plan(self)
    )
    manager, tensors = CheckpointManager(tmp_path / "a"), odd_tensors()
    manager.save(1, tensors, {})
    changed = {
        name: (1 - tensor.float()).to(tensor.dtype) if name.startswith("rare") else tensor
        for name, tensor in tensors.items()
    }
    manager.save(2, changed, {})
    assert len(made) == 1
    other = CheckpointManager(tmp_path / "b")
    other.save(2, changed, {})
    files = [(folder / "step_00000002/manifest.json").read_text() for folder in tmp_path.iterdir()]
    assert files[0] == files[1]
    assert len(made) == 2
    manager.save(3, {**changed, "rare.fp32": changed["rare.fp32"].double()}, {})
    assert len(made) == 3
    with pytest.raises(OSError, match="full"), monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "_finish", full)
        manager.save(4, changed, {})
    manager.save(4, changed, {})
    manager.save(5, changed, {})
    assert len(made) == 5, "one for the save that failed, one for those after it"
    assert Checkpoint.open(tmp_path / "a/step_00000005").tensor_dtypes() == {
        name: tensor.dtype for name, tensor in changed.items()
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_reads_it(manager: CheckpointManager) -> None:
    path = save(manager, 1, 2.5)
    tensors = {"layer.weight": torch.zeros(3, 4)}
    dcp.load(tensors, checkpoint_id=path)
    assert (tensors["layer.weight"] == 2.5).all()


# -- the run state ---------------------------------------------------------------------------------


def test_state_comes_back_equal(manager: CheckpointManager) -> None:
    state = {
        "step": 7,
        "big": 2**100,
        "floats": [0.1, -0.0, 1e308, 5e-324],
        "text": "größe \ud800 \0 \n",
        "nothing": None,
        "flags": [True, False],
        "nested": {"": {"a": [[], {}]}},
    }
    manager.save(7, {"a": torch.zeros(1)}, state)
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None
    assert checkpoint.state() == state
    assert repr(checkpoint.state()) == repr(state)  # -0.0, True and 1 are equal to others


def a_cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["self"] = [cycle]
    return cycle


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"loss": float("nan")}, "state['loss'] is nan: JSON has no such number; store None"),
        ({"a": [1, {"b": float("-inf")}]}, "state['a'][1]['b'] is -inf"),
        ({"shape": (1, 2)}, "state['shape'] is a tuple; store a list"),
        ({"ids": {1, 2}}, "state['ids'] is a set; store a list"),
        ({3: "x"}, "state[3]: the key is a int, JSON keys are str; use str(key)"),
        ({"a": {None: 1}}, "state['a'][None]: the key is a NoneType"),
        ({"w": torch.ones(2)}, "state['w'] is a Tensor; store a torch tensor among the tensors"),
        ({"lr": np.float64(0.1)}, "state['lr'] is a float64; store a torch tensor among the"),
        ({"raw": b"x"}, "state['raw'] is a bytes; store None, bool, int, float, str, list or"),
        ({"path": Path("x")}, "Path; store None, bool"),
        (a_cycle(), "nested too deeply or contains itself"),
        ([1], "the state of a checkpoint must be a dict, got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_that_json_would_bend(manager: CheckpointManager, state: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        manager.save(1, {"a": torch.zeros(1)}, state)
    assert message in str(caught.value)
    assert manager.steps() == []


@pytest.mark.parametrize(
    ("step", "tensors", "message"),
    [
        (-1, {"a": torch.zeros(1)}, "must be an int of 0 or more, got -1"),
        (1.0, {"a": torch.zeros(1)}, "must be an int of 0 or more, got 1.0"),
        (1, {"a": 3}, "a: is a int; put it into the state"),
        (1, {"": torch.zeros(1)}, "'': the name must be a string"),
        (1, {"a": torch.zeros(1, device="meta")}, "a: is on the meta device"),
        (1, {"a": torch.eye(2).to_sparse()}, "a: is torch.sparse_coo; store it dense"),
        (1, {}, "no rank has a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_tensor(
    manager: CheckpointManager, step: Any, tensors: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        manager.save(step, tensors, {})
    assert message in str(caught.value)
    assert list(manager.folder.glob("*")) == [manager.folder / ".lock"]


# -- loading is strict -----------------------------------------------------------------------------


def test_load_names_what_does_not_fit(manager: CheckpointManager) -> None:
    manager.save(1, {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(2)}, {})
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None
    tensors = {
        "a": torch.zeros(2),
        "b": torch.zeros(3, 2),
        "c": torch.zeros(2, dtype=torch.bfloat16),
        "d": torch.zeros(1),
    }
    with pytest.raises(UserError) as caught:
        checkpoint.load(tensors)
    assert str(caught.value) == (
        f"{checkpoint.path} does not fit 3 of the 4 tensors asked for:\n"
        "  b: has shape [2, 3], asked for [3, 2]\n"
        "  c: is torch.float32, asked for torch.bfloat16\n"
        "  d: missing\n"
        "use the configuration it was written with (state.json)"
    )
    assert tensors["a"].tolist() == [0, 0]  # nothing was filled
    with pytest.raises(UserError, match="a: the tensor to fill is on the meta device"):
        checkpoint.load({"a": torch.zeros(2, device="meta")})
    with pytest.raises(UserError, match=r"x7: missing\n  and 12 more\n"):
        checkpoint.load({f"x{i}": torch.zeros(1) for i in range(20)})


def test_file_that_vanishes_after_opening(manager: CheckpointManager) -> None:
    path = save(manager, 1)
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None
    shard_of(path).unlink()
    with pytest.raises(UserError, match="reading from .* failed: rank 0: FileNotFoundError"):
        value_of(checkpoint)


# -- damage ----------------------------------------------------------------------------------------

FILES = ["__0_0.distcp", ".metadata", "state.json", "manifest.json"]


def newest_with_report(folder: Path) -> tuple[Checkpoint | None, str]:
    reports: list[str] = []
    checkpoint = newest_sound(folder, reports.append)
    return checkpoint, "\n".join(reports)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_flipped_bit(manager: CheckpointManager, name: str, where: float) -> None:
    save(manager, 1)
    path = save(manager, 2)
    size = (path / name).stat().st_size
    flip(path / name, int(where * (size - 1)), bit=3)
    checkpoint, report = newest_with_report(manager.folder)
    assert checkpoint is not None and checkpoint.step == 1 and value_of(checkpoint) == 1
    assert str(path) in report and report.endswith("trying the one before")
    if name != "manifest.json":
        assert f"{name}: sha256 is " in report and ", expected " in report


def test_any_flipped_bit_of_the_manifest(manager: CheckpointManager) -> None:
    path = save(manager, 1)
    file = path / "manifest.json"
    content = file.read_bytes()
    assert damage_of(path) is None
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            assert damage_of(path) is not None, (position, bit, flipped[position])


def test_report_gives_both_digests(manager: CheckpointManager) -> None:
    save(manager, 1)
    path = save(manager, 2)
    (path / "state.json").write_bytes(b"x" * (path / "state.json").stat().st_size)
    entries = json.loads((path / "manifest.json").read_text())["files"]
    report = newest_with_report(manager.folder)[1]
    expected = entries["state.json"]["sha256"]
    assert report.startswith(f"{path} is damaged: state.json: sha256 is ")
    assert f", expected {expected};" in report


@pytest.mark.parametrize("name", FILES)
def test_shorter_or_longer(manager: CheckpointManager, name: str) -> None:
    save(manager, 1)
    path = save(manager, 2)
    size = (path / name).stat().st_size
    for wrong in (size - 1, size + 1):
        os.truncate(path / name, wrong)
        assert manager.steps() == [1]
        checkpoint, report = newest_with_report(manager.folder)
        assert checkpoint is not None and checkpoint.step == 1
        if name == "manifest.json":
            assert f"{path}: manifest.json: not a manifest" in report
        else:
            assert f"{path} is damaged: {name}: size is {wrong} bytes, expected {size}" in report


@pytest.mark.parametrize("name", FILES)
def test_missing_file(manager: CheckpointManager, name: str) -> None:
    save(manager, 1)
    path = save(manager, 2)
    (path / name).unlink()
    assert manager.steps() == [1]
    checkpoint, report = newest_with_report(manager.folder)
    assert checkpoint is not None and checkpoint.step == 1
    assert str(path) in report and f"{name}: missing" in report


@pytest.mark.parametrize("name", FILES)
def test_unreadable_file(manager: CheckpointManager, name: str) -> None:
    save(manager, 1)
    path = save(manager, 2)
    (path / name).unlink()
    (path / name).symlink_to(name)  # a loop
    checkpoint, report = newest_with_report(manager.folder)
    assert checkpoint is not None and checkpoint.step == 1
    assert f"{name}: cannot be read: Too many levels of symbolic links" in report


def test_renamed_directory(manager: CheckpointManager) -> None:
    path = save(manager, 1)
    path.rename(manager.folder / "step_00000009")
    assert manager.steps() == []
    with pytest.raises(UserError, match="holds step 1; rename it step_00000001"):
        newest_sound(manager.folder, print)


def test_manifest_of_another_format(manager: CheckpointManager) -> None:
    path = save(manager, 1)
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(UserError, match="format is 2, this program reads 1"):
        newest_sound(manager.folder, print)


def test_none_is_sound(manager: CheckpointManager) -> None:
    """Never start from zero beside checkpoints that exist."""
    first, second = save(manager, 1), save(manager, 2)
    flip_number(first)
    os.truncate(second / "state.json", 1)
    reports: list[str] = []
    with pytest.raises(UserError) as caught:
        manager.newest_sound(reports.append)
    text = str(caught.value)
    assert f"no checkpoint in {manager.folder} is sound" in text
    assert f"{first} is damaged: __0_0.distcp: sha256" in text
    assert f"{second} is damaged: state.json: size is 1 bytes" in text
    assert "move them away to start from step 0" in text
    assert [str(second) in reports[0], str(first) in reports[1]] == [True, True]


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "absent", pytest.fail) is None
    assert complete_steps(tmp_path / "absent") == [] and describe(tmp_path / "absent") == []
    assert not (tmp_path / "absent").exists()
    assert CheckpointManager(tmp_path).newest_sound(pytest.fail) is None


def test_retired_while_being_read(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader beside a running training: what the writer deletes meanwhile is not damaged."""
    save(manager, 1)
    path = save(manager, 2)
    real = Checkpoint.open

    def open_late(where: Path, *args: Any) -> Checkpoint:
        if where == path:
            where.rename(manager.folder / ".trash-x")
        return real(where, *args)

    monkeypatch.setattr(Checkpoint, "open", open_late)
    checkpoint = newest_sound(manager.folder, pytest.fail)
    assert checkpoint is not None and checkpoint.step == 1


# -- the start of a writer -------------------------------------------------------------------------


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1)
        save(manager, 2, 20.0)
    for name in (".tmp-a", ".trash-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    # Replaced, and killed before the old one was deleted; replaced, and killed half-way.
    (tmp_path / ".replaced-step_00000001").mkdir()
    (tmp_path / "step_00000002").rename(tmp_path / ".replaced-step_00000002")
    with CheckpointManager(tmp_path) as manager:
        names = [".lock", "step_00000001", "step_00000002"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert value_of(manager.newest_sound(pytest.fail)) == 20


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="opening .*x for checkpoints failed: File exists"):
        CheckpointManager(tmp_path / "x")


def test_closed_manager_and_its_successor(tmp_path: Path) -> None:
    first = CheckpointManager(tmp_path)
    second = CheckpointManager(tmp_path)  # the same process: a leftover of an earlier run
    save(second, 1)
    with pytest.raises(UserError, match="a later one of the same process took over"):
        save(first, 2)
    first.close()
    save(second, 2)
    second.close()
    second.close()
    with pytest.raises(UserError, match="was closed"):
        save(second, 3)
    assert second.steps() == [1, 2]


def test_lock_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="opening .* for checkpoints failed: Input/output error"):
        CheckpointManager(tmp_path)


# -- the listing -----------------------------------------------------------------------------------


def test_describe(manager: CheckpointManager) -> None:
    manager.keep = -1
    first, second, third = (save(manager, step) for step in (1, 2, 3))
    flip_number(second)
    (third / ".metadata").unlink()
    rows = describe(manager.folder)
    assert [(row.step, row.tensors) for row in rows] == [(3, None), (2, None), (1, 1)]
    assert rows[0].problem == f"{third} is damaged: .metadata: missing"
    assert rows[1].problem is not None and "__0_0.distcp: sha256 is" in rows[1].problem
    assert rows[2].problem is None and rows[2].path == first
    assert rows[2].size == sum(file.stat().st_size for file in first.iterdir())
    sizes_only = describe(manager.folder, digests=False)
    assert [row.problem is None for row in sizes_only] == [False, True, True]
