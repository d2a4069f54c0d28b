"""Arguments of the model: torchtitan's Llama with Lighthouse's settings."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.llama3.model.args import RoPEScalingArgs

from torchtitan_ext.lighthouse.kernels import KERNELS, unusable_reason
from torchtitan_ext.lighthouse.scorers import SCORERS

from .settings import Lighthouse


@dataclass
class LighthouseModelArgs(TransformerModelArgs):
    """llama3's arguments, the flavor's dense layers, and the job's settings in this package's sections."""

    dense_layers: tuple[int, ...] = ()
    enable_weight_tying: bool = False  # the embeddings are the output projection too
    lighthouse: Lighthouse = field(default_factory=Lighthouse)
    fuse_output: bool = False
    kernel: str = "sdpa"

    @property
    def lighthouse_layers(self) -> list[int]:
        """The layers that attend with Lighthouse: none if lighthouse.enable is false."""
        if not self.lighthouse.enable:
            return []
        dense = self.dense_layers if self.lighthouse.dense_layers is None else self.lighthouse.dense_layers
        return [layer for layer in range(self.n_layers) if layer not in dense]

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        super().update_from_config(job_config, **kwargs)
        self.set_rope(**vars(job_config.rope))
        self.lighthouse = job_config.lighthouse
        self.fuse_output = job_config.loss.fuse_output
        kernel = job_config.attention.kernel
        self.kernel = choose_kernel(job_config)[0] if kernel == "auto" else kernel

    def set_rope(self, theta: float | None = None, **scaling: float | None) -> None:
        """Change what isn't None; scaling: fields of `RoPEScalingArgs`."""
        if theta is not None:
            self.rope_theta = theta
        given = {name: value for name, value in scaling.items() if value is not None}
        self.rope_scaling_args: RoPEScalingArgs = replace(self.rope_scaling_args, **given)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and the FLOPs per token that training computes, forward and backward.

        torchtitan's count, corrected for attention: a token attends to N/2 keys in a dense layer and to S^2/2N in a
        Lighthouse layer, where torchtitan counts N; Lighthouse's scorer is added.
        """
        nparams, flops = super().get_nparams_and_flops(model, seq_len)
        if self.enable_weight_tying:  # torchtitan counts the embeddings in neither
            nparams, flops = nparams + self.vocab_size * self.dim, flops + 6 * self.vocab_size * self.dim
        n_lighthouse = len(self.lighthouse_layers)
        keys = (self.n_layers - n_lighthouse) * seq_len / 2
        keys += n_lighthouse * self.lighthouse.gathered_len(seq_len) ** 2 / seq_len / 2
        scored = seq_len, self.dim // self.n_heads, self.lighthouse.dilation
        flops += n_lighthouse * self.n_heads * SCORERS[self.lighthouse.scorer].flops(*scored)
        flops += 6 * 2 * self.dim * (keys - self.n_layers * seq_len)
        return nparams, round(flops)


_530M = LighthouseModelArgs(
    dim=1024,
    n_layers=30,
    n_heads=8,
    vocab_size=128256,
    ffn_dim_multiplier=0.5,  # llama3 rounds half of 2/3 of 4 * dim up to a width of 1536
    rope_theta=10000,
    dense_layers=(0, 1, 28, 29),
)
_LLAMA_32: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000, "enable_weight_tying": True}
_LLAMA_32["rope_scaling_args"] = RoPEScalingArgs(scaling_factor=32.0)

flavors = {
    # Small enough for a laptop's CPU. No layer stays dense: one dense layer of two would do all the
    # attending that so small a model learns, and hide what Lighthouse does.
    "debug": LighthouseModelArgs(dim=64, n_layers=2, n_heads=2, vocab_size=384, rope_theta=10000),
    # For experiments in minutes on a GPU. Byte vocabulary, padded to a multiple of 128. No layer stays dense: with
    # one or two at either end stage 1 learned more, but the dense stage ended higher.
    "27M": LighthouseModelArgs(dim=512, n_layers=8, n_heads=4, vocab_size=384, rope_theta=10000),
    "85M": LighthouseModelArgs(dim=768, n_layers=12, n_heads=6, vocab_size=384, rope_theta=10000),
    # The body of 530M with a byte vocabulary, padded to a multiple of 128.
    "270M": replace(_530M, vocab_size=384),  # type: ignore[call-arg]  # torchtitan has no types
    "530M": _530M,
    # Llama 3.2 (1B, 3B) and 3.1 (8B) as published, with two dense layers at either end.
    "1B": LighthouseModelArgs(
        **_LLAMA_32, dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5, dense_layers=(0, 1, 14, 15)
    ),
    "3B": LighthouseModelArgs(**_LLAMA_32, dim=3072, n_layers=28, n_heads=24, dense_layers=(0, 1, 26, 27)),
    "8B": LighthouseModelArgs(**vars(llama3_args["8B"]), dense_layers=(0, 1, 30, 31)),
}


def choose_kernel(job_config: JobConfig) -> tuple[str, list[str]]:
    """The attention kernel of a job on this machine, and why each faster one can't run.

    Raises ValueError if the job names a kernel that can't run.
    """
    args, parallelism, wanted = flavors[job_config.model.flavor], job_config.parallelism, job_config.attention.kernel
    ring = parallelism.context_parallel_degree > 1 and parallelism.context_parallel_rotate_method == "alltoall"
    dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # which torchtitan makes the current one later
    reasons: list[str] = []
    for kernel in KERNELS if wanted == "auto" else (wanted,):
        reason = unusable_reason(kernel, dtype, args.dim // args.n_heads, job_config.debug.deterministic, device)
        if ring and kernel == "fa4":
            reason = "torch's ring attention (parallelism.context_parallel_rotate_method) needs one of torch's kernels"
        if not reason:
            return kernel, reasons
        reasons.append(f"{kernel}: {reason}")
    raise ValueError(f"attention.kernel = {wanted!r} can't run: {reasons[0]}; or use 'auto'")
