"""A run's own records: the TensorBoard events and the job config that it leaves behind.

torchtitan opens a new event file at each process start, so a run that was killed and resumed has
several; `read_run` makes one curve of them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG_FILE = "config.json"  # the job config of a run's last start
LOSS = "loss_metrics/global_avg_loss"
TOKENS_PER_SECOND = "throughput(tps)"
SECONDS = "time_metrics/end_to_end(s)"
N_DEVICES = "n_devices"
LOG_FREQ = "log_freq"
VALIDATION_LOSS = "validation_metrics/loss"
VALIDATION_STEP = "validation_step"
VALIDATION = (VALIDATION_STEP, VALIDATION_LOSS)
# what is read of the job config
CONFIG_FIELDS = (
    *(("training", "steps"), ("training", "seq_len"), ("model", "flavor"), ("debug", "seed")),
)
TAGS = (LOSS, TOKENS_PER_SECOND, SECONDS, N_DEVICES, LOG_FREQ)


@dataclass(frozen=True)
class Run:
    """One curve, a value a logged step; every array has shape [n_logged].

    step: strictly increasing. loss: nats a token. tokens_per_second: of one device.
    seconds: wall time since the point logged before (or since the process start).
    n_devices: devices at work. log_freqs: `metrics.log_freq`, which a later start may have changed.
    starts: True at the first point of each process start, whose time holds loading and compilation. validation_step, validation_loss: [n_validated], under the run's own
    attention; the time of validation is in none of the others.
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
        """The largest of any start."""
        return int(self.log_freqs.max())

    @property
    def finished(self) -> bool:
        return bool(self.step[-1] > self.total_steps - self.log_freqs[-1])

    @property
    def device_hours(self) -> np.ndarray:
        """Device-hours spent up to and with each logged step, [n_logged]. Work that a kill threw
        away is not in it: only the steps that led to the result count."""
        return np.cumsum(self.seconds * self.n_devices) / 3600

    def gaps(self, start: int) -> list[tuple[int, int]]:
        """Pairs of steps, from `start` on, between which logged points are missing: a kill loses
        what TensorBoard had not written yet."""
        steps = [start, *self.step.tolist()]
        return [
            (a, b)
            for (a, b), log_freq in zip(pairwise(steps), self.log_freqs, strict=True)
            if b - a > log_freq
        ]


def read_run(folder: str | Path) -> Run | None:
    """The run dumped into `folder` (its `job.dump_folder`), or None where nothing is logged yet.

    Where a resumed process repeats steps, the later process's points replace every older one from
    its first step on. Raises ValueError when the records lack the job config or a scalar.
    """
    folder = Path(folder)
    config_file = folder / CONFIG_FILE
    event_files = sorted(folder.glob("**/events.out.tfevents.*"))
    starts = [points for points in map(_read_events, event_files) if points is not None]
    if not starts:
        return None
    if not config_file.is_file():
        raise ValueError(
            f"{config_file} is missing: train with model.name = 'llama3_lighthouse', which saves "
            "it; the table reads training.steps there"
        )
    config = read_config(config_file, CONFIG_FIELDS)

    starts.sort(key=lambda points: points["wall_time"][0])
    merged = starts[0]
    for points in starts[1:]:
        first = points["step"][0]
        kept = {
            key: merged[VALIDATION_STEP if key in VALIDATION else "step"] < first for key in merged
        }
        merged = {key: np.concatenate([merged[key][kept[key]], points[key]]) for key in merged}
    return Run(
        folder=folder,
        config=config,
        step=merged["step"],
        loss=merged[LOSS],
        tokens_per_second=merged[TOKENS_PER_SECOND],
        # torchtitan divides by log_freq whatever the number of steps since the last point
        seconds=merged[SECONDS] * merged[LOG_FREQ],
        n_devices=merged[N_DEVICES],
        log_freqs=merged[LOG_FREQ],
        starts=merged["starts"],
        validation_step=merged[VALIDATION_STEP],
        validation_loss=merged[VALIDATION_LOSS],
    )


def read_config(file: Path, fields: Iterable[tuple[str, str]]) -> dict:
    """The job config that a run has left in `file`. Raises ValueError where that lacks one of the `fields`, each a
    section and a name in it; FileNotFoundError where there is no file."""
    try:
        config = json.loads(file.read_text())
        _ = [config[section][field] for section, field in fields]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the job config of a run ({error!r}): restore the one that a training with "
            "model.name = 'llama3_lighthouse' left there"
        ) from error
    return config


def _read_events(file: Path) -> dict[str, np.ndarray] | None:
    """The scalars of one process start, or None where it was killed before it logged any."""
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    logged = events.Tags()["scalars"]
    series = {tag: events.Scalars(tag) if tag in logged else [] for tag in TAGS}
    # a kill can cut the last point short: some of its scalars are written, some are not
    n_logged = min(map(len, series.values()))
    if n_logged == 0:
        if len(series[LOSS]) > 1:
            missing = next(tag for tag in TAGS if not series[tag])
            raise ValueError(
                f"{file} has no scalar '{missing}': train with model.name = 'llama3_lighthouse', "
                "which logs it"
            )
        return None
    points = {tag: np.array([e.value for e in series[tag][:n_logged]]) for tag in TAGS}
    points["step"] = np.array([e.step for e in series[LOSS][:n_logged]])
    points["wall_time"] = np.array([e.wall_time for e in series[LOSS][:n_logged]])
    points["starts"] = np.arange(n_logged) == 0
    validated = events.Scalars(VALIDATION_LOSS) if VALIDATION_LOSS in logged else []
    points[VALIDATION_STEP] = np.array([e.step for e in validated], dtype=int)
    points[VALIDATION_LOSS] = np.array([e.value for e in validated])
    return points
