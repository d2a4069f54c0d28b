"""Record a run's job in its folder, and read it."""

import json
from pathlib import Path

from torchtitan.config import JobConfig

CONFIG_FILE = "config.json"  # the job of a run's last start
# sections that decide what a run learns
LEARNED_WITH = ("model", "rope", "lighthouse", "training", "optimizer", "lr_scheduler", "debug")
# metrics logged beside torchtitan's
N_DEVICES = "n_devices"
LOG_FREQ = "log_freq"


def write_config(job_config: JobConfig) -> None:
    """Record the job in its dump folder, atomically."""
    file = Path(job_config.job.dump_folder, CONFIG_FILE)
    new = file.with_suffix(".tmp")
    new.write_text(json.dumps(job_config.to_dict(), indent=2) + "\n")
    new.replace(file)


def read_config(file: Path, *fields: str) -> dict:
    """The job recorded in `file`. Raises ValueError if one of `fields`, such as "training.steps", is missing."""
    try:
        config = json.loads(file.read_text())
        for section, _, field in (name.partition(".") for name in fields):
            config[section][field]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{file} is not the job config of a run ({error!r})"
        raise ValueError(f"{reason}: restore the one that a training of llama3_lighthouse wrote") from error
    return config
