"""Small models, and the checkpoints that their runs would save."""

import dataclasses
import json

import torch
import torch.distributed.checkpoint as dcp

from torchtitan_ext.model import LighthouseTransformer, flavors

from .streams import BYTE_TOKENIZER


def args(**changes):
    small = {"dim": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "dense_layers": (0,)}
    return dataclasses.replace(flavors["debug"], **small | changes)


def build(model_args, model_cls=LighthouseTransformer, device="cpu"):
    with torch.device("meta"):
        model = model_cls(model_args)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model


@torch.no_grad()
def attentive(flavor="debug", seq_len=64, rope=()):
    """A dense model of ours whose logits depend on the positions of far tokens."""
    model_args = dataclasses.replace(flavors[flavor], max_seq_len=seq_len)
    model_args.set_rope(**dict(rope))
    model = build(model_args)
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
