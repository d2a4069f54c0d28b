"""Describe a model as transformers' config.json does, for the export and for a training that starts from one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .args import LighthouseModelArgs
from .model import meta_model

# What transformers takes where a config.json leaves the field out.
DEFAULTS = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def llama_config(args: LighthouseModelArgs) -> dict:
    """The model's part of transformers' config.json for a LlamaForCausalLM.

    RoPE is spelled as every version reads it: rope_scaling beside rope_theta, not transformers 5's rope_parameters.
    """
    rope = {"rope_type": "llama3", "factor": args.rope_scaling_args.scaling_factor}
    rope |= {name: getattr(args.rope_scaling_args, name) for name in SCALING[1:]}
    width = meta_model(args).layers["0"].feed_forward.w1.out_features
    same = ("model_type", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")
    return {name: DEFAULTS[name] for name in same} | {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": width,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope,
    }


def config_problems(args: LighthouseModelArgs, flavor: str, field: str, folder: Path) -> Iterator[str]:
    """How the model of a folder's config.json differs from `args` in what its weights' shapes don't show."""
    file = folder / "config.json"
    if not file.exists():
        return
    try:
        there = _computed(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        yield f"{field}: {file} can't be read ({error}); fetch it again, or delete it"
        return
    here = _computed(llama_config(args))
    changed = [name for name, value in here.items() if there[name] != value]
    if changed:
        other = "; ".join(f"{name} is {there[name]!r} there and {here[name]!r} here" for name in changed)
        yield (
            f"model.flavor = {flavor!r}: {file}, which {field} leads to, is of a model that computes something else "
            f"({other}); give weights that were trained like this flavor, or add a flavor with their values "
            "to torchtitan_ext/model/args.py"
        )


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the computation, RoPE in either spelling: see `llama_config`."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    given = {name: value for name, value in (config | rope).items() if value is not None}
    computed = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    computed["num_key_value_heads"] = config.get("num_key_value_heads") or computed["num_attention_heads"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"rope_type": kind} | {name: rope.get(name) for name in SCALING}
    unscaled = kind == "default" or (kind in ("linear", "llama3") and scaling["factor"] == 1)
    return computed | {"rope_scaling": None if unscaled else scaling}
