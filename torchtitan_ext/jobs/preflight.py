"""Print the preflight: what a run will take, and every problem of its environment and its job."""

import logging
import sys
import warnings
from pathlib import Path

from .environment import environment_problems


def report(config_file: Path, overrides: list[str], n_gpus: int, gpu_memory: float | None, tok_s: float | None) -> int:
    """Print the facts and the problems of a run; returns 1 if there are problems. Arguments as in `plan_report`."""
    # What libraries warn of on the way is no problem of the run.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    problems = list(environment_problems())
    facts: dict[str, str] = {}
    try:
        # Not before: it needs what has just been looked for.
        from .plan import plan_report
    except ImportError as error:
        problems.append(f"the job can't be checked before this environment is complete: {error}")
    else:
        facts, job_problems = plan_report(str(config_file), overrides, n_gpus, gpu_memory, tok_s)
        problems += job_problems
    _show(facts, problems)
    return 1 if problems else 0


def _show(facts: dict[str, str], problems: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if facts:
        table = Table.grid(padding=(0, 2))
        for name, fact in facts.items():
            table.add_row(Text(name), Text(fact))
        console.print(table)
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}:" if problems else "no problems"
    console.print(count, style="bold red" if problems else None)
    for problem in problems:
        console.print(f"- {problem}", markup=False, soft_wrap=True)
