"""Estimate a training step's peak GPU memory from the tensors that are alive; no constant is fitted.

Widths are elements per token: `d` of the model, `f` of SwiGLU, `kv` of the key and value heads. `r` is gathered rows
per token in a Lighthouse layer, 1 in a dense one. A compiled block keeps for its backward pass:

    none       input, both norms' outputs, the sum of the first residual; 4 d
               q and the attention's output, k, v; r (2 d + 2 kv)
               the scattered output in a Lighthouse layer; d
               both SwiGLU projections and their product; 3 f
    selective  input, wq's and wv's output, attention's output, w1's output; (2 + r) d + kv + f;
               of these products, every other one that the job does not force it to recompute
    full       input; d

With context parallelism, `none` also keeps the dense layers' attention output after the exchange; d.

The peak is in the loss, or in a block's backward pass, which recomputes what the block didn't keep and adds at its
widest the gradients of the block's output, the product and both projections: d + 3 f.

Omitted, less than 1 %: slots, log-sum-exp, norms' deviations, tokens, cuBLAS's workspace.
dev/LOG.md compares the estimates with measured peaks.
"""

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from torchtitan_ext.model import LighthouseModelArgs
from torchtitan_ext.model.loss import liger_chunk
from torchtitan_ext.model.model import meta_model

from .rules import sequences_at_once

FP32 = 4  # bytes
GIB = 2**30


def no_estimate_reason(job_config: JobConfig, dims: ParallelDims) -> str | None:
    """The setting that `peak_memory` does not cover; None if it covers the job."""
    checkpointing, compiled = job_config.activation_checkpoint, job_config.compile
    mode, option = checkpointing.mode, checkpointing.selective_ac_option
    reasons = {
        "compile.enable = false": not compiled.enable,
        f"compile.components = {compiled.components}": not {"model", "loss"} <= set(compiled.components),
        f"activation_checkpoint.mode = {mode!r}": mode not in ("none", "selective", "full"),
        f"activation_checkpoint.selective_ac_option = {option!r}": option != "op" and not option.isdecimal(),
        f"parallelism.tensor_parallel_degree = {dims.tp}": dims.tp > 1,
        f"parallelism.pipeline_parallel_degree = {dims.pp}": dims.pp > 1,
        "parallelism.data_parallel_shard_degree = 1, without FSDP": not dims.fsdp_enabled,
        "training.enable_cpu_offload = true": job_config.training.enable_cpu_offload,
        f"model.converters = {job_config.model.converters}": bool(job_config.model.converters),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def peak_memory(job_config: JobConfig, args: LighthouseModelArgs, dims: ParallelDims) -> dict[str, float]:
    """GiB that one GPU's allocator reserves at a step's peak, by use; the sum is the estimate.

    For jobs without a `no_estimate_reason`, with FSDP's mixed precision, AdamW, Liger-Kernel's loss and expandable
    segments. args: the model's, with the job's settings.
    """
    training = job_config.training
    width = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    master = TORCH_DTYPE_MAP[training.dtype].itemsize
    model = meta_model(args)
    n_params, n_block = (sum(p.numel() for p in module.parameters()) for module in (model, model.layers["0"]))
    n_output = model.output.weight.numel()
    shards = dims.dp_shard * dims.cp
    tokens = training.local_batch_size * training.seq_len // dims.cp

    # FSDP's streams have their own pools: gradients and gathered parameters never reuse freed activations.
    weights = 4 * n_params * master / shards  # with gradients and two moments
    on_hand = n_params
    if job_config.parallelism.fsdp_reshard_after_forward != "never":
        on_hand = n_output + 2 * n_block  # one at work, one ahead
    if job_config.parallelism.fsdp_no_sync and training.global_batch_size > sequences_at_once(job_config, dims):
        weights += FP32 * n_params  # gradients that are reduced once per step
    # With the buffers, in and out, of the largest gather.
    gathered = width * (on_hand + max(n_block, n_output) * (1 + 1 / shards))

    d, f = args.dim, model.layers["0"].feed_forward.w1.out_features
    row = width * tokens
    table = FP32 * training.seq_len * d // args.n_heads  # cosines and sines
    reduced = FP32 * n_output  # the output projection's gradient, on its way to the shards (half of it where tied)
    kept, in_block = 0.0, []
    for layer in range(args.n_layers):
        layer_keeps, without_checkpointing = _kept_by_layer(job_config, args, layer, f)
        kept += row * layer_keeps
        in_block.append(kept + row * (without_checkpointing - layer_keeps + d + 3 * f))
    logits = 2 * width * tokens * args.vocab_size  # with their gradient
    if job_config.loss.fuse_output:  # a chunk's, and the projection's gradient
        chunk, _ = liger_chunk(tokens, args.vocab_size, d)
        logits = width * chunk * args.vocab_size + FP32 * args.vocab_size * d
    in_loss = kept + row * 3 * d + logits  # before and after the last norm, and the gradient
    n_bytes = {
        "weights, gradients, moments": weights,
        "gathered weights": gathered,
        "saved activations": kept,
        "temporary": max(in_loss, max(in_block) + reduced) - kept + table,
    }
    return {name: n / GIB for name, n in n_bytes.items()}


def _kept_by_layer(job_config: JobConfig, args: LighthouseModelArgs, layer: int, f: int) -> tuple[float, float]:
    """Elements per token that a block keeps, and that it would keep without checkpointing."""
    d, kv = args.dim, args.dim // args.n_heads * (args.n_kv_heads or args.n_heads)
    seq_len, is_lighthouse = job_config.training.seq_len, layer in args.lighthouse_layers
    r = args.lighthouse.gathered_len(seq_len) / seq_len if is_lighthouse else 1.0
    scattered_or_exchanged = d if is_lighthouse or job_config.parallelism.context_parallel_degree > 1 else 0
    everything = 4 * d + r * (2 * d + 2 * kv) + scattered_or_exchanged + 3 * f
    mode, option = job_config.activation_checkpoint.mode, job_config.activation_checkpoint.selective_ac_option
    if mode == "none":
        return everything, everything
    if mode == "full":
        return d, everything
    if option != "op":  # of every `option`-th block, only the input is kept; 0 means 1
        return d if (layer + 1) % (int(option) or 1) == 0 else everything, everything
    # the products' widths, in order (all map from d: a width stands for a shape); w2's output is not needed
    widths = {"attention.wq": d, "attention.wk": kv, "attention.wv": kv, "attention.wo": d}
    widths |= {"feed_forward.w1": f, "feed_forward.w3": f}
    recomputed_fqns = job_config.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns
    recomputed = {width for fqn, width in widths.items() if any(part in fqn for part in recomputed_fqns)}
    kept = [width for width in widths.values() if width not in recomputed][::2]  # torchtitan keeps every other one
    return (1 + r) * d + sum(kept), everything  # with the block's input and attention's output
