"""Files of strangers: each that means harm is a message, soon and without much memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.config.errors import UserError
from deepseek.config.yaml_file import read_yaml
from deepseek.console import complain, say, table
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.interop.fsdp_source import open_source
from deepseek.interop.hf_import import read_json
from deepseek.interop.nemo_file import NemoFile
from support.micro_runs import MicroRuns

CPU_SECONDS, MEGABYTES = 1.5, 200


def message_of(call: Callable[[], object]) -> str:
    """What the user reads of a call in a process of its own, which must stay small and quick."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            call()
            told = "nothing was refused"
        except UserError as error:
            told = f"UserError: {error}"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        told += f"\n{time.process_time() - begin} {grown}"
        os.write(writer, told.encode(errors="replace")[-60_000:])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    told, _, measured = text.rpartition("\n")
    seconds, grown = map(float, measured.split())
    assert seconds < CPU_SECONDS and grown < MEGABYTES, (seconds, grown, told[:300])
    assert told.startswith("UserError: "), told[:2000]
    return told


@pytest.fixture(scope="module")
def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


CONFIG = b"kv_lora_rank: 3\n"
BOMB = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 9)}]\n".encode() for k in range(1, 12)
)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def deflated(size: int) -> bytes:
    """A zip like torch's of a few kB that unpacks to ``size`` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/version", b"3")
        with archive.open("a/data/0", "w") as stream:
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
    return buffer.getvalue()


def sparse(path: Path, name: str, size: int, other: str, content: bytes) -> None:
    """A tar whose member ``name`` is one hole, as GNU tar keeps it."""
    info = tarfile.TarInfo(name)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % size  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        more = tarfile.TarInfo(other)
        more.size = len(content)
        tar.addfile(more, io.BytesIO(content))
    path.write_bytes(bytes(header) + plain.getvalue())


@pytest.mark.parametrize(
    ("members", "part"),
    [
        ({"model_config.yaml": b"a: !!python/object/apply:os.system [ls]"}, "the tag !!python"),
        ({"model_config.yaml": BOMB}, "the alias \\*a0 is not read"),
        ({"model_config.yaml": b"[" * 50_000}, "nested more than 20 deep"),
        ({"model_config.yaml": b"k: 1\n" * 300_000}, "is no file, or of 1,500,000 bytes"),
        ({"model_config.yaml": b"\x00\xff"}, "is no .nemo file"),
        ({"model_config.yaml": link("model_config.yaml", "/etc/passwd")}, "is no file"),
        (
            {
                "model_config.yaml": link("model_config.yaml", "model_weights.ckpt"),
                "model_weights.ckpt": link("model_weights.ckpt", "model_config.yaml"),
            },
            "is no file",
        ),
        (
            {"model_config.yaml": link("model_config.yaml", "model_config.yaml", tarfile.LNKTYPE)},
            "is no file",
        ),
        ({f"m{k}": b"" for k in range(3_000)}, "more than 1,000 members"),
        ({"model_weights.ckpt": deflated(300 << 20)}, "is compressed, which torch.save never"),
    ],
)
def test_nemo_files(tmp_path: Path, weights: bytes, members: dict[str, Any], part: str) -> None:
    path = tmp_path / "evil.nemo"
    with tarfile.open(path, "w") as tar:
        # What is looked for comes last.
        for name, content in {
            **{k: v for k, v in members.items() if k not in ("model_config.yaml",)},
            **{"model_config.yaml": CONFIG, "model_weights.ckpt": weights},
            **members,
        }.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    told = message_of(lambda: NemoFile.open(path))
    assert part.replace("\\", "") in told, told[:500]


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights.ckpt"])
def test_a_sparse_member_of_a_nemo_file(tmp_path: Path, weights: bytes, name: str) -> None:
    others = {"model_config.yaml": CONFIG, "model_weights.ckpt": weights}
    del others[name]
    ((other, content),) = others.items()
    sparse(tmp_path / "evil.nemo", name, 4 << 30, other, content)
    assert "is no file, or of 4,294,967,296 bytes" in message_of(
        lambda: NemoFile.open(tmp_path / "evil.nemo")
    )


def test_a_nemo_file_never_learns_the_environment(
    micro: MicroRuns, tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "s3cr3t-token")
    text = b"kv_lora_rank: 16\ntopk_method: ${oc.env:A_SECRET}\nvocab_size: ${oc.env:A_SECRET}\n"
    path = tmp_path / "env.nemo"
    with tarfile.open(path, "w") as tar:
        for name, content in {"model_config.yaml": text, "model_weights.ckpt": weights}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    ran = micro.train("of_env", f"model.restore_from={path}", before="")
    assert ran.code == 2 and "Traceback" not in ran.err
    assert "s3cr3t" not in ran.out + ran.err
    assert "s3cr3t" not in json.dumps(NemoFile.open(path).state())


def nested(depth: int) -> dict[str, Any]:
    inside: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(depth):
        inside = {"a": inside}
    return inside


def itself() -> dict[str, Any]:
    made: dict[str, Any] = {"a": torch.zeros(1)}
    made["again"] = made
    return made


def many() -> dict[str, Any]:
    inside: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(40):
        inside = {"left": inside, "right": inside}
    return inside


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: nested(5000), "too deep or too often"),
        (itself, "too deep or too often"),
        (many, "too deep or too often"),
        (lambda: {"a": torch.empty(1).expand(10**12)}, "holds fewer numbers, which it repeats"),
        (lambda: {"a": 1}, "holds no tensor"),
    ],
)
def test_torch_files(tmp_path: Path, make: Callable[[], Any], part: str) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        torch.save(make(), tmp_path / "evil.pt")
    finally:
        sys.setrecursionlimit(limit)
    assert part in message_of(lambda: open_source(tmp_path / "evil.pt"))


def test_a_compressed_torch_file(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(deflated(300 << 20))
    assert "is compressed, which torch.save never does" in message_of(
        lambda: open_source(tmp_path / "evil.pt")
    )


DEEP = ["[" * 100_000, '{"a":' * 100_000, '{"a": 1' + "0" * 6000 + "}", "[" * 999 + "]" * 999]


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_deep_tokenizers(tmp_path: Path, name: str, text: str) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in message_of(lambda: load_tokenizer(tmp_path))


@pytest.mark.parametrize("key", ["normalizer", "pre_tokenizer", "decoder", "more"])
def test_deep_parts_of_tokenizers(tmp_path: Path, key: str) -> None:
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content[key] = "HERE"
    deep = '{"type":"Sequence","normalizers":[' * 300 + "]}" * 300
    file.write_text(json.dumps(content).replace('"HERE"', deep))
    assert "cannot be read by this version of tokenizers" in message_of(
        lambda: load_tokenizer(tmp_path)
    )


@pytest.mark.parametrize("text", DEEP)
def test_deep_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in message_of(lambda: read_json(tmp_path / "config.json"))


def test_a_yaml_alias_stands_for_nothing() -> None:
    document = read_yaml("a: &x [1, 2]\nb: *x\nc: *unknown\n", "here")
    assert document.tree == {"a": [1, 2], "b": None, "c": None}
    assert [str(problem).partition(" is not")[0] for problem in document.problems] == [
        "here:1: the anchor &x",
        "here:2: the alias *x",
        "here:3: the alias *unknown",
    ]


def test_what_strangers_wrote_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "a\x1b[31mb\x07\x9bc\rd\u202ee\udcff é東🗼\tend\n"
    say(evil)
    complain(evil)
    shown = "a\\x1b[31mb\\x07\\x9bc\\rd\\u202ee\\udcff é東🗼\tend\n\n"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (shown, shown)
    table("title", ["name"], [["\x1b[2J[red]x[/red]\x07"]])
    drawn = capsys.readouterr().out
    assert "\\x1b[2J[red]x[/red]\\x07" in drawn and "\x1b[2J" not in drawn
