"""``python -m deepseek`` is ``deepseek``."""

import sys

try:
    from deepseek.cli import main
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    sys.stderr.write(
        "error: the command line needs typer: pip install typer rich; without it, "
        "scripts/train_deepseek.py and scripts/test_model.py train and test\n"
    )
    sys.exit(2)

main()
