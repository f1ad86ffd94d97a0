"""The oracle: the paper's equations as plain float64 loops.

It lives in the package, ``deepseek/models/reference.py``, so that ``deepseek test`` has it too.
"""

from deepseek.models.reference import *  # noqa: F403
