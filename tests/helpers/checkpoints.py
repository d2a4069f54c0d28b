"""Make dense models and the checkpoints that their runs would save."""

import json
from dataclasses import replace

import torch
import torch.distributed.checkpoint as dcp

from torchtitan_ext.model import flavors

from . import models
from .streams import BYTE_TOKENIZER


@torch.no_grad()
def build(flavor="debug", seq_len=64, rope=()):
    """A dense model of ours whose logits depend on the positions of far tokens."""
    args = replace(flavors[flavor], max_seq_len=seq_len)
    args.set_rope(**dict(rope))
    model = models.build(args)
    for layer in model.layers.values():
        for proj in (layer.attention.wq, layer.attention.wk):
            proj.weight *= 8  # else attention is nearly uniform
    return model


def save_run(dump_folder, model, *, flavor="debug", step=3, lighthouse=False, rope=()):
    """What a run leaves: its checkpoint of `step`, with more than the model in it, and its job config."""
    path = dump_folder / "checkpoint" / f"step-{step}"
    state = {**model.state_dict(), "optimizer": {"lr": 1.0}, "train_state": {"step": step}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    job = {
        "model": {"flavor": flavor, "hf_assets_path": str(BYTE_TOKENIZER)},
        "training": {"seq_len": model.model_args.max_seq_len},
        "checkpoint": {"folder": "checkpoint"},
        "lighthouse": {"enable": lighthouse},
        "rope": dict(rope),
    }
    (dump_folder / "config.json").write_text(json.dumps(job))
    return path
