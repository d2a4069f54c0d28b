"""Causal attention with a named kernel: all compute the same, and a job gets the fastest that can run."""

import sys
from types import ModuleType

import pytest
import torch
from helpers.jobs import job_of
from helpers.lighthouse_cases import DEVICE
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from torchtitan_ext.lighthouse import LighthouseAttention, LighthouseConfig, kernels
from torchtitan_ext.lighthouse.kernels import KERNELS, CausalAttention, causal_attention
from torchtitan_ext.model import choose_kernel

JOB = "configs/530m/stage1.toml"


def heads_first(n_heads, *tensors):
    """From [B, S, H, D] to [B, n_heads, S, D]."""
    return [x.repeat_interleave(n_heads // x.shape[2], 2).transpose(1, 2) for x in tensors]


@pytest.fixture
def fa4(monkeypatch):
    """FlashAttention-4's functions, computed by torch's for the CPU; the calls are listed."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    calls, flash_backward = [], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(q, k, v, *, causal, return_lse):
        calls.append("forward")
        out, lse = flash(*heads_first(q.shape[2], q, k, v), 0.0, causal)
        return out.transpose(1, 2).contiguous(), lse.contiguous(), None, "what a later version adds"

    def backward(q, k, v, out, grad, lse, *, causal, deterministic):
        calls.append(f"backward {deterministic}")
        n_heads = q.shape[2], k.shape[2], v.shape[2]
        grads = flash_backward(*heads_first(q.shape[2], grad, q, k, v, out), lse, 0.0, causal)
        grads = (x.transpose(1, 2).unflatten(2, (n, -1)) for x, n in zip(grads, n_heads, strict=True))
        return tuple(x.sum(3).contiguous() for x in grads)

    for name in ("flash_attn", "flash_attn.cute", kernels._FA4):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[kernels._FA4]).update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return calls


def qkv(dtype=torch.float32, seq_len=48, device="cpu", head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, seq_len, head_dim) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def output_and_gradients(attend, inputs):
    out = attend(*inputs, enable_gqa=True)
    return out, *torch.autograd.grad(out.float().sin().sum(), inputs)


@pytest.mark.slow
def test_flash_attention_4_is_one_operator_with_a_gradient_that_compiles_repeats_and_is_kept(fa4, monkeypatch):
    inputs, eager = qkv(), CausalAttention("fa4")
    expected = output_and_gradients(causal_attention, inputs)
    for deterministic, attend in ((True, eager), (False, torch.compile(eager, fullgraph=True, backend="aot_eager"))):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda is_so=deterministic: is_so)
        torch.testing.assert_close(output_and_gradients(attend, inputs), expected)
        assert fa4 == ["forward", f"backward {deterministic}"]
        fa4.clear()
    torch.library.opcheck(kernels.flash_attention_4, [x.transpose(1, 2) for x in qkv(torch.half)])
    assert torch.ops.lighthouse.flash_attention_4.default in _op_sac_save_list  # of selective checkpointing


def test_the_dilated_scorer_attends_by_the_same_kernel(fa4):
    config = LighthouseConfig(levels=2, pooling_factor=2, top_k=8, scorer="dilated", tile_winners=4)
    rows = [x.transpose(1, 2) for x in qkv(seq_len=64)]
    out = LighthouseAttention(config, CausalAttention("fa4"))(*rows)
    assert fa4 == ["forward"] * 3  # two for the scores
    torch.testing.assert_close(out, LighthouseAttention(config)(*rows))


def test_an_installation_that_does_not_fit_is_a_reason(fa4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(sys.modules[kernels._FA4], "_flash_attn_bwd")
    assert "_flash_attn_bwd'); pip install" in kernels.unusable_reason("fa4", torch.bfloat16, 128)


@pytest.mark.parametrize("can_run", KERNELS)
def test_a_job_attends_by_the_fastest_kernel_that_can_run(can_run, monkeypatch):
    slower = KERNELS[KERNELS.index(can_run) :]
    monkeypatch.setattr("torchtitan_ext.model.args.unusable_reason", lambda name, *_: name not in slower and "why")
    assert choose_kernel(job_of(JOB)[0]) == (can_run, [f"{name}: why" for name in KERNELS if name not in slower])


def test_a_named_kernel_that_cannot_run_is_refused_and_the_ring_takes_torchs(monkeypatch):
    with pytest.raises(ValueError, match="kernel = 'auto': must be one of fa4, cudnn, flash, sdpa"):
        CausalAttention("auto")
    refusal = r"attention\.kernel = 'cudnn' can't run: cudnn: there is no CUDA device; .*'auto'"
    with pytest.raises(ValueError, match=refusal):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        choose_kernel(job_of(JOB, "attention.kernel=cudnn")[0])
    monkeypatch.setattr("torchtitan_ext.model.args.unusable_reason", lambda *_: None)
    ring = "parallelism.context_parallel_rotate_method=alltoall", "parallelism.context_parallel_degree=2"
    kernel, [reason] = choose_kernel(job_of(JOB, *ring)[0])
    assert kernel == "cudnn" and "ring" in reason
    assert [choose_kernel(job_of(JOB, alone)[0]) for alone in ring] == [("fa4", [])] * 2


def test_a_rank_asks_whether_its_own_gpu_can_train_the_job(monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torchtitan_ext.model.args.unusable_reason", lambda *given: asked.append(given))
    choose_kernel(job_of(JOB, "attention.kernel=cudnn", "debug.deterministic")[0])
    assert asked == [("cudnn", torch.bfloat16, 128, True, "cuda:3")]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_attends_as_fp32_does_and_repeats_bitwise(kernel, head_dim):
    if reason := kernels.unusable_reason(kernel, torch.bfloat16, head_dim):
        pytest.skip(reason)
    inputs = qkv(torch.bfloat16, 1000, DEVICE, head_dim)
    ours = output_and_gradients(CausalAttention(kernel), inputs)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    for x, y in zip(ours, output_and_gradients(causal_attention, exact), strict=True):
        assert (x - y).abs().max() < 0.02 * y.abs().max()
    if kernels.unusable_reason(kernel, torch.bfloat16, head_dim, deterministic=True):
        return
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (output_and_gradients(CausalAttention(kernel), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, once, again))
