"""What every script imports first: this checkout's package, and a sentence where anything after it is missing."""

import os
import sys
from pathlib import Path

sys.path.insert(1, os.getcwd())  # from which a training imports what a job names
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from torchtitan_ext.command_line import end_by_hook, run  # noqa: F401

sys.excepthook = end_by_hook
