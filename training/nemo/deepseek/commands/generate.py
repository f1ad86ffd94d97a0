"""``deepseek generate``: continuations, answers and conversations from any weights."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.config.errors import UserError
from deepseek.console import complain, say
from deepseek.run_folder import TOKENIZER

if TYPE_CHECKING:
    from deepseek.data.chat_template import ChatTemplate
    from deepseek.data.tokenizer import Tokenizer
    from deepseek.inference.generation import Sampling
    from deepseek.inference.speculative import Acceptance
    from deepseek.models.transformer import Transformer

BATCH = 16
"""Prompts read and continued in one pass."""
_MTP = "mtp"
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What a model is given."""

    said: str | list[Message]
    """A text to continue, or a conversation to answer."""
    where: str
    """Where it came from, for messages."""


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt."""

    text: str
    tokens: int
    """Drawn, without the one that ended it."""
    stop_reason: str
    """``eos``: a token that ends; ``stop``: a text to stop before; ``length``."""


def generate_text(
    source: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    *,
    prompts_file: Path | None = None,
    stop: Sequence[str] = (),
    as_json: bool = False,
    draft: str | None = None,
    tokenizer: Path | None = None,
) -> list[str]:
    """Continue each prompt; a single one streams to the terminal as it is drawn.

    Args:
        source: a run folder, a checkpoint, a ``.nemo`` file or a folder of Hugging Face.
        prompts: texts; they may differ in length.
        max_new_tokens: per prompt.
        temperature: 0 for the most probable token each time; None, here and below: as
            ``sampling_for`` says.
        top_k: keep the k most probable tokens; 0: all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        seed: of the draws.
        chat: each prompt is what a user says. Without any, a terminal is asked for them.
        prompts_file: has further prompts, see ``read_prompts``.
        stop: texts before which an answer ends.
        as_json: one object for each prompt, on a line.
        draft: ``mtp`` for speculative decoding.
        tokenizer: a ``tokenizer.json`` or its folder; None: the one beside the weights.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: no sound checkpoint, a prompt that does not fit, a file without prompts; with
            ``chat`` no chat template or no prompt.
    """
    if any(not text for text in stop):
        raise UserError("--stop '' would stop before the first token; give a text, or leave it out")
    if draft not in (None, _MTP):
        raise UserError(f"--draft {draft}: use {_MTP}, the model's own multi-token prediction")
    asked = [Prompt(text, f"--prompt {number}") for number, text in enumerate(prompts, start=1)]
    asked += read_prompts(prompts_file) if prompts_file is not None else []
    talks = chat and not asked and sys.stdin.isatty() and not as_json
    said = [p.said.strip() if isinstance(p.said, str) else "messages" for p in asked]
    if chat and not talks and not (said and all(said)):
        raise UserError('--chat answers a question, and none is given; add --prompt "..."')
    model, read = open_model(source, tokenizer)
    sampling = sampling_for(read, temperature, top_k, top_p)
    writer = Writer(model, read, sampling, max_new_tokens, seed, list(stop), draft is not None)
    if chat or any(isinstance(prompt.said, list) for prompt in asked):
        writer.answers_chats(template_of(source, read))
    if talks:
        talk(writer)
        return []
    asked = asked or [Prompt("", "the empty prompt")]
    ids = [writer.ids_of(prompt, chat) for prompt in asked]
    texts = []
    quotes = len(asked) > 1 or not chat
    for start in range(0, len(asked), 1 if writer.drafts else BATCH):
        part = asked[start : start + (1 if writer.drafts else BATCH)]
        streams = len(part) == 1 and not as_json
        if streams and quotes:
            _write(_quoted(part[0]))
        answers = writer.answers(ids[start : start + len(part)], start, _write if streams else None)
        for prompt, prompt_ids, answer in zip(part, ids[start:], answers, strict=False):
            texts.append(answer.text)
            if as_json:
                say(_as_json(prompt, len(prompt_ids), answer))
            else:
                quote = _quoted(prompt) if quotes and not streams else ""
                gap = "\n" if len(asked) > 1 else ""
                say(f"{quote}{'' if streams else answer.text}{gap}")
    if writer.drafts:
        complain(writer.speed())
    return texts


def open_model(source: Path, tokenizer: Path | None = None) -> tuple[Transformer, Tokenizer]:
    """The model in whatever holds one, and its tokenizer; no data are needed."""
    from deepseek.interop.open_weights import open_checkpoint
    from deepseek.launch.health import compile_kernels

    if (source / "config.json").is_file():
        return _opened_hf(source, tokenizer)
    opened = open_checkpoint(source)
    read = opened.tokenizer(tokenizer)
    if read is None:
        place = opened.run / TOKENIZER if opened.run is not None else opened.path
        gone = "does not exist" if opened.run is not None else "has no tokenizer beside it"
        raise UserError(f"{place} {gone}; give --tokenizer, a tokenizer.json or its folder")
    model = opened.model()
    if next(model.parameters()).is_cpu:
        compile_kernels(complain)
    return model, read


def sampling_for(
    tokenizer: Tokenizer, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """How tokens are drawn: what is given, else what the model's ``generation_config.json`` says
    (``do_sample: false`` is a temperature of 0), else 0.8, all tokens, 0.95."""
    from deepseek.inference.generation import Sampling

    told = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
    said = tokenizer.generation
    if said.get("do_sample") is False:
        told["temperature"] = 0
    elif said.get("do_sample"):
        told |= {key: said[key] for key in told if said.get(key) is not None}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return Sampling(**told | {key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def _opened_hf(source: Path, tokenizer: Path | None) -> tuple[Transformer, Tokenizer]:
    """By way of an import that is thrown away."""
    from deepseek.commands.convert import import_hf

    with tempfile.TemporaryDirectory(prefix="deepseek-") as scratch:
        target = Path(scratch) / "imported"
        with redirect_stdout(sys.stderr):
            import_hf(source, target, tokenizer=tokenizer)
        return open_model(target)


# -- prompts --


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts in a file, or on standard input if it is ``-``.

    One a line; empty lines are left out. In a ``.jsonl`` file, or where the first line is such an
    object, each line is an object with ``prompt``, a text, or with ``messages``.

    Raises:
        UserError: no such file, not UTF-8, no prompt, or a line that is none, by its number.
    """
    name = "standard input" if str(file) == "-" else str(file)
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UserError(f"--prompts {name}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: is not UTF-8 text; save it as UTF-8") from error
    lines = [
        (f"{name}:{number}", line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"--prompts {name}: holds no prompt; write one a line")
    if file.suffix == ".jsonl" or _is_object(lines[0][1]):
        return [Prompt(_said(line, where), where) for where, line in lines]
    return [Prompt(line, where) for where, line in lines]


def _is_object(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and ("prompt" in row or "messages" in row)


def _said(line: str, where: str) -> str | list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from error
    keys = [key for key in ("prompt", "messages") if isinstance(row, dict) and key in row]
    if len(keys) != 1:
        raise UserError(f'{where}: write {{"prompt": "..."}} or {{"messages": [...]}}, one of them')
    said = row[keys[0]]
    if keys == ["prompt"] and isinstance(said, str):
        return said
    if (
        keys == ["messages"]
        and isinstance(said, list)
        and said
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in said)
    ):
        return said
    form = "a text" if keys == ["prompt"] else "a list of {role, content}"
    raise UserError(f"{where}: {keys[0]} is {json.dumps(said)[:60]}, and must be {form}")


def template_of(source: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template. Raises ``UserError`` if there is none."""
    from deepseek.data.chat_template import ChatTemplate

    if tokenizer.chat_template is None:
        raise UserError(
            f"{source / TOKENIZER} has no chat template, so this model cannot be asked: it "
            "continues texts (leave out --chat), or, if it was trained on conversations, put its "
            "template beside the tokenizer as chat_template.jinja"
        )
    return ChatTemplate(tokenizer)


# -- answers --


class Writer:
    """A model that writes text.

    Args:
        model: whose text.
        tokenizer: of the model.
        sampling: how tokens are drawn.
        max_new_tokens: per prompt.
        seed: of the draws.
        stop: texts before which an answer ends.
        drafts: with speculative decoding.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
        stop: Sequence[str] = (),
        drafts: bool = False,
    ) -> None:
        from deepseek.inference.speculative import Acceptance

        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.seed, self.stop, self.drafts = max_new_tokens, seed, stop, drafts
        self.template: ChatTemplate | None = None
        self.stop_ids = tokenizer.stop_ids
        self._acceptance: Acceptance = Acceptance()
        self._seconds = 0.0

    def answers_chats(self, template: ChatTemplate) -> None:
        """From here on it can: answers end as the template ends them, and hold no special token."""
        self.template = template
        self.stop_ids = [*self.stop_ids, template.end_id()]

    def ids_of(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """The ids that the model goes on from.

        Raises:
            UserError: the template refuses the prompt, or it does not fit into the context.
        """
        from deepseek.data.chat_template import ChatError
        from deepseek.inference.generation import check_prompts

        said = prompt.said
        try:
            if isinstance(said, str):
                said.encode()
            if chat and isinstance(said, str):
                said = [{"role": "user", "content": said}]
            if isinstance(said, str):
                ids = self.tokenizer.prompt_ids(said)
            else:
                assert self.template is not None, "conversations need a template"
                ids = self.template.prompt_ids(said)
        except UnicodeEncodeError as error:
            raise UserError(f"{prompt.where}: is not UTF-8 text") from error
        except ChatError as error:
            raise UserError(f"{prompt.where}: {error}") from error
        check_prompts(self.model.config, [ids], self.max_new_tokens, [prompt.where])
        return ids

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        number: int = 0,
        show: Callable[[str], None] | None = None,
        most: int | None = None,
    ) -> list[Answer]:
        """Continue prompts in one pass, as each would be continued alone.

        Args:
            prompts: ids.
            number: of the first prompt, added to the seed.
            show: gets the text of a single prompt, piece by piece.
            most: new tokens, if fewer than ``max_new_tokens`` fit.
        """
        rows = [_Row(self) for _ in prompts]
        begin = time.perf_counter()
        for row, token in self._drawn(rows, prompts, number, most or self.max_new_tokens):
            piece = row.take(token)
            if show is not None and piece:
                show(piece)
        self._seconds += time.perf_counter() - begin
        for row in rows:
            piece = row.finish()
            if show is not None and piece:
                show(piece)
        return [Answer(row.text, row.tokens, row.reason or "length") for row in rows]

    def _drawn(
        self, rows: Sequence[_Row], prompts: Sequence[Sequence[int]], number: int, most: int
    ) -> Iterator[tuple[_Row, int]]:
        from deepseek.inference.generation import stream_tokens
        from deepseek.inference.speculative import stream_speculative

        settings = (most, self.sampling, self.stop_ids, self.seed + number)
        if self.drafts:
            for row, prompt in zip(rows, prompts, strict=True):
                for token in stream_speculative(self.model, prompt, *settings, self._acceptance):
                    yield row, token
                    if row.reason is not None:
                        break
            return

        def is_enough(number: int) -> bool:
            return rows[number].reason is not None

        for step in stream_tokens(self.model, prompts, *settings, is_enough):
            for row, drawn in zip(rows, step, strict=True):
                if drawn is not None:
                    yield row, drawn

    def speed(self) -> str:
        """How well the guesses were, and how fast it went."""
        count = self._acceptance
        share = f" ({count.accepted / count.guessed:.0%})" if count.guessed else ""
        a_pass = f", {count.tokens / count.passes:.2f} tokens a pass" if count.passes else ""
        each = f", {count.tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""
        return f"draft        {count.accepted} of {count.guessed} accepted{share}{a_pass}{each}"


class _Row:
    """One answer as it grows. Text that may be the beginning of a stop text is held back."""

    def __init__(self, writer: Writer) -> None:
        self._decoder = writer.tokenizer.stream(skip_special=writer.template is not None)
        self._stop_ids: Collection[int] = writer.stop_ids
        self._stop = writer.stop
        self._held = ""
        self.text = ""
        self.tokens = 0
        self.reason: str | None = None
        """Why it has ended; None: it has not."""

    def take(self, token: int) -> str:
        """The text that is certain with one more token."""
        if token in self._stop_ids:
            self.reason = "eos"
            return ""
        self.tokens += 1
        self._held += self._decoder.push(token)
        ends = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if ends:
            self.reason = "stop"
            return self._give(min(ends))
        return self._give(len(self._held) - self._open_end())

    def finish(self) -> str:
        """What is still held back, once no token follows."""
        if self.reason == "stop":
            return ""
        self._held += self._decoder.finish()
        ends = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if ends:
            self.reason = "stop"
        return self._give(min(ends, default=len(self._held)))

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece

    def _open_end(self) -> int:
        """Characters at the end that may become a stop text."""
        lengths = (
            n
            for text in self._stop
            for n in range(1, min(len(text), len(self._held) + 1))
            if self._held.endswith(text[:n])
        )
        return max(lengths, default=0)


# -- on the terminal --


def talk(writer: Writer, ask: Callable[[str], str] = input) -> None:
    """A conversation, until ``/exit`` or Ctrl-D. Ctrl-C ends an answer, not the conversation.

    Args:
        writer: answers chats.
        ask: shows a prompt and returns a line; raises ``EOFError`` at the end.
    """
    import readline  # noqa: F401  # line editing and history for input()

    say("/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C ends an answer")
    assert writer.template is not None
    longest = writer.model.config.max_position_embeddings
    messages: list[Message] = []
    turn = 0
    while True:
        try:
            said = ask("> ").strip()
        except EOFError:
            say()
            return
        if said == "/exit":
            return
        if said == "/reset":
            messages = []
            say("a new conversation")
            continue
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            ids = writer.template.prompt_ids(asked)
            if (room := longest - len(ids)) < 1:
                raise UserError(
                    f"the conversation has {len(ids)} tokens, and the model reads {longest}: "
                    "/reset begins a new one"
                )
        except UserError as error:
            complain(f"error: {error}")
            continue
        pieces: list[str] = []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            _write(piece)

        try:
            writer.answers([ids], turn, show, min(room, writer.max_new_tokens))
        except KeyboardInterrupt:
            _write(" ...")
        say("\n")
        turn += 1
        messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _quoted(prompt: Prompt) -> str:
    """The prompt, each line behind ``> ``; nothing for an empty one."""
    said = prompt.said
    if isinstance(said, list):
        said = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in said)
    return "".join(f"> {line}\n" for line in said.splitlines())


def _as_json(prompt: Prompt, prompt_tokens: int, answer: Answer) -> str:
    key = "prompt" if isinstance(prompt.said, str) else "messages"
    row = {
        key: prompt.said,
        "answer": answer.text,
        "prompt_tokens": prompt_tokens,
        "tokens": answer.tokens,
        "stop_reason": answer.stop_reason,
    }
    return json.dumps(row, ensure_ascii=False)
