"""``deepseek emit``: a configuration in the words of NVIDIA's other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek.config import load_config
from deepseek.config.errors import UserError
from deepseek.config.yaml_file import dump_yaml
from deepseek.console import say
from deepseek.interop import peer_configs

KINDS = {
    "automodel": (
        peer_configs.automodel_recipe,
        peer_configs.AUTOMODEL,
        peer_configs.AUTOMODEL_NOTES,
    ),
    "megatron": (
        peer_configs.megatron_config,
        peer_configs.MEGATRON_CORE,
        peer_configs.MEGATRON_NOTES,
    ),
}


def emit(kind: str, config: str, output: Path, overrides: Sequence[str] = ()) -> None:
    """Write ``output``.

    Args:
        kind: ``automodel`` or ``megatron``.
        config: name of a shipped configuration, or a YAML file.
        output: a file that does not exist.
        overrides: ``a.b=c``.

    Raises:
        ConfigError: of the configuration, or what the target lacks; every problem at once.
        UserError: the file exists or cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} exists already and nothing is overwritten; give another name")
    run = load_config(config, overrides)
    translate, program, notes = KINDS[kind]
    tree = translate(run)
    words = " ".join(["deepseek emit", kind, config, *overrides])
    lines = [f"For {program}, by `{words}`.", *notes]
    text = "".join(f"# {line}\n" for line in lines) + dump_yaml(tree)
    try:
        output.write_text(text)
    except OSError as failure:
        raise UserError(f"{output}: cannot be written: {failure.strerror}") from failure
    say(f"written      {output}, for {program}")
    for note in notes:
        say(f"note         {note}")
