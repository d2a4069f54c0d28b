"""Compare installed versions with those that this package supports."""

import importlib.metadata
import os
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

from torchtitan_ext.patching import check_patched

DISTRIBUTION = "torchtitan-lighthouse"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def supported() -> tuple[str, list[str]]:
    """Python versions and requirements, from a clone's pyproject.toml or else the installed package."""
    if PROJECT.is_file():
        project = tomllib.loads(PROJECT.read_text())["project"]
        return project["requires-python"], project["dependencies"] + project["optional-dependencies"]["train"]
    try:
        own = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # a copied folder
        return "", []
    return own["Requires-Python"], own.get_all("Requires-Dist", [])


def environment_problems() -> Iterator[str]:
    """Problems with remedies: versions, missing patches, restarts by torchrun."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, requirements = supported()
    if platform.python_version() not in SpecifierSet(python):
        yield f"Python {platform.python_version()}: {DISTRIBUTION} needs {python}"
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        needed = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f'{requirement.name} is {version or "not installed"}, not {needed}: pip install "{needed}"'
    try:
        check_patched()
    except (ValueError, OSError) as error:
        yield str(error)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        remedy = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, as scripts/train.sh does"
        yield f"torchrun --max_restarts={restarts}: a restart may hang on addresses of earlier ranks; {remedy}"
