"""Ablation grids: each cell is a stage 1 and a stage 2 with its own settings."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torchtitan_ext.jobs.job_file import arguments_of, parse_job

from . import runner


def read_grid(file: Path) -> dict[str, list[str]]:
    """torchtitan arguments of each cell, by name. Raises ValueError if the file is not a grid."""
    try:
        cells = tomllib.loads(file.read_text())["ablations"]
        named = {cell["run"]: _arguments(cell["settings"]) for cell in cells}
        if len(named) < len(cells):
            raise ValueError(f"its {len(cells)} cells have {len(named)} names, {', '.join(named)}")
        return named
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "give a TOML file of [[ablations]], each with a run and its settings, like configs/published.toml"
        raise ValueError(f"--grid {file} is not a grid ({error!r}): {remedy}") from error


def _arguments(settings: Mapping[str, Mapping[str, object]]) -> list[str]:
    pairs = ((f"{section}.{name}", value) for section, fields in settings.items() for name, value in fields.items())
    return [argument for field, value in pairs for argument in arguments_of(field, value)]


def plan(
    cells: Mapping[str, list[str]], configs: Path, output: Path, overrides: Sequence[str], nproc: int | None = None
) -> list[runner.PlannedRun]:
    """The runs of each cell, in a folder of its name: job files in `configs`, the cell's settings, overrides."""
    runs = []
    for name, settings in cells.items():
        arguments = [*settings, *overrides]
        splits = [parse_job(configs / "stage2.toml", arguments).training.steps * 10 // 16]
        experiment = runner.plan(configs, output / name, splits, ("stage1", "stage2"), arguments, nproc)
        runs += [replace(run, name=f"{name}/{run.name}") for run in experiment]
    return runs
