"""Conversations in the forms that people bring: ids and masks equal those of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from deepseek.commands.convert import copy_template
from deepseek.config.errors import UserError
from deepseek.data.chat import conversation_of, prepare_chat
from deepseek.data.chat_template import ChatError, ChatTemplate
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import train_bpe
from support.sample_texts import TEXTS

G, H = "{% generation %}", "{% endgeneration %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}\n"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
TOOL = "{% elif m.role == 'tool' %}<tool>{{ m.content }}</tool>"
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
MARKED = {
    "V2, a space before the mark": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: " + G + "{{ m.content }}" + CALLS +
        "{{ eos_token }}" + H + "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "V3": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}" + TOOL +
        "{% else %}<｜Assistant｜>" + G + "{{ m.content }}" + CALLS + "{{ eos_token }}" + H +
        "{% endif %}{% endfor %}"
    ),
    "R1, earlier reasoning dropped": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}" +
        TOOL + "{% elif m.role == 'assistant' %}<｜Assistant｜>" + G +
        "{{ m.content.split('</think>')[-1] }}" + CALLS + "{{ eos_token }}" + H +
        "{% endif %}{% endfor %}"
    ),
    "V3.1, thinking off, think tag outside the mark": (
        "{% set thinking = thinking if thinking is defined else false %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}" + TOOL +
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{% if not thinking %}</think>{% endif %}" +
        G + "{{ m.content.split('</think>', 1)[-1] }}" + CALLS + "{{ eos_token }}" + H +
        "{% endif %}{% endfor %}"
    ),
    "Kimi-K2, tools declared": (
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>"
        "{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{% endif %}"
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>"
        "{% if m.role == 'assistant' %}" + G + "{{ m.content }}" + CALLS + "<|im_end|>" + H +
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "Moonlight, a default system": (
        "{%- for m in messages -%}{%- if loop.first and messages[0].role != 'system' -%}"
        "<|im_system|>system<|im_middle|>You are helpful.<|im_end|>{%- endif -%}"
        "{%- if m.role == 'system' -%}<|im_system|>{%- elif m.role == 'user' -%}<|im_user|>"
        "{%- else -%}<|im_assistant|>{%- endif -%}{{ m.role }}<|im_middle|>"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}" + CALLS +
        "<|im_end|>{%- endgeneration -%}{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}"
        "{%- endfor -%}"
    ),
    "ChatML, new line inside the mark": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + G +
        THOUGHT + "{{ m.content }}" + CALLS + "<|im_end|>\n" + H +
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    ),
    "Qwen, default system and white space control": (
        "{%- if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{%- endif %}"
        "{%- for m in messages %}\n<|im_start|>{{ m.role }}\n{%- if m.role == 'assistant' %}\n"
        "{%- generation %}{% set said = m.content %}" + THOUGHT + "{{- said }}" + CALLS +
        "<|im_end|>{%- endgeneration %}{%- else %}{{- m.content }}{{ said }}<|im_end|>{%- endif %}"
        "{%- endfor %}"
    ),
    "Llama 3, trimmed": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}" + G + "{{ m.content | trim }}" + CALLS + "<|eot_id|>" + H +
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]" + TOOL + "{% elif m.role == 'assistant' %} " + G + "{{ m.content }}" + CALLS +
        "{{ eos_token }}" + H + "{% endif %}{% endfor %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m.role | upper }}: {% if m.role == 'assistant' %}" + G +
        "{{ m.thinking }}{{ m.content }}" + CALLS + H + "{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}"
    ),
}  # fmt: skip
WORDS = "a is two, don't for x in\nrange(3): ünï 中文 1234 <b> \t end. 🙂 def f".split(" ")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS * 3, 500)


def folder_of(bpe: Tokenizer, folder: Path, template: Any, **config: Any) -> Path:
    """A tokenizer folder as transformers and we read it."""
    bpe.save(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "chat_template": template, **config}))
    return folder


def talks(count: int) -> list[dict[str, Any]]:
    """Drawn conversations: with system, tools, several turns, empty ones, reasoning, and none."""
    rng = random.Random(7)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))).strip() or "x"

    made = []
    for number in range(count):
        kind = number % 6
        turns = [{"role": "system", "content": text()}] if number % 3 == 0 else []
        for turn in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": "" if kind == 1 and turn else text()})
            if kind == 2:
                call = {"name": "add", "arguments": {"a": rng.randint(0, 99), "é": text()}}
                said = rng.choice(["", text()])
                turns += [
                    {"role": "assistant", "content": said, "tool_calls": [{"function": call}]},
                    {"role": "tool", "content": text()},
                ]
            answer = {"role": "assistant", "content": text()}
            if kind == 3:
                answer[rng.choice(["reasoning_content", "thinking", "reasoning"])] = text()
            if kind in (4, 5):
                thought = f"\n{text()}\n" if kind == 4 else "\n\n"
                answer["content"] = f"<think>{thought}</think>\n\n" + answer["content"]
            turns.append(answer)
        tools = [{"type": "function", "function": {"name": "add", "description": "ünï"}}]
        made.append({"messages": turns, **({"tools": tools} if kind == 2 else {})})
    return made


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.nightly)])
def test_ids_and_masks_equal_those_of_transformers(
    count: int, bpe: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    for number, (name, template) in enumerate(MARKED.items()):
        folder = folder_of(bpe, tmp_path / str(number), template)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ours = ChatTemplate(load_tokenizer(folder))
        for row in talks(count):
            found = ours.encode(conversation_of(row))
            wanted = theirs.apply_chat_template(
                row["messages"], tools=row.get("tools"), tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            assert found.ids.tolist() == wanted["input_ids"], (name, row)
            marked = [bit == 1 for bit in wanted["assistant_masks"]]
            assert found.is_answer.tolist() == marked, (name, row)


def test_answers_that_leave_the_generation_prompt_begin_after_its_token(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    """R1's own template asks with an opened think tag, and writes answers without their reasoning:
    the mask is that of the template with marks after ``<｜Assistant｜>``."""
    body = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>[{{ m.content.split('</think>')[-1] }}{{ eos_token }}]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    )
    names = ["<｜User｜>", "<｜Assistant｜>"]
    for special in (True, False):  # V3's own are not
        tokens = {
            str(bpe.vocab_size + k): {"content": name, "special": special}
            for k, name in enumerate(names)
        }
        found = []
        for number, (left, right) in enumerate([("", ""), (G, H)]):
            template = body.replace("[", left, 1).replace("eos_token }}]", "eos_token }}" + right)
            folder = tmp_path / f"{special}{number}"
            folder_of(bpe, folder, template, added_tokens_decoder=tokens)
            ours = ChatTemplate(load_tokenizer(folder))
            turns = [*row(content="<b>")["messages"], *row(content="x</think>< c")["messages"]]
            found.append(ours.encode(conversation_of({"messages": turns})))
        assert found[0].ids.tolist() == found[1].ids.tolist()
        assert found[0].is_answer.tolist() == found[1].is_answer.tolist()
        said = bpe.decode(found[0].ids[found[0].is_answer].tolist(), skip_special=True)
        assert said == "<b>< c"


@pytest.mark.parametrize("key", ["weight", "trainable", "train", "training", "loss"])
@pytest.mark.parametrize("template", [None, MARKED["V3"], MARKED["V2, a space before the mark"]])
def test_answers_that_are_switched_off_are_context(
    key: str, template: str | None, bpe: Tokenizer, tmp_path: Path
) -> None:
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, template)))
    turns = [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "bad", key: False},
        {"role": "user", "content": "b?"}, {"role": "assistant", "content": "good", key: True},
    ]  # fmt: skip
    found = ours.encode(conversation_of({"messages": turns}))
    learnt = ours.tokenizer.decode(found.ids[found.is_answer].tolist())
    assert "good" in learnt and "bad" not in learnt
    assert "bad" in ours.tokenizer.decode(found.ids.tolist())
    turns[3][key] = False
    with pytest.raises(ChatError, match="all are switched off"):
        ours.encode(conversation_of({"messages": turns}))


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is not none %}{{ m.content }}"
    "{% endif %}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments }}</call>"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def row(**answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **answer}]}


def test_a_call_of_a_tool_may_have_no_content(bpe: Tokenizer, tmp_path: Path) -> None:
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, CALLING)))
    for answer in ({"content": None, "tool_calls": [CALL]}, {"tool_calls": [CALL]}):
        found = ours.encode(conversation_of(row(**answer)))
        assert "<call>add" in ours.tokenizer.decode(found.ids[found.is_answer].tolist())


def test_every_call_of_a_tool_is_told(bpe: Tokenizer, tmp_path: Path) -> None:
    """A template that writes the first call alone, and one that knows its tools by name."""
    first = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path / "first", first)))
    ours.encode(conversation_of(row(content="4", tool_calls=[CALL])))
    with pytest.raises(ChatError, match="message 1: the chat template has no place for its tool"):
        ours.encode(conversation_of(row(content="4", tool_calls=[CALL, CALL])))
    escaped = CALLING.replace("<call>{{ c.function.name }}", "{{ c | tojson(ensure_ascii=true) }}")
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path / "escaped", escaped)))
    ours.encode(conversation_of(row(content="4", tool_calls=[CALL, CALL])))
    known = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    known += "{% if c.function.name != 'add' %}{{ raise_exception('unknown') }}{% endif %}"
    known += "{% endfor %}{% endfor %}"
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path / "known", known + CALLING)))
    ours.encode(conversation_of(row(content="4", tool_calls=[CALL, CALL])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (row(content=None), "content is a JSON null, expected text"),
        (row(content="", tool_calls=[CALL]), "no place for its tool_calls"),
        (row(content=[{"type": "image_url"}]), "a part of type image_url"),
        (row(content="4", weight=0.5), "weight=0.5 must be 0 or 1"),
        (row(content="4", weight=1, trainable=False), "contradict each other"),
        (row(content="4", train_detail=[]), "train_detail is not read here"),
        (row(content="hi \ud83d"), "half of a surrogate pair"),
        (row(content="4") | {"tools": ["\udc00"]}, "tools: holds half of a surrogate pair"),
        (
            row(content="4") | {"tools": [{"a": [{"\udc00": 1}]}]},
            "tools: holds half of a surrogate",
        ),
        (row(content="4", **{"\ud800": 1}), "message 1: holds half of a surrogate pair"),
        (row(content="4", tool_calls=5), "message 1: tool_calls is a JSON number, expected a list"),
        (row(content="4", tool_calls=CALL), "tool_calls is a JSON object, expected a list"),
        (row(content="", tool_calls=[{"function": {"name": "i"}}]), "1: .*no place for its tool_c"),
        (row(content="4", tool_calls=[{"name": "s"}]), "message 1: .*no place for its tool_calls"),
        (row(content="4", tool_calls=[None]), "no place for its tool_calls"),
        (row(content="4", tool_calls=[{"function": None}]), "no place for its tool_calls"),
        (row(content=None, function_call=CALL), "function_call is not read here; write OpenAI's"),
        (row(content="4", function_call=CALL), "function_call is not read here; write OpenAI's"),
        (row(content="4", weight="1"), "weight='1' must be 0 or 1"),
        (row(content="4", weight=10**400), "weight=10{59} must be 0 or 1"),
        (row(content="4", weight=[1]), r"weight=\[1\] must be 0 or 1"),
        (row(content="4") | {"loss": False}, "loss=false of a whole line is not read here"),
        (row(content="4") | {"images": ["a.png"]}, "images is not read here, and the text, or"),
        (row(content="4") | {"mask": "User"}, "mask is not read here, and the text, or what is"),
        (row(content="4") | {"loss_weight": 0.5}, "loss_weight is not read here, and the text"),
        (row(content="4", masked=True), "message 1: masked is not read here; use weight 0 or 1"),
        (row(content="4", train_on=False), "message 1: train_on is not read here; use weight"),
        (row(content="4", ignore_loss=1), "message 1: ignore_loss is not read here; use weight"),
        (row(content="4") | {"functions": [{}]}, "functions is not read here"),
        (row(content="4") | {"documents": [{}]}, "documents is not read here"),
        (row(content="4") | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is not read"),
        (row(content="4") | {"conversations": []}, "has both messages and conversations"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "has both completion and response"),
        ({"instruction": "a", "input": 5, "output": "b"}, "input is a JSON number, expected text"),
        ({"messages": [{"role": "User", "content": "a"}]}, r"nothing to learn \(roles: User\)"),
        ({"messages": []}, r"nothing to learn \(roles: none\)"),
        (row(content=[{"text": "x"}]), "a part of type None"),
        (row(content=[None]), "a part of type null"),
        (row(content=[{"type": "text", "text": None}]), "a part of type text"),
        (row(content=[]), "the answer is empty"),
        (row(content=" \n"), "the answer is empty"),
        (row(content={"a": 1}), "content is a JSON object, expected text"),
        (row(content=10**400), "content is a JSON number, expected text"),
    ],
)
def test_what_would_be_read_half_is_refused(
    data: dict[str, Any], message: str, bpe: Tokenizer
) -> None:
    with pytest.raises(ChatError, match=message):
        ChatTemplate(bpe).encode(conversation_of(data))


def test_parts_of_text_are_joined(bpe: Tokenizer) -> None:
    for parts in (
        [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}],
        ["four"],
        [{"type": "input_text", "text": "f"}, "", {"type": "output_text", "text": "our"}],
    ):
        assert conversation_of(row(content=parts)) == conversation_of(row(content="four"))


def test_what_says_nothing_is_no_reason_to_refuse() -> None:
    plain = conversation_of(row(content="4"))
    for more in (
        {"images": []},
        {"functions": None},
        {"loss": 2.3},
        {"train": True},
        {"id": 10**400},
    ):
        assert conversation_of(row(content="4") | more) == plain
    for more in ({"weight": None}, {"weight": 1.0}, {"loss": True}, {"train_detail": None}):
        answer = conversation_of(row(content="4", **more)).messages[-1]
        assert answer["content"] == "4"
    user = {"role": "user", "content": "x", "function_call": None, "tool_calls": None}
    conversation_of({"messages": [user, *row(content="4")["messages"]]})


@pytest.mark.parametrize(
    "tag",
    ["{% generation %}", "{%- generation -%}", "{%+ generation +%}", "{%-generation-%}",
     "{%\ngeneration\n%}", "{%- generation +%}"],
)  # fmt: skip
def test_marks_are_known_however_they_are_written(tag: str, bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}" + tag + (
        " {{ m.content }} " + tag.replace("gen", "endgen") + "{% else %}{{ m.content }}{% endif %}"
        "\n{% endfor %}"
    )  # fmt: skip
    folder = folder_of(bpe, tmp_path, template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [*row(content="one ünï")["messages"], *row(content="🙂")["messages"]]
    found = ChatTemplate(load_tokenizer(folder)).encode(conversation_of({"messages": messages}))
    wanted = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids.tolist() == wanted["input_ids"]
    assert found.is_answer.tolist() == [bit == 1 for bit in wanted["assistant_masks"]]


def test_marks_of_one_template_say_nothing_of_another(bpe: Tokenizer, tmp_path: Path) -> None:
    plain = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    named = [
        {"name": "default", "template": MARKED["plain"]},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + plain},
    ]
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, named)))
    for more in ({}, {"tools": [{"name": "add"}]}):
        found = ours.encode(conversation_of(row(content="four") | more))
        learnt = ours.tokenizer.decode(found.ids[found.is_answer].tolist(), skip_special=True)
        assert learnt == "four"


def test_what_a_template_leaves_out_is_told(
    bpe: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ChatTemplate(bpe).encode(conversation_of(row(content="4", reasoning_content="two")))
    assert found.lost == ("reasoning_content of assistant",)
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row(content="4", reasoning_content="two")) + "\n")
    bpe.save(tmp_path / "tok")
    prepare_chat([file], tmp_path / "out", tmp_path / "tok")
    assert "in 1 of 1 conversations the chat template leaves out reasoning_content" in (
        capsys.readouterr().err
    )
    silent = folder_of(bpe, tmp_path / "silent", "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ChatError, match="leaves the answer out"):
        ChatTemplate(load_tokenizer(silent)).encode(conversation_of(row(content="4")))


def test_tojson_takes_what_transformers_takes(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tools = [{"type": "function", "function": {"name": "é", "b": [1, {"z": 1, "a": 2}]}}]
    messages = row(content="four")["messages"]
    for number, options in enumerate(
        ["", "separators=(',', ':')", "sort_keys=true", "indent=2", "ensure_ascii=true, indent=1"]
    ):
        template = "{{ tools | tojson(" + options + ") }}{% for m in messages %}{{ m.content }}"
        template += "{% endfor %}{{ eos_token }}{% if strftime_now('%Y') %}!{% endif %}"
        folder = folder_of(bpe, tmp_path / str(number), template)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ChatTemplate(load_tokenizer(folder)).render(messages, tools=tools) == wanted


def test_the_template_called_tool_use_is_taken_with_tools(bpe: Tokenizer, tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    named = [
        {"name": "default", "template": plain},
        {"name": "tool_use", "template": "<T>{{ tools | tojson }}" + plain},
    ]
    messages = row(content="four")["messages"]
    for form in (named, {entry["name"]: entry["template"] for entry in named}):
        ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, form)))
        assert ours.render(messages, tools=[{"name": "add"}]).startswith('<T>[{"name": "add"}]')
        assert not ours.render(messages).startswith("<T>")


def test_named_templates_in_files_of_their_own(bpe: Tokenizer, tmp_path: Path) -> None:
    """As transformers 5 saves them; they are kept by an import and an export."""
    transformers = pytest.importorskip("transformers")
    plain = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder_of(bpe, tmp_path, plain))
    theirs.chat_template = {"default": plain, "tool_use": "<T>{{ tools | tojson }}" + plain}
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "additional_chat_templates" / "tool_use.jinja").is_file()
    load_tokenizer(tmp_path / "theirs").save(tmp_path / "saved")
    load_tokenizer(tmp_path / "theirs").save(tmp_path / "copied")
    copy_template(tmp_path / "theirs", tmp_path / "copied")
    messages, tools = row(content="four")["messages"], [{"name": "add"}]
    for name in ("theirs", "saved", "copied"):
        ours = ChatTemplate(load_tokenizer(tmp_path / name))
        again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        for given in (None, tools):
            wanted = again.apply_chat_template(messages, tools=given, tokenize=False)
            assert ours.render(messages, tools=given) == wanted
            assert wanted.startswith("<T>") == (given is not None)


@pytest.mark.parametrize("form", [5, True, ["x"], [{"name": "default"}], {"default": 3}])
def test_a_chat_template_of_another_form_is_refused(
    form: Any, bpe: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="chat_template of tokenizer_config.json must be a text, n"):
        ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, form)))


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "",
    ],
)
def test_hostile_templates_are_a_message(
    body: str, bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.data.chat_template.RENDER_SECONDS", 0.3)
    ours = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, body or "{# nothing #}")))
    with pytest.raises(ChatError, match="the chat template re"):
        ours.encode(conversation_of(row(content="4")))


def test_tokens_that_stand_in_the_config_alone_are_tokens(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = bpe.vocab_size
    more = {
        str(size + k): {"content": name, "special": True}
        for k, name in enumerate(["<|im_start|>", "<|im_end|>"])
    }
    folder = folder_of(bpe, tmp_path, MARKED["ChatML, new line inside the mark"],
                       added_tokens_decoder=more)  # fmt: skip
    ours = load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "<|im_start|>user\na<|im_end|>"
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == size + 2
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "no id with an object"),
        ({"added_tokens_decoder": {"9000": {"content": "<|new|>"}}}, "but the ids end at"),
        ({"added_tokens_decoder": {"5": {"content": "<|new|>"}}}, "which tokenizer.json gives to"),
        ({"added_tokens_decoder": {"5": {}}}, "without content"),
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "is no object"),
        ({"additional_special_tokens": ["<|new|>"]}, "which has no id"),
        ({"additional_special_tokens": 1.5}, "additional_special_tokens beside it must be a list"),
        ({"extra_special_tokens": "<|new|>"}, "extra_special_tokens beside it must be a list"),
        ({"extra_special_tokens": {"image": "<|new|>"}}, "which has no id"),
        ({"eos_token": 5}, "has eos_token=5, expected its text or an object with its content"),
        ({"bos_token": ["<s>"]}, r"has bos_token=\['<s>'\], expected its text or an object"),
        ({"pad_token": {"text": "<p>"}}, "has pad_token={'text': '<p>'}, expected its text"),
        ({"bos_token": "<gone>"}, "says bos_token is '<gone>', which is not in the vocabulary"),
        ({"eos_token": ""}, "says eos_token is '', which is not in the vocabulary"),
        ({"pad_token": "<gone>"}, None),
        ({"add_bos_token": "true"}, "has add_bos_token='true', expected true or false"),
        ({"add_eos_token": 1}, "has add_eos_token=1, expected true or false"),
        ({"add_bos_token": None, "add_eos_token": False}, None),
        ({"chat_template": "\ud800"}, "holds half of a surrogate pair"),
        ({"name": {"a": ["b\udc00"]}}, "holds half of a surrogate pair"),
        ({"name": "\U0001f642 \\ud800"}, None),
    ],
)
def test_added_tokens_that_cannot_be(
    config: dict[str, Any], message: str | None, bpe: Tokenizer, tmp_path: Path
) -> None:
    folder = folder_of(bpe, tmp_path, None, **config)
    if message is None:
        load_tokenizer(folder)
        return
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [{}, [], 3, None])
def test_tokens_of_tokenizer_json_without_a_text(
    content: Any, bpe: Tokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    told = json.loads(file.read_text())
    told["added_tokens"][0]["content"] = content
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match="is damaged|cannot be read"):
        load_tokenizer(tmp_path)


def test_an_answer_without_an_id_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    """The only b stands in the constant text, so the answer seems to be told."""
    silent = folder_of(bpe, tmp_path, "a b c{{ eos_token }}")
    with pytest.raises(ChatError, match="an answer becomes no id at all"):
        ChatTemplate(load_tokenizer(silent)).encode(conversation_of(row(content="b")))


def test_white_space_without_an_id_at_the_end_of_a_mark(bpe: Tokenizer, tmp_path: Path) -> None:
    """Where the mark ends in it the answer is marked to its last id, and what follows is not:
    transformers marks all to the end there."""
    folder = folder_of(bpe, tmp_path, MARKED["ChatML, new line inside the mark"])
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    told["decoder"], told["model"]["unk_token"] = None, "<｜end▁of▁sentence｜>"
    file.write_text(json.dumps(told))
    ours = ChatTemplate(load_tokenizer(folder))
    turns = [*row(content="one two")["messages"], *row(content="three")["messages"]]
    found = ours.encode(conversation_of({"messages": turns}))
    text, marked = ours.render(turns), found.is_answer
    places = ours.tokenizer.encode_with_places(text, parse_special=True)[1]
    inside = [text[a:b] for (a, b), on in zip(places, marked, strict=True) if on]
    assert "".join(inside) == "onetwo<|im_end|>three<|im_end|>"


def test_a_null_in_one_file_leaves_what_the_other_says(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<｜▁pad▁｜>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.pad_id


# -- data sets in other forms --

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
OTHER_FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[bool]]] = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        [U, A],
        [True],
    ),
    "ShareGPT, own names, system, a switch, an id": (
        {
            "id": "x1",
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "u"},
                {"from": "assistant", "value": "a", "weight": 0},
                {"from": "human", "value": "u"},
                {"from": "chatgpt", "value": "a", "loss": True},
            ],
        },
        [S, U, A, U, A],
        [False, True],
    ),
    "ShareGPT, system of the line": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "u"}, {"from": "model", "value": "a"}],
        },
        [S, U, A],
        [True],
    ),
    "conversations of role and content": ({"conversations": [U, A]}, [U, A], [True]),
    "messages of from and value": (
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        [U, A],
        [True],
    ),
    "messages beside a prompt": ({"prompt": "z", "messages": [U, A]}, [U, A], [True]),
    "Alpaca": (
        {"instruction": "u", "input": "", "output": "a", "text": "### ..."},
        [U, A],
        [True],
    ),
    "Alpaca, an input": (
        {"instruction": "do", "input": "this", "output": "a"},
        [{"role": "user", "content": "do\nthis"}, A],
        [True],
    ),
    "Alpaca, an input alone": ({"instruction": "", "input": "u", "output": "a"}, [U, A], [True]),
    "Alpaca, no input": ({"instruction": "u", "output": "a"}, [U, A], [True]),
    "Alpaca, history and system": (
        {"instruction": "u", "output": "a", "history": [["u", "a"], ["u", "a"]], "system": "s"},
        [S, U, A, U, A, U, A],
        [True, True, True],
    ),
    "prompt and completion": ({"prompt": "u", "completion": "a"}, [U, A], [True]),
    "prompt and response": ({"prompt": "u", "response": "a"}, [U, A], [True]),
    "lists of messages: the prompt's answers are not learnt": (
        {"prompt": [S, U, A, U], "completion": [A, U, A]},
        [S, U, A, U, A, U, A],
        [False, True, True],
    ),
    "a prompt's own switch yields": (
        {"prompt": [U, {**A, "weight": 1, "train": True}, U], "completion": [A]},
        [U, A, U, A],
        [False, True],
    ),
    "a list and a text": ({"prompt": [S, U], "completion": "a"}, [S, U, A], [True]),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_forms_of_data_sets(form: str) -> None:
    row, messages, learnt = OTHER_FORMS[form]
    found = conversation_of(row)
    assert (found.messages, found.learnt) == (messages, learnt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [], "rejected": []}, "has the keys chosen, rejected, expected messages, conv"),
        ({"prompt": "a", "chosen": "b"}, "has the keys prompt, chosen, expected"),
        ({"instruction": "a", "response": "b"}, "has the keys instruction, response, expected"),
        ({"question": "a", "answer": "b"}, "has the keys question, answer, expected"),
        ({"conversations": "a"}, "conversations is a JSON string, expected a list of messages"),
        ({"conversations": [{"from": "human"}]}, "message 0: value is missing, expected text"),
        ({"conversations": [{"value": "x"}]}, "message 0: from is missing, expected text"),
        (
            {"conversations": [{"from": "human", "value": "x", "role": "user"}]},
            "message 0: has from or value beside role or content; keep one",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "x"},
                    {"from": "observation", "value": ""},
                ]
            },
            "message 1: from=observation is not read here; write the call as tool_calls",
        ),
        ({"conversations": [{"from": 3, "value": "x"}]}, "message 0: role is a JSON number"),
        ({"instruction": "a", "output": ""}, "message 1: the answer is empty"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history: entry 0 is no"),
        ({"instruction": "a", "output": "b", "history": "a"}, "history is a JSON string"),
        ({"instruction": 1, "output": "b"}, "message 0: content is a JSON number, expected text"),
        ({"prompt": [A], "completion": [A]}, "message 0 is the assistant's"),
        ({"messages": [U, A], "weight": 0.5}, "weight=0.5 of a whole line is not read here"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "message 1: weight=0.5 must be 0 or 1"),
        ({"messages": [U, {**A, "loss_weight": 2}]}, "message 1: loss_weight is not read here"),
    ],
)
def test_other_forms_are_refused_with_their_keys(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError) as found:
        conversation_of(row)
    assert message in str(found.value)


def test_what_a_prompt_says_is_masked(bpe: Tokenizer, tmp_path: Path) -> None:
    template = ChatTemplate(load_tokenizer(folder_of(bpe, tmp_path, MARKED["V3"])))
    row = {"prompt": [U, {**A, "content": "no"}, U], "completion": [{**A, "content": "yes"}]}
    encoded = template.encode(conversation_of(row))
    assert bpe.decode(encoded.ids[encoded.is_answer].tolist(), skip_special=True) == "yes"
