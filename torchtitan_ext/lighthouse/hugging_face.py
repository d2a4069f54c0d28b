"""Lighthouse for transformers: `register()` enables `attn_implementation = "lighthouse"`.

These models rotate queries and keys before attention: RoPE placement `base`.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .attention import lighthouse_attention
from .config import LighthouseConfig

FIELDS = [field.name for field in fields(LighthouseConfig) if field.name != "rope"]


def settings_of(config: Any) -> tuple[LighthouseConfig, list[int]]:
    """Settings from the dict `config.lighthouse` of a model, and the layers that train with them.

    Raises ValueError if it is missing, for an unknown key or layer, and as `LighthouseConfig` does."""
    given = getattr(config, "lighthouse", None)
    if given is None:
        raise ValueError("the model's config has no `lighthouse`: set it to a dict, like {'levels': 3, 'top_k': 1536}")
    settings = {name: value for name, value in given.items() if name != "dense_layers"}
    if unknown := [name for name in settings if name not in FIELDS]:
        raise ValueError(f"config.lighthouse[{unknown[0]!r}]: must be one of {', '.join(FIELDS)}, dense_layers")
    layers, dense = range(config.num_hidden_layers), given.get("dense_layers") or []
    if unknown := [layer for layer in dense if layer not in layers]:
        raise ValueError(f"config.lighthouse['dense_layers'] has {unknown[0]!r}: must be of 0 ... {len(layers) - 1}")
    return LighthouseConfig(**settings), [layer for layer in layers if layer not in dense]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [B, H, N, D] and 2 x [B, H_kv, N, D] -> [B, N, H, D].

    A module in training mode uses Lighthouse, unless `config.lighthouse["dense_layers"]` has its layer; all others use
    "sdpa". Raises ValueError for unsupported arguments and illegal settings."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("softcap", "s_aux", "position_bias", "cu_seq_lens_q"):  # sdpa ignores some
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} has no effect under attn_implementation = 'lighthouse': use another")
    config, layers = settings_of(module.config) if module.training else (None, [])
    if config is None or module.layer_idx not in layers:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal} | kwargs
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    # The first Lighthouse layer looks for packed documents, which transformers does only without a mask or cache.
    look = module.layer_idx == layers[0] and not torch.compiler.is_compiling()
    positions = kwargs.get("position_ids") if look else None
    restart = positions is not None and bool((positions.diff() != 1).any())
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    hides = "attention_mask hides some of the past (padding, packed documents, a sliding window)"
    for refused, what in (
        (query.shape[2] != key.shape[2], "there are more keys than queries (a cache); generate after model.eval()"),
        (attention_mask is not None, f"{hides}, or torch.compile made it; give whole rows, compile layer by layer"),
        (restart, "position_ids restart (packed documents); give whole rows"),
        (dropout, f"dropout is {dropout}; set attention_dropout to 0"),
        (not is_causal, "is_causal is false; use attn_implementation = 'sdpa'"),
    ):
        if refused:
            dense = f"or add {module.layer_idx} to config.lighthouse['dense_layers']"
            raise ValueError(f"layer {module.layer_idx} trains with Lighthouse, but {what}, {dense}")
    usual = query.shape[-1] ** -0.5
    query = query if scaling in (None, usual) else query * (scaling / usual)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return lighthouse_attention(q, k, v, config), None


def register() -> None:
    """Register `attn_implementation = "lighthouse"` with transformers, 5.0 or later."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("lighthouse", attend)
    AttentionMaskInterface.register("lighthouse", sdpa_mask)  # None if tokens see all of the past
