import json
import os
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental._context_parallel._attention import set_rotate_method
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor, TensorBoardLogger, _get_metrics_rank
from torchtitan.components.tokenizer import BaseTokenizer, build_hf_tokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import dist_sum
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3 import get_train_spec as get_llama3_train_spec
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.models.llama3.model.model import Attention
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_ext.data import build_dataloader
from torchtitan_ext.environment import environment_problems
from torchtitan_ext.lighthouse.attention import kernels
from torchtitan_ext.lighthouse.ulysses import UlyssesAttention
from torchtitan_ext.records import CONFIG_FILE, LOG_FREQ, N_DEVICES

from .args import flavors
from .checkpointer import use_step_folders
from .checkpoints import (
    checkpoint_folder,
    excluded_states,
    exclusion_note,
    note_start,
    remove_half_saved,
)
from .checks import check_job, launched_ranks, parallel_dims
from .folder_lock import lock_folders
from .loss import build_loss
from .model import LighthouseSelfAttention, LighthouseTransformer
from .optimizer import build_launch_schedulers

# What attention's output was computed from: with it kept, selective activation checkpointing makes no selection
# twice, nor the attention that scored it.
_op_sac_save_list.add(torch.ops.lighthouse.attention_scores.default)
if kernels:
    _op_sac_save_list.add(torch.ops.lighthouse.select.default)


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    if parallel_dims.cp_enabled:
        mesh = parallel_dims.get_mesh("cp")
        load_balance = job_config.parallelism.context_parallel_load_balancer is not None
        for module in model.modules():
            if isinstance(module, LighthouseSelfAttention):
                module.share_sequence(mesh, load_balance)
    model = parallelize_llama(model, parallel_dims, job_config)
    if parallel_dims.cp_enabled:
        method = job_config.parallelism.context_parallel_rotate_method
        if method != "allgather":
            set_rotate_method(method)  # torchtitan would leave it to a validation
        else:  # no ring then, which torchtitan has put in
            for module in model.modules():
                if isinstance(module, Attention):
                    stock = ScaledDotProductAttentionWrapper()
                    module.inner_attention = UlyssesAttention(stock, mesh, load_balance)
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    return model


def build_checked_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    # torchtitan builds the tokenizer before anything else, so this is where a bad job stops.
    if int(os.environ.get("RANK", 0)) == 0:
        for problem in environment_problems():
            logger.warning(problem)
    check_job(job_config)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Ranks whose torchrun was killed would train on, into the folder where the next launch goes on: they
        # hear of it as of a SIGTERM, save and end.
        _prctl_pr_set_pdeathsig(signal.SIGTERM)
    use_step_folders()
    if int(os.environ.get("RANK", 0)) == 0:
        lock_folders(job_config)
        if job_config.checkpoint.enable:
            note_start(job_config)
            if not job_config.checkpoint.load_only:
                remove_half_saved(checkpoint_folder(job_config))
        # torchtitan's job.save_config_file comes before the check: a refused job would replace the
        # config of the run that its folder holds.
        file = Path(job_config.job.dump_folder, CONFIG_FILE)
        file.write_text(json.dumps(job_config.to_dict(), indent=2) + "\n")
    checkpoint, n_ranks = job_config.checkpoint, launched_ranks()
    excluded = excluded_states(job_config, n_ranks and parallel_dims(job_config, n_ranks))
    if loaded := sorted({*checkpoint.exclude_from_loading} - {*excluded}):
        logger.info(
            f"checkpoint.exclude_from_loading: the run has saved a checkpoint since it left out {', '.join(loaded)}, "
            f"and goes on from that; to leave that out again, delete {exclusion_note(job_config)}"
        )
    checkpoint.exclude_from_loading = excluded
    return build_hf_tokenizer(job_config)


def _continue_wandb_run(job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Has each start of a run record the same W&B run, whose id its folder keeps."""
    rank, all_ranks = torch.distributed.get_rank(), job_config.metrics.save_for_all_ranks
    records = all_ranks or rank == _get_metrics_rank(parallel_dims, job_config)
    if not records or os.environ.keys() & {"WANDB_RESUME_FROM", "WANDB_FORK_FROM"}:
        return
    os.environ.setdefault("WANDB_RESUME", "allow")
    file = Path(job_config.job.dump_folder, f"wandb_run_id{f'_{rank}' * all_ranks}.txt")
    if not (file.exists() and file.read_text().strip()):
        file.write_text(uuid4().hex + "\n")
    os.environ.setdefault("WANDB_RUN_ID", file.read_text().strip())


class LighthouseMetricsProcessor(MetricsProcessor):
    """Logs the number of devices, `metrics.log_freq` and the gathered length too, and no logged step is lost in a kill."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        if job_config.metrics.enable_wandb:
            _continue_wandb_run(job_config, parallel_dims)
        super().__init__(job_config, parallel_dims, tag)
        self.first_step = True
        self.constants = {
            N_DEVICES: parallel_dims.world_size,
            LOG_FREQ: job_config.metrics.log_freq,
        }
        if job_config.lighthouse.enable:
            seq_len = job_config.training.seq_len
            gathered_len = job_config.lighthouse.gathered_len(seq_len)
            self.constants["gathered_len"] = gathered_len
            self.extra_columns = f"  gathered: {gathered_len:,} of {seq_len:,}"

    def should_log(self, step: int) -> bool:
        # The first step of a process shows what resuming, or switching to dense, did to the loss.
        first, self.first_step = self.first_step, False
        return first or super().should_log(step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        # Each rank's loss is of its part of a sequence, but torchtitan has it count the whole.
        n_parts = self.parallel_dims.cp
        extra_metrics = {**(extra_metrics or {}), **self.constants}
        if "n_tokens_seen" in extra_metrics:
            extra_metrics["n_tokens_seen"] /= n_parts
        try:
            super().log(step, global_avg_loss, global_max_loss * n_parts, grad_norm, extra_metrics)
            for logger in getattr(self.logger, "_loggers", ()):
                if isinstance(logger, TensorBoardLogger):
                    logger.writer.flush()
        except OSError as error:
            raise RuntimeError(
                f"step {step} could not be logged in {self.job_config.job.dump_folder}: {error}. Make space, or mend "
                "what else is the cause, and launch the same command again: it continues from the newest checkpoint"
            ) from error


def build_metrics_processor(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: BaseModelArgs | None = None,
    tag: str | None = None,
) -> MetricsProcessor:
    return LighthouseMetricsProcessor(job_config, parallel_dims, tag)


class LighthouseValidator(Validator):
    """torchtitan's validator, on the same sequences each time, of which ranks may share each.

    By itself it would draw on from where the last validation stopped, so that neither two validations of
    a run nor a run and its resumed twin could be compared. To the end of the data (validation.steps = -1) it would
    wait forever for ranks whose share of the documents ends sooner.
    """

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        **kwargs: Any,
    ):
        source = dp_world_size, dp_rank, tokenizer
        super().__init__(job_config, *source, **kwargs)
        validation = job_config.validation
        whole = validation.steps == -1
        loader = build_dataloader(*source, job_config, infinite=not whole, section="validation")
        batches = list(islice(loader, None if whole else validation.steps))
        n_batches = torch.tensor(len(batches), device=device_type)
        torch.distributed.all_reduce(n_batches, torch.distributed.ReduceOp.MIN)
        if not n_batches:
            raise ValueError(
                f"validation.dataset = {validation.dataset!r}, validation.dataset_path = {validation.dataset_path!r}: "
                f"a data-parallel rank gets not one sequence of {validation.seq_len} tokens; give more documents, or a "
                "smaller validation.seq_len"
            )
        self.validation_dataloader = batches[: int(n_batches)]

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs the sum of losses over the sum of labels that count, of all batches and ranks.

        torchtitan takes the mean of the batches' means, which depends on how documents are batched.
        """
        for part in model_parts:
            part.eval()
        losses, counts = [], []
        for input_dict, labels in self.validation_dataloader:
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            input_dict = {name: tensor.to(device_type) for name, tensor in input_dict.items()}
            inputs, labels, extra, settings = self.post_dataloading_process(
                input_dict, labels.to(device_type), model_parts
            )
            counts.append((labels != IGNORE_INDEX).sum())
            with self.validation_context(), self.maybe_enable_amp:
                if self.pp_schedule:
                    parts: list[torch.Tensor] = []  # of the last stage
                    args, settings = (
                        ((inputs,), extra | settings) if self.pp_has_first_stage else ((), settings)
                    )
                    self.pp_schedule.eval(*args, **settings, target=labels, losses=parts)
                    losses.append(sum(parts, torch.zeros(())).to(device_type))
                else:
                    losses.append(self.loss_fn(model_parts[0](inputs, **extra, **settings), labels))
        mesh = self.parallel_dims.get_optional_mesh("loss")
        loss, count = (dist_sum(torch.stack(parts).sum(), mesh) for parts in (losses, counts))
        self.metrics_processor.log_validation(loss=loss / count, step=step)
        for part in model_parts:
            part.train()


def build_dataloaders(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ParallelAwareDataloader:
    """The training's loader. What is wrong with the validation's is told now too, before the model is built."""
    if job_config.validation.enable:
        build_dataloader(dp_world_size, dp_rank, tokenizer, job_config, section="validation")
    return build_dataloader(dp_world_size, dp_rank, tokenizer, job_config)


def get_train_spec() -> TrainSpec:
    """llama3's train spec with the model, the checks and the records of this package."""
    return replace(
        get_llama3_train_spec(),
        model_cls=LighthouseTransformer,
        model_args=flavors,
        parallelize_fn=parallelize,
        build_dataloader_fn=build_dataloaders,
        build_tokenizer_fn=build_checked_tokenizer,
        build_lr_schedulers_fn=build_launch_schedulers,
        build_loss_fn=build_loss,
        build_validator_fn=LighthouseValidator,
        build_metrics_processor_fn=build_metrics_processor,
    )
