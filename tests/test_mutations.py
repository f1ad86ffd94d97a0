"""Every fault of ``support.mutations`` can still be planted, and its test is still there."""

import re

import pytest

from support.mutations import MUTATIONS, PACKAGE, ROOT, TESTS, Mutation, mutated


def test_every_fault_can_be_planted() -> None:
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
    for mutation in MUTATIONS:
        sound = (ROOT / PACKAGE / mutation.file).read_text()
        faulty = mutated(mutation, sound)
        if mutation.file.endswith(".py"):  # C is compiled by the test that must notice
            compile(faulty, mutation.file, "exec")
        assert faulty != sound, mutation.what


def test_every_test_is_there() -> None:
    for mutation in MUTATIONS:
        file, _, name = mutation.test.partition("::")
        wanted = rf"^def {re.escape(name.partition('[')[0])}\("
        assert re.search(wanted, (TESTS / file).read_text(), re.MULTILINE), mutation.test


@pytest.mark.parametrize("text", ["nothing of it", "ab, ab"])
def test_a_stale_fault_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="a fault: 'ab' stands [02] times in f.py, expected once"):
        mutated(Mutation("a fault", "f.py", "ab", "c", "test_f.py::test_f"), text)
