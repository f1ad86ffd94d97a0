"""Hugging Face weights to a checkpoint of step 0, tensor by tensor.

``HfFolder`` is the source: ``config.json``, the index and the headers of all files. Only
safetensors files are opened: a ``.bin`` is a pickle, and code that a repository brings along is
never run. ``plan_import`` accounts for every tensor before a number is read; ``WeightImport.write``
then writes one file of the checkpoint for each file of the source. In memory there is one tensor at
a time, of a stack of experts one expert; other parts of it follow the order of the source, whatever
that is.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.checkpoint.shards import ChunkFile, TensorSpec, write_checkpoint, write_chunks
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.files import Staging, has_size
from deepseek.interop.huggingface import (
    SCALE,
    HfTensor,
    account,
    hf_tensors,
    is_derived,
    layer_of,
    listing,
    our_shapes,
)
from deepseek.ops.fp8 import block_counts, dequantise_blocks
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Mtp = Literal["keep", "drop"]
Vocab = Literal["pad", "trim"]
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_COMPARED = 1 << 25
"""Bytes compared at once."""
_PICKLE_REASON = (
    "pickles, which can run code when they are read, are not opened; take the safetensors files of "
    "the model, or write them with transformers' save_pretrained"
)
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HfFolder:
    """A folder with a model.

    Raises:
        UserError: it is none; a shard is missing or broken; the index and the files name different
            tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            reason = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {reason}; give the folder with config.json and the weights")
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has no {CONFIG}; {self._what_else()}")
        self.config = read_json(path / CONFIG)
        """Content of ``config.json``."""
        self.files: list[TensorFile] = self._files()
        """In the order of their names."""
        self.owner: dict[str, TensorFile] = {
            name: file for file in self.files for name in file.tensors
        }
        """The file of each tensor."""
        self.tensors: dict[str, TensorSpec] = {
            name: spec for file in self.files for name, spec in file.tensors.items()
        }
        """Every tensor of every file."""

    def fingerprint(self) -> list[list[Any]]:
        """Name, bytes and time of each file with weights: other ones are other work."""
        stats = [(file.path.name, file.path.stat()) for file in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _what_else(self) -> str:
        """What to do with a folder that holds no model of Hugging Face."""
        if (self.path / "adapter_config.json").is_file():
            return (
                "it holds an adapter; merge it into its model first: PeftModel.from_pretrained("
                "BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
            )
        if (self.path / CONFIG_FILE).is_file() and (self.path / CHECKPOINTS).is_dir():
            return (
                "it is a folder of this program already: model.restore_from starts a run from it, "
                "`deepseek generate` samples it, `deepseek hf export` writes Hugging Face files"
            )
        return "give the folder of a Hugging Face model"

    def _files(self) -> list[TensorFile]:
        if not (self.path / INDEX).is_file():
            return [self._only_file()]
        places = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{self.path / INDEX} has no weight_map; copy or download it again")
        names = sorted({str(name) for name in places.values()})
        foreign = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
        if foreign:
            raise UserError(
                f"{self.path / INDEX} names files outside its folder ({listing(foreign)})"
            )
        if missing := [name for name in names if not os.path.isfile(self.path / name)]:
            raise UserError(
                f"{self.path} lacks {len(missing)} of {len(names)} files that its index names: "
                f"{listing(missing)}; copy or download them"
            )
        if others := [name for name in names if not name.endswith(".safetensors")]:
            pickles = any(Path(name).match(pattern) for name in others for pattern in _PICKLES)
            reason = _PICKLE_REASON if pickles else "no safetensors files, which alone are read"
            raise UserError(f"{self.path / INDEX} names {listing(others)}: {reason}")
        files = [TensorFile(self.path / name) for name in names]
        held = {name: file.path.name for file in files for name in file.tensors}
        absent = [name for name, place in places.items() if held.get(name) != place]
        unlisted = [name for name in held if name not in places]
        if sum(len(file.tensors) for file in files) != len(held):
            raise UserError(f"{self.path}: two files hold a tensor of the same name")
        if absent or unlisted:
            lines = [f"{self.path}: the index and the files do not agree:"]
            lines += [f"  {len(absent)} not where the index says: {listing(absent)}"] * bool(absent)
            lines += [f"  {len(unlisted)} not in the index: {listing(unlisted)}"] * bool(unlisted)
            raise UserError("\n".join([*lines, "  copy or download the files and the index again"]))
        return files

    def _only_file(self) -> TensorFile:
        """Without an index all weights are in one file, whatever it is called."""
        found = sorted(self.path.glob("*.safetensors"))
        if (self.path / SINGLE).is_file():
            return TensorFile(self.path / SINGLE)
        if not found:
            raise UserError(self._no_weights())
        shard = re.search(r"-of-(\d+)\.safetensors$", found[0].name)
        if len(found) > 1 or (shard is not None and int(shard[1]) > 1):
            names = listing([path.name for path in found], 3)
            raise UserError(
                f"{self.path} has no {INDEX}, which says where each tensor is, and its files "
                f"({names}) are shards; download the index"
            )
        return TensorFile(found[0])

    def _no_weights(self) -> str:
        pickles = sorted(p.name for pattern in _PICKLES for p in self.path.glob(pattern))
        if pickles:
            return f"{self.path} holds {listing(pickles)}: {_PICKLE_REASON}"
        return f"{self.path} holds no {SINGLE} and no {INDEX}; download the weights"


class TensorFile:
    """A file to read from. Its header is checked at once: what it names is there.

    Raises:
        UserError: the file is missing, is cut off, names a tensor twice, has a dtype that torch
            lacks, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: Any = None
        self._open()
        self.close()
        with open(path, "rb") as stream:
            text = stream.read(int.from_bytes(stream.read(8), "little"))
        header = json.loads(text, object_pairs_hook=self._once)
        header.pop("__metadata__", None)
        self.tensors: dict[str, TensorSpec] = {}
        """By name, in the order of the numbers in the file."""
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind = entry["dtype"]
            if kind not in TORCH_DTYPES:
                raise UserError(
                    f"{path}: {name} has dtype {kind}; {', '.join(TORCH_DTYPES)} can be read"
                )
            self.tensors[name] = TensorSpec(TORCH_DTYPES[kind], tuple(entry["shape"]))

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The tensor ``name``, or only ``row`` of its leading dim; mapped, so not to be changed."""
        mapped = self._mapped or self._open()
        return mapped.get_tensor(name) if row is None else mapped.get_slice(name)[row]

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """``count`` entries of the leading dim from ``first`` on."""
        mapped = self._mapped or self._open()
        return mapped.get_slice(name)[first : first + count]

    def close(self) -> None:
        """Let go of the file; reading opens it again."""
        self._mapped = None

    def _open(self) -> Any:
        """The library checks header and size each time."""
        try:
            self._mapped = safe_open(self.path, "pt")
        except SafetensorError as failure:
            raise UserError(
                f"{self.path} is cut off, or no safetensors file: {failure} (it has "
                f"{self.path.stat().st_size:,} bytes); copy or download it again"
            ) from None
        except OSError as failure:
            raise UserError(f"{self.path}: cannot be read: {failure}") from failure
        return self._mapped

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object. Readers disagree about which of two entries of one name counts."""
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{self.path}: its header names {twice} twice; download it again")
        return entries


@dataclass(frozen=True)
class WeightImport:
    """What becomes of every tensor of a folder."""

    folder: HfFolder
    config: ModelConfig
    """Of the model that is written."""
    targets: Mapping[str, HfTensor]
    """What each tensor of theirs holds of ours."""
    block: tuple[int, int]
    """Rows and columns that share a scale in FP8."""
    dropped: Mapping[str, list[str]]
    """Tensors of the source that are not in the result, by reason."""
    quantised: tuple[str, ...]
    """Tensors that are FP8 in the source."""
    mtp_absent: bool
    """``config.json`` speaks of MTP modules whose weights are not there."""

    @property
    def result_bytes(self) -> int:
        """About how much is written."""
        shapes = our_shapes(self.config).values()
        return sum(4 * torch.Size(shape).numel() for shape in shapes) + 2048 * len(self.targets)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(spec.nbytes for spec in self.folder.tensors.values())

    @property
    def rows(self) -> set[int]:
        """Rows of embedding and head in the source."""
        return {self.targets[name].shape[0] for name in (_EMBED, _HEAD)}

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
        write_checkpoint(path, 0, shapes, torch.float32, files, state)

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
        for row, together in groupby(target.slices, key=lambda piece: piece.row):
            numbers = self._read(file, name, row)
            if not all(map(torch.isfinite, numbers.aminmax())):  # NaN is both
                raise UserError(
                    f"{file.path}: {name} holds NaN or infinite numbers; download the file again, "
                    "or take an earlier checkpoint of the run that wrote it"
                )
            if name in (_EMBED, _HEAD):
                numbers = _resized(numbers, self.config.vocab_size)
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
        scales = self.folder.owner[scale].read(scale, row)  # of a file that stays mapped
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


def plan_import(
    folder: HfFolder,
    cfg: ModelConfig,
    mtp: Mtp = "keep",
    vocab: Vocab | None = None,
    num_ids: int = 0,
) -> WeightImport:
    """Account for every tensor of a folder.

    Args:
        folder: the source.
        cfg: the model that its ``config.json`` describes.
        mtp: ``keep`` the MTP modules if there are any, or ``drop`` them.
        vocab: what to do where embedding and head have other rows than ``cfg.vocab_size``, or fewer
            than the tokenizer has ids: ``pad`` to the largest of these numbers, new rows being the
            mean of those that are there; ``trim`` to the smaller of the first two; None: refuse.
        num_ids: of the tokenizer; 0: there is none.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or quantised in another way;
            lists the names.
    """
    block = _block(folder.config)
    tensors = folder.tensors
    scales = {name for name in tensors if name.endswith(SCALE)}
    derived = {name for name, spec in tensors.items() if is_derived(name, spec.shape)}
    beyond = {name for name in tensors if (layer_of(name) or 0) >= cfg.num_hidden_layers}
    mtp_absent = not beyond and cfg.num_nextn_predict_layers > 0
    if mtp == "drop" or not beyond:
        cfg = replace(cfg, num_nextn_predict_layers=0)
    gone = beyond if mtp == "drop" else set()
    apart = gone | scales | derived
    given = {name: spec for name, spec in tensors.items() if name not in apart}
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in given)
    _require_counts(folder, cfg, stacked)
    targets = _with_rows(folder, hf_tensors(cfg, "stacked" if stacked else "released"))
    copies = {name for name, target in targets.items() if target.copy_of}
    account(
        f"the weights in {folder.path}",
        {name: spec.shape for name, spec in given.items()},
        {name: target.shape for name, target in targets.items()},
        optional=copies,
        way_out=lambda missing, unexpected: _mtp_way_out(missing, unexpected, cfg),
    )
    _check_dtypes(folder, given, scales - gone, targets, block)
    rows = {name: targets[name].shape[0] for name in (_EMBED, _HEAD)}
    size = _vocab_size(folder, cfg.vocab_size, rows, vocab, num_ids)
    dropped = {
        "MTP modules": sorted(gone),
        "copies of embedding and head": sorted(copies & given.keys()),
        "without numbers, or following from the configuration": sorted(derived),
    }
    quantised = tuple(sorted(name for name, spec in given.items() if spec.dtype in _FP8))
    cfg = replace(cfg, vocab_size=size)
    return WeightImport(folder, cfg, targets, block, dropped, quantised, mtp_absent)


def _require_counts(folder: HfFolder, cfg: ModelConfig, stacked: bool) -> None:
    """Refuse a configuration of far more tensors than there are, before they are listed."""
    there = len(folder.tensors)
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    experts = 0 if stacked else max(0, layers - cfg.first_k_dense_replace) * cfg.n_routed_experts
    if layers + 3 * experts > 4 * there + 1000:
        raise UserError(
            f"{folder.path}: config.json describes {layers:,} layers with {cfg.n_routed_experts:,} "
            f"experts, and the files hold {there:,} tensors in all; correct config.json, or "
            "download the files that are missing"
        )


def _with_rows(folder: HfFolder, targets: dict[str, HfTensor]) -> dict[str, HfTensor]:
    """With as many rows of embedding and head as the files have."""
    for name, target in list(targets.items()):
        spec = folder.tensors.get(target.copy_of or name)
        table = (target.copy_of or name) in (_EMBED, _HEAD)
        if table and spec is not None and spec.shape[1:] == target.shape[1:]:
            targets[name] = replace(target, shape=spec.shape)
    return targets


def _vocab_size(
    folder: HfFolder, stated: int, rows: Mapping[str, int], vocab: Vocab | None, num_ids: int
) -> int:
    """Rows of embedding and head in the result."""
    sizes = {stated, *rows.values()}
    if vocab is None and len(sizes) > 1:
        found = ", ".join(f"{name} has {count:,} rows" for name, count in rows.items())
        raise UserError(
            f"{folder.path}: {found}, and config.json says vocab_size={stated:,}: the vocabulary "
            f"was padded or has grown; give --vocab trim for {min(sizes):,} rows, or --vocab pad "
            f"for {max(sizes):,}"
        )
    size = max(sizes | {num_ids}) if vocab == "pad" else min(sizes)
    if num_ids > size:
        raise UserError(
            f"{folder.path}: the tokenizer has {num_ids:,} ids, the model {size:,}; give the "
            "model's own with --tokenizer, or rows for the new ids with --vocab pad"
        )
    return size


def _resized(numbers: Tensor, rows: int) -> Tensor:
    """Embedding or head (V, D) with so many rows; new ones are the mean of the others."""
    missing = rows - numbers.shape[0]
    if missing <= 0:
        return numbers[:rows]
    return torch.cat([numbers, numbers.mean(dim=0, keepdim=True).expand(missing, -1)])


def _check_dtypes(
    folder: HfFolder,
    given: Mapping[str, TensorSpec],
    scales: set[str],
    targets: Mapping[str, HfTensor],
    block: tuple[int, int],
) -> None:
    """Refuse what is neither plain nor FP8 with scales per block."""
    problems = []
    for name, spec in given.items():
        scale = name + SCALE
        if spec.dtype in _FP8 and targets[name].copy_of is None:
            if len(spec.shape) < 2:
                problems.append(f"{name}: is FP8, and only matrices have scales per block")
                continue
            down, across = block_counts((spec.shape[-2], spec.shape[-1]), block)
            wanted = (*spec.shape[:-2], down, across)
            if scale not in scales:
                problems.append(f"{name}: is FP8 and has no {scale}")
            elif (shape := folder.tensors[scale].shape) != wanted:
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
            f"the weights in {folder.path} cannot be read as fp32, bf16, fp16, or FP8 "
            f"with scales per block {block}:\n  {len(problems)} tensors: "
            f"{listing(problems, 6)}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it holds none, or a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise UserError(f"{path}: {twice[0]} stands there twice; leave one of the two")
        return dict(pairs)

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=once)
    except OSError as failure:
        raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:
        raise UserError(f"{path}: not JSON ({failure}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


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
