"""scripts/train.sh and scripts/train.slurm, with a fake SLURM and, in all tests but one, a fake torchrun."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers.launches import ROOT, SHORT, train
from helpers.streams import write_text
from torch.distributed.run import parse_args

from torchtitan_ext.experiment import records
from torchtitan_ext.jobs.launch import ANSI_COLOR, DEFAULTS
from torchtitan_ext.jobs.resume import complete_steps

CONFIG = "configs/text/stage1.toml"
STAND_INS = {
    # a node is a process, and a node that fails fails the step
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & nodes+=($!); done
        for node in "${nodes[@]}"; do wait "$node" || failed=1; done
        exit "${failed:-0}"
    """,
    "scontrol": """
        if [[ $1 == show ]]; then
            [[ $* == "show hostnames $SLURM_JOB_NODELIST" ]] && printf '%s\\n' $HOSTS
        else
            echo "scontrol $*" >> "$CALLS/slurm"
        fi
    """,
    "scancel": """
        echo "scancel $*" >> "$CALLS/slurm"
        for call in "$CALLS"/torchrun-*; do kill -TERM "${call##*-}"; done
    """,
    "torchrun": """
        env > "$CALLS/environment"
        printf '%s\\0' "$@" > "$CALLS/.torchrun-$$"
        mv "$CALLS/.torchrun-$$" "$CALLS/torchrun-$$"
        exec sleep "${TRAINS:-0}"
    """,
}


class Launches:
    """Starts a script of this repository where the commands above are the stand-ins."""

    def __init__(self, folder):
        self.calls, self.bin = folder / "calls", folder / "bin"
        self.calls.mkdir()
        for name, script in STAND_INS.items():
            self.command(name, script)
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls)}
        # as of an allocation of two nodes with four GPUs each
        self.slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[8-9]", "HOSTS": "node8 node9"}
        self.slurm |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "CONFIG": CONFIG}

    def command(self, name, script):
        write_text(self.bin / name, f"#!/usr/bin/env bash\n{script}").chmod(0o755)

    def start(self, script, *overrides, **env):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["bash", f"scripts/{script}", *overrides]
        return subprocess.Popen(command, cwd=ROOT, env=self.env | env, start_new_session=True, **pipes)

    def run(self, script, *overrides, **env):
        process = self.start(script, *overrides, **env)
        output, _ = process.communicate(timeout=120)
        return process, output

    def torchruns(self):
        """What torchrun was asked, as it reads it itself: one of them a node."""
        calls = [path.read_text().split("\0")[:-1] for path in self.calls.glob("torchrun-*")]
        return [parse_args(call) for call in calls]


@pytest.fixture
def launches(tmp_path):
    return Launches(tmp_path)


OVERRIDES = ["--job.description", "two words; $HOME * 'quoted'", "--training.steps", "3"]


def test_every_node_of_a_slurm_job_gets_the_same_command_and_two_jobs_meet_apart(launches):
    ports = set()
    for job in ("7654321", "7654322"):
        process, output = launches.run("train.slurm", *OVERRIDES, **launches.slurm | {"SLURM_JOB_ID": job})
        assert process.returncode == 0, output
        first, second = (run for run in launches.torchruns() if run.rdzv_id == job)
        assert vars(first) == vars(second)
        assert (first.nnodes, first.nproc_per_node, first.rdzv_backend) == ("2", "4", "c10d")
        assert first.module and first.training_script == "torchtitan_ext.train"
        assert first.training_script_args == ["--job.config_file", CONFIG, *OVERRIDES]
        host, port = first.rdzv_endpoint.split(":")
        assert host == "node8" and 1024 <= int(port) < 32768  # not among those that Linux hands out by itself
        ports.add(port)
    assert len(ports) == 2


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_one_node_needs_no_meeting_point(launches, restarts):
    process, output = launches.run("train.sh", *OVERRIDES, CONFIG=CONFIG, NGPU="2", PET_MAX_RESTARTS=restarts)
    assert process.returncode == 0, output
    # torchrun takes the script's place: what ends the one ends the other
    assert (launches.calls / f"torchrun-{process.pid}").exists()
    [run] = launches.torchruns()
    assert (run.nnodes, run.nproc_per_node) == ("1", "2")
    assert run.rdzv_endpoint == "localhost:0"  # any free port
    assert run.training_script_args == ["--job.config_file", CONFIG, *OVERRIDES]
    environment = (launches.calls / "environment").read_text()
    assert all(f"{name}={value}" in environment for name, value in DEFAULTS.items() if name != "OMP_WAIT_POLICY")
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment) == (restarts == "3")


MISSING = [
    ("train.sh", {"CONFIG": ""}, "CONFIG: is not set"),
    ("train.sh", {"CONFIG": "configs/none.toml"}, "CONFIG = configs/none.toml: there is no"),
    ("train.sh", {"NNODES": "2"}, "RDZV_ENDPOINT: is not set: NNODES = 2"),
    ("train.slurm", {"CONFIG": "configs/none.toml"}, "configs/none.toml: there is no"),
    ("train.slurm", {"SLURM_GPUS_ON_NODE": ""}, "no GPUs were allocated"),
]


@pytest.mark.parametrize(("script", "env", "message"), MISSING)
def test_what_is_missing_is_named_before_anything_starts(launches, script, env, message):
    process, output = launches.run(script, **launches.slurm | env)
    assert process.returncode != 0 and message in output and not launches.torchruns()


def test_a_cancelled_job_is_not_queued_again(launches):
    process = launches.start("train.slurm", **launches.slurm, TRAINS="60")
    try:
        deadline = time.monotonic() + 30
        while len(launches.torchruns()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0
    finally:
        with suppress(ProcessLookupError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)
    assert not (launches.calls / "slurm").exists()


@pytest.mark.slow
def test_two_nodes_meet_train_and_save_at_the_time_limit_and_the_run_continues(launches, tmp_path):
    """Through the real torchrun and trainer, both nodes on the CPU of this machine."""
    launches.command("torchrun", f'touch "$CALLS/torchrun-$$"; exec "{sys.executable}" -m torch.distributed.run "$@"')
    # the port comes from the job: two runs of this test must not meet
    job = launches.slurm | {"HOSTS": "localhost localhost", "SLURM_JOB_ID": str(os.getpid())}
    job |= {"NGPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoint"
    settings = [*SHORT, f"--job.dump_folder={run}", "--checkpoint.interval=1000000"]

    process = launches.start("train.slurm", *settings, "--training.steps=1000000", **job)
    started = next(line for line in process.stdout if "- step:" in ANSI_COLOR.sub("", line))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, started + output
    [saved] = complete_steps(checkpoints)
    assert len(list(checkpoints.glob(f"step-{saved}/*.distcp"))) == 2
    number = os.getpid()
    assert (launches.calls / "slurm").read_text() == f"scancel --signal=TERM {number}\nscontrol requeue {number}\n"

    train(2, [f"--job.config_file={CONFIG}", *settings, f"--training.steps={saved + 2}"])
    curve = records.read_run(run)
    assert curve.step.tolist() == list(range(1, saved + 3)) and set(curve.n_devices) == {2}
    assert curve.starts.sum() == 2
