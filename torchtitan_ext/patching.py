"""Apply this repository's patches to torchtitan, take them back, or say whether they are there.

The state of a tree is read from the blob ids that git writes into a patch (`index OLD..NEW`): it
is clean when every file that the patches touch has its first OLD id, patched when every one has
its last NEW id, and anything else is refused. The patches are applied to a copy of the package,
which then takes the package's place in one system call: whatever stops a run, the tree is either.
"""

import argparse
import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .command_line import run

VERSION = "0.2.2"
PATCHES = Path(__file__).resolve().parents[1] / "patches"
WORK_DIR = ".torchtitan-patching"  # made beside the package: renaming stays on its file system
REINSTALL = f"pip install --force-reinstall --no-deps torchtitan=={VERSION}"

_INDEX_LINE = re.compile(
    r"^diff --git a/(\S+) b/\S+\n(?:(?:new|deleted) file mode .*\n)?index (\w{40})\.\.(\w{40})",
    re.MULTILINE,
)


class PatchingError(Exception):
    """Nothing was changed. The message says why, names the files, and what to do."""


class NotPatched(PatchingError):
    """torchtitan is as released."""


def series() -> list[Path]:
    """The patches, in the order in which they apply."""
    try:
        return [PATCHES / name for name in (PATCHES / "series").read_text().split()]
    except FileNotFoundError as error:
        raise PatchingError(
            f"{error.filename} is missing: the patches come with the source, not with the built "
            "package.\nRun this from a clone, installed with pip install --editable."
        ) from error


def blob_ids() -> dict[str, list[str]]:
    """For each file that the patches touch, its blob ids: as released, then after each patch."""
    ids: dict[str, list[str]] = {}
    for patch in series():
        for name, old, new in _INDEX_LINE.findall(patch.read_text()):
            ids.setdefault(name, [old]).append(new)
    return ids


def _blob_id(path: Path) -> str:
    if not path.is_file():
        return "0" * 40  # git's id for a file that a patch adds or deletes
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def installed_root() -> Path:
    """The folder of the torchtitan that Python would import; found without importing it."""
    spec = importlib.util.find_spec("torchtitan")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    for entry in map(Path, sys.path):
        if (entry / WORK_DIR / "old").is_dir():  # a run was killed inside _swap's fallback
            return entry
    raise PatchingError(
        f"torchtitan is not installed: pip install torchtitan=={VERSION}, or name the folder "
        "that holds it with --root."
    )


def _found_version(root: Path) -> str | None:
    """The version that a checkout or an installation's metadata states, if there is either."""
    version_file = root / "assets" / "version.txt"
    if version_file.is_file():
        return version_file.read_text().strip()
    for metadata in root.glob("torchtitan-*.dist-info/METADATA"):
        if found := re.search(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE):
            return found[1]
    return None


def is_patched(root: Path) -> bool:
    """Whether the torchtitan/ in `root` is patched (True) or as released (False).

    Raises PatchingError where it is neither: missing, another version, patched in part, or
    changed locally.
    """
    package = root / "torchtitan"
    if not package.is_dir():
        raise PatchingError(f"there is no torchtitan/ in {root}: name its folder with --root.")
    in_checkout = (package.resolve().parent / ".git").exists()
    if (version := _found_version(root)) not in (None, VERSION):
        raise PatchingError(
            f"{package} is version {version}, the patches are for {VERSION}.\n"
            f"Get that one: {f'git checkout v{VERSION}' if in_checkout else REINSTALL}"
        )
    ids = blob_ids()
    found = {name: _blob_id(root / name) for name in ids}
    if all(found[name] == known[0] for name, known in ids.items()):
        return False
    if all(found[name] == known[-1] for name, known in ids.items()):
        return True
    changed = [name for name, known in ids.items() if found[name] not in known]
    files = " ".join(changed or [name for name, known in ids.items() if found[name] != known[0]])
    state = "changed, or from other sources than the patches" if changed else "patched in part"
    raise PatchingError(
        f"{package} is {state}: {files}\n"
        f"Restore it: {f'git checkout -- {files}' if in_checkout else REINSTALL}"
    )


def check_patched() -> None:
    """Raises NotPatched for a torchtitan as released, PatchingError as `is_patched` does."""
    root = installed_root()
    if not is_patched(root):
        raise NotPatched(
            f"{root / 'torchtitan'} is not patched: python -m torchtitan_ext.patching apply"
        )


def change(root: Path, patched: bool) -> bool:
    """Make the torchtitan/ in `root` patched, or as released. Returns False if it was so already.

    Raises PatchingError or OSError, with nothing changed.
    """
    package = (root / "torchtitan").resolve()
    work = package.parent / WORK_DIR
    if not package.parent.is_dir():
        raise PatchingError(f"there is no {package.parent}: name torchtitan's folder with --root.")
    lock = os.open(package.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # it only keeps runs apart, and NFS can't lock a folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (work / "old").is_dir() and not package.exists():
            os.rename(work / "old", package)
        if work.exists():  # left by a killed run
            shutil.rmtree(work)
        if is_patched(root) == patched:
            return False
        try:
            _patch_copy(package, work, patched, lock)
            _swap(work / "torchtitan", package, work / "old")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def _patch_copy(package: Path, work: Path, patched: bool, lock: int) -> None:
    """Make work/torchtitan, a copy of `package` in the wanted state."""
    # without bytecode, which Python may take for valid although it is of the other state
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, work / "torchtitan", symlinks=True, ignore=no_bytecode)
    # inside of a repository, git apply skips the files that aren't the repository's
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_CEILING_DIRECTORIES": str(work.parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    if shutil.which("git") is None:
        raise PatchingError("git, which applies the patches, is not on the PATH: install it.")
    git = subprocess.run(
        [
            "git",
            "apply",
            *([] if patched else ["-R"]),
            *(series() if patched else reversed(series())),
        ],
        cwd=work,
        env=environment,
        pass_fds=[lock],  # git outlives a killed run: the next one waits for it
        capture_output=True,
        text=True,
    )
    ids = blob_ids()
    wrong = [name for name in ids if _blob_id(work / name) != ids[name][-1 if patched else 0]]
    if git.returncode or wrong:
        raise PatchingError(f"git apply failed on {' '.join(wrong)}:\n{git.stderr.strip()}")
    for name in ids:  # git writes them anew, under this run's umask
        original = package / Path(name).relative_to("torchtitan")
        if original.exists() and (work / name).exists():
            shutil.copymode(original, work / name)


def _swap(new: Path, package: Path, old: Path) -> None:
    """Put `new` in the place of `package`, in one step where the file system can.

    Where it can't (NFS) there is an instant without a package; `change` finds it under `old`
    if a run is killed just then.
    """
    try:
        _exchange(new, package)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise PatchingError(
                f"{package} can't be replaced: it is part of a container image.\n"
                f"Install it into the container: {REINSTALL}"
            ) from error
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        try:
            os.rename(package, old)
            os.rename(new, package)
        except BaseException:
            if not package.exists():
                os.rename(old, package)
            raise


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step: renameat2's RENAME_EXCHANGE, macOS's RENAME_SWAP."""
    libc = ctypes.CDLL(None, use_errno=True)
    flag, here = 2, -100  # 2 is the flag of both; -100 is AT_FDCWD
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), flag)
        else:
            failed = libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), flag)
    except AttributeError as error:  # an old C library
        raise OSError(errno.ENOSYS, "the C library can't exchange two folders") from error
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(a), None, str(b))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code that --help documents."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtitan_ext.patching",
        description=f"Patch torchtitan {VERSION}: all of the patches or none.\n\n"
        "    python -m torchtitan_ext.patching apply",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit code: 0, done, or so already (check: patched); 1, check found torchtitan as "
        "released; 2, wrong arguments; 3, refused or failed, with nothing changed",
    )
    parser.add_argument(
        "action",
        choices=["apply", "check", "revert"],
        help="patch, say whether it is patched, or make it as released again",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="the folder that holds torchtitan/: a site-packages or a git checkout "
        "(default: where torchtitan is installed)",
    )
    options = parser.parse_args(arguments)
    already = ""
    try:
        root = options.root or installed_root()
        if options.action == "check":
            patched = is_patched(root)
        else:
            patched = options.action == "apply"
            already = "" if change(root, patched) else "already "
        state = f"patched ({len(series())} patches)" if patched else "as released"
    except (PatchingError, OSError) as error:
        print(f"{options.action} refused: {error}", file=sys.stderr)
        return 3
    print(f"{root / 'torchtitan'} is {already}{state}")
    return 1 if options.action == "check" and not patched else 0


if __name__ == "__main__":
    run(main, refused=3)
