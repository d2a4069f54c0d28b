"""Progress of a command on stderr: a live bar on a terminal, else a line every ten seconds."""

import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10


class Display(Progress):
    """Shows one task after another; a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        # the bar comes last: a narrow terminal cuts it first
        columns = (TextColumn("{task.description}  {task.fields[status]}", markup=False), BarColumn(20))
        super().__init__(*columns, console=console, disable=not console.is_interactive, speed_estimate_period=math.inf)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, title: str, total: float, done: float = 0) -> None:
        """Begin a task; `count` and `show` apply to the latest."""
        self.add_task(title, total=total, completed=done, status="")  # type: ignore[arg-type]
        self.last_line = self.get_time()

    def count(self, amount: float, what: str = "") -> None:
        self.show(self.tasks[-1].completed + amount, what)

    def show(self, done: float, what: str = "") -> None:
        """Show `done` of the total, and the time left at the mean speed so far."""
        task, now = self.tasks[-1], self.get_time()
        self.update(task.id, completed=done)
        left = "" if task.time_remaining is None else f", left {timedelta(seconds=task.time_remaining)}"
        status = f"{what}{task.percentage:.0f}%{left}"
        self.update(task.id, status=status)
        if self.disable and (now - self.last_line >= SECONDS_BETWEEN_LINES or task.finished):
            self.last_line = now
            self.say(f"{task.description}  {status}")
