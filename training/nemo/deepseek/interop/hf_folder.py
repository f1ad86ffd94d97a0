"""A folder of Hugging Face files: ``config.json``, the index, and the headers of all weights.

Everything is looked at before a number is read. Only safetensors files are opened: a ``.bin`` is a
pickle, and code that a repository brings along is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.interop.huggingface import listing
from deepseek.interop.safetensors_file import TensorFile
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
            if (self.path / SINGLE).is_file():
                return [TensorFile(self.path / SINGLE)]
            raise UserError(self._no_weights())
        places = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{self.path / INDEX} has no weight_map; copy or download it again")
        names = sorted({str(name) for name in places.values()})
        foreign = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
        if foreign:
            raise UserError(
                f"{self.path / INDEX} names files outside its folder ({listing(foreign)})"
            )
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise UserError(
                f"{self.path} lacks {len(missing)} of {len(names)} files that its index names: "
                f"{listing(missing)}; copy or download them"
            )
        if others := [name for name in names if not name.endswith(".safetensors")]:
            raise UserError(f"{self.path / INDEX} names {listing(others)}: {_PICKLE_REASON}")
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

    def _no_weights(self) -> str:
        pickles = sorted(p.name for pattern in _PICKLES for p in self.path.glob(pattern))
        if pickles:
            return f"{self.path} holds {listing(pickles)}: {_PICKLE_REASON}"
        if any(self.path.glob("*.safetensors")):
            return f"{self.path} has several .safetensors files and no {INDEX}; download the index"
        return f"{self.path} holds no {SINGLE} and no {INDEX}; download the weights"


_PICKLE_REASON = (
    "pickles, which can run code when they are read, are not opened; take the safetensors files of "
    "the model, or write them with transformers' save_pretrained"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as failure:
        raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:
        raise UserError(f"{path}: not JSON ({failure}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content
