"""The model: torchtitan's Llama with Lighthouse Attention in chosen layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.llama3 import Transformer
from torchtitan.models.llama3.model.model import Attention
from torchtitan.protocols.model import AttentionMasksType

from torchtitan_ext.lighthouse import lighthouse_attention
from torchtitan_ext.lighthouse.context_parallel import context_parallel_attention
from torchtitan_ext.lighthouse.kernels import CausalAttention

from .args import LighthouseModelArgs
from .loss import ProjectionForLoss, as_product


class LighthouseSelfAttention(Attention):
    """llama3's attention module, and its parameters, with Lighthouse between the projections.

    RoPE is left to the layer, which rotates the entries that it gathers.
    """

    def __init__(self, model_args: LighthouseModelArgs):
        super().__init__(model_args)
        self.config = model_args.lighthouse
        # where ranks share each sequence, `mesh` and `load_balance` of `context_parallel_attention`
        self.context_parallel: dict[str, Any] = {}

    def forward(
        self, x: Tensor, freqs_cis: Tensor, attention_masks: AttentionMasksType | None, positions: Tensor | None = None
    ) -> Tensor:
        # torchtitan gives the positions where ranks share the sequence: those of `chunk_order`.
        assert attention_masks is None and (positions is None) == (not self.context_parallel)
        bs, seqlen, _ = x.shape
        # -1 instead of the number of heads: tensor parallelism shards them.
        xq, xk, xv = (proj(x).view(bs, seqlen, -1, self.head_dim) for proj in (self.wq, self.wk, self.wv))
        shared = self.context_parallel
        attend = context_parallel_attention if shared else lighthouse_attention
        output = attend(xq, xk, xv, self.config, freqs_cis=freqs_cis, attention=self.inner_attention, **shared)
        return self.wo(output.reshape(bs, seqlen, -1))


class TiedProjection(nn.Module):
    """The output projection by the embeddings' weight, which stays theirs: it is sharded, saved and counted once."""

    def __init__(self, embeddings: nn.Embedding, fuse_output: bool) -> None:
        super().__init__()
        self.embeddings = (embeddings,)  # in a tuple, so that it is not registered twice
        self.project = as_product if fuse_output else nn.functional.linear

    @property
    def weight(self) -> Tensor:
        return self.embeddings[0].weight

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.project(hidden, self.weight)


class LighthouseTransformer(Transformer):
    """torchtitan's llama3 with Lighthouse in `model_args.lighthouse_layers`.

    Parameters, their names and initial values don't depend on these: a checkpoint of either kind loads in the other.
    """

    def __init__(self, model_args: LighthouseModelArgs):
        kinds = model_args.attn_type, model_args.attn_mask_type
        if kinds != ("sdpa", "causal"):
            raise ValueError(f"attn_type, attn_mask_type = {kinds}: all layers attend causally; use 'sdpa', 'causal'")
        super().__init__(model_args)
        for layer in model_args.lighthouse_layers:
            self.layers[str(layer)].attention = LighthouseSelfAttention(model_args)
        for block in self.layers.values():
            block.attention.inner_attention = CausalAttention(model_args.kernel)
        if model_args.enable_weight_tying:
            self.output: Any = TiedProjection(self.tok_embeddings, model_args.fuse_output)
        elif model_args.fuse_output:
            self.output = ProjectionForLoss(model_args.dim, model_args.vocab_size)


def meta_model(args: LighthouseModelArgs) -> LighthouseTransformer:
    """The model without memory for its weights: their names, shapes and number."""
    with torch.device("meta"):
        return LighthouseTransformer(args)
