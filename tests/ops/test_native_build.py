"""Kernels in C: compiled without warnings, once, on torch's threads; and machines without them."""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
import torch.nn.functional as F

from deepseek.config import UserError
from deepseek.files import user_cache
from deepseek.ops import few_rows
from deepseek.ops.native import build

SIZES = 3, 512, 600  # rows, outputs, inputs: worth a second thread


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has not asked for kernels yet, and its cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._library.cache_clear()
    yield tmp_path / "deepseek" / "kernels"
    build._library.cache_clear()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel in place of all, which take seconds to compile."""
    (tmp_path / "small.c").write_text("int small(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def product() -> torch.Tensor:
    """One that a kernel computes, if there is one."""
    rows, outputs, inputs = SIZES
    x_RI = torch.linspace(-1, 1, rows * inputs).view(rows, inputs)
    w_OI = torch.linspace(-1, 2, outputs * inputs).view(outputs, inputs).sin()
    with torch.no_grad():
        y_RO = few_rows.linear(x_RI, w_OI)
    torch.testing.assert_close(y_RO, F.linear(x_RI, w_OI), rtol=1e-5, atol=1e-4)
    return y_RO


def test_compiled_once_and_without_warnings(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = build.FLAGS
    monkeypatch.setattr(build, "FLAGS", (*ours, "-Wall", "-Wextra", "-Werror"))
    assert build.must_compile()
    assert build.why_not() is None
    assert not build.must_compile()
    (library,) = fresh.iterdir()  # nothing else is left there
    assert library.suffix == ".so"
    monkeypatch.setattr(build, "_compile", None)
    build._library.cache_clear()
    assert build.why_not() is None
    monkeypatch.setattr(build, "FLAGS", (*ours, "-DANOTHER"))
    build._library.cache_clear()
    with pytest.raises(TypeError):  # another library, under a name of its own
        build.why_not()


def test_lines_are_as_wide_as_those_of_python() -> None:
    for source in build.SOURCES.glob("*.[ch]"):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{source.name}:{number}"


def test_one_openmp_runtime_and_its_threads() -> None:
    """torch's: with one thread no other is started, with two no third."""
    y_RO = product()
    assert build.why_not() is None and few_rows.takes_few(y_RO, y_RO) is False  # gradients are on
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {Path(line.split()[-1]) for line in lines}
    assert [f for f in files if f.name.startswith(("libgomp", "libomp", "libiomp"))] == [
        Path(build._openmp())
    ]
    before = threads()
    product()
    assert threads() <= before  # fewer, where a test before had more, which end now
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).mul_(2)  # torch's own second thread
        before = threads()
        assert torch.equal(product(), y_RO)
        assert threads() <= before
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/does/not/exist -O1", "CC=/does/not/exist -O1: there is no such program"),
        ("false", "/false cannot compile them: exit status 1"),
        ("cc -include none.h", "cc cannot compile them: "),
        ("cc -DNAME='half", "No closing quotation"),
    ],
)
def test_without_a_compiler(
    compiler: str, message: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert message in (build.why_not() or "")
    product()
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_compiler_that_takes_too_long_is_waited_for_once(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("begun", *(f"{number}.c" for number in range(5))):
        (tmp_path / name).touch()
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho >>{tmp_path}/begun\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "SECONDS", 0.2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert "slow took more than 0.2 s" in (build.why_not() or "")
    assert len((tmp_path / "begun").read_text()) <= 2  # the next may begin before it is known


def test_no_compiler_at_all(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not build.must_compile()
    assert build.why_not() == ("no C compiler: install gcc, or set CC (looked for cc, gcc, clang)")
    product()


def test_a_cache_folder_that_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.parent.write_text("a file where the folder should be")
    assert str(fresh) in (build.why_not() or "")
    product()


def test_a_user_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert "has no home folder to keep a cache in; set XDG_CACHE_HOME" in (build.why_not() or "")
    product()
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder of yours"):
        user_cache()


def test_a_disk_that_is_full_leaves_no_library(
    fresh: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", stream.name)

    monkeypatch.setattr(build, "sync", full)
    assert "No space left on device" in (build.why_not() or "")
    assert not list(fresh.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("error: \\377", "cannot compile them: error: \ufffd", id="no text"),
        pytest.param(  # clang's, beside the GNU runtime of torch's wheels
            "undefined reference to `__kmpc_fork_call",
            "torch has loaded GNU's; install gcc, or set CC",
            id="another openmp",
        ),
    ],
)
def test_what_a_compiler_says(
    words: str, message: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nprintf '{words}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert message in (build.why_not() or "")


def test_a_library_of_another_user(
    fresh: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write there would have his code run."""
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    monkeypatch.setattr(build, "ROOT", -1)
    assert "belongs to another user; set XDG_CACHE_HOME" in (build.why_not() or "")
    product()


def test_other_systems_and_other_runtimes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert build.why_not() == "they are compiled on Linux only, and this is darwin"
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.Path, "read_text", lambda path: "")
    build._library.cache_clear()
    assert build.why_not() == "which OpenMP runtime torch uses is not clear (loaded: none)"


def test_what_kernels_are_not_given() -> None:
    """Gradients, autocast, other dtypes, tensors that are no plain memory."""
    x = torch.ones(2, 2)
    assert not build.takes(x)
    with torch.no_grad():
        assert build.takes(x, torch.nn.Parameter(x))
        assert not build.takes(x, x.double()) and not build.takes(x.to("meta"))
        assert not build.takes(torch.Tensor._make_subclass(type("Mine", (torch.Tensor,), {}), x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not build.takes(x)


def test_an_openmp_runtime_of_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside torch's, as sentencepiece's wheels bring one."""
    maps = tmp_path / "maps"
    own = Path(torch.__file__).resolve().parent
    names = own.parent / "sentencepiece.libs/libgomp-1.so", own / "lib/libgomp.so.1"
    maps.write_text("".join(f"0-1 r-xp 0 00:0 1  {name}\n" for name in names))
    monkeypatch.setattr(build, "Path", lambda p: maps if p == "/proc/self/maps" else Path(p))
    assert build._openmp() == str(names[1])
