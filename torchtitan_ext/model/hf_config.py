"""Describe a model as transformers' config.json does, for the export and for a training that starts from one."""

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from .args import LighthouseModelArgs, flavors
from .model import meta_model

# transformers' defaults for fields that a config.json leaves out
FIXED_FIELDS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
DEFAULTS: dict[str, Any] = {**FIXED_FIELDS, "tie_word_embeddings": False, "quantization_config": None}
DEFAULTS |= {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
DEFAULTS |= {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
# names in config.json of a flavor's fields
FIELDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
FIELDS |= {"n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps"}
FIELDS |= {"rope_theta": "rope_theta", "enable_weight_tying": "tie_word_embeddings"}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def llama_config(args: LighthouseModelArgs) -> dict:
    """The model's part of transformers' config.json for a LlamaForCausalLM.

    RoPE is spelled as every version reads it: rope_scaling beside rope_theta, not transformers 5's rope_parameters.
    """
    rope = {"rope_type": "llama3", "factor": args.rope_scaling_args.scaling_factor}
    rope |= {name: getattr(args.rope_scaling_args, name) for name in SCALING[1:]}
    one_layer = meta_model(replace(args, n_layers=1))  # type: ignore[call-arg]  # torchtitan has no types
    config = FIXED_FIELDS | {name: getattr(args, field) for field, name in FIELDS.items()}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": one_layer.layers["0"].feed_forward.w1.out_features,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "max_position_embeddings": args.max_seq_len,
        "rope_scaling": rope,
    }


def config_problems(job_config: JobConfig, field: str, folder: Path) -> Iterator[str]:
    """How the model of a folder's config.json differs from the job's flavor, but for the RoPE that the job sets."""
    file, flavor = folder / "config.json", job_config.model.flavor
    if not file.exists():
        return
    given = [name for name, value in vars(job_config.rope).items() if value is not None]
    chosen = {"rope_theta" if name == "theta" else "rope_scaling" for name in given}
    try:
        there = computed(json.loads(file.read_text()))
        if other := difference(there, flavors[flavor], chosen):
            leads_to = f"{file}, which {field} leads to, is of a model that computes something else ({other})"
            yield f"model.flavor = {flavor!r}: {leads_to}; {_remedy(there, chosen)}"
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        yield f"{field}: {file} can't be read ({error}); fetch it again, or delete it"


def difference(there: dict[str, Any], args: LighthouseModelArgs, chosen: Collection[str] = ()) -> str:
    here = computed(llama_config(args))
    changed = [name for name, value in there.items() if value != here[name] and name not in chosen]
    return "; ".join(f"{name} is {there[name]!r} there and {here[name]!r} here" for name in changed)


def _remedy(there: dict[str, Any], chosen: set[str]) -> str:
    """How to train the model of a config.json: by a flavor that has its numbers, or by a new one."""
    if suited := [repr(name) for name, args in flavors.items() if not difference(there, args, chosen)]:
        return f"set it to {' or '.join(suited)}"
    values = {name: there[theirs] for name, theirs in FIELDS.items()}
    dim, width, rope = there["hidden_size"], there["intermediate_size"], there["rope_scaling"] or {}
    # llama3 takes this part of 8/3 dim, rounds both down, and the result up to a multiple
    values |= {"ffn_dim_multiplier": -(-1e6 * width // (8 * dim // 3)) / 1e6, "multiple_of": width & -width}
    scaling = [rope[name] for name in SCALING] if rope.get("rope_type") == "llama3" else [1.0]
    values["rope_scaling_args"] = RoPEScalingArgs(*scaling)
    if impossible := difference(there, LighthouseModelArgs(**values), chosen):
        return f"no flavor can match it ({impossible}): give weights of another model"
    numbers = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"docs/extend.md says where to add its flavor: flavors['mine'] = LighthouseModelArgs({numbers})"


def computed(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that change the computation, RoPE in either spelling: see `llama_config`."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    given = {name: value for name, value in (config | rope).items() if value is not None}
    computed = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    computed["num_key_value_heads"] = config.get("num_key_value_heads") or computed["num_attention_heads"]
    computed["head_dim"] = config.get("head_dim") or computed["hidden_size"] // computed["num_attention_heads"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"rope_type": kind} | {name: rope.get(name) for name in SCALING}
    unscaled = kind == "default" or (kind in ("linear", "llama3") and scaling["factor"] == 1)
    return computed | {"rope_scaling": None if unscaled else scaling}
