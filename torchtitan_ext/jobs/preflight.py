"""Print the preflight: a run's estimated resources, and every problem of its environment and job."""

import logging
import warnings
from pathlib import Path

from .environment import environment_problems


def report(config_file: Path, overrides: list[str], n_gpus: int, gpu_memory: float | None, tok_s: float | None) -> int:
    """Print the facts and the problems of a run; returns 1 if there are problems. Arguments as in `plan_report`."""
    # Libraries' warnings are no problems of the run.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    problems = list(environment_problems())
    facts: dict[str, str] = {}
    try:
        # It needs the packages checked above.
        from .plan import plan_report
    except ImportError as error:
        problems.append(f"the job can't be checked before this environment is complete: {error}")
    else:
        facts, job_problems = plan_report(str(config_file), overrides, n_gpus, gpu_memory, tok_s)
        problems += job_problems
    for name, fact in facts.items():
        print(f"{name:10} {fact}")
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}:" if problems else "no problems")
    for problem in problems:
        print(f"- {problem}")
    return 1 if problems else 0
