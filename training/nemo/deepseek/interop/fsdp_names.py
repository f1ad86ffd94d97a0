"""Names of an FSDP run and ours, as a table that its user can edit.

    prefix: null
    names:
      model.layers.{i}.input_layernorm.weight: layers.{i}.attn_norm.weight
      model.layers.{i}.mlp.experts.{e}.down_proj.weight: layers.{i}.ffn.experts.w2[{e}]
      model.layers.{i}.mlp.experts.gate_up_proj:
      - layers.{i}.ffn.experts.w1
      - layers.{i}.ffn.experts.w3
    copies:
      model.layers.61.embed_tokens.weight: model.embed_tokens.weight
    drop: ["*.rotary_emb.inv_freq"]

Left are the names of the checkpoint, right ours. The table as it comes is the Hugging Face one of
``huggingface.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError, nearest, shown
from deepseek.config.schema import ModelConfig
from deepseek.config.yaml_file import dump_yaml, read_yaml
from deepseek.interop.huggingface import Layout, hf_tensors

_HELP = """\
# Names of an FSDP checkpoint (left) and of deepseek (right). Of the entries that fit, the one with
# the fewest {} counts, the first of these.
#   {i}, {e}   any number, the same on both sides
#   a[{e}]     one expert of the stack a
#   [a, b]     a and b, joined along the rows (the last but one dim)
# prefix: what stands before every weight's name, as `model.`; null: found by itself.
# copies: tensors that must equal another one of the checkpoint, and are not taken.
# drop:   patterns (* and ?) of tensors that are not needed.
"""
_KEYS = ("prefix", "names", "copies", "drop")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_DROPPED = ("*rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Slice:
    """A tensor of ours, or one expert of it."""

    name: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @classmethod
    def read(cls, text: str) -> Slice:
        """The inverse of ``str``."""
        match = re.fullmatch(r"(.*)\[(\d+)\]", text)
        return cls(match[1], int(match[2])) if match else cls(text)


class NameTable:
    """The table.

    Args:
        names: theirs to ours, one or several; with ``{i}`` for numbers.
        copies: theirs to the one of theirs that they repeat.
        drop: patterns of theirs that are not needed.
        prefix: before every weight's name; None: to be found.
    """

    def __init__(
        self,
        names: dict[str, tuple[str, ...]],
        copies: dict[str, str],
        drop: tuple[str, ...],
        prefix: str | None = None,
    ) -> None:
        self.names, self.copies, self.drop, self.prefix = names, copies, drop, prefix
        self._exact = {name: ours for name, ours in names.items() if "{" not in name}
        # An MTP module is a layer of theirs as well: what names the layer comes first.
        patterns = sorted((n for n in names if "{" in n), key=lambda name: name.count("{"))
        self._patterns = [(_pattern(name), names[name]) for name in patterns]

    @classmethod
    def hugging_face(cls, cfg: ModelConfig) -> NameTable:
        """The names of transformers and of the released weights, both layouts of the experts."""
        names: dict[str, tuple[str, ...]] = {}
        copies: dict[str, str] = {}
        layouts: tuple[Layout, ...] = ("released", "stacked")
        for layout in layouts:
            for theirs, tensor in hf_tensors(cfg, layout).items():
                if tensor.copy_of is not None:
                    copies[theirs] = tensor.copy_of
                    continue
                ours = []
                for piece in tensor.slices:
                    one_expert = piece.expert is not None and piece.row is None
                    target = piece.name + ("[{e}]" if one_expert else "")
                    if target not in ours:
                        ours.append(target)
                key, values = _templates(theirs, ours, cfg)
                names.setdefault(key, values)
        return cls(names, copies, _DROPPED)

    @classmethod
    def read(cls, path: Path) -> NameTable:
        """Read a file. Raises ``UserError`` for what is no such table."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(f"{path}: cannot be read: {failure}") from failure
        document = read_yaml(text, str(path))
        tree = document.tree
        problems = [str(problem) for problem in document.problems]
        if not isinstance(tree, dict):
            raise UserError(
                f"{path}: expected the keys {', '.join(_KEYS)}; --write-names makes one"
            )
        for key in tree.keys() - set(_KEYS):
            close = nearest(key, _KEYS)
            problems.append(f"{key}: unknown key; {close or ', '.join(_KEYS)}?")
        names = tree.get("names") or {}
        copies, drop, prefix = tree.get("copies") or {}, tree.get("drop") or [], tree.get("prefix")
        if not isinstance(names, dict) or not names:
            problems.append("names: must be a section of names, theirs: ours")
            names = {}
        read = {}
        for theirs, ours in names.items():
            values = ours if isinstance(ours, list) else [ours]
            if not all(isinstance(value, str) and value for value in values) or not values:
                problems.append(f"names.{theirs}: {shown(ours)} is neither a name nor a list")
                continue
            left = set(re.findall(r"\{(\w+)\}", theirs))
            for value in values:
                for loose in sorted(set(re.findall(r"\{(\w+)\}", value)) - left):
                    problems.append(
                        f"names.{theirs}: {value} asks for {{{loose}}}, the left has none"
                    )
            read[theirs] = tuple(values)
        if not (isinstance(copies, dict) and all(isinstance(v, str) for v in copies.values())):
            problems.append("copies: must be a section of names, copy: original")
        if not (isinstance(drop, list) and all(isinstance(v, str) for v in drop)):
            problems.append("drop: must be a list of patterns")
        if not (prefix is None or isinstance(prefix, str)):
            problems.append("prefix: must be a text or null")
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise UserError(f"the table {path} is broken:\n{lines}")
        return cls(read, copies, tuple(drop), prefix)

    def to_yaml(self) -> str:
        """The file, with an explanation."""
        names = {n: ours[0] if len(ours) == 1 else list(ours) for n, ours in self.names.items()}
        tree: dict[str, Any] = {
            "prefix": self.prefix,
            "names": names,
            "copies": self.copies,
            "drop": list(self.drop),
        }
        return _HELP + dump_yaml(tree)

    def parts(self, name: str) -> tuple[Slice, ...] | None:
        """What the tensor ``name`` of theirs holds of ours; None: not in the table."""
        if name in self._exact:
            return tuple(Slice.read(ours) for ours in self._exact[name])
        for pattern, ours in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return tuple(Slice.read(value.format(**match.groupdict())) for value in ours)
        return None

    def theirs(self, name: str) -> str | None:
        """A name of theirs for ours, for messages; the first of several."""
        for theirs, ours in self.names.items():
            for value in ours:
                match = _pattern(value.removesuffix("[{e}]")).fullmatch(name)
                if match:
                    known = match.groupdict()
                    return re.sub(r"\{(\w+)\}", lambda m, k=known: k.get(m[1], m[0]), theirs)  # type: ignore[misc]
        return None

    def drops(self, name: str) -> bool:
        """Whether theirs is not needed."""
        return any(fnmatchcase(name, pattern) for pattern in self.drop)

    def find_prefix(self, names: Iterable[str]) -> str:
        """What stands before the weights' names in a checkpoint.

        Raises:
            UserError: no name fits, or those of two prefixes equally well.
        """
        if self.prefix is not None:
            return self.prefix
        counts: Counter[str] = Counter()
        listed = list(names)
        for name in listed:
            for prefix in _prefixes(name):
                if self.parts(name[len(prefix) :]) is not None:
                    counts[prefix] += 1
                    break
        if not counts:
            raise UserError(
                "no name of the checkpoint is in the table; it has names like "
                f"{', '.join(sorted(listed)[:4]) or '(none)'}; write the table with --write-names, "
                "edit it, and give it with --names"
            )
        (best, count), *others = counts.most_common()
        if others and others[0][1] == count:
            raise UserError(
                f"the checkpoint holds {count} weights twice, below `{best}` and below "
                f"`{others[0][0]}`; say which in the table: prefix: '{best}' (--names)"
            )
        return best


def clean(name: str) -> str:
    """Without the names that wrappers put in between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _prefixes(name: str) -> Iterator[str]:
    """Beginnings of a name up to a dot, the shortest first."""
    yield ""
    for match in re.finditer(r"\.", name):
        yield name[: match.end()]


def _templates(theirs: str, ours: list[str], cfg: ModelConfig) -> tuple[str, tuple[str, ...]]:
    """Both sides with ``{i}`` for the layer, ``{e}`` for the expert; MTP layers as they are."""
    key = re.sub(r"(?<=\.experts\.)\d+(?=\.)", "{e}", theirs)
    layer = re.match(r"model\.layers\.(\d+)\.", theirs)
    if layer is None or int(layer[1]) >= cfg.num_hidden_layers:
        return key, tuple(ours)
    key = re.sub(r"^model\.layers\.\d+\.", "model.layers.{i}.", key)
    return key, tuple(re.sub(r"^layers\.\d+\.", "layers.{i}.", value) for value in ours)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    seen: set[str] = set()
    text = ""
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            text += re.escape(piece)
        elif piece in seen:
            text += f"(?P={piece})"
        else:
            seen.add(piece)
            text += rf"(?P<{piece}>\d+)"
    return re.compile(text)
