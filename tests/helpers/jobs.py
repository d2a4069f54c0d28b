"""Make checkpoints as a run saves them, and list the problems that a check finds in a job."""

import pickle
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.jobs.recorded import write_config
from torchtitan_ext.jobs.rules import check_job
from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.train.trainer import LighthouseTrainer

from .commands import ROOT


def save(folder, step=10, degree=1, without=(), rate=None, positions=None, model=None, **changes):
    """A checkpoint of a model, by default one like that of configs/text, with torchtitan's keys; returns its path."""
    group = {"initial_lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}
    rate = rate or 1e-2 * min(1, (step + 1) / 40)
    states = {
        **(model or LighthouseTransformer(replace(flavors["debug"], **changes))).state_dict(),
        "optimizer": {
            "state.output.weight.exp_avg": torch.zeros(4, 4),
            **{f"param_groups.output.weight.{name}": value for name, value in group.items()},
        },
        "lr_scheduler": {"last_epoch": step, "base_lrs": [1e-2], "_last_lr": [rate]},
        "dataloader": positions or {f"dp_rank_{rank}": pickle.dumps({}) for rank in range(degree)},
        "train_state": {"step": step},
    }
    path = Path(folder) / "checkpoint" / f"step-{step}"
    dcp.save({key: value for key, value in states.items() if key not in without}, checkpoint_id=path, no_dist=True)
    return path


def save_run(dump_folder, model, *settings, step=3):
    """What a run leaves: its checkpoint, and its job, that of a dense run with these settings."""
    path, seq_len = save(dump_folder, step, model=model), f"training.seq_len={model.model_args.max_seq_len}"
    job, _ = job_of("configs/text/dense.toml", f"job.dump_folder={dump_folder}", seq_len, *settings)
    write_config(job)
    return path


def start_from(path):
    return f"--checkpoint.initial_load_path={path}", "--checkpoint.no_initial_load_model_only"


def start(config):
    """What a launch does before it builds anything."""
    object.__new__(LighthouseTrainer)._begin_run(config)


def problems(config):
    with pytest.raises(ValueError) as error:
        check_job(config)
    return str(error.value).split("\n- ")[1:]


def only(problems, *words):
    """The one problem, which has these words."""
    [problem] = problems
    for word in words:
        assert str(word) in problem
    return problem


def only_problem(config, *words):
    return only(problems(config), *words)


def cut_short(path):
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


def put_aside(problem):
    [command] = {*re.findall(r"\((mkdir .* && mv .*?)\)", problem)}  # of each rank
    subprocess.run(command, shell=True, check=True)


def job_of(config, *settings):
    """A parsed job, and the model's arguments with its settings, from `section.field=value` settings."""
    job = parse_job(ROOT / config, [f"--{setting}" for setting in settings])
    args = replace(flavors[job.model.flavor])
    args.update_from_config(job)
    return job, args
