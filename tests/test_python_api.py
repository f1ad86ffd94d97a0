"""The public Python interface: its names, what importing it costs, and its guide."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek
from deepseek.config import UserError
from support.micro_runs import MicroRuns

ROOT = Path(deepseek.__file__).parent
GUIDE = ROOT / "docs" / "python.md"


def test_every_public_name_is_there_and_told_to_type_checkers() -> None:
    for name in deepseek.__all__:
        assert getattr(deepseek, name) is not None, name
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    told = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told | {"__version__"} == set(deepseek.__all__)
    assert set(deepseek.__all__) <= set(dir(deepseek))
    with pytest.raises(AttributeError, match="no attribute 'Transfomer'"):
        _ = deepseek.Transfomer  # type: ignore[attr-defined]


def test_importing_it_and_loading_a_configuration_needs_no_torch() -> None:
    code = (
        "import sys, deepseek; run = deepseek.load_config('deepseek_v3_tiny'); "
        "deepseek.count_parameters(run.model); "
        "print(sorted({'torch', 'lightning', 'pytorch_lightning', 'numpy'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.framework
def test_the_guide_runs_from_top_to_bottom(micro: MicroRuns, tmp_path: Path) -> None:
    """Its blocks as one program, on the tiny model in small, on text of this package."""
    from deepseek.data.prepare import prepare

    texts = sorted((ROOT / "models" / "components").glob("*.py"))
    prepare(texts, tmp_path / "data", vocab_size=400)
    small = [
        "trainer.max_steps=2",
        "trainer.val_check_interval=0",
        "trainer.accelerator=cpu",
        "model.vocab_size=400",
        "model.tokenizer.vocab_size=400",
        "model.num_hidden_layers=2",
        "model.data.seq_length=64",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        f"model.data.data_prefix={tmp_path / 'data'}",
        "exp_manager.create_tensorboard_logger=false",
    ]
    program = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL))
    shown = 'settings = ["trainer.max_steps=20", "trainer.val_check_interval=0"]'
    assert shown in program
    program = (
        program.replace(shown, f"settings = {small!r}") + "print('rows', len(log.steps['loss']))"
    )
    (tmp_path / "guide.py").write_text(program)
    # A process of its own: training keeps freed memory, which would mislead tests of memory.
    ran = micro.cli.start("guide.py", cwd=tmp_path, program="python").wait().assert_done()
    assert "hiden_size" in ran.out and "did you mean" in ran.out and "rows 2" in ran.out
    assert (tmp_path / "my_run" / "checkpoints" / "step_00000002").is_dir()


def test_overrides_beside_a_finished_configuration_are_refused() -> None:
    run = deepseek.load_config("deepseek_v3_tiny")
    with pytest.raises(UserError, match="would be ignored beside a RunConfig"):
        deepseek.train(run, ["trainer.max_steps=1"])
