"""The fused loss: equal to plain cross entropy, on a GPU without the logits, alone and in a model."""

import pytest
import torch
from helpers.models import args, build
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss

from torchtitan_ext.model import loss
from torchtitan_ext.model.loss import liger_chunk, linear_cross_entropy_loss

TOKENS, VOCAB, DIM = 150, 500, 16


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 64)


def example(dtype=torch.float32, ignored=0, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = (2, TOKENS, DIM), (VOCAB, DIM)
    hidden, weight = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(VOCAB, (2, TOKENS), generator=g).to(device)
    labels[:, :ignored] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("ignored", [0, 7, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_value_and_gradients_are_those_of_cross_entropy(dtype, ignored, device):
    hidden, weight, labels = example(dtype, ignored, device)
    ours = linear_cross_entropy_loss((hidden, weight), labels)
    exact = cross_entropy_loss(hidden.double() @ weight.double().T, labels)
    assert ours.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert abs(ours - exact) <= tolerance * 0.1 * exact
    # not again on a GPU: Liger's kernel scales the gradient in place
    losses = (ours, exact) if device == "cuda" else (ours, exact, ours)
    grads = (torch.autograd.grad(x / 3, (hidden, weight), retain_graph=True) for x in losses)
    for grad, expected, *again in zip(*grads, strict=True):
        assert grad.dtype == dtype and all(torch.equal(grad, x) for x in again)
        assert (grad - expected).norm() <= tolerance * expected.norm()


@pytest.mark.gpu
def test_the_gradient_of_a_large_vocabulary_is_summed_in_fp32():
    hidden = torch.randn(1, 98304, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 128, device="cuda", dtype=torch.bfloat16) / 10
    weight.requires_grad_()
    labels = torch.randint(32000, (1, 98304), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy_loss((hidden, weight), labels).backward()
    assert torch.cuda.max_memory_allocated() < 98304 * 32000  # half a byte a logit
    expected = torch.zeros(32000, 128, device="cuda")
    for h, y in zip(hidden[0].split(4096), labels[0].split(4096), strict=True):
        w = weight.detach().float().requires_grad_()
        torch.nn.functional.cross_entropy(h.detach().float() @ w.T, y, reduction="sum").backward()
        expected += w.grad
    assert (weight.grad - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("seq_len", [98_304, 131_072])
def test_ranks_that_share_a_sequence_take_chunks_as_large_as_one(seq_len, ranks, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 4096)
    assert liger_chunk(seq_len // ranks, 128_256, 1024)[0] == 4096
    assert liger_chunk(16_384, 4096, 1024) == (4096, 1) and liger_chunk(1000, 384, 512) == (1000, 1)


def gradients(fuse_output, wrap=lambda model: None):
    model = build(args(n_layers=2, n_heads=2, vocab_size=VOCAB, max_seq_len=128, fuse_output=fuse_output))
    wrap(model)
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(VOCAB, (1, 128), generator=g) for _ in range(2))
    loss_fn = linear_cross_entropy_loss if fuse_output else cross_entropy_loss
    total = loss_fn(model(tokens), labels)
    (total / 128).backward()
    return total, {name: p.grad for name, p in model.named_parameters()}


def assert_close(ours, expected, tolerance):
    assert abs(ours[0] - expected[0]) <= tolerance * expected[0]
    assert ours[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (ours[1][name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_a_model_trains_the_same_and_keeps_its_parameters(autocast, tolerance):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(gradients(True), gradients(False), tolerance)


@pytest.mark.slow
def test_float8_linears_leave_the_projection_and_the_parameters_as_they_are():
    assert not isinstance(build(args(fuse_output=True)).output, nn.Linear)  # which converters replace
    float8 = pytest.importorskip("torchao.float8")

    def convert(model):
        float8.convert_to_float8_training(model, config=float8.Float8LinearConfig(emulate=True))
        for block in model.layers.values():
            block.compile(fullgraph=True, backend="aot_eager")

    assert_close(gradients(True, convert), gradients(False), 0.2)
