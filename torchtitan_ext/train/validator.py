"""Validate a model on the same held-out documents each time, counting each label once."""

import time
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig
from torchtitan.distributed.utils import dist_sum
from torchtitan.tools.utils import device_type

from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import settings_of


class LighthouseValidator(Validator):
    """torchtitan's validator, but each validation reads the same sequences, and the same number of batches per rank.

    torchtitan's continues where the last validation stopped; with validation.steps = -1 it waits forever for ranks
    whose documents end first.
    """

    def __init__(self, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer: Any, **kwargs: Any):
        source, validation = (dp_world_size, dp_rank, tokenizer), job_config.validation
        to_the_end = validation.steps == -1
        loader = build_dataloader(*source, job_config, infinite=not to_the_end, section="validation")
        # Not super().__init__, which would open the data a second time.
        self.job_config, self.tokenizer = job_config, tokenizer
        self.__dict__.update(kwargs)
        # copies: a worker's batches would each hold a file open
        self.validation_dataloader = batches = [
            ({"input": pad(inputs["input"], rest)}, pad(labels, rest, value=IGNORE_INDEX))
            for inputs, labels in islice(loader, None if to_the_end else validation.steps)
            for rest in [(0, 0, 0, validation.local_batch_size - len(labels))]  # a pipeline needs full batches
        ]
        if not batches:
            reason = f"a data-parallel rank gets not one sequence of {validation.seq_len} tokens"
            remedy = "give more documents, or a smaller validation.seq_len"
            raise ValueError(f"{settings_of(job_config, 'validation')}: {reason}; {remedy}")
        n_batches = torch.tensor(len(batches), device=device_type)
        torch.distributed.all_reduce(n_batches, torch.distributed.ReduceOp.MAX)
        inputs, labels = batches[0]
        # Ranks compute together: those whose data ends first add labels that don't count.
        batches += [(inputs, torch.full_like(labels, IGNORE_INDEX))] * (int(n_batches) - len(batches))

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss per label; torchtitan's mean of means depends on the batches."""
        for part in model_parts:
            part.eval()
        metrics, begin = self.metrics_processor, time.perf_counter()
        trained_s, n_trained = begin - metrics.time_last_log, metrics.ntokens_since_last_log
        metrics.time_last_log, metrics.ntokens_since_last_log = begin, 0
        losses, counts = [], []
        for input_dict, labels in self.validation_dataloader:
            metrics.ntokens_since_last_log += labels.numel()
            input_dict = {name: tensor.to(device_type) for name, tensor in input_dict.items()}
            labels = labels.to(device_type)
            inputs, labels, extra, settings = self.post_dataloading_process(input_dict, labels, model_parts)
            counts.append((labels != IGNORE_INDEX).sum())
            with self.validation_context(), self.maybe_enable_amp:
                if self.pp_schedule:
                    parts: list[torch.Tensor] = []  # of the last stage
                    args, settings = ((inputs,), extra | settings) if self.pp_has_first_stage else ((), settings)
                    self.pp_schedule.eval(*args, **settings, target=labels, losses=parts)
                    losses.append(sum(parts, torch.zeros(())).to(device_type))
                else:
                    losses.append(self.loss_fn(model_parts[0](inputs, **extra, **settings), labels))
        mesh = self.parallel_dims.get_optional_mesh("loss")
        loss, count = (dist_sum(torch.stack(parts).sum(), mesh) for parts in (losses, counts))
        metrics.log_validation(loss=loss / count, step=step)
        # Training's next log counts what it has done since its last.
        metrics.time_last_log, metrics.ntokens_since_last_log = time.perf_counter() - trained_s, n_trained
        for part in model_parts:
            part.train()
