"""``python -m deepseek`` is ``deepseek``."""

from deepseek.cli import main

main()
