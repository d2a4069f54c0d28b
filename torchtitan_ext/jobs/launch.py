"""Start a training on this machine, follow its steps, and leave no process of it behind."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")
STEP_LINE = re.compile(r"- step:\s*(\d+)\s+loss:\s*(\S+).*\btps:\s*([\d,]+)")


class Step(NamedTuple):
    """What a training logs of a step."""

    number: int
    loss: float
    tps: str  # tokens per second per device


class Training:
    """A training that was started; its output goes to the end of a log file."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.log = process, log
        self.last_lines: deque[str] = deque(maxlen=60)

    @property
    def output(self) -> str:
        """The end of what it printed."""
        return "".join(self.last_lines)

    def steps(self) -> Iterator[Step]:
        """Each logged step, once, as it is logged; ends with the training."""
        assert self.process.stdout is not None  # it is a pipe
        last = 0
        for line in self.process.stdout:
            line = ANSI_COLOR.sub("", line)
            self.log.write(line)
            self.log.flush()
            self.last_lines.append(line)
            match = STEP_LINE.search(line)
            if match and int(match[1]) > last:  # each rank logs it
                last = int(match[1])
                yield Step(last, float(match[2]), match[3])


def torchrun(nproc: int, config_file: str | Path) -> list[str]:
    """The command that trains a job file on this machine; torchtitan arguments may follow."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*command, "-m", "torchtitan_ext.train", "--job.config_file", str(config_file)]


def child_environment() -> dict[str, str]:
    """This process's environment for a training, with what is better set unless its user has."""
    ours = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow down others of a shared CPU
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # fixed ones leave gaps that no long activation fits into
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted ranks wait for addresses of the killed
    }
    return {**ours, **os.environ, "PYTHONUNBUFFERED": "1"}


@contextmanager
def training(command: list[str], log_file: Path, **environment: str) -> Iterator[Training]:
    """Start a training. However the body ends, none of its processes is left; SIGTERM and SIGHUP end it like Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    ends = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]  # as nohup sets it
    before = {s: signal.signal(s, interrupt) for s in ends}
    try:
        with (
            log_file.open("a") as log,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=child_environment() | environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which then ends the child in order
            ) as child,
        ):
            try:
                yield Training(child, log)
                child.wait()
            finally:
                if child.poll() is None:
                    child.terminate()  # torchrun ends its workers, after 30 s by force
                    log.write(child.communicate()[0])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
