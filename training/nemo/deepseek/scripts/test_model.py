"""Check the model from a clone: python scripts/test_model.py [--config NAME]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deepseek.commands.entry import test_entry  # noqa: E402

if __name__ == "__main__":
    test_entry()
