"""Apply this repository's patches to torchtitan, revert them, or check for them.

git writes each file's blob ids into a patch (`index OLD..NEW`). A tree is as released when every patched file has its
first OLD id, patched when every file has its last NEW id. Any other tree is an error.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

VERSION = "0.2.2"
PATCHES = Path(__file__).resolve().parents[1] / "patches"
REINSTALL = f"pip install --force-reinstall --no-deps torchtitan=={VERSION}"


def series() -> list[Path]:
    """The patches, in the order in which they apply."""
    if patches := sorted(PATCHES.glob("*.patch")):
        return patches
    raise ValueError(f"{PATCHES} has no patches: they come with a clone, installed with pip install --editable")


def blob_ids() -> dict[str, list[str]]:
    """Blob ids of each file that the patches touch: as released, then after each patch."""
    ids: dict[str, list[str]] = {}
    for patch in series():
        for name, old, new in re.findall(r"(?m)^diff --git a/(\S+) .*\nindex (\w{40})\.\.(\w{40})", patch.read_text()):
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
    raise ValueError(f"torchtitan is not installed: pip install torchtitan=={VERSION}, or name its folder: --root")


def is_patched(root: Path) -> bool:
    """Whether the torchtitan/ in `root` is patched or as released. Raises ValueError where it is neither."""
    ids = blob_ids()
    present = {name: _blob_id(root / name) for name in ids}
    for patched in (False, True):
        if present == {name: known[-patched] for name, known in ids.items()}:
            return patched
    files = " ".join(name for name, known in ids.items() if present[name] != known[0])
    remedy = f"git checkout v{VERSION} -- {files}" if (root / ".git").exists() else REINSTALL
    state = f"neither torchtitan {VERSION} as released nor with all patches: {files}"
    raise ValueError(f"{root / 'torchtitan'} is {state}\nRestore it: {remedy}")


def check_patched() -> None:
    """Raise ValueError for torchtitan as released, and for one changed in another way."""
    if not is_patched(root := installed_root()):
        raise ValueError(f"{root / 'torchtitan'} is not patched: python -m torchtitan_ext patch apply")


def change(root: Path, patched: bool) -> None:
    """Patch the torchtitan/ in `root` or revert it. A failing patch changes nothing. Raises ValueError."""
    if is_patched(root) == patched:
        return
    modes = {root / name: (root / name).stat().st_mode for name in blob_ids()}
    git = subprocess.run(
        ["git", "apply", "-p2", *([] if patched else ["--reverse"])],
        input="".join(patch.read_text() for patch in series()),  # one input: git checks all of it before it writes
        cwd=(root / "torchtitan").resolve(),  # git follows no links
        # Inside a repository, git apply skips files that are not the repository's; core.autocrlf changes all lines.
        env=os.environ | {"GIT_DIR": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        capture_output=True,
        text=True,
    )
    if git.returncode or is_patched(root) != patched:
        raise ValueError(f"git apply failed:\n{git.stderr.strip()}")
    for path, mode in modes.items():  # git resets modes to the umask's
        path.chmod(mode)
