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
    if device == "meta":
        return model
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model
