"""The memory estimates are close to measured peaks, and count what a block keeps."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.jobs import ROOT, job_of
from helpers.lighthouse_cases import DEVICE
from helpers.models import build
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from torchtitan_ext.jobs.memory import GIB, no_estimate_reason, peak_memory
from torchtitan_ext.jobs.preflight import FA4_MFU, MFU, PRODUCTS
from torchtitan_ext.jobs.rules import parallel_dims
from torchtitan_ext.model import flavors
from torchtitan_ext.model.settings import Lighthouse

RECORDS = ("bench_train", "kernels/train_fa4", "kernels/train_1m_fa4", "kernels/train_1m_kept_fa4")
ROWS = [row for name in RECORDS for row in json.loads((ROOT / f"results/{name}.json").read_text())["rows"]]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']} on {row['n_gpus']}")
def test_the_estimates_are_near_what_was_measured(row):
    job, args = job_of(*row["config"].split())
    dims = parallel_dims(job, row["n_gpus"])
    assert no_estimate_reason(job, dims) is None
    assert sum(peak_memory(job, args, dims).values()) == pytest.approx(row["peak_gib"], rel=0.15)
    mfu = FA4_MFU if "fa4" in row["name"] else MFU
    assert mfu[job.activation_checkpoint.mode] == pytest.approx(row["mfu"], abs=5)


@pytest.mark.slow
@pytest.mark.parametrize("lighthouse", [False, True])
@pytest.mark.parametrize(
    "policy", ["none", "selective", "selective wo", "selective wk,w1", f"selective {','.join(PRODUCTS)}", "full"]
)
def test_a_compiled_block_keeps_what_the_estimate_counts(triton_everywhere, policy, lighthouse):
    mode, *recomputed = policy.split()
    given = [f"per_op_sac_force_recompute_mm_shapes_by_fqns={names}" for names in recomputed] + [f"mode={mode}"]
    settings = ("training.seq_len=64", *(f"activation_checkpoint.{setting}" for setting in given))
    job, _ = job_of("configs/530m/stage1.toml", *settings)
    lighthouse_settings = Lighthouse(enable=lighthouse, levels=2, top_k=4, tile_winners=4)
    args = replace(flavors["debug"], n_layers=1, n_kv_heads=1, max_seq_len=64, lighthouse=lighthouse_settings)

    torch._dynamo.reset()
    model = build(args, device=DEVICE).bfloat16()
    if mode != "none":
        cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        saved = {*_op_sac_save_list, cpu_attention}
        apply_ac(model, job.activation_checkpoint, model_compile_enabled=True, op_sac_save_list=saved)
    block = torch.compile(model.layers["0"], backend="aot_eager_decomp_partition", fullgraph=True)
    kept = {}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hidden = torch.randn(1, 64, args.dim, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden, model.freqs_cis, None, None)
    counted = peak_memory(job, args, parallel_dims(job, 1))["saved activations"]
    assert counted * GIB == sum(storage.nbytes() for storage in kept.values())


def estimate(*settings, n_gpus=1):
    job, args = job_of("configs/530m/stage1.toml", *settings)
    return sum(peak_memory(job, args, parallel_dims(job, n_gpus)).values())


@pytest.mark.slow
def test_the_estimate_grows_with_what_is_kept_and_shrinks_with_what_is_shared():
    mode, option = "activation_checkpoint.mode", "activation_checkpoint.selective_ac_option"
    every, second = (estimate(f"{mode}=selective", f"{option}={n}") for n in (1, 2))
    assert estimate(f"{mode}=full") == every < second < estimate()
    assert estimate("training.local_batch_size=2") > 1.7 * estimate()
    assert estimate(n_gpus=8) < estimate(n_gpus=2)
    assert estimate("parallelism.fsdp_reshard_after_forward=default") < estimate()
    gradient = 4 * 530_117_632 / GIB
    assert estimate("parallelism.fsdp_no_sync") == pytest.approx(estimate() + gradient)
    assert estimate("parallelism.fsdp_no_sync", "training.global_batch_size=1") == estimate()
    assert estimate("loss.no_fuse_output") > estimate() + 20  # the logits of 98,304 tokens


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["compile.no_enable"], "compile.enable = false"),
        (["activation_checkpoint.mode=memory_budget"], "'memory_budget'"),
        (["parallelism.tensor_parallel_degree=2"], "tensor_parallel_degree = 2"),
        (["parallelism.data_parallel_replicate_degree=2", "parallelism.data_parallel_shard_degree=1"], "without FSDP"),
        (["training.enable_cpu_offload"], "enable_cpu_offload"),
        (["model.converters=quantize.linear.float8"], "model.converters = ['quantize.linear.float8']"),
    ],
)
def test_no_estimate_is_given_of_what_was_not_looked_into(settings, words):
    job, _ = job_of("configs/530m/stage1.toml", *settings)
    sharing = any(setting.startswith("parallelism.") for setting in settings)
    assert words in no_estimate_reason(job, parallel_dims(job, 1 + sharing))
