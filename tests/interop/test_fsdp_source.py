"""What is no checkpoint of FSDP: every reason to refuse one, and nothing in it that runs."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.config.errors import UserError
from deepseek.interop.fsdp_source import open_source
from support.fsdp_checkpoints import GATE, assert_same, expected, migrate, run, save, written


class Code:
    """Runs when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_code_in_a_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": run()["model"], "extra": Code(tmp_path / "ran")}, tmp_path / "full.pt")
    with pytest.raises(UserError, match="refused: it asks to load .*Save the state dicts alone"):
        open_source(tmp_path / "full.pt")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_metadata_is_refused(tmp_path: Path) -> None:
    path = save(run(), tmp_path / "sharded")
    (path / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(UserError, match="refused: it asks to load pathlib.*touch|getattr"):
        open_source(path)
    assert not (tmp_path / "ran").exists()


def test_code_among_the_objects_is_never_run(tmp_path: Path) -> None:
    path = save(run() | {"scheduler": Code(tmp_path / "ran")}, tmp_path / "sharded")
    migration = migrate(path)
    assert migration.dropped["state of the old run (data, random numbers, counters)"] == [
        "scheduler"
    ]
    assert_same(written(migration, tmp_path), expected())
    assert not (tmp_path / "ran").exists()


def local_file(folder: Path) -> Path:
    return save({"layers.0._flat_param": torch.zeros(9)}, folder / "local.pt")


def rank_files(folder: Path) -> Path:
    for rank in range(2):
        save(run()["model"], folder / f"pytorch_model_fsdp_rank{rank}.bin")
    return folder


def one_rank(folder: Path) -> Path:
    return rank_files(folder) / "pytorch_model_fsdp_rank1.bin"


def local_dcp(folder: Path) -> Path:
    return save({"model": {"_flat_param": torch.zeros(9)}}, folder / "local")


def nothing(folder: Path) -> Path:
    return folder / "nothing"


def other_file(folder: Path) -> Path:
    (folder / "notes.pt").write_text("notes")
    return folder / "notes.pt"


def cut_off(folder: Path) -> Path:
    path = save(run(), folder / "full.pt")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def cut_in_half(folder: Path) -> Path:
    path = save(run(), folder / "full.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def not_a_dictionary(folder: Path) -> Path:
    torch.save(torch.zeros(3), folder / "one.pt")
    return folder / "one.pt"


def no_tensors(folder: Path) -> Path:
    return save({"step": 3}, folder / "state.pt")


def safetensors(folder: Path) -> Path:
    (folder / "model.safetensors").touch()
    return folder


def deepspeed(folder: Path) -> Path:
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    return folder


def parent(folder: Path) -> Path:
    save(run(), folder / "step_7")
    return folder


def part_of_dcp(folder: Path) -> Path:
    return save(run(), folder / "sharded") / ".metadata"


def of_ours(folder: Path) -> Path:
    (folder / "checkpoints").mkdir()
    return folder


def lost_file(folder: Path) -> Path:
    path = save(run(), folder / "sharded")
    (path / "__0_0.distcp").unlink()
    return path


def cut_shard(folder: Path) -> Path:
    path = save(run(), folder / "sharded")
    with open(path / "__0_0.distcp", "r+b") as stream:
        stream.truncate(1000)
    return path


def empty_metadata(folder: Path) -> Path:
    path = save(run(), folder / "sharded")
    (path / ".metadata").write_bytes(b"")
    return path


def flipped_bit(folder: Path) -> Path:
    """In the middle of a tensor: torch alone loads it without a word."""
    path = save(run(), folder / "full.pt")
    with zipfile.ZipFile(path) as archive:
        member = next(member for member in archive.infolist() if "/data/" in member.filename)
    content = bytearray(path.read_bytes())
    lengths = struct.unpack_from("<HH", content, member.header_offset + 26)
    content[member.header_offset + 30 + sum(lengths) + member.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    return path


def aliased(folder: Path) -> Path:
    content = run()
    state = content["optimizer"]["state"][GATE]
    state["exp_avg"] = state["exp_avg_sq"]
    return save(content, folder / "full.pt")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (local_file, ["LOCAL_STATE_DICT", "_flat_param is a flat parameter", "save it again"]),
        (local_dcp, ["LOCAL_STATE_DICT", "save it again as FULL_STATE_DICT or SHARDED"]),
        (rank_files, ["LOCAL_STATE_DICT", "pytorch_model_fsdp_rank0.bin is one rank's file"]),
        (one_rank, ["LOCAL_STATE_DICT", "it is one rank's file"]),
        (nothing, ["does not exist"]),
        (other_file, ["no file of torch.save, or damaged"]),
        (cut_off, ["no file of torch.save, or damaged"]),
        (cut_in_half, ["full.pt", "copy it again"]),
        (not_a_dictionary, ["holds a Tensor, expected a dictionary"]),
        (no_tensors, ["holds no tensor"]),
        (safetensors, ["Hugging Face weights", "deepseek hf import"]),
        (deepspeed, ["DeepSpeed", "zero_to_fp32.py"]),
        (parent, ["is no checkpoint", "give one of those inside: step_7"]),
        (part_of_dcp, ["part of a DCP checkpoint; give its folder"]),
        (of_ours, ["of this program already", "model.restore_from"]),
        (
            lost_file,
            ["1 of its 1 files are missing, such as __0_0.distcp", "copy the folder again"],
        ),
        (cut_shard, ["__0_0.distcp is cut short: it has 1,000 bytes and needs", "copy it again"]),
        (empty_metadata, [".metadata: not the metadata of a checkpoint"]),
        (flipped_bit, ["full.pt is damaged: the check sum of full/data/", "copy it again"]),
        (aliased, [f"{GATE}.exp_avg_sq are the same numbers", "SHARDED_STATE_DICT"]),
    ],
)
def test_no_such_checkpoint(tmp_path: Path, make: Any, parts: list[str]) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        open_source(path)
    for part in parts:
        assert part in str(error.value)


def test_shards_in_a_torch_file_are_local(tmp_path: Path) -> None:
    """What a rank gets by saving its sharded state dict with torch.save."""
    from torch.distributed._shard.sharded_tensor import Shard, ShardMetadata

    meta = ShardMetadata([0], [2], placement="rank:0/cpu")
    torch.save({"embed": Shard(torch.zeros(2), meta)}, tmp_path / "shard.pt")
    with pytest.raises(UserError, match="LOCAL_STATE_DICT .it holds one rank's shards"):
        open_source(tmp_path / "shard.pt")


def test_a_file_without_check_sums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(run(), tmp_path / "full.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_source(path).tensors
