"""End a command: user errors print one line, bugs a traceback.

Imports nothing that is slow or may be missing, so that --help and errors of the environment appear at once.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

NOT_A_PATH = "is not a path on this machine: mount or copy what is there, and give its path"
REMEDIES = {
    errno.ENOENT: "give one that exists",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another path, or move what is there",
    errno.ENOSPC: "make room on the disk of the output, or choose another path",
}


class CommandFailed(Exception):
    """A process that a command started has failed. The message gives cause and remedy."""


def is_address(path: str) -> bool:
    """Whether a path begins with a scheme, such as s3://bucket, which would become a folder of that name here."""
    return bool(re.match(r"[A-Za-z][\w+.-]+:/", path))


def make_folder(folder: Path) -> Path:
    """Create the folder if needed, before time is spent on its content. Raises OSError if it is not writable."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def run(main: Callable[[], int | None], program: str) -> NoReturn:
    """Exit with the code that `main` returns, or that `end` gives an exception."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = end(error, program)
    sys.exit(code)


def end(error: BaseException, program: str) -> int:
    """Print the error to stderr; return the exit code: 2 for bad input and missing packages, 130 for Ctrl-C, else 1."""
    code, reason = 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        code, reason = 130, "; ".join(["interrupted", *map(str, error.args)])
    elif isinstance(error, BrokenPipeError):
        # Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, reason = 1, "the reader of its output has closed it: write to a file (> FILE) to keep all of it"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != __package__:
        own = "in an environment of your own, pip install --editable '.[train]'"
        reason = f"{error.name} is not installed for {sys.executable}: `make setup`, then call .venv/bin/python; {own}"
    elif isinstance(error, OSError) and error.errno is not None:
        file = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{file}{error.strerror}; {REMEDIES.get(error.errno, 'choose another path, or correct that')}"
    elif isinstance(error, CommandFailed):
        code = 1
    elif not isinstance(error, (OSError, ValueError)):
        traceback.print_exception(error)
        return 1
    print(f"{program}: {reason}", file=sys.stderr)
    return code
