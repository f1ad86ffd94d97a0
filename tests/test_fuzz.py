"""Files changed at random: each is read as it was or refused with a message, never a traceback, and
never taken for sound where a digest tells that it is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deepseek.checkpoint.checkpoint import Checkpoint, describe
from deepseek.commands.convert import import_hf
from deepseek.commands.generate import sampling_for
from deepseek.config.errors import UserError
from deepseek.data.chat import ChatTemplate, Conversation, prepare_chat
from deepseek.data.digests import Verification
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare
from deepseek.data.prepared import PreparedData
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.monitoring.live import frame
from deepseek.monitoring.report.page import run_page
from deepseek.monitoring.run_log import RunLog, read_run
from support.damaged_files import mutated
from support.micro_runs import MicroRuns

Read = Callable[[Path], object]
"""Opens what lies around a file; what it returns must not change unnoticed (None: anything may)."""

CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]},
    {"prompt": "a", "response": "b", "weight": 1},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
            {"role": "user", "content": "x", "name": "me"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one", "trainable": False},
            {"role": "assistant", "content": "two", "weight": 1.0},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, micro: MicroRuns, whole: str
) -> dict[str, tuple[Path, Read]]:
    """By kind: a sound file, and how it is read."""
    folder = tmp_path_factory.mktemp("sound")
    tokenizer_folder(folder / "tok")
    chat, text = folder / "chat" / "a.jsonl", folder / "text" / "a.jsonl"
    for path in (chat, text):
        path.parent.mkdir()
    chat.write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    text.write_text("".join(json.dumps({"text": f"text {k}"}) + "\n" for k in range(50)))
    data = folder / "data" / "d"
    prepare([text], data, folder / "tok")
    hf = folder / "hf"
    checkpoint = sorted((micro.folder / whole / "checkpoints").glob("step_*"))[-1]
    micro.cli("hf", "export", micro.folder / whole, hf).assert_done()
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for shard in hf.glob("*.safetensors"):
        size = int.from_bytes(shard.read_bytes()[:8], "little")
        names = json.loads(shard.read_bytes()[8 : 8 + size])
        index["weight_map"] |= {n: shard.name for n in names if n != "__metadata__"}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    run = micro.folder / whole
    found: dict[str, tuple[Path, Read]] = {
        "tokenizer.json": (folder / "tok" / "tokenizer.json", tokenizer),
        **{
            name: (folder / "tok" / name, tokenizer)
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "generation_config.json",
            )
        },
        "chat.jsonl": (chat, lambda path: conversations(path, folder / "tok")),
        "text.jsonl": (text, lambda path: documents(path, folder / "tok")),
        "idx": (Path(f"{data}.idx"), prepared),
        "bin": (Path(f"{data}.bin"), prepared),
        "P.json": (Path(f"{data}.json"), prepared),
        "config.json": (hf / "config.json", imported),
        "model.safetensors.index.json": (hf / "model.safetensors.index.json", imported),
        "metrics.jsonl": (run / "metrics.jsonl", seen),
        "environment.json": (run / "environment.json", seen),
        "config.yaml": (run / "config.yaml", seen),
        "experts.arrays": (run / "monitor" / "experts.arrays", seen),
        "ranks.arrays": (run / "monitor" / "ranks.arrays", seen),
        "manifest": (checkpoint / "manifest.json", loaded),
        "state": (checkpoint / "state.json", loaded),
        "metadata": (checkpoint / ".metadata", loaded),
        "shard": (next(checkpoint.glob("*.distcp")), loaded),
    }
    for path, _ in found.values():
        assert path.is_file(), sorted(path.parent.iterdir())
    return found


def tokenizer_folder(folder: Path) -> None:
    """A tokenizer with all that lies beside one."""
    plain = byte_tokenizer()
    plain.save(folder)
    start, end = (f"<|im_{side}|>" for side in ("start", "end"))
    files: dict[str, dict[str, object]] = {
        "tokenizer_config.json": {
            **json.loads((folder / "tokenizer_config.json").read_text()),
            "add_bos_token": True,
            "pad_token": {"__type": "AddedToken", "content": end, "lstrip": False},
            "added_tokens_decoder": {
                str(plain.vocab_size): {"content": start, "special": True},
                str(plain.vocab_size + 1): {"content": end, "special": True, "rstrip": False},
            },
            "additional_special_tokens": [start, {"content": end}],
            "extra_special_tokens": {"image": start},
            "chat_template": [
                {"name": "default", "template": TEMPLATE},
                {"name": "tool_use", "template": "{{ tools | tojson }}" + TEMPLATE},
            ],
            "model_max_length": 4096,
        },
        "special_tokens_map.json": {
            "eos_token": {"content": "<｜end▁of▁sentence｜>", "single_word": False},
            "additional_special_tokens": [start],
        },
        "generation_config.json": {
            "eos_token_id": [257, plain.vocab_size + 1],
            "bos_token_id": 256,
            "pad_token_id": None,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 50,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def tokenizer(path: Path) -> None:
    found = load_tokenizer(path.parent)
    found.decode(found.prompt_ids("a text 東\n"))
    sampling_for(found, None, None, None)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools in (None, [{"name": "f"}]):
        ChatTemplate(found).encode(Conversation(messages, tools))
    found.save(path.parent / "out")


def conversations(path: Path, tokenizer: Path) -> None:
    prepare_chat([path], path.parent / "out" / "c", tokenizer, overwrite=True)


def documents(path: Path, tokenizer: Path) -> None:
    prepare([path], path.parent / "out" / "t", tokenizer, overwrite=True)


def prepared(path: Path) -> object:
    prefix = path.with_suffix("")
    data, record = IndexedDataset(prefix), PreparedData.load(prefix)
    ids = [data.document(k).tolist() for k in range(len(data))]
    if record is None:
        # No record of ours any more (valid JSON without our mark): nothing vouches for the data.
        return None
    verification = Verification(record.data_files())
    verification.start()
    verification.finish()
    return ids, record.settings, record.tokens, record.text_bytes, record.bin_sha256


def imported(path: Path) -> None:
    import_hf(path.parent, path.parent / "out", "keep", None, [], None)


def seen(path: Path) -> None:
    folder = path.parent.parent if path.parent.name == "monitor" else path.parent
    with open(os.devnull, "w") as nowhere:
        Console(file=nowhere).print(frame(RunLog(folder)))
    run_page([read_run(folder)])


def loaded(path: Path) -> object:
    describe(path.parent.parent)
    opened = Checkpoint.open(path.parent)
    shapes, dtypes = opened.tensor_shapes(), opened.tensor_dtypes()
    tensors = {name: torch.empty(shapes[name], dtype=dtypes[name]) for name in shapes}
    opened.load(tensors)
    return opened.step, opened.state(), {n: t.flatten().tolist() for n, t in tensors.items()}


KINDS = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "chat.jsonl", "text.jsonl", "idx", "bin", "P.json",
    "config.json", "model.safetensors.index.json", "metrics.jsonl", "environment.json",
    "config.yaml", "experts.arrays", "ranks.arrays", "manifest", "state",
    "metadata", "shard",
]  # fmt: skip


@pytest.mark.parametrize(
    "draws", [11, pytest.param(1250, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy about numbers without measure
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files(
    files: dict[str, tuple[Path, Read]], tmp_path: Path, kind: str, draws: int
) -> None:
    sound, read = files[kind]
    inside_monitor = sound.parent.name == "monitor"
    root = sound.parent.parent if inside_monitor else sound.parent
    copy = tmp_path / root.name
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("out", "logs"))
    path = copy / sound.relative_to(root)
    original = path.read_bytes()
    expected = read(path)
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(draws):
        content = mutated(original, random.Random(f"{kind} {number}"))
        path.write_bytes(content)
        shutil.rmtree(path.parent / "out", ignore_errors=True)
        try:
            result = read(path)
            if expected is None or result is None or result == expected:
                counts["read"] += 1
            else:
                counts["silently different"] += 1
                wrong.append(f"draw {number}: taken for sound: {content[:300]!r}")
        except UserError:
            counts["refused"] += 1
        except Exception:
            counts["tracebacks"] += 1
            wrong.append(f"draw {number}: {content[:300]!r}\n{traceback.format_exc()[-1500:]}")
    print(kind, dict(counts))
    assert not wrong, f"{len(wrong)} of {draws}: {dict(counts)}\n" + "\n\n".join(wrong[:5])
