"""Hugging Face weights to a checkpoint of step 0, tensor by tensor.

``WeightImport`` accounts for every tensor of the folder before a number is read, then writes one
file of the checkpoint for each file of the source. In memory there is one tensor at a time, of a
stack of experts one expert; other parts of it follow the order of the source, whatever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.checkpoint.shards import ChunkFile, TensorSpec, write_checkpoint, write_chunks
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.files import Staging, has_size
from deepseek.interop.hf_config import model_config
from deepseek.interop.hf_folder import HfFolder
from deepseek.interop.huggingface import (
    SCALE,
    HfTensor,
    Layout,
    account,
    hf_tensors,
    layer_of,
    listing,
    our_shapes,
)
from deepseek.interop.safetensors_file import TensorFile
from deepseek.ops.fp8 import block_counts, dequantise_blocks

Mtp = Literal["keep", "drop"]
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_COMPARED = 1 << 25
"""Bytes compared at once."""


class WeightImport:
    """What becomes of every tensor of a folder.

    Args:
        folder: the source.
        mtp: ``keep`` the MTP modules if there are any, or ``drop`` them.
        ignore_keys: unknown keys of ``config.json`` that are known not to change the model.

    Raises:
        UserError: the model is another one, a tensor is missing, unexpected, of another shape or
            quantised in another way; lists the names.
    """

    def __init__(
        self, folder: HfFolder, mtp: Mtp = "keep", ignore_keys: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.block = _block(folder.config)
        cfg = model_config(folder.config, ignore_keys)
        tensors = folder.tensors
        scales = {name for name in tensors if name.endswith(SCALE)}
        tables = {name for name in tensors if "rotary_emb.inv_freq" in name}
        beyond = {name for name in tensors if (layer_of(name) or 0) >= cfg.num_hidden_layers}
        if mtp == "drop" or not beyond:
            cfg = replace(cfg, num_nextn_predict_layers=0)
        self.config: ModelConfig = cfg
        """Of the model that is written."""
        self.mtp_absent = not beyond and bool(folder.config.get("num_nextn_predict_layers"))
        """``config.json`` speaks of MTP modules whose weights are not there."""
        gone = beyond if mtp == "drop" else set()
        apart = gone | scales | tables
        given = {name: spec for name, spec in tensors.items() if name not in apart}
        stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in given)
        self.layout: Layout = "stacked" if stacked else "released"
        self.targets: dict[str, HfTensor] = hf_tensors(cfg, self.layout)
        copies = {name for name, target in self.targets.items() if target.copy_of}
        account(
            f"the weights in {folder.path}",
            {name: spec.shape for name, spec in given.items()},
            {name: target.shape for name, target in self.targets.items()},
            optional=copies,
            way_out=lambda missing, unexpected: _mtp_way_out(missing, unexpected, cfg),
        )
        self._check_dtypes(given, scales - gone)
        self.dropped: dict[str, list[str]] = {
            "MTP modules": sorted(gone),
            "copies of embedding and head": sorted(copies & given.keys()),
            "rotary tables, which follow from the configuration": sorted(tables),
        }
        """Tensors of the source that are not in the result, by reason."""
        self.quantised = sorted(n for n, spec in given.items() if spec.dtype in _FP8)
        """Tensors that are FP8 in the source."""

    @property
    def result_bytes(self) -> int:
        """About how much is written."""
        shapes = our_shapes(self.config).values()
        return sum(4 * torch.Size(shape).numel() for shape in shapes) + 2048 * len(self.targets)

    def write(
        self, staging: Staging, path: Path, state: dict[str, Any], progress: Callable[[int], None]
    ) -> None:
        """Write the checkpoint into the directory ``path`` of ``staging``, or go on with it.

        Args:
            staging: remembers which files are done.
            path: of the checkpoint; may be there from an earlier attempt.
            state: of the checkpoint.
            progress: called with the bytes of the source that are done.

        Raises:
            UserError: a copy of the embedding or the head is none.
            OSError: of the disk.
        """
        path.mkdir(parents=True, exist_ok=True)
        done, written = 0, []
        for number, file in enumerate(self.folder.files):
            part = f"{number:05d}"
            note = staging.note(part)
            result = None if note is None else ChunkFile.from_json(note)
            if result is None or not has_size(path / result.name, result.entry):
                result = self._write_file(file, path / f"__0_{number}.distcp", done, progress)
                staging.done(part, result.to_json())
            file.close()
            written.append(result)
            done += sum(spec.nbytes for spec in file.tensors.values())
            progress(done)
        files = [result for result in written if result.chunks]
        for result in written:
            if not result.chunks:  # all that it held was dropped
                (path / result.name).unlink(missing_ok=True)
        shapes = {f"model.{name}": shape for name, shape in our_shapes(self.config).items()}
        self._check_written(files, shapes)
        write_checkpoint(path, 0, shapes, torch.float32, files, state)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(spec.nbytes for spec in self.folder.tensors.values())

    def _write_file(
        self, file: TensorFile, path: Path, done: int, progress: Callable[[int], None]
    ) -> ChunkFile:
        path.unlink(missing_ok=True)

        def pieces() -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
            read = done
            for name, spec in file.tensors.items():
                target = self.targets.get(name)
                if target is not None and target.copy_of is not None:
                    self._compare(file, name, target.copy_of)
                elif target is not None:
                    yield from self._pieces(file, name, target)
                read += spec.nbytes
                progress(read)

        return write_chunks(path, pieces())

    def _pieces(
        self, file: TensorFile, name: str, target: HfTensor
    ) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Our parts of one tensor of theirs, in fp32, as chunks."""
        for row, together in groupby(target.pieces, key=lambda piece: piece.row):
            numbers = self._read(file, name, row)
            for piece in together:
                part = numbers if piece.rows is None else numbers[piece.rows]
                offsets = (0,) * part.dim()
                if piece.expert is not None:
                    part, offsets = part.unsqueeze(0), (piece.expert, *offsets)
                yield f"model.{piece.name}", offsets, part

    def _read(self, file: TensorFile, name: str, row: int | None) -> Tensor:
        numbers = file.read(name, row)
        if numbers.dtype not in _FP8:
            return numbers.float()
        scale = name + SCALE
        owner = self.folder.owner[scale]
        scales = owner.read(scale, row)
        if owner is not file:
            owner.close()
        return dequantise_blocks(numbers, scales, self.block)

    def _compare(self, file: TensorFile, name: str, original: str) -> None:
        """The MTP layers share the main model's embedding and head, as they must here."""
        owner = self.folder.owner[original]
        rows, size = file.tensors[name].shape[0], file.tensors[name].nbytes
        step = max(1, _COMPARED * rows // max(size, 1))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            mine = file.read_rows(name, first, count).float()
            if not torch.equal(mine, owner.read_rows(original, first, count).float()):
                raise UserError(
                    f"{self.folder.path}: {name} differs from {original}, which the MTP modules "
                    "share here; import without them (--mtp drop)"
                )
        if owner is not file:
            owner.close()

    def _check_dtypes(self, given: dict[str, TensorSpec], scales: set[str]) -> None:
        problems = []
        for name, spec in given.items():
            scale = name + SCALE
            if spec.dtype in _FP8 and self.targets[name].copy_of is None:
                if len(spec.shape) < 2:
                    problems.append(f"{name}: is FP8, and only matrices have scales per block")
                    continue
                down, across = block_counts((spec.shape[-2], spec.shape[-1]), self.block)
                wanted = (*spec.shape[:-2], down, across)
                if scale not in scales:
                    problems.append(f"{name}: is FP8 and has no {scale}")
                elif (shape := self.folder.tensors[scale].shape) != wanted:
                    problems.append(f"{scale}: is {shape}, {name} needs {wanted}")
            elif spec.dtype not in _PLAIN:
                problems.append(f"{name}: is {spec.dtype}")
            elif scale in scales:
                problems.append(f"{scale}: {name} is {spec.dtype} and needs no scales")
        problems += [
            f"{scale}: there is no {scale.removesuffix(SCALE)}"
            for scale in scales
            if scale.removesuffix(SCALE) not in given
        ]
        if problems:
            raise UserError(
                f"the weights in {self.folder.path} cannot be read as fp32, bf16, fp16, or FP8 "
                f"with scales per block {self.block}:\n  {len(problems)} tensors: "
                f"{listing(problems, 6)}"
            )

    def _check_written(self, files: list[ChunkFile], shapes: dict[str, tuple[int, ...]]) -> None:
        """Written = expected, number by number."""
        found = dict.fromkeys(shapes, 0)
        for file in files:
            for chunk in file.chunks:
                found[chunk.name] += torch.Size(chunk.sizes).numel()
        wrong = [name for name, shape in shapes.items() if found[name] != torch.Size(shape).numel()]
        if wrong:
            raise UserError(f"{len(wrong)} tensors were not written whole: {listing(wrong)}")


def _mtp_way_out(missing: list[str], unexpected: list[str], cfg: ModelConfig) -> str:
    """Advice where MTP layers alone are wrong, else nothing."""
    layers = [layer_of(name) for name in missing + unexpected]
    if any(layer is None or layer < cfg.num_hidden_layers for layer in layers):
        return ""
    return (
        f"config.json counts num_nextn_predict_layers={cfg.num_nextn_predict_layers} MTP layers, "
        "the weights hold others; correct it there, or import without them (--mtp drop)"
    )


def _block(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return 128, 128
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method != "fp8":
        raise UserError(
            f"config.json: quantization_config.quant_method={method}: only fp8 with scales per "
            "block is read; take the bf16 or fp8 weights of the model"
        )
    block = quantisation.get("weight_block_size", [128, 128])
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(
            f"config.json: quantization_config.weight_block_size={block}: FP8 weights need scales "
            "per block, [rows, columns]"
        )
    return block[0], block[1]
