"""Text to .bin/.idx: the same bytes whatever the workers and whenever it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek import files
from deepseek.config.errors import UserError
from deepseek.data import corpus as corpus_module
from deepseek.data import documents, encoding, partial, prepare
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare as run
from deepseek.data.prepared import PreparedData, Progress
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from support.sample_texts import TEXTS as ALL_TEXTS

# A file with a zero byte counts as binary.
TEXTS = [text.replace("\0", "") for text in ALL_TEXTS]
SUFFIXES = (".bin", ".idx", ".json", ".tokenizer/tokenizer.json")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files, JSON lines, an empty file, and a text long enough for several chunks, which make
    several batches."""
    monkeypatch.setattr(documents, "CHUNK", 10_000)
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 20_000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for k in range(5):
        (folder / f"small{k}.txt").write_text(TEXTS[k % 3] * (k + 1))
    (folder / "empty.txt").touch()
    rows = [{"text": f"row {k} {TEXTS[k % 3]}" if k % 10 else ""} for k in range(300)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    long = "".join(f"line number {k} of a long text\n" for k in range(4_500))
    (folder / "long.txt").write_text(long)
    return folder


@pytest.fixture
def bytes_folder(tmp_path: Path, byte: Tokenizer) -> Path:
    byte.save(tmp_path / "bytes")
    return tmp_path / "bytes"


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def leftovers(prefix: Path) -> set[str]:
    wanted = {f"{prefix.name}{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")}
    return {path.name for path in prefix.parent.iterdir()} - wanted


def test_the_data_is_the_text(tmp_path: Path, corpus: Path) -> None:
    seen: list[Progress] = []
    prefix = tmp_path / "out" / "data"
    done = run([corpus], prefix, vocab_size=500, progress=seen.append)
    tokenizer = load_tokenizer(done.tokenizer_folder)
    data = IndexedDataset(prefix)
    texts = [(corpus / "long.txt").read_text()]
    rows = map(json.loads, (corpus / "rows.jsonl").read_text().splitlines())
    texts += [row["text"] for row in rows if row["text"]]
    texts += [(corpus / f"small{k}.txt").read_bytes().decode() for k in range(5)]
    assert len(data) == len(texts) == done.documents
    for k, text in enumerate(texts):
        document = data.document(k)
        assert document[-1] == tokenizer.eos_id
        if k:  # the whole of the long one is compared once, not decoded
            assert tokenizer.decode(document[:-1]) == text
        assert document[:-1].tolist() == tokenizer.encode(text)
    assert done.text_bytes == sum(len(text.encode()) for text in texts)
    assert done.tokens == data.num_tokens
    assert done.bytes_per_token == done.text_bytes / done.tokens
    assert done.empty_documents == 31
    assert done.max_id == data.id_range()[1] < done.vocab_size == tokenizer.vocab_size == 500
    assert done.tokenizer_fingerprint == tokenizer.fingerprint
    assert done.bin_sha256 == hashlib.sha256((tmp_path / "out/data.bin").read_bytes()).hexdigest()
    assert done.note == "prepared"
    assert PreparedData.load(prefix) == done
    assert leftovers(prefix) == set()

    stages = [state.stage for state in seen]
    assert sorted(set(stages), key=stages.index) == [
        "training tokenizer",
        "tokenizing",
        "finishing",
    ]
    counted = [state for state in seen if state.stage == "tokenizing"]
    assert [s.done for s in counted] == sorted(s.done for s in counted)
    assert counted[-1].done == counted[-1].total == sum(p.stat().st_size for p in corpus.iterdir())
    assert (counted[-1].documents, counted[-1].tokens) == (done.documents, done.tokens)


def test_without_ends_of_documents(tmp_path: Path, corpus: Path, bytes_folder: Path) -> None:
    done = run([corpus], tmp_path / "p", bytes_folder, append_eos=False)
    assert done.tokens == done.text_bytes
    assert done.max_id < 256


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    results = []
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "data"
        run([corpus], prefix, vocab_size=400, workers=workers)
        results.append(contents(prefix))
    assert results[0] == results[1]


def test_without_input_it_is_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Path(json.__file__).parent
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    done = run(None, tmp_path / "p", vocab_size=300)
    files_ = sorted(library.glob("*.py"))
    assert (done.documents, done.text_bytes) == (
        sum(path.stat().st_size > 0 for path in files_),
        sum(path.stat().st_size for path in files_),
    )
    assert run(None, tmp_path / "p", vocab_size=300).note == "already prepared, nothing to do"
    message = r"tokenizer: BPE of 300 trained on the text -> BPE of 400 trained on the text"
    with pytest.raises(UserError, match=message):
        run(None, tmp_path / "p", vocab_size=400)


def kill_at_sync(number: int, arguments: tuple[Any, ...]) -> None:
    """Run prepare in this process and kill it with SIGKILL at the ``number``-th fsync."""
    fsync, count = os.fsync, 0

    def counted(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    files.os.fsync = counted  # type: ignore[assignment]
    run(*arguments, journal_bytes=80_000)


def test_killed_at_every_durable_point_it_goes_on(
    tmp_path: Path, corpus: Path, bytes_folder: Path
) -> None:
    run([corpus], tmp_path / "whole" / "data", bytes_folder)
    expected = contents(tmp_path / "whole" / "data")
    kinds = set()
    context = multiprocessing.get_context("fork")
    for number in range(1, 100):
        prefix = tmp_path / f"killed{number}" / "data"
        arguments = ([corpus], prefix, bytes_folder)
        process = context.Process(target=kill_at_sync, args=(number, arguments))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if number % 2:  # and something more was written, but not made durable
            for name in ("ids.bin", "lengths.bin", "journal.jsonl"):
                path = prefix.parent / "data.partial" / name
                if path.is_file():
                    with open(path, "ab") as stream:
                        stream.write(b'{"half')
        again = run(*arguments)
        kinds.add(again.note)
        assert contents(prefix) == expected
        assert {name for name in leftovers(prefix) if not name.endswith(".tmp")} == set()
    assert number > 15
    assert kinds == {"prepared", "continued an interrupted run", "already prepared, nothing to do"}


def test_killed_with_workers_it_goes_on_and_leaves_no_process(
    tmp_path: Path, corpus: Path, bytes_folder: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from multiprocessing import active_children\n"
        "from pathlib import Path\n"
        "from deepseek.data import documents, prepare\n"
        "def stop(state):\n"
        "    if state.stage == 'tokenizing':\n"
        "        print(*(child.pid for child in active_children()), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    a, b, c = map(Path, sys.argv[1:])\n"
        "    documents.CHUNK, prepare._BATCH_CHARACTERS = 10_000, 20_000\n"
        "    prepare.prepare([a], b, c, workers=2, journal_bytes=1, progress=stop)\n"
    )
    prefix = tmp_path / "killed" / "data"
    command = [sys.executable, script, corpus, prefix, bytes_folder]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in killed.stdout.split()]
    assert pids
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    again = run([corpus], prefix, bytes_folder)
    assert again.note == "continued an interrupted run"
    run([corpus], tmp_path / "whole" / "data", bytes_folder)
    assert contents(prefix) == contents(tmp_path / "whole" / "data")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def start(arguments: tuple[Any, ...], log: Path) -> None:
    with open(log, "a") as stream, contextlib.redirect_stderr(stream):
        done = run(*arguments)
        stream.write(done.note + "\n")


def test_two_at_once_do_the_work_once(tmp_path: Path, corpus: Path, bytes_folder: Path) -> None:
    prefix, log = tmp_path / "out" / "data", tmp_path / "log"
    arguments = ([corpus], prefix, bytes_folder)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(arguments, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = log.read_text().splitlines()
    notes = sorted(line for line in lines if "waiting for" not in line)
    assert notes == ["already prepared, nothing to do"] * 2 + ["prepared"]
    assert leftovers(prefix) == set()
    run([corpus], tmp_path / "alone" / "data", bytes_folder)
    assert contents(prefix) == contents(tmp_path / "alone" / "data")


def test_done_already_is_said_at_once(tmp_path: Path, corpus: Path, bytes_folder: Path) -> None:
    prefix = tmp_path / "out" / "data"
    run([corpus], prefix, bytes_folder)
    before = (tmp_path / "out" / "data.bin").stat()
    seen: list[Progress] = []
    os.utime(corpus / "small1.txt")  # touched, but the same
    again = run([corpus], prefix, bytes_folder, progress=seen.append)
    assert again.note == "already prepared, nothing to do"
    assert seen == []
    assert (tmp_path / "out" / "data.bin").stat().st_ino == before.st_ino


def test_a_half_that_went_missing_is_made_again(
    tmp_path: Path, corpus: Path, bytes_folder: Path
) -> None:
    prefix = tmp_path / "out" / "data"
    run([corpus], prefix, bytes_folder)
    expected = contents(prefix)
    for suffix in (".idx", ".bin"):
        Path(f"{prefix}{suffix}").unlink()
        assert run([corpus], prefix, bytes_folder).note == "prepared"
        assert contents(prefix) == expected


def test_other_data_is_not_overwritten_unasked(
    tmp_path: Path, corpus: Path, bytes_folder: Path
) -> None:
    prefix = tmp_path / "out" / "data"
    run([corpus], prefix, bytes_folder)
    before = contents(prefix)
    message = r"data holds data prepared differently \(append_eos: True -> False\); choose another"
    with pytest.raises(UserError, match=message):
        run([corpus], prefix, bytes_folder, append_eos=False)
    (corpus / "small1.txt").write_text("changed")
    with pytest.raises(UserError, match=r"\(the input files have changed\)"):
        run([corpus], prefix, bytes_folder)
    assert contents(prefix) == before
    again = run([corpus], prefix, bytes_folder, overwrite=True)
    assert again.note == "prepared"
    assert contents(prefix) != before


def test_files_of_others_are_not_overwritten_unasked(tmp_path: Path, bytes_folder: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("some text")
    (tmp_path / "data.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"data: data\.json exists and was not made by prepare-dat"):
        run([text], tmp_path / "data", bytes_folder)
    assert (tmp_path / "data.json").read_text() == '{"mine": 1}'
    assert run([text], tmp_path / "data", bytes_folder, overwrite=True).documents == 1


def test_partial_work_of_other_settings_is_dropped(
    tmp_path: Path, corpus: Path, bytes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out" / "data"

    def stop(state: Progress) -> None:
        if state.stage == "tokenizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([corpus], prefix, bytes_folder, journal_bytes=1, progress=stop)
    assert (tmp_path / "out" / "data.partial").is_dir()
    done = run([corpus], prefix, bytes_folder, append_eos=False)
    assert done.note == "prepared" and done.tokens == done.text_bytes
    assert "belongs to other settings or other input: starting anew" in capsys.readouterr().err


def test_damaged_partial_work_is_dropped(
    tmp_path: Path, corpus: Path, bytes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out" / "data"
    count = 0

    def stop(state: Progress) -> None:
        nonlocal count
        count += state.stage == "tokenizing"
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([corpus], prefix, bytes_folder, journal_bytes=1, progress=stop)
    os.truncate(tmp_path / "out" / "data.partial" / "ids.bin", 10)
    assert run([corpus], prefix, bytes_folder).note == "prepared"
    assert "data.partial is damaged: starting anew" in capsys.readouterr().err
    run([corpus], tmp_path / "whole" / "data", bytes_folder)
    assert contents(prefix) == contents(tmp_path / "whole" / "data")


def test_a_journal_stays_readable_when_killed_twice(
    tmp_path: Path, corpus: Path, bytes_folder: Path
) -> None:
    journal = tmp_path / "p.partial" / "journal.jsonl"
    for expected in (2, 3):
        count = 0

        def stop(state: Progress) -> None:
            nonlocal count
            count += state.stage == "tokenizing"
            if count == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run([corpus], tmp_path / "p", bytes_folder, journal_bytes=1, progress=stop)
        lines = journal.read_text().splitlines()
        assert len([json.loads(line) for line in lines]) == expected
        with open(journal, "a") as stream:
            stream.write('{"half')


def test_overwriting_never_leaves_a_mixed_pair(
    tmp_path: Path, corpus: Path, bytes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ([corpus], tmp_path / "p", bytes_folder)
    run(*arguments)

    def stop(source: Path, target: Path, replace: Any = os.replace) -> None:
        if Path(target).suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        run(*arguments, append_eos=False, overwrite=True)
    with pytest.raises(UserError, match=r"p\.idx does not exist, but p\.bin does"):
        IndexedDataset(tmp_path / "p")
    assert run(*arguments, append_eos=False).note == "continued an interrupted run"


def test_output_inside_the_input_is_left_out(tmp_path: Path, bytes_folder: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    assert run([folder], folder / "data", bytes_folder).documents == 1
    again = run([folder], folder / "data", bytes_folder)
    assert again.note == "already prepared, nothing to do"


def test_large_ids_take_four_bytes(tmp_path: Path, corpus: Path, byte: Tokenizer) -> None:
    content = json.loads(byte._source)
    content["added_tokens"][1]["id"] = 70_000  # the end of a document
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    done = run([corpus / "small1.txt"], tmp_path / "p", tmp_path / "tokenizer.json")
    data = IndexedDataset(tmp_path / "p")
    assert data.dtype == np.dtype("int32")
    assert done.max_id == data.document(0)[-1] == 70_000


def test_more_text_than_is_trained_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_TRAINING_BYTES", 100_000)
    assert run([corpus], tmp_path / "p", vocab_size=300).vocab_size == 300


def test_a_text_with_too_few_pairs(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run([corpus / "small1.txt"], tmp_path / "p", vocab_size=4096)
    assert done.vocab_size < 500
    assert (
        f"gives a tokenizer of {done.vocab_size} ids, 4096 were asked for"
        in capsys.readouterr().err
    )


def test_left_out_files_are_told(
    tmp_path: Path, corpus: Path, bytes_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "picture.png").write_bytes(b"\x89PNG\0")
    run([corpus], tmp_path / "p", bytes_folder)
    assert f"left out: binary files: 1 ({corpus / 'picture.png'})" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--strict: binary files: 1 \(.*picture\.png\) would be"):
        run([corpus], tmp_path / "q", bytes_folder, strict=True)
    assert not (tmp_path / "q.bin").exists()


def test_errors(tmp_path: Path, corpus: Path, bytes_folder: Path) -> None:
    prefix = tmp_path / "p"
    with pytest.raises(UserError, match=r"workers=0: give at least 1"):
        run([corpus], prefix, bytes_folder, workers=0)
    with pytest.raises(UserError, match=r"p: the input holds no text: 1 files, 1 empty documents"):
        run([corpus / "empty.txt"], prefix, bytes_folder)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        run([tmp_path / "nowhere"], prefix, bytes_folder)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"(Not a directory|File exists)"):
        run([corpus], tmp_path / "file" / "p", bytes_folder)
    (corpus / "bad.txt").write_bytes(b"\xff")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 0"):
            run([corpus], prefix, bytes_folder, workers=workers)
    assert not list(tmp_path.glob("p.lock"))


def test_a_full_disk(
    tmp_path: Path, corpus: Path, bytes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with pytest.raises(UserError, match=r"p\.bin needs about 0\.\d MB .* has 0\.1 MB free; fr"):
            run([corpus], tmp_path / "p", bytes_folder)
    with monkeypatch.context() as patch:

        def full(stream: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(partial, "sync", full)
        with pytest.raises(UserError, match=r"preparing .*p failed: No space left on device; mend"):
            run([corpus], tmp_path / "p", bytes_folder)
    done = run([corpus], tmp_path / "p", bytes_folder)
    assert done.note == "continued an interrupted run"


def die(*arguments: Any) -> None:
    os._exit(1)


def test_a_worker_that_dies(
    tmp_path: Path, corpus: Path, bytes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_encode_in_worker", die)
        with pytest.raises(UserError, match=r"a worker process died .*fewer than 2 workers need"):
            run([corpus], tmp_path / "p", bytes_folder, workers=2)
    assert run([corpus], tmp_path / "p", bytes_folder).documents > 0


def test_a_document_too_long_for_the_format(
    tmp_path: Path, corpus: Path, bytes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(*arguments: Any) -> partial.Encoded:
        texts = arguments[1]
        return partial.Encoded(b"", [2**31] * len(texts), 1, 1)

    monkeypatch.setattr(encoding, "_encode", huge)
    with pytest.raises(UserError, match=r"a document has 2147483648 ids, the \.idx format ends at"):
        run([corpus / "small1.txt"], tmp_path / "p", bytes_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "deepseek-data/0"}', r"p\.json: not written by this version"),
        ('{"format": "deepseek-data/1"}', r"p\.json is damaged \(.*\); prepare the data again"),
        ("{", r"p\.json is damaged \(not JSON: .*move it away"),
        ("[" * 100_000, r"p\.json is damaged \(not JSON: "),
    ],
)
def test_bad_records(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message):
        PreparedData.load(tmp_path / "p")


@pytest.mark.parametrize("content", ["[]", '{"a": 1}'])
def test_other_json_is_no_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    assert PreparedData.load(tmp_path / "p") is None
