"""Log a run's metrics: torchtitan's processor, plus the values that an experiment's table needs."""

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torchtitan.components.metrics import MetricsProcessor, TensorBoardLogger, WandBLogger, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools.logging import logger

from torchtitan_ext.jobs.recorded import LOG_FREQ, N_DEVICES


def _continue_wandb_run(job_config: JobConfig) -> None:
    """Let every start of a run log to the same W&B run; its id is in the run's folder."""
    if os.environ.keys() & {"WANDB_RESUME_FROM", "WANDB_FORK_FROM"}:
        return
    os.environ.setdefault("WANDB_RESUME", "allow")
    rank_suffix = f"_{torch.distributed.get_rank()}" if job_config.metrics.save_for_all_ranks else ""
    file = Path(job_config.job.dump_folder, f"wandb_run_id{rank_suffix}.txt")
    if not (file.exists() and file.read_text().strip()):
        file.write_text(uuid4().hex + "\n")
    os.environ.setdefault("WANDB_RUN_ID", file.read_text().strip())


class LighthouseMetricsProcessor(MetricsProcessor):
    """Also logs the number of devices and `metrics.log_freq`, and flushes so that a kill loses no logged step. Raises
    ValueError if W&B can't start: torchtitan would train without it."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, args: BaseModelArgs, tag: str | None = None):
        metrics, rank = job_config.metrics, torch.distributed.get_rank()
        records = metrics.save_for_all_ranks or rank == _get_metrics_rank(parallel_dims, job_config)
        to_wandb = records and metrics.enable_wandb
        if to_wandb:
            _continue_wandb_run(job_config)
        super().__init__(job_config, parallel_dims, tag)
        if to_wandb and WandBLogger not in map(type, self.logger._loggers):
            remedy = "call `wandb login`, or set WANDB_MODE=offline"
            raise ValueError(f"metrics.enable_wandb = true: W&B did not start, as the log says above; {remedy}")
        self.must_log = True  # the next step
        self.constants = {N_DEVICES: parallel_dims.world_size, LOG_FREQ: job_config.metrics.log_freq}
        if job_config.lighthouse.enable:
            seq_len = job_config.training.seq_len
            n_rows = self.constants["gathered_len"] = job_config.lighthouse.gathered_len(seq_len)
            logger.info(f"Lighthouse attends to {n_rows:,} gathered rows of {seq_len:,} tokens")

    def should_log(self, step: int) -> bool:
        # The first step of a process shows the jump after a resume or the switch to dense, the last how a run ends.
        asked, self.must_log = self.must_log or step == self.job_config.training.steps, False
        return asked or super().should_log(step)

    def log(self, step: int, avg_loss: float, max_loss: float, grad_norm: float, extra_metrics: Any = None) -> None:
        # A rank's loss covers 1/cp of the sequence; torchtitan divides by all tokens.
        n_parts = self.parallel_dims.cp
        extra_metrics = {**(extra_metrics or {}), **self.constants}
        if "n_tokens_seen" in extra_metrics:
            extra_metrics["n_tokens_seen"] /= n_parts
        try:
            super().log(step, avg_loss, max_loss * n_parts, grad_norm, extra_metrics)
            for backend in getattr(self.logger, "_loggers", ()):
                if isinstance(backend, TensorBoardLogger):
                    backend.writer.flush()
        except OSError as error:
            folder = self.job_config.job.dump_folder
            remedy = "Make space, or remove another cause, and launch again: that continues from the newest checkpoint"
            raise RuntimeError(f"step {step} could not be logged in {folder}: {error}. {remedy}") from error
