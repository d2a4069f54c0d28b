"""Read a run's records: its TensorBoard events and its job.

torchtitan opens a new event file at each process start; `read_run` merges them into one curve.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_ext.jobs.recorded import CONFIG_FILE, LOG_FREQ, N_DEVICES, read_config

LOSS = "loss_metrics/global_avg_loss"
TOKENS_PER_SECOND = "throughput(tps)"
LOG = "log.txt"  # written by `splits`, in the run's folder
SECONDS = "time_metrics/end_to_end(s)"
VALIDATION_LOSS = "validation_metrics/loss"
# TensorBoard tag of each field of Run
TAGS = {"loss": LOSS, "tokens_per_second": TOKENS_PER_SECOND, "seconds": SECONDS}
TAGS |= {"n_devices": N_DEVICES, "log_freqs": LOG_FREQ}


@dataclass(frozen=True)
class Run:
    """One curve: arrays of shape [n_logged], those of validation [n_validated].

    step: strictly increasing. loss: nats per token. tokens_per_second: per device. seconds: wall time since the
    previous logged point, or since the process start. log_freqs: `metrics.log_freq`, which a later start may change.
    starts: True at the first point of each process start, whose time includes loading and compilation.
    validation_loss: under the run's own attention; no other field includes the time of validation.
    """

    folder: Path
    config: dict
    step: np.ndarray
    loss: np.ndarray
    tokens_per_second: np.ndarray
    seconds: np.ndarray
    n_devices: np.ndarray
    log_freqs: np.ndarray
    starts: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray

    @property
    def total_steps(self) -> int:
        return self.config["training"]["steps"]

    @property
    def log_freq(self) -> int:
        """The largest `metrics.log_freq` of all starts."""
        return int(self.log_freqs.max())

    @property
    def finished(self) -> bool:
        return bool(self.step[-1] >= self.total_steps)

    @property
    def device_hours(self) -> np.ndarray:
        """Device-hours up to each logged step, inclusive, [n_logged], without work that a kill lost."""
        return np.cumsum(self.seconds * self.n_devices) / 3600

    @property
    def setting(self) -> str:
        """Model, context, devices and attention kernel, as far as config and log name them."""
        log, kernel = self.folder / LOG, self.config.get("attention", {}).get("kernel")
        gpu = re.search("CUDA capacity: (.+) with", log.read_text(errors="replace")) if log.is_file() else None
        n = int(self.n_devices[-1])
        devices = gpu[1] if gpu else "device" if n == 1 else "devices"
        model = f"{self.config['model']['flavor']}, seq_len {self.config['training']['seq_len']:,}, {n} {devices}"
        return f"{model}, attention by {kernel}" if kernel else model

    def gaps(self, start: int) -> list[tuple[int, int]]:
        """Pairs of steps, from `start` on, between which a start's last events are lost."""
        pairs = zip(pairwise([start, *self.step.tolist()]), self.log_freqs, strict=True)
        return [(a, b) for (a, b), log_freq in pairs if b - a > log_freq]


def read_run(folder: Path) -> Run | None:
    """The run in `folder`, its `job.dump_folder`; None if nothing is logged yet. A resumed process's points replace
    older ones from its first step on. Raises FileNotFoundError if the job is missing, ValueError if a scalar is."""
    starts = [points for file in folder.glob("**/events.out.tfevents.*") if (points := _read_start(file))]
    if not starts:
        return None
    config = read_config(folder / CONFIG_FILE, "training.steps", "training.seq_len", "model.flavor", "debug.seed")
    starts.sort(key=lambda points: points["wall_time"][0])
    ends = [min((later["step"][0] for later in starts[n:]), default=np.inf) for n in range(1, len(starts) + 1)]
    merged = {}
    for name in starts[0].keys() - {"wall_time"}:
        step = "validation_step" if name.startswith("validation") else "step"
        merged[name] = np.concatenate([p[name][p[step] < end] for p, end in zip(starts, ends, strict=True)])
    # torchtitan divides by log_freq, for any number of steps since the last point
    merged["seconds"] = merged["seconds"] * merged["log_freqs"]
    return Run(folder=folder, config=config, **merged)


def read_scalars(file: Path) -> dict[str, list[Any]]:
    """The points of an event file by tag, each with its step, value and wall_time."""
    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _read_start(file: Path) -> dict[str, np.ndarray] | None:
    """The points of one process start by field of Run; None if it logged none."""
    logged = read_scalars(file)
    losses, validated = logged.get(LOSS, []), logged.get(VALIDATION_LOSS, [])
    if losses and all(point.value < 0 for point in losses):
        return None  # with metrics.save_for_all_ranks: a pipeline's other stages log -1
    # a kill can leave the last point incomplete
    n_logged = min(len(logged.get(tag, [])) for tag in TAGS.values())
    if n_logged == 0:
        if len(losses) > 1:
            missing = next(tag for tag in TAGS.values() if tag not in logged)
            raise ValueError(f"{file} has no '{missing}': train with model.name = 'llama3_lighthouse', which logs it")
        return None
    points = {name: np.array([point.value for point in logged[tag][:n_logged]]) for name, tag in TAGS.items()}
    return points | {
        "step": np.array([point.step for point in losses[:n_logged]]),
        "wall_time": np.array([point.wall_time for point in losses[:n_logged]]),
        "starts": np.arange(n_logged) == 0,
        "validation_step": np.array([point.step for point in validated]),
        "validation_loss": np.array([point.value for point in validated]),
    }
