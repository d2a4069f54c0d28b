"""Causal attention by a kernel of a name: all compute the same, and a job gets the fastest that can run."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from helpers.jobs import ROOT
from helpers.lighthouse_cases import DEVICE
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.lighthouse import LighthouseAttention, LighthouseConfig, kernels
from torchtitan_ext.lighthouse.kernels import KERNELS, CausalAttention, causal_attention
from torchtitan_ext.model import choose_kernel


def weights_of(q, k):
    """Logarithms of softmax's numerators [B, H, S, S] of q [B, S, H, D] and k [B, S, H_kv, D]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[3] ** 0.5
    return logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)


@pytest.fixture
def fa4(monkeypatch):
    """FlashAttention-4's functions, computed by torch; the calls are listed."""
    calls = []

    def forward(q, k, v, *, causal, return_lse):
        calls.append("forward")
        logits, group = weights_of(q, k), q.shape[2] // k.shape[2]
        out = torch.einsum("bhst,bthd->bshd", logits.softmax(-1), v.repeat_interleave(group, 2))
        return out.contiguous(), logits.logsumexp(-1), None, "what a later version adds"

    def backward(q, k, v, out, grad, lse, *, causal, deterministic):
        calls.append(f"backward {deterministic}")
        group = q.shape[2] // k.shape[2]
        weights = torch.exp(weights_of(q, k) - lse.unsqueeze(-1))
        of_weights = torch.einsum("bshd,bthd->bhst", grad, v.repeat_interleave(group, 2))
        of_logits = weights * (of_weights - (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)) / q.shape[3] ** 0.5
        dq = torch.einsum("bhst,bthd->bshd", of_logits, k.repeat_interleave(group, 2))
        dk, dv = torch.einsum("bhst,bshd->bthd", of_logits, q), torch.einsum("bhst,bshd->bthd", weights, grad)
        grads = dq, *(x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
        return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), grads, strict=True))

    for name in ("flash_attn", "flash_attn.cute", kernels._FA4):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[kernels._FA4]).update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return calls


def qkv(dtype=torch.float32, seq_len=48, device="cpu", head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, seq_len, head_dim) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def job(*settings):
    return parse_job(ROOT / "configs/530m/stage1.toml", [f"--{setting}" for setting in settings])


def output_and_gradients(attend, inputs):
    out = attend(*inputs, enable_gqa=True)
    return out, *torch.autograd.grad(out.float().sin().sum(), inputs)


def test_flash_attention_4_is_one_operator_with_a_gradient(fa4):
    inputs = qkv()
    expected = output_and_gradients(causal_attention, inputs)
    torch.testing.assert_close(output_and_gradients(CausalAttention("fa4"), inputs), expected)
    assert fa4 == ["forward", "backward False"]
    rows = [x.detach().transpose(1, 2).requires_grad_() for x in inputs]
    torch.library.opcheck(kernels.flash_attention_4, tuple(rows))


@pytest.mark.slow
def test_flash_attention_4_compiles_without_a_graph_break(fa4):
    inputs = qkv()
    compiled = torch.compile(CausalAttention("fa4"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        output_and_gradients(compiled, inputs), output_and_gradients(CausalAttention("fa4"), inputs)
    )


def test_selective_checkpointing_keeps_what_flash_attention_4_returned(fa4):
    def policy(_, op, *__, **___):
        kept = op == torch.ops.lighthouse.flash_attention_4.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(CausalAttention("fa4"), *qkv(), enable_gqa=True, use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    assert fa4 == ["forward", "backward False"]


def test_deterministic_training_asks_for_the_deterministic_backward_pass(fa4):
    torch.use_deterministic_algorithms(True)
    try:
        output_and_gradients(CausalAttention("fa4"), qkv())
    finally:
        torch.use_deterministic_algorithms(False)
    assert fa4 == ["forward", "backward True"]


def test_the_dilated_scorer_attends_by_the_same_kernel(fa4):
    config = LighthouseConfig(levels=2, pooling_factor=2, top_k=8, scorer="dilated", tile_winners=4)
    rows = [x.transpose(1, 2) for x in qkv(seq_len=64)]
    out = LighthouseAttention(config, CausalAttention("fa4"))(*rows)
    assert fa4 == ["forward"] * 3  # two for the scores
    torch.testing.assert_close(out, LighthouseAttention(config)(*rows))


@pytest.mark.parametrize("can_run", KERNELS)
def test_a_job_attends_by_the_fastest_kernel_that_can_run(can_run, monkeypatch):
    slower = KERNELS[KERNELS.index(can_run) :]
    monkeypatch.setattr("torchtitan_ext.model.args.unusable_reason", lambda name, *_: name not in slower and "why")
    assert choose_kernel(job()) == (can_run, [f"{name}: why" for name in KERNELS if name not in slower])


def test_a_named_kernel_that_cannot_run_is_refused_and_the_ring_takes_torchs(monkeypatch):
    refusal = r"attention\.kernel = 'cudnn' can't run: cudnn: there is no CUDA device; .*'auto'"
    with pytest.raises(ValueError, match=refusal):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        choose_kernel(job("attention.kernel=cudnn"))
    monkeypatch.setattr("torchtitan_ext.model.args.unusable_reason", lambda *_: None)
    ring = "parallelism.context_parallel_rotate_method=alltoall", "parallelism.context_parallel_degree=2"
    kernel, [reason] = choose_kernel(job(*ring))
    assert kernel == "cudnn" and "ring" in reason


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
