"""Call a verb or a script in this process, or make in another."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_ext.__main__ import entry

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "scripts").glob("*.py"))}


def run_command(monkeypatch, name, *arguments):
    """The exit code of a verb or script."""
    arguments = list(map(str, arguments))
    with pytest.raises(SystemExit) as stop:
        if name in SCRIPTS:
            monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *arguments])
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", ["torchtitan_ext", name, *arguments])
            entry()
    return stop.value.code


def call(*command, **env):
    command = list(map(str, command))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})
