"""The strict YAML reader: data only, lines in messages, numbers as in YAML 1.2."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config import ConfigError, load_config
from deepseek.config.yaml_file import MAX_BYTES, dump_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e+3", -2500.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("-7", -7),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'32'", "32"),
        ("[1, a, 1.5]", [1, "a", 1.5]),
        ("a: {b: 1}", {"a": {"b": 1}}),
        ("=", "="),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = read_yaml(text, "x").tree
    assert read == value
    assert type(read) is type(value)


def test_nan() -> None:
    assert math.isnan(read_yaml(".nan", "x").tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "f.yaml:2: the key a stands twice, first on line 1; remove one"),
        ("a:\n  b: 1\n  b: 2\n", "f.yaml:3: the key a.b stands twice, first on line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", "f.yaml:1: the tag !!python/object/apply:os"),
        ("x: 1\na: !thing 2\n", "f.yaml:2: the tag !thing is not read"),
        ("a: &b 1\n", "f.yaml:1: the anchor &b is not read"),
        ("a: &b 1\nc: *b\n", "f.yaml:2: the alias *b is not read"),
        ("x: 1\n<<: {a: 1}\n", "f.yaml:2: merge keys (<<) are not read"),
        ("1: a\n", "f.yaml:1: a key must be a name, got 1"),
        ("[a, b]: c\n", "f.yaml:1: a key must be a name, got a list"),
        ("null: c\n", "f.yaml:1: a key must be a name"),
    ],
)
def test_more_than_data_is_refused_with_its_line(text: str, message: str) -> None:
    assert message in "\n".join(map(str, read_yaml(text, "f.yaml").problems))


def test_repeated_keys_are_all_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nseed: 2\nname: a\nname: b\nmodel:\n  qk_rope_head_dim: 15\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a: [1, 2\nb: 3\n", ["f.yaml:2: is not valid YAML", "mend"]),
        ("a: 1\n\tb: 2\n", ["f.yaml:2: is not valid YAML", "indent with spaces, not tabs"]),
        ("a: b: c\n", ["f.yaml:1: is not valid YAML: mapping values are not allowed here"]),
        ("a: 1\n---\nb: 2\n", ["f.yaml:2: is not valid YAML", "remove the `---`"]),
        ("a: 1\nb: \x07\n", ["f.yaml:2: is not valid YAML: contains a control character"]),
        ("a: %\n", ["f.yaml:1: is not valid YAML", "mend the line `a: %`"]),
        ("a: 'x\n", ["is not valid YAML"]),
        ("[" * 100_000, ["f.yaml:1: is nested more than 20 deep"]),
    ],
)
def test_syntax_errors_name_file_and_line(text: str, phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "f.yaml")
    (problem,) = caught.value.problems
    for phrase in phrases:
        assert phrase in str(problem)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is empty; start from a shipped one"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "must hold sections such as `model:`"),
        (b"just text\n", "must hold sections such as `model:`"),
        (b"name: \xff\xfe\n", "is not UTF-8 text (byte 6)"),
        (b"PK\x03\x04" + b"\0" * MAX_BYTES, "is longer than 100,000 bytes"),
        (b"model:\n  hidden_size: [\n", "a.yaml:3: is not valid YAML"),
    ],
)
def test_files_that_are_no_configurations(tmp_path: Path, content: bytes, phrase: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}" in str(caught.value)
    assert phrase in str(caught.value)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give a YAML file inside it"):
        load_config(tmp_path)


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nseed: 3\r\n")
    cfg = load_config(path)
    assert (cfg.name, cfg.seed) == ("a", 3)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab_9~", min_size=1), inner),
    max_leaves=10,
)


@given(PLAIN)
def test_what_is_written_is_read_back(value: object) -> None:
    document = read_yaml(dump_yaml(value), "x")
    assert document.tree == value
    assert document.problems == []


@pytest.mark.parametrize("text", ["1e-4", "32", "0o17", "yes", "null", "~", "1:20", "2024-01-02"])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert read_yaml(dump_yaml({"a": text}), "x").tree == {"a": text}
