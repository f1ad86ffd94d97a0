"""Where the project's description names ``DeepSeekModel``; the step is ``training/step.py``."""

from deepseek.training.step import DeepSeekModel

__all__ = ["DeepSeekModel"]
