"""How every command of this project reads numbers, shows its progress and ends.

What its user can mend ends a command with one sentence on stderr; a fault of the program keeps its traceback. Nothing
is imported here that takes time or may be missing, so that --help and a wrong environment are answered at once.
"""

import argparse
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
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
    """Ends a command. The message says why, and what to do."""


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {least} or more")
        return int(text)

    return whole_number


def is_address(path: str) -> bool:
    """Whether a path begins with a scheme, as s3://bucket: it would become a folder of that name here."""
    return bool(re.match(r"[A-Za-z][\w+.-]+:/", path))


def local_path(text: str) -> Path:
    """An argparse type."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no path on this machine: {MOUNT}")
    return Path(text)


def make_folder(folder: Path) -> Path:
    """The folder, made if need be, before time is spent on what goes there. Raises OSError where nothing can."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def run(main: Callable[[], int | None], refused: int = 1) -> NoReturn:
    """Exit with what `main` returns, or with the sentence and code of `end` where it stops."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = end(error, refused)
    sys.exit(code)


def end(error: BaseException, refused: int = 1) -> int:
    """Say on stderr why a command ends; returns its exit code.

    `refused` is that of what this package raises for bad input (ValueError, OSError, CommandFailed), and of a package
    that is missing; 130 that of an interruption.
    """
    code, reason = refused, str(error)
    if isinstance(error, KeyboardInterrupt):
        code, reason = 130, "; ".join(["interrupted", *map(str, error.args)])
    elif isinstance(error, BrokenPipeError):
        # Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = (
            "whatever read its output has closed it: write to a file (> FILE) to keep all of it"
        )
    elif isinstance(error, ModuleNotFoundError) and not _is_ours(error.name):
        reason = (
            f"{error.name} is not installed for {sys.executable}: `make setup`, then call .venv/bin/python; "
            "in an environment of your own, pip install --editable ."
        )
    elif isinstance(error, OSError) and error.errno is not None:
        remedy = REMEDIES.get(error.errno, "mend that, and call again")
        file = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{file}{error.strerror}; {remedy}"
    elif not isinstance(error, (OSError, ValueError, CommandFailed)):
        traceback.print_exception(error)
        return 1
    print(f"{Path(sys.argv[0]).stem}: {reason}", file=sys.stderr)
    return code


def end_by_hook(kind: type, error: BaseException, trace: TracebackType | None) -> NoReturn:
    """`end`, as a sys.excepthook: for what stops a command before it runs, while it imports."""
    sys.exit(end(error))


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == __package__


class Display:
    """How far a command is, on stderr: a live bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self) -> None:
        # Here, because preflight and patching say so where rich is missing, and --help needs none of it.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            # a narrow terminal cuts the bar first
            TextColumn("{task.description}  {task.fields[status]}", markup=False),
            BarColumn(20),
            console=self.console,
        )

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
        """So much more is done. The time left is told as if the rest went at the mean speed."""
        done = self.done + amount
        seconds = time.monotonic() - self.began
        left = seconds / (done - self.first) * (self.total - done) if done > self.first else 0
        self.show(done, f"{what}{done / self.total:.0%}, left {duration(left)}")

    def show(self, done: float, status: str) -> None:
        """So much is done in all."""
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
