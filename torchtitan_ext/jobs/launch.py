"""Start a training on this machine, follow its steps, and end all its processes."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")
DEFAULTS = {  # a training's environment, unless the caller's says otherwise
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down others on a shared CPU
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",  # seconds after SIGTERM, for three steps and the save
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # fixed segments leave gaps too small for long activations
}
STEP_LINE = re.compile(r"- step:\s*(\d+)\s+loss:\s*(\S+).*\btps:\s*([\d,]+)")


class Training:
    """A started training; its output is appended to a log file."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.log = process, log
        self.last_lines: deque[str] = deque(maxlen=60)

    @property
    def output(self) -> str:
        return "".join(self.last_lines)

    def steps(self) -> Iterator[tuple[int, float, str]]:
        """Each logged step once, until the training ends: number, loss, tokens per second per device."""
        assert self.process.stdout is not None  # a pipe
        last = 0
        for line in self.process.stdout:
            line = ANSI_COLOR.sub("", line)
            self.log.write(line)
            self.log.flush()
            self.last_lines.append(line)
            match = STEP_LINE.search(line)
            if match and int(match[1]) > last:  # each rank logs it
                last = int(match[1])
                yield last, float(match[2]), match[3]


def torchrun(nproc: int, config_file: str | Path) -> list[str]:
    """The command that trains a job file on this machine; torchtitan arguments may follow."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*command, "-m", "torchtitan_ext.train", "--job.config_file", str(config_file)]


@contextmanager
def training(command: list[str], log_file: Path, **environment: str) -> Iterator[Training]:
    """Start a training; end its processes when the body ends. SIGTERM and SIGHUP act like Ctrl-C."""
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        log = stack.enter_context(log_file.open("a"))
        environment = {**DEFAULTS, **os.environ, "PYTHONUNBUFFERED": "1", **environment}
        if environment.get("PET_MAX_RESTARTS", "0") != "0":  # or restarted ranks wait for killed ones
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the child in order
        )
        stack.enter_context(child)
        try:
            yield Training(child, log)
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()  # torchrun ends its workers, and kills them after a timeout
                log.write(child.communicate()[0])
