import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.metrics import MetricsProcessor, TensorBoardLogger
from torchtitan.components.tokenizer import BaseTokenizer, build_hf_tokenizer
from torchtitan.components.validate import Validator, build_validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import get_train_spec as get_llama3_train_spec
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.utils import device_type

from torchtitan_ext.data import build_dataloader
from torchtitan_ext.lighthouse.attention import kernels
from torchtitan_ext.records import CONFIG_FILE

from .args import flavors
from .checks import check_job
from .loss import build_loss
from .model import LighthouseSelfAttention, LighthouseTransformer

# What attention's output was computed from: with it kept, selective activation checkpointing makes no
# selection twice, nor the attention that scored it.
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
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    return model


def build_checked_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    # torchtitan builds the tokenizer before anything else, so this is where a bad job stops.
    check_job(job_config)
    if int(os.environ.get("RANK", 0)) == 0:
        # torchtitan's job.save_config_file comes before the check: a refused job would replace the
        # config of the run that its folder holds.
        file = Path(job_config.job.dump_folder, CONFIG_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job_config.to_dict(), indent=2) + "\n")
    return build_hf_tokenizer(job_config)


class LighthouseMetricsProcessor(MetricsProcessor):
    """Logs the number of devices and the gathered length too, and no logged step is lost in a kill."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.first_step = True
        self.constants = {"n_devices": parallel_dims.world_size}
        if job_config.lighthouse.enable:
            seq_len = job_config.training.seq_len
            gathered_len = job_config.lighthouse.gathered_len(seq_len)
            self.constants["gathered_len"] = gathered_len
            self.extra_columns = f"  gathered: {gathered_len:,} of {seq_len:,}"

    def should_log(self, step: int) -> bool:
        # The first step of a process shows what resuming, or switching to dense, did to the loss.
        first, self.first_step = self.first_step, False
        return first or super().should_log(step)

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        extra_metrics = {**(extra_metrics or {}), **self.constants}
        super().log(*args, extra_metrics=extra_metrics, **kwargs)
        for logger in getattr(self.logger, "_loggers", ()):
            if isinstance(logger, TensorBoardLogger):
                logger.writer.flush()


def build_metrics_processor(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: BaseModelArgs | None = None,
    tag: str | None = None,
) -> MetricsProcessor:
    return LighthouseMetricsProcessor(job_config, parallel_dims, tag)


def build_repeating_validator(job_config: JobConfig, **kwargs: Any) -> Validator:
    """torchtitan's validator, on the same sequences each time.

    By itself it would draw on from where the last validation stopped, so that neither two validations of
    a run nor a run and its resumed twin could be compared.
    """
    validator = build_validator(job_config=job_config, **kwargs)
    steps = job_config.validation.steps
    validator.validation_dataloader = list(
        islice(validator.validation_dataloader, None if steps == -1 else steps)
    )
    return validator


def get_train_spec() -> TrainSpec:
    """llama3's train spec with the model, the checks and the records of this package."""
    return replace(
        get_llama3_train_spec(),
        model_cls=LighthouseTransformer,
        model_args=flavors,
        parallelize_fn=parallelize,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_checked_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_repeating_validator,
        build_metrics_processor_fn=build_metrics_processor,
    )
