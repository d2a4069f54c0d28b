"""Read a job: torchtitan's TOML file, which may extend another, and torchtitan's arguments."""

import importlib
import tomllib
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
from torchtitan.config import ConfigManager, JobConfig

from torchtitan_ext.arguments import errors_in_one_line
from torchtitan_ext.model import settings as own


def read_toml(file: str | Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a TOML file, merged over those of the file that it `extends`. Raises ValueError."""
    file = Path(file)
    if file.resolve() in extending:
        raise ValueError(f"{file}: extends itself, by way of {', '.join(map(str, extending))}; break that circle")
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give the path of a job file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML ({error}); correct that") from error
    if (parent := values.pop("extends", None)) is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"{file}: extends = {parent!r}: must be the path of one job file")
    return merged(read_toml(file.parent / parent, (*extending, file.resolve())), values, f"{file}: ")


def merged(base: dict[str, Any], changes: dict[str, Any], where: str = "") -> dict[str, Any]:
    """`base` with `changes`, section by section; lists are replaced. Raises ValueError for a section that is none."""
    both = base | changes
    for name in base.keys() & changes.keys():
        if isinstance(base[name], dict):
            if not isinstance(changes[name], dict):
                raise ValueError(f"{where}{name} = {changes[name]!r}: must be a table of settings")
            both[name] = merged(base[name], changes[name], f"{where}{name}.")
    return both


def parse_job(config_file: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Parse the job of a TOML file and torchtitan arguments, without checks; imports its modules. Raises ValueError."""
    default = {"job": {"custom_config_module": own.__name__}, "experimental": {}}
    sections = merged(default, read_toml(config_file), f"{config_file}: ")
    where = " ".join([str(config_file), *overrides])
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--experimental.custom_import", "--experimental.custom-import", dest="module", nargs="?")
    module = parser.parse_known_args(overrides)[0].module or sections["experimental"].get("custom_import")
    if module:
        import_extension(module, where)  # before scorers' names are checked
    settings = f"all settings: python -m torchtitan_ext.train --job.config_file {config_file} --help"
    try:
        with warnings.catch_warnings(), errors_in_one_line(settings):
            # the checks report wrong types
            warnings.filterwarnings("ignore", category=UserWarning, message="The field")
            manager = ConfigManager()
            manager._maybe_load_toml = lambda args: sections  # type: ignore[method-assign]
            job = manager.parse_args(["--job.config_file", str(config_file), *overrides])
            merged(job.to_dict(), sections)  # the parser ignores a number in place of a section
            return job
    except ImportError as error:
        raise ValueError(f"{where}: {error}; drop job.custom_config_module") from error
    except (AssertionError, TypeError, ValueError) as error:
        # the rest advises on torchtitan's launcher
        said = str(error).splitlines()[0].partition(" We'll try")[0]
        raise ValueError(f"{where}: {said.rstrip('.')}; correct that in the file or argument") from error


def arguments_of(field: str, value: object) -> list[str]:
    """torchtitan's arguments that set `field`, such as "loss.fuse_output"; its switches take no value."""
    section, _, name = field.rpartition(".")
    if isinstance(value, bool):
        return [f"--{field}" if value else f"--{section}.no_{name}"]
    return [f"--{field}", *map(str, value)] if isinstance(value, list) else [f"--{field}={value}"]


def import_extension(module: str, where: str | Path) -> None:
    """Import a job's module, which registers data sets and flavors. Raises ValueError, naming `where`."""
    try:
        importlib.import_module(module)
    except Exception as error:  # from a user's module
        named = f"experimental.custom_import = {module!r} in {where}"
        raise ValueError(f"{named}: {error}; call from the folder that holds it, or drop the setting") from error


def as_toml(job: JobConfig) -> str:
    """The whole job as TOML; settings that are None are left out."""
    return tomli_w.dumps(asdict(job, dict_factory=lambda items: {name: x for name, x in items if x is not None}))
