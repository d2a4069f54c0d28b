"""A whole transformer block on the Triton operators: compiled and checkpointed.

Runs on the GPU where there is one, else with the kernels under Triton's interpreter.
"""

from dataclasses import replace

import pytest
import torch
from helpers.lighthouse_cases import DEVICE
from helpers.models import args as small_args
from helpers.models import build
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from torchtitan_ext.lighthouse import scorers
from torchtitan_ext.model import Lighthouse

LIGHTHOUSE = Lighthouse(enable=True, levels=2, pooling_factor=4, top_k=4, tile_winners=4, dense_layers=[])
ARGS = small_args(n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=64, multiple_of=32, lighthouse=LIGHTHOUSE)
pytestmark = pytest.mark.usefixtures("triton_everywhere")


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(ARGS.vocab_size, (1, ARGS.max_seq_len), generator=generator).to(DEVICE)


def gradients(built, seed=0):
    built.zero_grad()
    built(tokens(seed)).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in built.named_parameters()}


def assert_same(ours, reference, **tolerance):
    names = [name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for name in ours]
    assert names == list(reference)
    torch.testing.assert_close([*ours.values()], [*reference.values()], **tolerance)


def compile_block(built):
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    built.layers["0"] = torch.compile(built.layers["0"], fullgraph=True, backend=backend)
    return built


@pytest.mark.slow
def test_compiles_fullgraph_and_does_not_recompile_between_steps():
    plain, built = build(ARGS, device=DEVICE), compile_block(build(ARGS, device=DEVICE))
    assert_same(gradients(built), gradients(plain), rtol=1e-4, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(gradients(built, 1), gradients(plain, 1), rtol=1e-4, atol=1e-6)


CHECKPOINTED = [("full", "norm", False), ("full", "norm", True), ("selective", "norm", False)]
CHECKPOINTED += [("selective", "norm", True), ("selective", "dilated", True), ("selective", "gla", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "scorer", "compiled"), CHECKPOINTED)
def test_gradients_under_activation_checkpointing_are_the_unchecked_ones(mode, scorer, compiled, monkeypatch):
    calls, compute = [], scorers.output_scores
    monkeypatch.setattr(scorers, "output_scores", lambda *x: calls.append(x) or compute(*x))
    args = replace(ARGS, lighthouse=replace(ARGS.lighthouse, scorer=scorer))
    plain, built = gradients(build(args, device=DEVICE)), build(args, device=DEVICE)
    calls.clear()
    settings = ActivationCheckpoint(mode=mode, selective_ac_option="op")
    apply_ac(built, settings, model_compile_enabled=compiled, op_sac_save_list=_op_sac_save_list)
    tolerance = dict(rtol=1e-4, atol=1e-6) if compiled else dict(rtol=0, atol=0)
    assert_same(gradients(compile_block(built) if compiled else built), plain, **tolerance)
    assert len(calls) == (scorer != "norm")  # the scores are kept


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    built = compile_block(build(ARGS, device=DEVICE))
    gradients(built)
    batch = tokens(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        built(batch).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
