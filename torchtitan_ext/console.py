"""How a command shows its progress and ends: a user's error prints one line, a bug its traceback.

Imports nothing that takes time or may be missing, so that --help and a wrong environment are answered at once.
"""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

MOUNT = "mount what lies there, or copy it, and give its path"
SECONDS_BETWEEN_LINES = 10
REMEDIES = {
    errno.ENOENT: "give one that exists",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "choose another path, whose parents are folders",
    errno.EEXIST: "choose another path, or move what is there",
    errno.EACCES: "choose another path, or change its permissions",
    errno.EPERM: "choose another path, or change its permissions",
    errno.EROFS: "choose another path",
    errno.ENOSPC: "make room there, or choose another path",
}


class CommandFailed(Exception):
    """What a command started has failed. The message says why, and what to do."""


def is_address(path: str) -> bool:
    """Whether a path begins with a scheme, as s3://bucket: it would become a folder of that name here."""
    return bool(re.match(r"[A-Za-z][\w+.-]+:/", path))


def make_folder(folder: Path) -> Path:
    """The folder, made if need be, before time is spent on its content. Raises OSError if nothing can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def run(main: Callable[[], int | None], program: str) -> NoReturn:
    """Exit with what `main` returns, or as `end` says if it raises."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = end(error, program)
    sys.exit(code)


def end(error: BaseException, program: str) -> int:
    """Say on stderr why a command ends; returns its exit code.

    2 is for bad input and a missing package, 130 for an interruption, 1 for everything else.
    """
    code, reason = 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        code, reason = 130, "; ".join(["interrupted", *map(str, error.args)])
    elif isinstance(error, BrokenPipeError):
        # Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, reason = 1, "the reader of its output has closed it: write to a file (> FILE) to keep all of it"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != __package__:
        reason = (
            f"{error.name} is not installed for {sys.executable}: `make setup`, then call .venv/bin/python; "
            "in an environment of your own, pip install --editable ."
        )
    elif isinstance(error, OSError) and error.errno is not None:
        file = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{file}{error.strerror}; {REMEDIES.get(error.errno, 'correct that, and call again')}"
    elif isinstance(error, CommandFailed):
        code = 1
    elif not isinstance(error, (OSError, ValueError)):
        traceback.print_exception(error)
        return 1
    print(f"{program}: {reason}", file=sys.stderr)
    return code


class Display:
    """How far a command is, on stderr: a live bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(stderr=True)
        # a narrow terminal cuts the bar first
        text = TextColumn("{task.description}  {task.fields[status]}", markup=False)
        self.bar = Progress(text, BarColumn(20), console=self.console)

    def __enter__(self) -> "Display":
        if self.console.is_interactive:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_interactive:
            self.bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def start(self, title: str, total: float, done: int = 0) -> None:
        """Begin a task, which the following calls are about."""
        self.title, self.total = title, total
        self.done: float = done
        self.first, self.began = done, time.monotonic()
        self.last_line = self.began
        self.task = self.bar.add_task(title, total=total, completed=done, status="")

    def advance(self, amount: float, what: str = "") -> None:
        """Count `amount` more as done. Estimates the time left from the mean speed so far."""
        done = self.done + amount
        seconds = time.monotonic() - self.began
        left = seconds / (done - self.first) * (self.total - done) if done > self.first else 0
        self.show(done, f"{what}{done / self.total:.0%}, left {duration(left)}")

    def show(self, done: float, status: str) -> None:
        """Show that `done` of the total is done, with a status beside it."""
        self.done = done
        self.bar.update(self.task, completed=done, status=status)
        now = time.monotonic()
        waited = now - self.last_line >= SECONDS_BETWEEN_LINES
        if not self.console.is_interactive and (waited or done >= self.total):
            self.last_line = now
            self.say(f"{self.title}  {status}")


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


def size(n_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(n_bytes, precision=2)
