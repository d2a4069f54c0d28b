"""Check a whole run before it is paid for, in seconds: no training, no GPU, on any machine.

    python -m torchtitan_ext.preflight --job.config_file configs/530m/stage1.toml --ngpu 8 [overrides]

Every problem is named at once: versions, torchtitan's patches, the job's settings by the rules of training
itself, data, the checkpoint to start from, disk and GPU memory. What the run will take is printed beside them.
Overrides are torchtitan's, as for training: --lighthouse.top_k 2048.
"""

import argparse
import logging
import sys
import warnings

from .command_line import at_least, run
from .environment import environment_problems


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number")
    return number


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code that --help documents."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtitan_ext.preflight",
        description=__doc__,
        epilog="exit code: 0, nothing found; 1, problems, each named; 2, wrong arguments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--job.config_file", dest="config_file", required=True, metavar="TOML", help="the job file"
    )
    parser.add_argument(
        "--ngpu",
        type=at_least(1),
        default=1,
        metavar="N",
        help="GPUs of the run, on all nodes (default: 1)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=positive,
        metavar="GIB",
        help="memory of one GPU (default: of this machine's, or the 139 of an NVIDIA H200)",
    )
    parser.add_argument(
        "--tok-s",
        type=positive,
        metavar="N",
        help="tokens a second a GPU, `tps` in the log of a trial (default: from the MFU measured on an H200)",
    )
    options, overrides = parser.parse_known_args(arguments)

    problems = list(environment_problems())
    facts: dict[str, str] = {}
    try:
        # Not before: it needs what has just been looked for.
        from .outlook import job_outlook
    except ImportError as error:
        problems.append(f"the job can't be looked at before this environment is mended: {error}")
    else:
        facts, found = job_outlook(
            options.config_file, overrides, options.ngpu, options.gpu_memory, options.tok_s
        )
        problems += found
    show(facts, problems)
    return 1 if problems else 0


def show(facts: dict[str, str], problems: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name), Text(fact))
    if facts:
        console.print(table)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        console.print(f"{len(problems)} {noun}:", style="bold red")
    else:
        console.print("no problems")
    for problem in problems:
        console.print(f"- {problem}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    # What libraries warn of on the way is no problem of the run.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    run(main)
