"""``deepseek generate``: what it reads, where it stops, what it prints, and what it refuses."""

import json
import os
import pty
import select
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.commands.generate import Prompt, Writer, open_model, read_prompts, talk, template_of
from deepseek.data.chat_template import PLAIN_TEMPLATE
from deepseek.inference.generation import Sampling
from support.forked import Forked
from support.micro_runs import MicroRuns


@pytest.fixture(scope="module")
def opened(micro: MicroRuns) -> tuple[Any, Any]:
    return open_model(micro.folder / "run")


GREEDY = ["--temperature", "0", "--max-new-tokens", "12"]


def rows_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_generate_continues_a_prompt(cli: Forked) -> None:
    words = ["generate", "run", "--prompt", "abc", "--max-new-tokens", "8"]
    greedy = cli(*words, "--temperature", "0").assert_done().out
    assert greedy.startswith("> abc\n") and len(greedy.rstrip("\n")) > 6
    assert cli(*words, "--temperature", "0", "--seed", "5").out == greedy
    drawn = [cli(*words, "--seed", str(seed)).assert_done().out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_several_prompts_as_if_alone(cli: Forked) -> None:
    prompts = ["a", "bcd efg hij", ""]
    words = ["--max-new-tokens", "6", "--temperature", "0"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = cli("generate", "run", *given, *words).assert_done().out
    alone = [cli("generate", "run", "--prompt", prompt, *words).out for prompt in prompts]
    assert together == "".join(f"{text}\n" for text in alone)


def test_generate_streams_piece_by_piece(cli: Forked) -> None:
    watch = """
import sys
write = sys.stdout.write
class Watched:
    def write(self, text):
        write(f"[{text}]")
    def __getattr__(self, name):
        return getattr(sys.__stdout__, name)
sys.stdout = Watched()
"""
    words = ["--prompt", "abc", "--max-new-tokens", "5", "--temperature", "0"]
    pieces = cli("generate", "run", *words, before=watch).assert_done().out
    assert pieces.startswith("[> abc\n][") and pieces.count("[") >= 5
    plain = cli("generate", "run", *words).out
    assert pieces.replace("[", "").replace("]", "") == plain


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--temperature", "-1"], ["temperature=-1.0: must be 0 (greedy) or more"]),
        (["--temperature", "nan"], ["temperature=nan"]),
        (["--top-p", "0"], ["top_p=0.0", "above 0 and at most 1"]),
        (["--top-p", "1.5"], ["top_p=1.5"]),
        (["--top-k", "-1"], ["top_k=-1"]),
        (["--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (["--max-new-tokens", "300"], ["exceed", "max_position_embeddings=256"]),
        (["--prompt", "abc " * 300], ["--prompt 1 has", "max_position_embeddings=256"]),
        (["--stop", ""], ["--stop '' would stop before the first token"]),
        (["--stop", "x", "--stop", ""], ["--stop ''"]),
        (["--draft", "eagle"], ["--draft eagle: use mtp"]),
        (["--chat"], ["--chat answers a question"]),
        (["--chat", "--json"], ["--chat answers a question"]),
        (["--chat", "--prompt", "x"], ["tokenizer has no chat template"]),
        (["--prompt", b"\xff".decode(errors="surrogateescape")], ["--prompt 1: is not UTF-8"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt: cannot be read: No such file"]),
        (["--prompts", "."], ["--prompts .: cannot be read: Is a directory"]),
        (["--prompts", "-"], ["--prompts standard input: holds no prompt"]),
        (["--tokenizer", "nowhere"], ["tokenizer nowhere does not exist"]),
    ],
)
def test_generate_refuses(cli: Forked, words: list[str], parts: list[str]) -> None:
    ran = cli("generate", "run", *words)
    ran.assert_refused(*parts)
    assert ran.out == ""


def test_generate_from_what_is_no_run(cli: Forked, tmp_path: Path) -> None:
    cli("generate", "nowhere").assert_refused("nowhere does not exist; give a run folder")
    cli("generate", tmp_path).assert_refused("is neither a run folder", "deepseek train")
    cli("generate", "micro.yaml").assert_refused("is no run folder but a file")
    (tmp_path / "config.json").write_text("{}")
    cli("generate", tmp_path).assert_refused("holds no model.safetensors", "download the weights")


def remove_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)


def cut_newest(run: Path) -> None:
    shard = run / "checkpoints" / "step_00000012" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])


def replaced(name: str, before: str, after: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after))

    return damage


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (remove_checkpoints, ["holds no checkpoint yet; train first"]),
        (lambda run: (run / "tokenizer" / "tokenizer.json").write_text("{"), ["not JSON"]),
        (lambda run: (run / "tokenizer" / "tokenizer.json").write_text("{}"), ["not a tokenizer"]),
        (lambda run: shutil.rmtree(run / "tokenizer"), ["tokenizer", "does not exist"]),
    ],
)
def test_generate_from_a_damaged_run(
    cli: Forked, copy: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    damage(copy)
    cli("generate", copy).assert_refused(*parts)


def test_generate_from_the_checkpoint_before_a_damaged_one(cli: Forked, copy: Path) -> None:
    cut_newest(copy)
    ran = cli("generate", copy, "--max-new-tokens", "4").assert_done()
    assert "step_00000012 is damaged" in ran.err and "trying the one before" in ran.err
    assert "damaged" not in ran.out


# -- from whatever holds a model --


def test_generate_from_the_folder_alone(micro: MicroRuns, cli: Forked, copy: Path) -> None:
    """From any working directory, without data, configuration and log; from one checkpoint too."""
    words = ["--prompt", "abc", *GREEDY]
    wanted = cli("generate", "run", *words).assert_done().out
    (copy.parent / "else").mkdir()
    alone = Path(shutil.move(copy, copy.parent / "else" / "where"))
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (alone / name).unlink()
    assert cli("generate", alone, *words, cwd=Path("/")).assert_done().out == wanted
    assert cli("generate", ".", *words, cwd=alone).assert_done().out == wanted
    step = alone / "checkpoints" / "step_00000012"
    assert cli("generate", step, *words, cwd=Path("/")).assert_done().out == wanted
    other = cli("generate", step.with_name("step_00000008"), *words).assert_done().out
    assert other != wanted
    # A checkpoint by itself says what it lacks.
    moved = Path(shutil.move(step, alone.parent / "by_itself"))
    cli("generate", moved, *words).assert_refused("has no tokenizer beside it", "--tokenizer")
    given = ["--tokenizer", alone / "tokenizer"]
    assert cli("generate", moved, *words, *given).assert_done().out == wanted


def test_generate_from_hugging_face_files(micro: MicroRuns, cli: Forked, tmp_path: Path) -> None:
    words = ["--prompt", "abc", *GREEDY]
    wanted = cli("generate", "run", *words).assert_done().out
    cli("hf", "export", "run", tmp_path / "hf").assert_done()
    ran = cli("generate", tmp_path / "hf", *words).assert_done()
    assert ran.out == wanted
    cli("hf", "import", tmp_path / "hf", tmp_path / "imported").assert_done()
    assert cli("generate", tmp_path / "imported", *words).assert_done().out == wanted
    assert not list(Path("/tmp").glob("deepseek-*/imported"))


# -- where an answer stops --


def test_stop_texts_cut_before_them(opened: tuple[Any, Any]) -> None:
    """Wherever they lie in the tokens, alone and in a batch, and with several of them the first."""
    model, tokenizer = opened

    def answers(stop: list[str], drafts: bool = False) -> list[Any]:
        writer = Writer(model, tokenizer, Sampling(1.2), 40, 3, stop, drafts)
        asked = [Prompt("abc", "1"), Prompt("bcd efg", "2")]
        return writer.answers([writer.ids_of(prompt) for prompt in asked])

    whole = [answer.text for answer in answers([])]
    assert all(len(text) > 12 for text in whole)
    for start in (1, 4, 8):
        for length in (1, 2, 5):
            stop = whole[0][start : start + length]
            got = answers([stop, "never there"])
            for answer, text in zip(got, whole, strict=True):
                assert answer.text == text.partition(stop)[0]
                assert (answer.stop_reason == "stop") == (stop in text)
            assert answers(["never there", whole[0][start + 3 : start + 6], stop])[0].text == min(
                (whole[0].partition(cut)[0] for cut in (whole[0][start + 3 : start + 6], stop)),
                key=len,
            )
    cut = answers([whole[0][4:6]])[0]
    assert cut.tokens < answers([])[0].tokens


def test_stop_texts_never_show_while_streaming(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    writer = Writer(model, tokenizer, Sampling(1.2), 40, 3)
    ids = writer.ids_of(Prompt("abc", "1"))
    (whole,) = writer.answers([ids])
    for start in (2, 5, 9):
        stop = whole.text[start : start + 3]
        pieces: list[str] = []
        stopped = Writer(model, tokenizer, Sampling(1.2), 40, 3, [stop])
        (answer,) = stopped.answers([ids], show=pieces.append)
        assert "".join(pieces) == answer.text == whole.text.partition(stop)[0]
    held = Writer(model, tokenizer, Sampling(1.2), 40, 3, [whole.text + "!"])
    pieces = []
    held.answers([ids], show=pieces.append)
    assert "".join(pieces) == whole.text  # held back to the end, and then shown


def test_stop_on_the_command_line(cli: Forked) -> None:
    words = ["generate", "run", "--prompt", "abc", *GREEDY, "--json"]
    (whole,) = rows_of(cli(*words).assert_done().out)
    stop = whole["answer"][3:5]
    (cut,) = rows_of(cli(*words, "--stop", stop, "--stop", "zz").assert_done().out)
    assert cut["answer"] == whole["answer"].partition(stop)[0] and cut["stop_reason"] == "stop"
    assert whole["stop_reason"] == "length" and whole["tokens"] == 12
    drafted = cli(*words, "--stop", stop, "--draft", "mtp").assert_done()
    assert rows_of(drafted.out) == [cut]


def test_every_token_that_ends_ends(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    writer = Writer(model, tokenizer, Sampling(0.0), 12)
    ids = writer.ids_of(Prompt("abc", "1"))
    from deepseek.inference.generation import generate

    (row,) = generate(model, [ids], 12, Sampling(0.0), ())
    for end in row:
        writer.stop_ids = [tokenizer.eos_id, end]
        (answer,) = writer.answers([ids])
        first = row.index(end)
        assert (answer.tokens, answer.stop_reason) == (first, "eos")
        assert answer.text == tokenizer.decode(row[:first])


# -- prompts from a file, answers as JSON --


def test_prompts_of_a_file_as_if_alone(micro: MicroRuns, cli: Forked, tmp_path: Path) -> None:
    """More than a batch, of many lengths, in order; equal to each alone; with drafts as well."""
    prompts = ["abc" * (1 + k % 5) + " d" * (k % 3) for k in range(19)]
    file = tmp_path / "p.txt"
    file.write_text("\ufeff" + "\r\n".join([*prompts[:5], "", "  ", *prompts[5:]]), "utf-8")
    words = ["generate", "run", *GREEDY, "--json"]
    rows = rows_of(cli(*words, "--prompts", file).assert_done().out)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows[:3] + rows[17:]:
        assert rows_of(cli(*words, "--prompt", row["prompt"]).out) == [row]
        assert set(row) == {"prompt", "answer", "prompt_tokens", "tokens", "stop_reason"}
    drafted = cli(*words, "--prompts", file, "--draft", "mtp").assert_done()
    assert rows_of(drafted.out) == rows
    assert "accepted" in drafted.err and "tokens/s" in drafted.err
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert rows_of(cli(*words, "--prompts", lines).assert_done().out) == rows
    both = rows_of(cli(*words, "--prompt", "first", "--prompts", file).assert_done().out)
    assert [row["prompt"] for row in both] == ["first", *prompts]


def test_prompts_of_standard_input(micro: MicroRuns, tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_text('{"prompt": "abc\\ndef"}\n{"prompt": "x"}\n')
    before = f"import os; os.dup2(os.open({str(file)!r}, os.O_RDONLY), 0)"
    words = ["generate", "run", "--prompts", "-", *GREEDY]
    out = micro.cli(*words, before=before).assert_done().out
    assert out.startswith("> abc\n> def\n") and "\n\n> x\n" in out


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.txt", b"", ["p.txt: holds no prompt; write one a line"]),
        ("p.txt", b"\n \n", ["holds no prompt"]),
        ("p.txt", b"abc\nd\xffe\n", ["p.txt:2: is not UTF-8"]),
        ("p.jsonl", b'{"prompt": "a"}\nabc\n', ["p.jsonl:2: is no JSON"]),
        ("p.jsonl", b"[1]\n", ["p.jsonl:1: write", "one of them"]),
        ("p.jsonl", b'{"text": "a"}\n', ["p.jsonl:1: write"]),
        ("p.jsonl", b'{"prompt": "a", "messages": []}\n', ["p.jsonl:1: write", "one of them"]),
        ("p.jsonl", b'{"prompt": 3}\n', ["p.jsonl:1: prompt is 3, and must be a text"]),
        ("p.jsonl", b'{"messages": []}\n', ["messages is [], and must be a list of"]),
        ("p.jsonl", b'{"messages": [{"content": "a"}]}\n', ["must be a list of {role, content}"]),
        ("p.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', ["no chat template"]),
        ("p.txt", b"abc\n" + b"abc " * 400, ["p.txt:2 has", "max_position_embeddings=256"]),
    ],
)
def test_prompts_that_are_none(
    cli: Forked, tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    ran = cli("generate", "run", "--prompts", tmp_path / name)
    ran.assert_refused(*parts)
    assert ran.out == ""


def test_a_text_that_looks_like_json_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"a": 1}\n{"prompt": "b"}\n')
    assert [prompt.said for prompt in read_prompts(tmp_path / "p.txt")] == [
        '{"a": 1}',
        '{"prompt": "b"}',
    ]


# -- conversations --


@pytest.fixture
def asked(copy: Path) -> Path:
    """A run that can be asked."""
    (copy / "tokenizer" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    return copy


def test_conversations_of_a_file(cli: Forked, asked: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "e"}) + "\n")
    first, second = rows_of(
        cli("generate", asked, "--prompts", file, "--json", *GREEDY).assert_done().out
    )
    assert first["messages"] == messages and second["prompt"] == "e"
    by_hand = "User: ab\n\nAssistant: c<｜end▁of▁sentence｜>User: d\n\nAssistant:"
    _, tokenizer = open_model(asked)
    assert first["prompt_tokens"] == len(tokenizer.encode(by_hand, parse_special=True))
    file.write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}) + "\n")
    cli("generate", asked, "--prompts", file).assert_refused("p.jsonl:1: ", "refuses this")


def test_a_conversation_keeps_its_history(asked: Path, capsys: Any) -> None:
    model, tokenizer = open_model(asked)
    writer = Writer(model, tokenizer, Sampling(0.0), 9)
    writer.answers_chats(template_of(asked, tokenizer))
    said = iter(["ab", "", "cd", "/reset", "ab", "x" * 900, "/exit", "never"])
    read: list[list[dict[str, str]]] = []
    prompt_ids = writer.template.prompt_ids  # type: ignore[union-attr]

    def watched(messages: Any) -> Any:
        read.append([dict(message) for message in messages])
        return prompt_ids(messages)

    writer.template.prompt_ids = watched  # type: ignore[union-attr, method-assign]
    talk(writer, ask=lambda shown: next(said))
    assert [[message["role"] for message in messages] for messages in read] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
        ["user", "assistant", "user"],
    ]
    ran = capsys.readouterr()
    first = read[1][1]["content"]
    assert first and first in ran.out and "a new conversation" in ran.out
    assert read[3][1]["content"] == first  # after /reset the same question has the same answer
    assert "the model reads 256: /reset begins a new one" in ran.err
    assert next(said) == "never"


def test_ctrl_c_ends_an_answer_alone(asked: Path, capsys: Any, monkeypatch: Any) -> None:
    model, tokenizer = open_model(asked)
    writer = Writer(model, tokenizer, Sampling(0.0), 9)
    writer.answers_chats(template_of(asked, tokenizer))
    said = iter(["ab", "cd"])

    def ask(shown: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    def cut(ids: Any, turn: int, show: Any, most: int) -> Any:
        show("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "answers", cut)
    talk(writer, ask)
    assert capsys.readouterr().out.count("half ...") == 2


def test_a_conversation_on_a_terminal(cli: Forked, asked: Path) -> None:
    """The command itself, on a pseudo-terminal, left with Ctrl-D."""
    ours, theirs = pty.openpty()
    terminal = f"import os\nfd = os.open({os.ttyname(theirs)!r}, os.O_RDWR)\n"
    terminal += "for number in range(3):\n    os.dup2(fd, number)\n"
    words = ["generate", asked, "--chat", "--max-new-tokens", "3"]
    started = cli.start(*words, before=terminal, env={"TERM": "dumb"})
    out = ""
    for number, answer in enumerate(("hello\n", "again\n", "\x04"), start=1):
        while out.count("> ") < number:
            assert select.select([ours], [], [], 120)[0], out
            out += os.read(ours, 4096).decode(errors="replace")
        os.write(ours, answer.encode())
    assert started.wait().code == 0, out
    while select.select([ours], [], [], 0)[0]:
        out += os.read(ours, 4096).decode(errors="replace")
    os.close(ours)
    os.close(theirs)
    assert "/reset begins" in out and "Traceback" not in out
