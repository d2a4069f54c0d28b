"""Validation data: every rank gets the same number of batches, with the labels that training counts."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.launches import in_group
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.train.validator import LighthouseValidator


def validators(rank):
    """What a rank validates on, to the end of its documents, of which the ranks have different numbers."""
    n_ranks = dist.get_world_size()
    unused = dict.fromkeys(["parallel_dims", "loss_fn", "validation_context", "maybe_enable_amp", "metrics_processor"])

    def batches(*overrides):
        job = parse_job("configs/text/dense.toml", ["--validation.enable", *overrides])
        tokenizer = get_train_spec("llama3_lighthouse").build_tokenizer_fn(job)
        return LighthouseValidator(job, n_ranks, rank, tokenizer, **unused).validation_dataloader

    sources = "--validation.dataset=python_source_validation", "--validation.steps=-1"
    counted = set()
    for size in (1, 3, 64):
        drawn = batches(*sources, "--validation.seq_len=4096", f"--validation.local_batch_size={size}")
        numbers = [None] * n_ranks  # of batches and of labels that count
        dist.all_gather_object(numbers, (len(drawn), sum(int((labels != -100).sum()) for _, labels in drawn)))
        assert numbers[0][0] == numbers[1][0] and numbers[0][1] != numbers[1][1]
        assert {len(labels) for _, labels in drawn} == {size}  # a pipeline splits each batch into as many parts
        counted.add((numbers[0][1], numbers[1][1]))
    assert len(counted) == 1
    longer = "--training.seq_len=1048576", "--validation.seq_len=1048576"
    with pytest.raises(ValueError, match=r"validation\.dataset = .*not one sequence of 1048576"):
        batches(*sources, *longer)
    passkey = "--validation.dataset=passkey", "--validation.dataset_path=511"
    worker = "--validation.dataloader.num_workers=1"
    [(_, labels)] = batches(*passkey, worker, "--validation.steps=1", "--validation.seq_len=512")
    assert not labels.is_shared()  # which would hold a file open
    assert 0 < (labels != -100).float().mean() < 0.05  # the answers alone, as in training


def test_the_next_log_counts_the_training_before_a_validation_and_not_the_validation():
    metrics, validated = SimpleNamespace(time_last_log=time.perf_counter() - 100, ntokens_since_last_log=7), []

    def log_validation(loss, step):
        validated.append((loss, time.perf_counter() - metrics.time_last_log < 50, metrics.ntokens_since_last_log))
        metrics.time_last_log, metrics.ntokens_since_last_log = time.perf_counter(), 0

    metrics.log_validation = log_validation
    validator = object.__new__(LighthouseValidator)
    validator.validation_dataloader = [({"input": torch.zeros(1, 4)}, torch.zeros(1, 4, dtype=torch.long))]
    validator.post_dataloading_process = lambda inputs, labels, model_parts: (inputs["input"], labels, {}, {})
    validator.validation_context, validator.maybe_enable_amp, validator.pp_schedule = nullcontext, nullcontext(), None
    validator.loss_fn, validator.metrics_processor = lambda out, labels: out.sum() + 8, metrics
    validator.parallel_dims = SimpleNamespace(get_optional_mesh=lambda name: None)
    validator.validate([torch.nn.Identity()], 3)
    assert validated == [(2, True, 4)]
    assert 100 <= time.perf_counter() - metrics.time_last_log < 150 and metrics.ntokens_since_last_log == 7


@pytest.mark.slow
def test_ranks_validate_on_as_many_batches_each_and_on_what_training_counts():
    in_group(validators, 2)
