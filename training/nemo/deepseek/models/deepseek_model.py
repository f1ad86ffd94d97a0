"""The door that the project's description names; the step itself is in ``training/step.py``."""

from deepseek.training.step import DeepSeekModel

__all__ = ["DeepSeekModel"]
