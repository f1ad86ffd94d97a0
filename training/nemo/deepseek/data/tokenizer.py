"""Tokenizer: text to ids and back, as any ``tokenizer.json`` says.

The ``tokenizers`` library encodes. Ids become bytes by a table where the vocabulary is byte-level,
so text streams out without ever cutting a character.

It is read by ``tokenizer_files.py`` and trained by ``tokenizer_training.py``. Without that library
a vocabulary of the 256 bytes is read, as the latter makes it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.documents import CONTEXT, Apart, Chunk
from deepseek.files import atomic_open

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
SPECIAL = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)
"""Special tokens of tokenizers made here, in DeepSeek-V3's spelling and order."""

# Spellings met in the wild, DeepSeek's first; the first one in the vocabulary counts.
_BOS_NAMES = (BOS, "<|begin_of_text|>", "[BOS]", "<|startoftext|>", "<s>", "<bos>")
_EOS_NAMES = (
    EOS,
    "<|end_of_text|>",
    "[EOS]",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
)
_PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "[PAD]", "<|pad|>", "<pad>")
_FIM_NAMES = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


GENERATION = "generation_config.json"
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of ``byte_fallback``."""


class FimIds(NamedTuple):
    """Sentinels of fill-in-the-middle: ``begin prefix hole suffix end middle``."""

    begin: int
    hole: int
    end: int


@final
class Tokenizer:
    """Text to ids and back; ``load_tokenizer`` and ``train_bpe`` make one.

    Args:
        source: text of the ``tokenizer.json``.
        config: content of the ``tokenizer_config.json`` beside it, or {}.
        origin: what to call it in errors.
        generation: content of the ``generation_config.json`` beside it, or {}.

    Raises:
        UserError: the file is not a tokenizer; a token is named that is not there; a value of
            ``generation`` has another type; ``tokenizers`` is needed and not installed.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        origin: str,
        generation: dict[str, Any] | None = None,
    ) -> None:
        self._source, self._config, self._origin = source, config, origin
        self.generation = generation or {}
        """What ``generation_config.json`` says: ids that stop, defaults of sampling."""
        check_generation(self.generation, origin)
        _check_config(config, origin)
        self._parsed = parse_json(source, origin)
        model = self._parsed.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise UserError(
                f"{origin} is not a tokenizer: it has no model.vocab; give a tokenizer.json as "
                "written by Hugging Face tokenizers"
            )
        added = self._parsed.get("added_tokens") or []
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special = {token["id"] for token in added if token.get("special")}
        self._library = _library(source, origin)
        vocab = model["vocab"]
        bytes_alone = isinstance(vocab, dict) and set(vocab) == set(byte_characters())
        if self._library is None and (not bytes_alone or self._parsed.get("normalizer")):
            raise UserError(f"{origin} needs the tokenizers library; pip install tokenizers")

        self.bos_id = self._named("bos_token", _BOS_NAMES)
        """Begins a text; None if there is none. Never added by ``encode``."""
        self.eos_id = self._named("eos_token", _EOS_NAMES)
        """Ends a document; None if there is none."""
        self.pad_id = self._named("pad_token", _PAD_NAMES)
        """Fills a row; None if there is none."""
        self.fim = next(
            (
                FimIds(*(self._vocab[name] for name in names))
                for names in _FIM_NAMES
                if all(name in self._vocab for name in names)
            ),
            None,
        )
        """Fill-in-the-middle sentinels; None unless all three are in the vocabulary."""
        self.prefix_ids, self.suffix_ids = self._around()
        """What the tokenizer itself puts before and after a text: its post-processor, and
        ``add_bos_token`` and ``add_eos_token`` of its configuration."""

    def _around(self) -> tuple[list[int], list[int]]:
        before: list[int] = []
        after: list[int] = []
        post = self._parsed.get("post_processor") or {}
        for step in post.get("processors", [post]):
            first: list[int] = []
            last: list[int] = []
            if step.get("type") == "TemplateProcessing":
                side = first
                for piece in step["single"]:
                    if "Sequence" in piece:
                        side = last
                    else:
                        side += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            elif step.get("type") in ("BertProcessing", "RobertaProcessing"):
                first, last = [step["cls"][1]], [step["sep"][1]]
            before, after = first + before, after + last
        for key, token, ids in (
            ("bos_token", self.bos_id, before),
            ("eos_token", self.eos_id, after),
        ):
            if self._config.get(f"add_{key}") is True and not ids:
                if token is None:
                    raise UserError(
                        f"{self._origin}: add_{key} is true, and there is no {key}; name one in "
                        "tokenizer_config.json"
                    )
                ids.append(token)
        return before, after

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text: those of ``generation``, and the end of a document."""
        given = self.generation.get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        return list(dict.fromkeys(k for k in (*ids, self.eos_id) if k is not None))

    def required_eos(self) -> int:
        """``eos_id``. Raises ``UserError`` if there is none."""
        if self.eos_id is None:
            raise UserError(
                f"{self._origin}: no token ends a document; put a tokenizer_config.json beside it "
                f'with "eos_token": "...", or use one of {", ".join(_EOS_NAMES[:5])} as its name '
                "(prepare-data --no-append-eos needs none)"
            )
        return self.eos_id

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that a model is asked to go on from, as transformers makes them.

        Special tokens in the text are read as such, and ``prefix_ids`` stand before it, unless it
        begins with them itself. An empty text begins where a document does: after the last one's
        end.

        Raises:
            UserError: the text is empty, and no token begins or ends one.
        """
        ids = self.encode(text, parse_special=True)
        if ids[: len(self.prefix_ids)] != self.prefix_ids:
            ids = self.prefix_ids + ids
        return ids or [self.required_eos()]

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is added at its ends.

        Args:
            text: valid Unicode.
            parse_special: true reads ``<｜end▁of▁sentence｜>`` and other tokens marked special as
                one id (prompts); false reads them as the characters they are, so that data cannot
                forge them.
        """
        return self._encoded([text], parse_special)[0]

    def encode_with_places(
        self, text: str, parse_special: bool = False
    ) -> tuple[list[int], np.ndarray]:
        """Ids of ``text`` as ``encode``, and which of its characters each id stands for.

        Returns:
            The ids, and int64 [n, 2]: characters [start, end). Where the vocabulary is byte-level
            and nothing is normalised they are exact, white space included; elsewhere they are the
            library's.
        """
        ids = self.encode(text, parse_special)
        if self._bytes is not None:
            pieces = [self.id_bytes(token) for token in ids]
            if b"".join(pieces) == text.encode():
                widths = np.array([len(piece) for piece in pieces], np.int64)
                character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
                ends = np.cumsum(widths)
                starts = ends - widths
                last = len(character) - 1
                places = [character[starts.clip(0, last)], character[(ends - 1).clip(0, last)] + 1]
                return ids, np.stack(places, axis=1) if ids else np.zeros((0, 2), np.int64)
        assert self._library is not None, "bytes are exact"
        return self._placed([text], parse_special)[0]

    @property
    def apart(self) -> Apart | None:
        """Whether nothing is joined between two texts; None: no byte-level tokenizer joins there.

        The characters on both sides are encoded together: no token lies across, no token of the
        vocabulary has the two characters that meet there side by side, which merges and scores
        would need to reach across, and they are not unknown both, which would make them one.
        """
        return None if self._is_plain else self._joins_nothing

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Ids of the parts of documents: joined, they are those of the whole."""
        if self._is_plain or not any(chunk.before or chunk.after for chunk in chunks):
            return self._encoded([chunk.text for chunk in chunks], False)
        whole = self._encoded([chunk.before + chunk.text + chunk.after for chunk in chunks], False)
        found = []
        for chunk, ids in zip(chunks, whole, strict=True):
            # Where the ids of the neighbours end: told by those of a few characters, since telling
            # places takes three times as long as encoding.
            start = self._ids_before(chunk.before, chunk.text[:CONTEXT])[0]
            left = (chunk.before + chunk.text)[-CONTEXT:]
            inside, together = self._ids_before(left, chunk.after)
            found.append(ids[start : len(ids) - (together - inside)])
        return found

    def _ids_before(self, left: str, right: str) -> tuple[int, int]:
        """How many ids ``left`` has in ``left + right``, and how many there are."""
        (encoding,) = self._by_library([left + right], False, places=True)
        for place in range(len(left), len(left + right)):
            token = encoding.char_to_token(place)
            if token is not None:  # white space may have none
                return (token if left else 0), len(encoding)
        return len(encoding), len(encoding)

    def _placed(
        self, texts: Sequence[str], parse_special: bool
    ) -> list[tuple[list[int], np.ndarray]]:
        """Ids of texts and the characters of each, as the library tells them."""
        return [
            (found.ids, np.array(found.offsets, np.int64).reshape(-1, 2))
            for found in self._by_library(texts, parse_special, places=True)
        ]

    @cached_property
    def _is_plain(self) -> bool:
        """Byte-level, without anything that depends on where a text begins."""
        normalizer = (self._parsed.get("normalizer") or {}).get("type", "NFC")
        prefixed = any(step.get("add_prefix_space") for step in self._steps)
        return self._library is None or (self.byte_level and normalizer == "NFC" and not prefixed)

    @property
    def _steps(self) -> list[dict[str, Any]]:
        """The pre-tokenizers."""
        given = self._parsed.get("pre_tokenizer") or {}
        return given.get("pretokenizers", [given])

    def _joins_nothing(self, before: str, after: str) -> bool:
        (ids, places), place = self._placed([before + after], False)[0], len(before)
        right = int(np.searchsorted(places[:, 0], place))
        if not 0 < right < len(ids) or places[:right, 1].max() > place:
            return False
        if places[right - 1, 1] < place or places[right, 0] > place:
            return True  # white space that is no token lies between
        left, follows = (self._piece(ids[k]) for k in (right - 1, right))
        if isinstance(self._parsed["model"]["vocab"], list):
            # Unigram: of two equal sums of scores the one counts that is rounded up, which depends
            # on all that is scored before. So only where words are scored alone.
            return (follows or "").startswith("▁") and any(
                step.get("type") == "Metaspace" and step.get("split", True) for step in self._steps
            )
        if left is None or follows is None:
            return not (left is None and follows is None)
        return left[-1:] + follows[:1] not in self._side_by_side

    def _piece(self, token: int) -> str | None:
        """What a token is in the vocabulary; "" for a byte, which nothing joins; None: unknown."""
        piece = self._library.id_to_token(token) if self._library is not None else ""
        unknown = self._parsed["model"].get("unk_token")
        if piece == unknown or token == self._parsed["model"].get("unk_id", -1):
            return None
        return "" if _BYTE_PIECE.fullmatch(piece) else piece

    @cached_property
    def _side_by_side(self) -> set[str]:
        """Every two characters that some token has next to each other."""
        return {piece[k : k + 2] for piece in self._vocab for k in range(len(piece) - 1)}

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ``ids``: broken UTF-8 becomes U+FFFD, ids outside the vocabulary nothing."""
        if skip_special:
            ids = [token for token in ids if token not in self._special]
        if self._bytes is None:
            assert self._library is not None, "bytes are decoded by their table"
            known = [token for token in ids if token < self.vocab_size]
            return self._library.decode(known, skip_special_tokens=False)
        return b"".join(map(self.id_bytes, ids)).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes ids one by one and gives whole characters only."""
        return StreamDecoder(self, skip_special)

    def id_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for (byte-level vocabularies only)."""
        assert self._bytes is not None, "only byte-level vocabularies map ids to bytes"
        return self._bytes.get(int(token), b"")

    def is_special(self, token: int) -> bool:
        """True for ids that stand for no text, such as the end of a document."""
        return token in self._special

    @property
    def origin(self) -> str:
        """What to call it in errors."""
        return self._origin

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns conversations into text; None if it has none.

        Raises:
            UserError: there are several, and none is called ``default``.
        """
        given = self._config.get("chat_template")
        if given is None or isinstance(given, str):
            return given
        named = self._named_templates
        if "default" not in named:
            raise UserError(
                f"{self._origin}: tokenizer_config.json has the chat templates "
                f"{', '.join(map(str, named))} and none is called default; rename one"
            )
        return named["default"]

    @property
    def tool_chat_template(self) -> str | None:
        """The template called ``tool_use``, for conversations with tools; None if there is none."""
        return self._named_templates.get("tool_use")

    @property
    def _named_templates(self) -> dict[str, str]:
        """Chat templates by their names; empty: there is none, or one without a name."""
        given = self._config.get("chat_template")
        if given is None or isinstance(given, str):
            return {}
        try:
            if isinstance(given, dict):
                named = given
            else:
                named = {str(entry["name"]): entry["template"] for entry in given}
            if not all(isinstance(template, str) for template in named.values()):
                raise TypeError("a template is no text")
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self._origin}: chat_template of tokenizer_config.json must be a text, names "
                f'with texts, or a list of {{"name": ..., "template": ...}} '
                f"({type(error).__name__}: {error})"
            ) from error
        return named

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template, a Jinja text."""
        named = self._config or self._default_config()
        config = {**named, "chat_template": source}
        return Tokenizer(self._source, config, self._origin, self.generation)

    def with_generation(self, generation: dict[str, Any]) -> Tokenizer:
        """The same tokenizer with another ``generation``."""
        return Tokenizer(self._source, self._config, self._origin, generation)

    def with_stop(self, token: int) -> Tokenizer:
        """The same tokenizer, whose generated texts end at ``token`` too."""
        if token in self.stop_ids:
            return self
        return self.with_generation({**self.generation, "eos_token_id": [*self.stop_ids, token]})

    @property
    def special_names(self) -> list[str]:
        """Texts of all tokens that stand for no text."""
        return [name for name, token in self._added.items() if token in self._special]

    @property
    def added_names(self) -> list[str]:
        """Texts of all tokens that are found in a text before it is divided into words."""
        return list(self._added)

    @cached_property
    def special_texts(self) -> dict[str, str]:
        """Texts of the tokens that chat templates call by name: ``eos_token`` and the like."""
        names = {token: name for name, token in self._vocab.items()}
        tokens = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {key: names[token] for key, token in tokens.items() if token is not None}

    @property
    def byte_level(self) -> bool:
        """True if every id stands for fixed bytes, so that text and ids map exactly."""
        return self._bytes is not None

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes of text each id stands for, int64 [vocab_size], 0 for special ids.

        Bits per byte = sum of nats / ln 2 / sum of ``token_bytes[labels]``. None if the vocabulary
        is not byte-level.
        """
        if self._bytes is None:
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, content in self._bytes.items():
            sizes[token] = 0 if token in self._special else len(content)
        return sizes

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the rows an embedding needs."""
        return max(self._vocab.values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content of ``tokenizer.json`` (layout ignored) and of the id of eos."""
        content = {k: v for k, v in self._parsed.items() if k not in ("truncation", "padding")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{canonical}\neos={self.eos_id}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, readable by ``transformers``, and
        ``generation_config.json`` where there is something to say."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"tokenizer_config.json": self._config or self._default_config()}
        if self.generation:
            contents[GENERATION] = self.generation
        for name, content in contents.items():
            with atomic_open(folder / name) as stream:
                stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        with atomic_open(folder / "tokenizer.json") as stream:
            stream.write(self._source.encode())

    def _default_config(self) -> dict[str, Any]:
        """``tokenizer_config.json`` of a tokenizer that came without one."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_texts,
        }

    def _encoded(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        if self._library is None:
            return [list(self._byte_ids(text, parse_special)) for text in texts]
        return [encoding.ids for encoding in self._by_library(texts, parse_special, places=False)]

    def _by_library(self, texts: Sequence[str], parse_special: bool, places: bool) -> list[Any]:
        """The library's encodings.

        Raises:
            UserError: a character has no token, and there is none for unknown ones; the library
                gives up, as on a pattern that takes for ever.
        """
        library: Any = self._library
        library.encode_special_tokens = not parse_special
        encode = library.encode_batch if places else library.encode_batch_fast
        if self._alphabet is not None:
            for text in texts:
                self._refuse_unknown(text)
        try:
            return encode(list(texts), add_special_tokens=False)
        except BaseException as error:  # a panic of the library is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self._origin} cannot encode a text: {error}") from error

    @cached_property
    def _alphabet(self) -> set[str] | None:
        """The characters that have a token; None where any text has one."""
        model = self._parsed["model"]
        unigram = isinstance(model["vocab"], list)
        unknown = model.get("unk_id") if unigram else model.get("unk_token")
        if unknown is not None or model.get("byte_fallback") or self.byte_level:
            return None
        if not unigram and model.get("type", "BPE") != "BPE":
            return None  # of whole words: the library itself asks for an unknown one
        affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        pieces = {
            p.removeprefix(affixes[0] or "").removesuffix(affixes[1] or "") for p in self._vocab
        }
        return {piece for piece in pieces if len(piece) == 1}

    def _refuse_unknown(self, text: str) -> None:
        """Else the library leaves the character out, or ends without saying which it is."""
        assert self._library is not None and self._alphabet is not None
        normalizer = self._library.normalizer
        seen = set(normalizer.normalize_str(text) if normalizer else text)
        if self._library.pre_tokenizer is not None:
            pieces = self._library.pre_tokenizer.pre_tokenize_str("".join(sorted(seen)))
            seen = set("".join(piece for piece, _ in pieces))
        missing = sorted(seen - self._alphabet)
        if missing:
            raise UserError(
                f"{self._origin} has no token for the character {missing[0]!r} (U+"
                f"{ord(missing[0]):04X}) and none for unknown ones; give its model an unk_token "
                "or byte_fallback, or take such characters out of the text"
            )

    def _byte_ids(self, text: str, parse_special: bool) -> Iterator[int]:
        """What the library does with a vocabulary of bytes."""
        names = map(re.escape, sorted(self._added, key=len, reverse=True))
        for part in re.split(f"({'|'.join(names)})", text) if parse_special else [text]:
            if parse_special and part in self._added:
                yield self._added[part]
            else:
                yield from map(self._ids_of_bytes.__getitem__, part.encode())

    @cached_property
    def _ids_of_bytes(self) -> list[int]:
        return [self._vocab[character] for character in byte_characters()]

    @cached_property
    def _vocab(self) -> dict[str, int]:
        vocab = self._parsed["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [piece, score] pairs in order of id
            vocab = {piece: k for k, (piece, _) in enumerate(vocab)}
        return {**vocab, **self._added}

    @cached_property
    def _bytes(self) -> dict[int, bytes] | None:
        decoder, vocab = self._parsed.get("decoder") or {}, self._parsed["model"]["vocab"]
        kinds = {part.get("type") for part in decoder.get("decoders", [decoder])} - {"Fuse"}
        if kinds != {"ByteLevel"} or not isinstance(vocab, dict):
            return None
        table = {character: bytes([value]) for value, character in enumerate(byte_characters())}
        result = {
            token: b"".join(table.get(c) or c.encode() for c in name)
            for name, token in vocab.items()
        }
        result.update((token, name.encode()) for name, token in self._added.items())
        return result

    def _named(self, key: str, names: tuple[str, ...]) -> int | None:
        """Id of the token that the config calls ``key``, else of the first known spelling."""
        given = self._config.get(key)
        name = given.get("content") if isinstance(given, dict) else given
        if isinstance(name, str) and name in self._vocab:
            return self._vocab[name]
        if isinstance(name, str) and key != "pad_token":
            raise UserError(
                f"{self._origin}: tokenizer_config.json says {key} is {name!r}, which is not "
                "in the vocabulary; correct it there"
            )
        return next((self._vocab[name] for name in names if name in self._vocab), None)


@final
class StreamDecoder:
    """Ids in, text out, whole characters only; the pieces joined equal ``Tokenizer.decode``.

    That holds for any ids if the vocabulary is byte-level, else for the ids of a text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For vocabularies that are not byte-level: ids of the text already given, as context that
        # fixes the spaces, then ids still held back.
        self._given: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one id; return the characters it completes, perhaps none."""
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.id_bytes(token))
        self._held.append(token)
        text = self._held_text()
        # Bytes that are no character yet show as one U+FFFD each, or more; the character U+FFFD
        # itself shows as one for three bytes. After four bytes there is nothing to wait for.
        broken = len(text) - len(text.rstrip("\ufffd"))
        return "" if len(self._held) <= min(broken, 4) else self._release(text)

    def finish(self) -> str:
        """Return what is still held back; half a character becomes U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._release(self._held_text())

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        if self._held:
            self._given, self._held = self._held, []
        return text


def check_generation(told: dict[str, Any], origin: str) -> None:
    """Raise ``UserError`` for a value that is used here and has another type."""
    for key, value in told.items():
        several = key == "eos_token_id" and isinstance(value, list)
        for item in value if several else [value]:
            if item is None or key not in _GENERATION_TYPES:
                continue
            expected, what = _GENERATION_TYPES[key]
            if not isinstance(item, expected) or isinstance(item, bool) != (expected is bool):
                raise UserError(
                    f"{origin}: {GENERATION} has {key}={value!r}, expected {what}; correct it there"
                )


def _check_config(told: dict[str, Any], origin: str) -> None:
    """Raise ``UserError`` for a value of ``tokenizer_config.json`` of another type than is used."""
    for key in ("bos_token", "eos_token", "pad_token"):
        value = told.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise UserError(
                f"{origin}: tokenizer_config.json has {key}={value!r:.60}, expected its text or an "
                "object with its content; correct it there"
            )
    for key in ("add_bos_token", "add_eos_token"):
        if told.get(key) not in (None, True, False) or type(told.get(key)) in (int, float):
            raise UserError(
                f"{origin}: tokenizer_config.json has {key}={told[key]!r:.60}, expected true or "
                "false; correct it there"
            )


_GENERATION_TYPES: dict[str, tuple[Any, str]] = {
    "bos_token_id": (int, "an id"),
    "eos_token_id": (int, "an id or a list of ids"),
    "pad_token_id": (int, "an id"),
    "do_sample": (bool, "true or false"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "top_k": (int, "a whole number"),
}
"""Values of ``generation_config.json`` that are used here."""


def _library(source: str, origin: str) -> Any | None:
    """``source`` as the ``tokenizers`` library reads it; None without that library."""
    if not tokenizers_installed():
        return None
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(source)
    except Exception as error:
        raise UserError(
            f"{origin} cannot be read by this version of tokenizers ({error}); "
            "pip install -U tokenizers, or give a tokenizer.json of a known model"
        ) from error
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None  # else the ids of a text were drawn by chance
    return library


def tokenizers_installed() -> bool:
    """Whether the ``tokenizers`` library can be imported."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return True


def byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte, [256] (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]


def parse_json(text: str, origin: str) -> dict[str, Any]:
    """The object that a JSON text holds. Raises ``UserError`` if it holds none."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}:{error.lineno}: not JSON ({error.msg}); download or copy the file again"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, brackets 1000 deep
        raise UserError(f"{origin}: not JSON ({error}); download or copy the file again") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{origin} holds a JSON {type(parsed).__name__}, expected an object")
    if "\\ud" in text.lower():  # half of a pair is JSON, and no text that could be written again
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{origin} holds half of a surrogate pair ({error.object[error.start]!a}), which "
                "is no character; write the whole one, or remove it"
            ) from error
    return parsed
