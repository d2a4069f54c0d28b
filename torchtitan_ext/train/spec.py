"""Register `llama3_lighthouse` with torchtitan, and set up the process for a run."""

import os
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental._context_parallel._attention import set_rotate_method
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.llama3 import get_train_spec, parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.models.llama3.model.model import Attention
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.utils import device_type

from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import OWN_DATASETS
from torchtitan_ext.data.unpickling import restrict_unpickling
from torchtitan_ext.lighthouse.attention import triton_ops
from torchtitan_ext.lighthouse.kernels import CausalAttention
from torchtitan_ext.lighthouse.ulysses import UlyssesAttention
from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.model.loss import build_loss
from torchtitan_ext.model.model import LighthouseSelfAttention, TiedProjection
from torchtitan_ext.model.settings import Model

from .metrics import LighthouseMetricsProcessor
from .optimizer import LaunchSchedulers
from .validator import LighthouseValidator


class StateDictAdapter(Llama3StateDictAdapter):
    # Views of a shard that begins within a head fail, or permute wrongly.
    def _permute(self, w: torch.Tensor, *shape: int) -> torch.Tensor:
        if isinstance(w, DTensor):
            w = w.redistribute(placements=[Replicate()] * w.device_mesh.ndim)
        return super()._permute(w, *shape)


def register() -> None:
    """Set up this process for a run; a second call changes nothing."""
    restrict_unpickling()
    # Threads of the tokenizer would warn at every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # FlashAttention-4 keeps its compiled kernels on disk, for the next launch.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    DATASETS.update(OWN_DATASETS)
    # Selective checkpointing keeps torch's attention outputs; keep ours, the scores and the selection too.
    for name in ("flash_attention_4", "base_scores", *(("select",) if triton_ops else ())):
        _op_sac_save_list.add(getattr(torch.ops.lighthouse, name).default)
    spec = replace(
        get_train_spec(),
        model_cls=LighthouseTransformer,
        model_args=flavors,
        parallelize_fn=parallelize,
        build_dataloader_fn=lambda dp_world_size, dp_rank, **given: build_dataloader(dp_world_size, dp_rank, **given),
        build_lr_schedulers_fn=LaunchSchedulers,
        build_loss_fn=build_loss,
        build_validator_fn=LighthouseValidator,
        build_metrics_processor_fn=LighthouseMetricsProcessor,
        state_dict_adapter=StateDictAdapter,
    )
    with suppress(ValueError):  # registered before
        register_train_spec(Model.name, spec)


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """torchtitan's parallelize_llama, with tied embeddings, Lighthouse's context parallelism, and FSDP on a CPU."""
    model = parallelize_llama(model, parallel_dims, job_config)
    if isinstance(model.output, TiedProjection) and isinstance(model.tok_embeddings, FSDPModule):
        model.tok_embeddings.set_reshard_after_forward(False)  # the output projection takes the gathered weight
    if parallel_dims.tp_enabled and model.tok_embeddings:  # a compiled block loses gradients of a pending collective
        model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    if parallel_dims.cp_enabled:
        mesh, method = parallel_dims.get_mesh("cp"), job_config.parallelism.context_parallel_rotate_method
        load_balance = job_config.parallelism.context_parallel_load_balancer is not None
        if method != "allgather":
            set_rotate_method(method)  # torchtitan sets it only for a validation
        for module in model.modules():
            if isinstance(module, LighthouseSelfAttention):
                module.context_parallel = {"mesh": mesh, "load_balance": load_balance}
            if isinstance(module, Attention) and method == "allgather":  # replace torchtitan's ring
                kernel = CausalAttention(module.inner_attention.kernel)
                module.inner_attention = UlyssesAttention(kernel, mesh, load_balance)
    if device_type == "cpu":
        seed_shards(parallel_dims)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    return model


def seed_shards(parallel_dims: ParallelDims) -> None:
    """Seed each shard of a parameter differently, which DTensor does not do on a CPU."""
    offset, stride = 0, parallel_dims.pp
    for name in ("fsdp", "tp"):
        if mesh := parallel_dims.get_optional_mesh(name):
            offset += mesh.get_local_rank() * stride
            stride *= mesh.size()
    if offset:
        torch.manual_seed(torch.initial_seed() + offset)
    torch.rand(2)  # the runs in results/ drew two numbers before their weights
