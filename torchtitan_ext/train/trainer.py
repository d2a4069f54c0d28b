"""Train a job: torchtitan's trainer, which also rejects bad jobs, stops at bad steps and saves on SIGTERM."""

import atexit
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torchtitan.components.checkpoint import DATALOADER
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from torchtitan_ext.jobs import resume
from torchtitan_ext.jobs.environment import environment_problems
from torchtitan_ext.jobs.folder_lock import lock_folders
from torchtitan_ext.jobs.recorded import write_config
from torchtitan_ext.jobs.rules import check_job, launched_ranks, parallel_dims

from .checkpointer import LighthouseCheckpointManager


class LighthouseTrainer(Trainer):
    """Stops before saving a step with a non-finite loss or gradient norm, or skips its update, as the job says.

    On SIGTERM it finishes the step, saves and exits with 143.
    """

    checkpointer_cls = LighthouseCheckpointManager
    checkpointer: LighthouseCheckpointManager
    ntokens_seen: int

    def __init__(self, job_config: JobConfig) -> None:
        self.nonfinite_steps = 0  # in a row
        # per unchecked step: its number, the flags of all ranks, and the event of their arrival on the host
        self.outcomes: deque[tuple[int, torch.Tensor, torch.Event]] = deque()
        self.sigterm_received = False  # by this rank
        self.interrupted = False  # by SIGTERM to any rank
        self._begin_run(job_config)
        super().__init__(job_config)
        if self.device.type == "cpu" and self.parallel_dims.world_size > 1:
            # gloo's threads still free the last tensors, and would abort a finalizing interpreter.
            atexit.register(time.sleep, 1)

    def _begin_run(self, job_config: JobConfig) -> None:
        """Check the job before anything is built, lock and clean the run's folders, and record the job."""
        is_first = int(os.environ.get("RANK", 0)) == 0
        for problem in environment_problems() if is_first else ():
            logger.warning(problem)
        job_config.attention.kernel, reasons = check_job(job_config)  # config.json records it
        logger.info(f"Attention by {'; not by '.join([job_config.attention.kernel, *reasons])}")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # If torchrun is killed its ranks get SIGTERM, or they would train beside the next launch.
            _prctl_pr_set_pdeathsig(signal.SIGTERM)
        checkpoint, n_ranks = job_config.checkpoint, launched_ranks()
        if is_first:
            lock_folders(job_config)
            if resume.saves_checkpoints(job_config):
                resume.remove_half_saved(resume.checkpoint_folder(job_config))
            if changed := resume.describe_changes(start := resume.checkpoint_to_load(job_config), job_config):
                logger.info(f"Changed since {start}: {changed}")
            write_config(job_config)  # not job.save_config_file, which lets a rejected job replace the run's record
        excluded = resume.excluded_states(job_config, parallel_dims(job_config, n_ranks) if n_ranks else None)
        if loaded := sorted({*checkpoint.exclude_from_loading} - {*excluded}):
            logger.info(
                f"checkpoint.exclude_from_loading: the run goes on from its own checkpoint, with {', '.join(loaded)}; "
                "to leave that out, start from it in another job.dump_folder (checkpoint.initial_load_path)"
            )
        checkpoint.exclude_from_loading = excluded

    def init_distributed(self) -> ParallelDims:
        return parallel_dims(self.job_config, super().init_distributed().world_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # One rank's count. Only a launch that starts its data over may have another data-parallel degree.
        path = resume.checkpoint_to_load(self.job_config)
        if path and DATALOADER in self.job_config.checkpoint.exclude_from_loading:
            saved = resume.saved_degree(resume.complete_metadata(path))
            degree = resume.data_parallel_degree(self.parallel_dims)
            self.ntokens_seen = self.ntokens_seen * (saved or degree) // degree

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pinned memory, so the host does not wait for the previous step.
        if self.device.type != "cuda":
            return super().to_device(tensor)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def sum_over_batch(self, n_tokens: torch.Tensor) -> torch.Tensor:
        # On the device: reading it would wait for the previous step.
        total = n_tokens.clone()
        if self.parallel_dims.dp_enabled:
            torch.distributed.all_reduce(total, group=self.parallel_dims.get_mesh("batch").get_group())
        return total.float()

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        self.microbatch += 1
        parallelism, is_last = self.job_config.parallelism, self.microbatch == self.gradient_accumulation_steps
        for module in self.model_parts if parallelism.fsdp_no_sync else ():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last)
                if parallelism.fsdp_reshard_after_forward == "never":
                    module.set_reshard_after_backward(is_last)  # frees the weights that forward left gathered
        loss = super().forward_backward_step(**batch)
        if self.parallel_dims.pp_enabled and is_last:  # torchtitan's pipeline does not divide the sum over tokens
            for grad in [p.grad for part in self.model_parts for p in part.parameters() if p.grad is not None]:
                grad.div_(batch["global_valid_tokens"].to(grad.device))
        return loss

    def update_parameters(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        self._share_outcome(loss.detach(), grad_norm)
        # To skip an update, the host must wait for the device.
        if self.job_config.training.skip_nonfinite_steps and not self._check_outcomes():
            self.lr_schedulers.step()
        else:
            super().update_parameters(loss, grad_norm)
        # The device still computes this step.
        self._check_outcomes(but_last=1)
        self.metrics_processor.must_log |= self.interrupted  # as at a due save

    def _share_outcome(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Share non-finite losses and norms and SIGTERM with all ranks, without waiting."""
        if isinstance(loss, DTensor):
            loss = loss.full_tensor()
        norm = grad_norm.to(loss.device, loss.dtype)
        finite = torch.stack((loss, norm)).isfinite()
        sigterm = torch.full((1,), self.sigterm_received, device=loss.device)
        # A flag is the highest rank that raised it, plus 1.
        flags = torch.cat((~finite, sigterm)) * float(torch.distributed.get_rank() + 1)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        on_host = torch.cat((flags, norm[None])).to("cpu", non_blocking=True)
        arrival = utils.device_module.Event()
        arrival.record()
        self.outcomes.append((self.step, on_host, arrival))

    def _check_outcomes(self, but_last: int = 0) -> bool:
        """Whether all unchecked steps but the last `but_last` were finite; the same on all ranks.

        Raises RuntimeError for more consecutive non-finite steps than training.skip_nonfinite_steps.
        """
        all_finite = True
        while len(self.outcomes) > but_last:
            step, on_host, arrival = self.outcomes.popleft()
            arrival.synchronize()
            bad_loss, bad_norm, sigterm, norm = on_host.tolist()
            self.interrupted |= bool(sigterm)
            if not bad_loss and not bad_norm:
                self.nonfinite_steps = 0
                continue
            all_finite = False
            where = f"loss on rank {bad_loss - 1:.0f}, " if bad_loss else ""
            message = f"Step {step} is not finite: {where}gradient norm {norm}."
            self.nonfinite_steps += 1
            if self.nonfinite_steps > self.job_config.training.skip_nonfinite_steps:
                raise RuntimeError(
                    f"{message} Training stops, and saves nothing; {self.checkpointer.describe_latest()}. If the cause "
                    f"is in the step's data, --training.skip_nonfinite_steps={self.nonfinite_steps} passes over it."
                )
            logger.warning(f"{message} Parameters and optimizer state stay as they are.")
        return all_finite

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self.microbatch, last_step = 0, not self.should_continue_training()
        due = self.checkpointer.due(self.step)
        self.metrics_processor.must_log |= due  # a resume would lose the time since the last log
        super().train_step(data_iterator)
        if due or last_step or self.interrupted:
            self._check_outcomes()
        if self.interrupted and not last_step:
            self.checkpointer.save_interrupted(self.step)
            steps, latest = self.job_config.training.steps, self.checkpointer.describe_latest()
            logger.warning(f"SIGTERM: training ends after step {self.step} of {steps}; {latest}.")
            raise SystemExit(128 + signal.SIGTERM)  # as shells report it

    def train(self) -> None:
        # Schedulers send SIGTERM before they take a machine: save, then end.
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "sigterm_received", True))
        try:
            # This thread runs the backward pass too: in turns with autograd's own, each step takes the host longer.
            with torch.autograd.set_multithreading_enabled(False):
                super().train()
        except SystemExit:
            self.close()
            torch.distributed.destroy_process_group()
            raise
