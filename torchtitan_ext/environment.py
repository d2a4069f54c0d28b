"""Compare what is installed with what this package supports."""

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

from .patching import PatchingError, check_patched

DISTRIBUTION = "torchtitan-lighthouse"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def supported() -> tuple[str, list[str]]:
    """The versions of Python and the requirements: a clone's pyproject.toml, which an older installation may lag."""
    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text())["project"]
        return project["requires-python"], project["dependencies"]
    try:
        own = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # the package's folder, copied
        return "", []
    return own["Requires-Python"], own.get_all("Requires-Dist", [])


def environment_problems() -> Iterator[str]:
    """Versions that are not supported, each with a remedy, and patches that are not there."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, requirements = supported()
    if platform.python_version() not in SpecifierSet(python):
        yield f"Python {platform.python_version()}: {DISTRIBUTION} needs {python}"
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed = f'{requirement.name}{requirement.specifier}: pip install "{requirement.name}{requirement.specifier}"'
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed, {DISTRIBUTION} needs {needed}"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, {DISTRIBUTION} needs {needed}"
    try:
        check_patched()
    except (PatchingError, OSError) as error:
        yield str(error)
