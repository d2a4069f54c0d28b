"""The repository's scripts, and a call of a command in another process; the fixture `command` calls in this one."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "scripts").glob("*.py"))}


def call(*command, **env):
    command = list(map(str, command))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})
