"""Small models."""

import dataclasses

import torch

from torchtitan_ext.model import LighthouseTransformer, flavors


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
