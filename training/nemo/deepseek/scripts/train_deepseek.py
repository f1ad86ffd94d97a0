"""Train from a clone: python scripts/train_deepseek.py --config deepseek_v3_base [a.b=c ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from deepseek.commands.entry import train_entry  # noqa: E402

if __name__ == "__main__":
    train_entry()
