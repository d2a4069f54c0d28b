"""Lock a run's folders against a second launch."""

import fcntl
import os
import shlex
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from .resume import checkpoint_folder

LOCK = "run.lock"
_held: list[IO[str]] = []


def lock_folders(job_config: JobConfig) -> None:
    """Lock the folders of this launch until this process ends. Raises ValueError as `lock` does."""
    dump, folder = job_config.job.dump_folder, job_config.checkpoint.folder
    _held.append(lock(f"job.dump_folder = {dump!r}", Path(dump, LOCK)))
    if job_config.checkpoint.enable:
        # Other dump folders may share it. The lock lies beside it: torchtitan loads from a folder that exists.
        path = checkpoint_folder(job_config).resolve()
        _held.append(lock(f"checkpoint.folder = {folder!r}", path.with_name(f"{path.name}.lock")))


def lock(field: str, path: Path) -> IO[str]:
    """Lock the file `path` until it is closed or this process ends; no child inherits the lock. Raises ValueError,
    naming `field` and the holder, unless that has just started, if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}, since {time.ctime()}")
        file.flush()
        fcntl.lockf(file, fcntl.LOCK_SH)  # only now may a refused launch read the line
    except (BlockingIOError, PermissionError) as error:
        holder, remedy = "it has just started", "wait until it ends, stop it, or choose another folder"
        with file, suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            file.seek(0)
            holder = file.read()
        reason = f"{field}: a launch that is still running writes there ({holder})"
        raise ValueError(f"{reason}; {remedy}; if its host is down: rm {shlex.quote(str(path))}") from error
    except OSError as error:
        logger.warning(f"{path} can't be locked ({error}): launch nothing else into its folder")
    return file
