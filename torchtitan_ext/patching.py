"""Apply this repository's patches to torchtitan, take them back, or say whether they are there.

git writes each file's blob ids into a patch (`index OLD..NEW`). A tree is as released when every patched file has its
first OLD id, patched when every file has its last NEW id; anything else is refused. The patches are applied to a copy,
which then takes the package's place.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

VERSION = "0.2.2"
PATCHES = Path(__file__).resolve().parents[1] / "patches"
REINSTALL = f"pip install --force-reinstall --no-deps torchtitan=={VERSION}"


class PatchingError(ValueError):
    """Nothing was changed. The message says why, names the files, and what to do."""


def series() -> list[Path]:
    """The patches, in the order in which they apply."""
    if patches := sorted(PATCHES.glob("*.patch")):
        return patches
    raise PatchingError(f"{PATCHES} has no patches: they come with a clone, installed with pip install --editable")


def blob_ids() -> dict[str, list[str]]:
    """For each file that the patches touch, its blob ids: as released, then after each patch."""
    ids: dict[str, list[str]] = {}
    for patch in series():
        found = re.findall(r"^diff --git a/(\S+) .*\nindex (\w{40})\.\.(\w{40})", patch.read_text(), re.MULTILINE)
        for name, old, new in found:
            ids.setdefault(name, [old]).append(new)
    return ids


def _blob_id(path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def installed_root() -> Path:
    """The folder of the torchtitan that Python would import; found without importing it."""
    spec = importlib.util.find_spec("torchtitan")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    raise PatchingError(f"torchtitan is not installed: pip install torchtitan=={VERSION}, or name its folder: --root")


def is_patched(root: Path) -> bool:
    """Whether the torchtitan/ in `root` is patched or as released. Raises PatchingError where it is neither."""
    ids = blob_ids()
    found = {name: _blob_id(root / name) for name in ids}
    for patched, place in ((False, 0), (True, -1)):
        if all(found[name] == known[place] for name, known in ids.items()):
            return patched
    files = " ".join(name for name, known in ids.items() if found[name] != known[0])
    remedy = f"git checkout v{VERSION} -- {files}" if (root / ".git").exists() else REINSTALL
    neither = f"neither torchtitan {VERSION} as released nor with all patches: {files}"
    raise PatchingError(f"{root / 'torchtitan'} is {neither}\nRestore it: {remedy}")


def check_patched(changed_is_fine: bool = False) -> None:
    """Raises PatchingError for a torchtitan as released, or else changed, which its owner may have done on purpose."""
    root = installed_root()
    try:
        patched = is_patched(root)
    except PatchingError:
        if changed_is_fine:
            return
        raise
    if not patched:
        raise PatchingError(f"{root / 'torchtitan'} is not patched: python -m torchtitan_ext patch apply")


def change(root: Path, patched: bool) -> bool:
    """Make the torchtitan/ in `root` patched, or as released; False if it was so. An error leaves it as it is."""
    if is_patched(root) == patched:
        return False
    package = (root / "torchtitan").resolve()
    with tempfile.TemporaryDirectory(prefix=".torchtitan-", dir=package.parent) as work:
        # Without bytecode, which Python may take for valid although it is of the other state.
        no_bytecode = shutil.ignore_patterns("__pycache__")
        copy = shutil.copytree(package, Path(work, "torchtitan"), symlinks=True, ignore=no_bytecode)
        git = subprocess.run(
            ["git", "apply", *(series() if patched else ["-R", *reversed(series())])],
            cwd=work,
            # Inside a repository, git apply skips files that are not the repository's.
            env=os.environ | {"GIT_DIR": str(Path(work, "none"))},
            capture_output=True,
            text=True,
        )
        if git.returncode or is_patched(Path(work)) != patched:
            raise PatchingError(f"git apply failed:\n{git.stderr.strip()}")
        for name in blob_ids():  # which git writes anew
            shutil.copymode(root / name, Path(work, name))
        package.rename(Path(work, "before"))
        try:
            copy.rename(package)
        except BaseException:
            Path(work, "before").rename(package)
            raise
    return True
