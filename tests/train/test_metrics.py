"""A run's log says what to do when the disk is full; the requested metrics are recorded."""

import os
from unittest.mock import patch

import pytest
import wandb
from torchtitan.components.metrics import MetricsProcessor

from torchtitan_ext.jobs.rules import parallel_dims
from torchtitan_ext.train.metrics import LighthouseMetricsProcessor


def test_a_full_disk_is_named_by_the_log_too(job, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = job()
    processor = LighthouseMetricsProcessor(config, parallel_dims(config, 1), None)
    monkeypatch.setattr(MetricsProcessor, "log", lambda self, step, loss, *_: self.logger.log({"loss": loss}, step))
    processor.log(1, 1.0, 1.0, 1.0)
    [events] = tmp_path.glob("run/tb/*/*tfevents*")
    events.unlink()
    events.symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=rf"step 2 could not .*{tmp_path}/run: .*No space left"):
        processor.log(2, 1.0, 1.0, 1.0)


def test_weights_and_biases_must_start_where_metrics_are_recorded(job, tmp_path, monkeypatch):
    """torchtitan would train without it."""
    config = job("--metrics.enable_wandb", f"--job.dump_folder={tmp_path}")

    def start(rank, mode, **env):
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        with patch.dict(os.environ, WANDB_MODE=mode, **env):
            LighthouseMetricsProcessor(config, parallel_dims(config, 2), None).close()
            run_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_RESUME") == "allow" else None
        wandb.teardown()
        return run_id

    (tmp_path / "wandb_run_id_1.txt").touch()  # killed before it wrote
    config.metrics.save_for_all_ranks = True
    assert start(0, "disabled") == start(0, "disabled") != start(1, "disabled") == start(1, "disabled") != ""
    config.metrics.save_for_all_ranks = False
    assert start(0, "disabled") == start(0, "disabled") != start(1, "disabled") is None
    assert start(0, "disabled", WANDB_RUN_ID="mine") == "mine"  # as the user says
    assert start(0, "disabled", WANDB_FORK_FROM="other?_step=3") is None
    start(1, "offlin")
    with pytest.raises(ValueError, match=r"metrics\.enable_wandb = true: .*WANDB_MODE=offline"):
        start(0, "offlin")
