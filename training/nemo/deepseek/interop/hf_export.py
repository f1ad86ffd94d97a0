"""A checkpoint to Hugging Face weights, tensor by tensor, in shards with an index.

Of the checkpoint one tensor at a time is in memory (of a layer's experts, one of their three
stacks), of the files nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.files import FileEntry, HashingWriter, Staging, has_size
from deepseek.interop.hf_config import hf_config
from deepseek.interop.hf_import import CONFIG, INDEX, SINGLE, TORCH_DTYPES, TensorFile
from deepseek.interop.huggingface import (
    SCALE,
    HfTensor,
    account,
    hf_tensors,
    is_bias,
    is_projection,
    listing,
    our_shapes,
)
from deepseek.ops.fp8 import E4M3, block_counts, quantise_blocks

Dtype = Literal["fp32", "bf16", "fp8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of what is not quantised."""
BLOCK = (128, 128)
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
"""What ``config.json`` says of FP8 weights, as that of DeepSeek-V3 does."""
_WEIGHTS, _STATES = "model.", "optim."
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""As safetensors headers have them."""


class WeightExport:
    """What becomes of every tensor of a checkpoint.

    Args:
        checkpoint: whole, of any layout; its optimiser state is not read.
        config: of the model in it.
        dtype: of the files; correction biases are fp32 always. ``fp8``: as released, projections in
            FP8 with a scale per block, the rest in bf16.
        mtp: False leaves the MTP modules out.
        shard_bytes: size that no file exceeds, unless a single tensor does.

    Raises:
        UserError: the checkpoint does not hold exactly this model; lists the names.
        ConfigError: no Hugging Face class computes it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: Dtype = "fp32",
        mtp: bool = True,
        shard_bytes: int = 5 * 10**9,
    ) -> None:
        self.checkpoint = checkpoint
        shapes = checkpoint.tensor_shapes()
        foreign = [name for name in shapes if not name.startswith((_WEIGHTS, _STATES))]
        if foreign:
            raise UserError(f"{checkpoint.path} holds what is no weight: {listing(foreign)}")
        weights = {
            name.removeprefix(_WEIGHTS): shape
            for name, shape in shapes.items()
            if name.startswith(_WEIGHTS)
        }
        account(f"the weights of {checkpoint.path}", weights, our_shapes(config))
        self._shapes = weights
        self._stored = {
            name.removeprefix(_WEIGHTS): kind for name, kind in checkpoint.tensor_dtypes().items()
        }
        self.dropped = [] if mtp else [name for name in weights if name.startswith("mtp.")]
        """Our names of what is left out."""
        self.config = config if mtp else replace(config, num_nextn_predict_layers=0)
        """Of the model that is written."""
        self.hf_config: dict[str, Any] = {
            **hf_config(self.config),
            "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
        }
        if dtype == "fp8":
            self.hf_config["quantization_config"] = QUANTISATION
        """Content of ``config.json``; token ids are null."""
        self._dtype, self._quantises = DTYPES[dtype], dtype == "fp8"
        self._targets = hf_tensors(self.config)
        self._shards = self._plan(shard_bytes)
        self._last: tuple[str, Tensor] | None = None

    @property
    def narrows(self) -> bool:
        """Whether numbers are rounded to a smaller dtype."""
        kept = (self._stored[n] for n in self._shapes if not is_bias(n))
        return any(kind.itemsize > self._dtype.itemsize for kind in kept)

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self._shards))

    @property
    def file_names(self) -> list[str]:
        """Of the weights."""
        count = len(self._shards)
        if count == 1:
            return [SINGLE]
        return [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]

    @property
    def result_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(spec.nbytes for shard in self._shards for spec in shard.values())

    def write(
        self,
        staging: Staging,
        token_ids: Mapping[str, int | list[int] | None],
        progress: Callable[[int], None],
    ) -> None:
        """Write weights, index and ``config.json``, or go on with it.

        Args:
            staging: the folder, which remembers what is done.
            token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` for ``config.json``.
            progress: called with the bytes that are done.

        Raises:
            UserError: the checkpoint cannot be read; what was written is not what was to be.
            OSError: of the disk.
        """
        done = 0
        for name, shard in zip(self.file_names, self._shards, strict=True):
            path = staging.folder / name
            note = staging.note(name)
            if note is None or not has_size(path, FileEntry(**note)):
                path.unlink(missing_ok=True)
                with TensorFileWriter(path, shard) as file:
                    written = done
                    for tensor in shard:
                        file.write(tensor, self._numbers(tensor))
                        written += shard[tensor].nbytes
                        progress(written)
                assert file.entry is not None
                staging.done(name, {"size": file.entry.size, "sha256": file.entry.sha256})
            done += sum(spec.nbytes for spec in shard.values())
            progress(done)
        self._last = None
        self._check_written(staging.folder)
        files = {CONFIG: {**self.hf_config, **token_ids}}
        if len(self._shards) > 1:
            places = {
                tensor: name
                for name, shard in zip(self.file_names, self._shards, strict=True)
                for tensor in shard
            }
            files[INDEX] = {
                "metadata": {"total_size": self.result_bytes},
                "weight_map": dict(sorted(places.items())),
            }
        for name, content in files.items():
            staging.write(name, json.dumps(content, indent=2).encode() + b"\n")

    def _plan(self, limit: int) -> list[dict[str, TensorSpec]]:
        """What goes into each file."""
        shards: list[dict[str, TensorSpec]] = [{}]
        size = 0
        for name, target in self._targets.items():
            specs = self._specs(name, target)
            more = sum(spec.nbytes for spec in specs.values())
            if shards[-1] and size + more > limit:
                shards.append({})
                size = 0
            shards[-1] |= specs
            size += more
        # Larger dtypes first, so that every tensor lies at a multiple of its numbers' size.
        return [
            dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))
            for shard in shards
        ]

    def _specs(self, name: str, target: HfTensor) -> dict[str, TensorSpec]:
        """How a tensor is stored: a projection in FP8 is two tensors."""
        if self._quantises and is_projection(name):
            rows, columns = target.shape
            scales = TensorSpec(torch.float32, block_counts((rows, columns), BLOCK))
            return {name + SCALE: scales, name: TensorSpec(E4M3, target.shape)}
        fp32 = any(is_bias(piece.name) for piece in target.slices)
        return {name: TensorSpec(torch.float32 if fp32 else self._dtype, target.shape)}

    def _numbers(self, name: str) -> Tensor:
        """Quantised twice, for numbers and for scales: in a file they do not lie side by side, and
        all scales of a file need not be in memory."""
        weight = name.removesuffix(SCALE)
        target: HfTensor = self._targets[weight]
        (piece,) = (self._targets[target.copy_of] if target.copy_of else target).slices
        tensor = self._loaded(piece.name)
        part = tensor if piece.expert is None else tensor[piece.expert]
        if self._quantises and is_projection(weight):
            part = part.float()
            if not part.isfinite().all():
                raise UserError(
                    f"{self.checkpoint.path}: model.{piece.name} holds numbers that are not "
                    "finite, for which FP8 has no scale; export an earlier checkpoint, or as bf16"
                )
            numbers, scales = quantise_blocks(part, BLOCK)
            return numbers if name == weight else scales
        return part.to(torch.float32 if is_bias(piece.name) else self._dtype)

    def _loaded(self, name: str) -> Tensor:
        """A whole tensor of ours; the one before is forgotten."""
        if self._last is None or self._last[0] != name:
            self._last = None
            tensor = torch.empty(self._shapes[name], dtype=self._stored[name])
            self.checkpoint.load({_WEIGHTS + name: tensor})
            self._last = name, tensor
        return self._last[1]

    def _check_written(self, folder: Path) -> None:
        """Written = expected, by what the files say themselves."""
        found: dict[str, TensorSpec] = {}
        for name in self.file_names:
            found |= TensorFile(folder / name).tensors
        expected = {tensor: spec for shard in self._shards for tensor, spec in shard.items()}
        names = found.keys() | expected.keys()
        wrong = [name for name in names if found.get(name) != expected.get(name)]
        if wrong:
            raise UserError(f"{folder}: {len(wrong)} tensors are not as planned: {listing(wrong)}")


class TensorFileWriter:
    """A new file, whose tensors are announced first and then written one by one, in this order.

    Args:
        path: of a file that does not exist.
        tensors: what will be written. Larger dtypes first, or readers would find numbers at odd
            addresses.

    Raises ``OSError``. ``entry`` is there once the file is closed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors.items():
            place = [end, end + spec.nbytes]
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": place,
            }
            end = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.entry: FileEntry | None = None
        self._left = dict(tensors)
        self._stream = HashingWriter(path, self._done)
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected = next(iter(self._left), None)
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        assert name == expected and spec == self._left[name], (name, spec, expected)
        del self._left[name]
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._stream.write(numbers.data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            assert not self._left, f"announced, not written: {list(self._left)}"
            self._stream.close()
        else:
            self._stream.raw.close()

    def _done(self, entry: FileEntry) -> None:
        self.entry = entry
