"""The Triton operators: equal to the torch ones and to the fp64 reference, repeatable, every element written.

On a machine without a GPU the kernels run under Triton's interpreter on small shapes; the tests marked `gpu`
repeat the comparison at full size (`make test-gpu`).
"""

import dataclasses
import sys

import pytest
import torch
from helpers.commands import call
from helpers.lighthouse_cases import DEVICE, SCORES, TOLERANCE, error, hard_scores, qkv, rotary_table, selected
from torch.export import Dim, export

from torchtitan_ext.lighthouse import LighthouseAttention, LighthouseConfig, lighthouse_attention, torch_ops, triton_ops
from torchtitan_ext.lighthouse import attention as layer
from torchtitan_ext.lighthouse.kernels import causal_attention
from torchtitan_ext.lighthouse.naive import naive_attention
from torchtitan_ext.lighthouse.scorers import SCORERS, Scorer, norm_scores

# levels, pooling_factor, tile_winners, tiles, coarsest entries per tile, batch, KV heads, group, head_dim
SMALL = [
    (3, 2, 8, 2, 16, 1, 1, 3, 8),
    (3, 4, 2, 2, 3, 1, 1, 1, 24),
    (2, 8, 2, 3, 5, 1, 2, 1, 16),
    (5, 2, 2, 1, 6, 1, 1, 1, 16),
    (6, 2, 2, 1, 2, 1, 1, 1, 8),  # spans longer than what a program loads at once
]
LONG = (5, 4, 2, 1, 2, 1, 1, 1, 8)  # spans longer than what a program of the score kernel reads
GROUPED = (3, 2, 2, 1, 3, 2, 2, 2, 24)  # all that strides and indices depend on, in short spans
TINY = (3, 2, 2, 1, 3, 1, 1, 2, 8)
FULL = [
    (3, 4, 128, 12, 512, 1, 8, 1, 128),
    (3, 2, 128, 12, 2048, 1, 2, 4, 64),
    (4, 4, 64, 9, 77, 2, 2, 2, 96),
    (5, 2, 128, 4, 200, 2, 2, 1, 256),
    (5, 8, 16, 1, 33, 1, 2, 1, 64),
    (2, 8, 128, 1, 8000, 1, 2, 1, 128),
    (3, 4, 2, 1, 32, 1, 1, 1, 64),
]


def on_a_gpu(*cases):
    return [pytest.param(*case, marks=pytest.mark.gpu) for case in cases]


SHAPES = SMALL + on_a_gpu(*((shape,) for shape in FULL))


def setting(shape, rope="selected"):
    levels, p, m, tiles, coarsest, *_ = shape
    config = LighthouseConfig(levels, p, m * tiles, rope=rope, tile_winners=m)
    return config, coarsest * tiles * p ** (levels - 1)


def inputs_of(shape, dtype=torch.float32, rope="selected", seed=0):
    config, seq_len = setting(shape, rope)
    batch, n_kv_heads, group, head_dim = shape[5:]
    tensors = qkv(seq_len, batch, n_kv_heads, group, head_dim, dtype, seed, DEVICE)
    return tensors, rotary_table(seq_len + 3, head_dim, torch.complex64).to(DEVICE), config


@pytest.fixture(params=[torch_ops, triton_ops], ids=["torch", "triton"])
def either_path(request, monkeypatch):
    """The layer takes the torch operators, or the Triton ones, on any device."""
    monkeypatch.setattr(layer, "ops_for", lambda _: request.param)
    return request.param


@pytest.fixture
def poisoned():
    """Memory that nothing wrote reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(q, k, v, *, enable_gqa):
    """Causal SDPA that needs no S x S matrix, for any dtype and grouping."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return causal_attention(q, k, v)


def layer_and_gradients(tensors, config, freqs_cis=None, **kwargs):
    """The output, and the gradients for the same random one."""
    out = lighthouse_attention(*tensors, config, freqs_cis=freqs_cis, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return out, *torch.autograd.grad(out, tensors, grad)


def assert_near(ours, reference, dtype):
    assert all(error(x, y) < TOLERANCE[dtype] for x, y in zip(ours, reference, strict=True))


LAYERS = [(GROUPED, "selected", "norm"), (SMALL[2], "base", "norm"), (SMALL[2], "selected", "gla")]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rope", "scorer"), [*LAYERS, (TINY, "base", "dilated")], ids=str)
def test_layer_equals_the_reference(shape, rope, scorer, triton_everywhere):
    tensors, freqs_cis, config = inputs_of(shape, rope=rope)
    config = dataclasses.replace(config, scorer=scorer)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected = naive_attention(*exact, config, freqs_cis.cpu().to(torch.complex128))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected = (expected, *torch.autograd.grad(expected, exact, grad))
    assert_near(layer_and_gradients(tensors, config, freqs_cis), expected, torch.float32)


@pytest.mark.parametrize("rope", ["selected", "base"])
def test_tables_of_cosines_and_sines_rotate_the_halves_of_a_head(rope, either_path):
    (q, k, v), freqs_cis, config = inputs_of(TINY, rope=rope)

    def halves(x):
        return torch.cat([x[..., ::2], x[..., 1::2]], -1)

    out, dq, dk, dv = layer_and_gradients((q, k, v), config, freqs_cis)
    tensors = [x.detach().requires_grad_() for x in (halves(q), halves(k), v)]
    tables = tuple(torch.cat([x, x], -1)[None] for x in (freqs_cis.real, freqs_cis.imag))
    ours = layer_and_gradients(tensors, config, tables)
    torch.testing.assert_close(ours, (out, halves(dq), halves(dk), dv))


def test_one_entry_adds_a_scorer(either_path, monkeypatch):
    (q, k, v), freqs_cis, config = inputs_of(TINY)
    by_values = Scorer(lambda q, k, v, *_: norm_scores(v, v, v.shape[2]), lambda *_: 0)
    monkeypatch.setitem(SCORERS, "values", by_values)
    other = dataclasses.replace(config, scorer="values")
    slots = layer.select_slots(q, k, v, other, freqs_cis)
    assert torch.equal(slots, layer.select_slots(v, v, v, config, freqs_cis))
    assert all(x.any() for x in layer_and_gradients((q, k, v), other, freqs_cis))


@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_are_the_norms_and_their_maxima(shape, dtype):
    (q, k, v), _, config = inputs_of(shape, dtype)
    scores, seq_len = triton_ops.score(q, k, v, config), q.shape[1]
    assert error(scores[..., :seq_len], norm_scores(q, k, k.shape[2])) < 1e-6
    assert torch.equal(scores, torch_ops.score_pyramid(scores[..., :seq_len], config))


@pytest.mark.parametrize("shape", [GROUPED, LONG], ids=str)
def test_nan_scores_are_kept_by_every_entry_over_them(shape):
    (q, k, v), _, config = inputs_of(shape)
    q, k = q.detach(), k.detach()
    q[:, 5, -1, 0], k[:, 8, 0, 1], q[:, -3:, 0] = torch.nan, -torch.nan, torch.inf
    scores = triton_ops.score(q, k, v, config)
    torch.testing.assert_close(scores, torch_ops.score(q, k, v, config), equal_nan=True)
    assert scores.isnan().sum() == 2 * shape[5] * config.levels


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != SMALL[4]], ids=str)
@pytest.mark.parametrize("kinds", zip(SCORES, SCORES[1:] + SCORES[:1], strict=True), ids=str)
def test_selection_is_exactly_that_of_the_torch_path(shape, kinds, poisoned):
    config, seq_len = setting(shape)
    base = torch.stack([hard_scores(kind, (*shape[5:7], seq_len), 7) for kind in kinds]).to(DEVICE)
    assert torch.equal(selected(base, config, ops=triton_ops)[0], selected(base, config)[0])


def test_tiles_too_large_for_one_program_are_selected_all_the_same(monkeypatch):
    config, seq_len = setting(SMALL[0])
    base = hard_scores("random", (2, 1, 1, seq_len)).to(DEVICE)
    expected, _ = selected(base, config)
    monkeypatch.setattr(triton_ops, "_MOST_CANDIDATES", 1)
    monkeypatch.setattr(triton_ops, "_select_op", None)
    assert torch.equal(selected(base, config, ops=triton_ops)[0], expected)


def assert_gather_and_scatter_equal(tensors, freqs_cis, config, starts=(0,)):
    """The Triton operators and the torch ones, forward and backward; returns the slots."""
    dtype = tensors[0].dtype
    slots = torch_ops.select(torch_ops.score(*tensors, config), config, starts)
    exact = [x.detach().float().requires_grad_() for x in tensors]

    def check(ours, reference, inputs, exact_inputs):
        grad = torch.randn(ours.shape, device=DEVICE, dtype=dtype)
        expected = (reference, *torch.autograd.grad(reference, exact_inputs, grad.float()))
        assert_near((ours, *torch.autograd.grad(ours, inputs, grad)), expected, dtype)

    for x, own_exact, table in zip(tensors, exact, (freqs_cis, freqs_cis, None), strict=True):
        gathered = triton_ops.gather(x, slots, config, table, starts)
        check(gathered, torch_ops.gather(own_exact, slots, config, table, starts), x, own_exact)
    rows = triton_ops.gather(tensors[0], slots, config, freqs_cis, starts).detach().requires_grad_()
    chunks = len(rows), len(starts)
    carry = torch.randn(*chunks, config.levels - 1, *rows.shape[1::2], device=DEVICE)
    for given in [(rows, carry.to(dtype).requires_grad_())] + [(rows,)] * (len(starts) == 1):
        exact = [x.detach().float().requires_grad_() for x in given]
        ours = triton_ops.scatter(given[0], slots, config, *given[1:])
        check(ours, torch_ops.scatter(exact[0], slots, config, *exact[1:]), given, exact)
    return slots


CASES = [(shape, torch.float32, "selected") for shape in SMALL] + [(x, torch.bfloat16, "base") for x in SMALL[:3]]
DTYPES = [(torch.float32, "selected"), (torch.bfloat16, "base"), (torch.float16, "selected")]
CASES += on_a_gpu(*((shape, *case) for shape in FULL for case in DTYPES))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "rope"), CASES, ids=str)
def test_gather_and_scatter_equal_the_torch_path_both_ways(shape, dtype, rope, poisoned):
    assert_gather_and_scatter_equal(*inputs_of(shape, dtype, rope))


CHUNKED = [(3, 2, 2, 1, 3, 4, 2, 1, 8), *on_a_gpu(((3, 4, 128, 6, 512, 2, 8, 1, 128),))]
PLACES = [((0, 5), "selected", torch.float32), ((2, 3), "base", torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize(("places", "rope", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_chunks_of_a_sequence_are_gathered_one_after_another(shape, places, rope, dtype, poisoned):
    tensors, _, config = inputs_of(shape, dtype, rope)
    _, seq_len, _, head_dim = tensors[0].shape
    freqs_cis = rotary_table(6 * seq_len, head_dim, torch.complex64).to(DEVICE)
    starts = [place * seq_len for place in places]
    slots = assert_gather_and_scatter_equal(tensors, freqs_cis, config, starts)
    scores = torch_ops.score(*tensors, config)
    assert torch.equal(triton_ops.select(scores, config, starts), slots)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TINY, *on_a_gpu((FULL[0],))], ids=str)
def test_runs_repeat_bitwise_and_write_every_element(shape, either_path, poisoned):
    tensors, freqs_cis, config = inputs_of(shape)
    first, second = (layer_and_gradients(tensors, config, freqs_cis, attention=attend) for _ in range(2))
    assert all(x.isfinite().all() for x in first)
    assert all(map(torch.equal, first, second))


@pytest.mark.slow
def test_strided_inputs_need_no_layout(triton_everywhere):
    (q, k, v), freqs_cis, config = inputs_of((3, 2, 2, 1, 3, 2, 2, 1, 8))
    fused = torch.cat([q, k, v], 2)  # heads of one projection side by side
    views = fused.split([q.shape[2], k.shape[2], v.shape[2]], 2)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = lighthouse_attention(q, k, v, config, freqs_cis=freqs_cis)
    table = torch.stack([freqs_cis, freqs_cis.conj()], -1).to(torch.complex128)[..., 0]
    for tensors, same_table in ((views, freqs_cis), (transposed, table)):
        assert torch.equal(lighthouse_attention(*tensors, config, freqs_cis=same_table), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "carry"), [(TINY, False), ((3, 2, 2, 1, 3, 2, 1, 2, 8), True)], ids=str)
def test_operators_are_well_formed_torch_library_operators(shape, carry):
    tensors, freqs_cis, config = inputs_of(shape, torch.bfloat16)
    q, k, _ = tensors
    n, levels, p = q.shape[1], config.levels, config.pooling_factor
    scores = triton_ops.score(*tensors, config)
    slots = triton_ops.select(scores, config)
    n_rows = config.gathered_len(n) + carry * (levels - 1)
    rows = torch.randn(q.shape[0], q.shape[2], n_rows, q.shape[3]).to(DEVICE)
    ops = torch.ops.lighthouse
    for op, args in [
        (ops.score.default, (q.detach(), k.detach(), levels, p)),
        (ops.select.default, (scores, n, levels, p, config.top_k, config.tile_winners, [0])),
        (ops.reduce.default, (q, slots, freqs_cis, config.gathered_len(n), levels, p, 0, "selected", False, [0])),
        (ops.spread.default, (rows.requires_grad_(), slots, None, n, levels, p, 1, "none", carry, [0])),
    ]:
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"])


@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_runs():
    done = call(sys.executable, "tests/helpers/compile_kernels.py", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


RETURNED = {r"\(1, 11, 2, 8\)": lambda x: x.transpose(1, 2), r"\(1, 2, 10, 8\)": lambda x: x[:, :, :-1]}
RETURNED |= {"tuple": lambda x: (x, None), "NoneType": lambda x: None}


@pytest.mark.parametrize("returned", RETURNED)
def test_what_attention_returns_is_checked(either_path, returned):
    (tensors, _, config), change = inputs_of(TINY), RETURNED[returned]
    expected = rf"returned {returned}: must return \[B, H, S, D\] = \(1, 2, 11, 8\)"
    with pytest.raises(ValueError, match=expected):
        lighthouse_attention(*tensors, config, attention=lambda *x, **kw: change(attend(*x, **kw)))


def test_output_and_gradients_keep_dtype_and_value_under_autocast(either_path):
    tensors, freqs_cis, config = inputs_of(TINY)
    seen = []

    def attention(*tensors, **kwargs):
        seen.append(causal_attention(*tensors, **kwargs))
        return seen[0]

    with torch.autocast(DEVICE, torch.bfloat16):
        ours = layer_and_gradients(tensors, config, freqs_cis, attention=attention)
    assert seen[0].dtype == torch.bfloat16 and {x.dtype for x in ours} == {torch.float32}
    assert_near(ours, layer_and_gradients(tensors, config, freqs_cis), torch.bfloat16)


@pytest.mark.slow
def test_attention_may_change_its_inputs_in_place(either_path):
    tensors, freqs_cis, config = inputs_of(TINY)

    def in_place(q, k, v, **kwargs):
        return attend(q.mul_(2), k.add_(1), v.neg_(), **kwargs)

    def by_copies(q, k, v, **kwargs):
        return attend(q * 2, k + 1, -v, **kwargs)

    ours, expected = (layer_and_gradients(tensors, config, freqs_cis, attention=f) for f in (in_place, by_copies))
    assert torch.equal(ours[0], expected[0])
    assert_near(ours, expected, torch.float32)  # on a GPU, attention's own backward pass does not repeat bitwise


@pytest.mark.slow
def test_forward_mode_differentiation_is_refused(triton_everywhere):
    (q, k, v), freqs_cis, config = inputs_of(TINY)
    one = torch.ones((), device=DEVICE)
    for function in (
        lambda x: lighthouse_attention(q * x, k, v, config),
        lambda x: lighthouse_attention(q, k, v * x, config),
        lambda x: lighthouse_attention(q, k, v, config, freqs_cis=freqs_cis * x),
        lambda x: lighthouse_attention(q, k, v, config, attention=lambda q, *_, **__: q * x),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (one,), (one,))


@pytest.mark.parametrize("rope", ["selected", "base"])
def test_an_empty_batch_gives_an_empty_output(either_path, rope):
    tensors, freqs_cis, config = inputs_of(TINY, rope=rope)
    out = lighthouse_attention(*(x[:0] for x in tensors), config, freqs_cis=freqs_cis)
    assert out.shape == (0, *tensors[0].shape[1:])
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.slow
def test_exports_with_a_dynamic_batch_and_length(either_path):
    shape = (3, 2, 2, 2, 3, 2, 1, 2, 8)
    (tensors, _, config), table = inputs_of(shape), rotary_table(1024, 8, torch.complex64).to(DEVICE)
    dims = {0: Dim("batch", max=9), 1: 8 * Dim("parts", min=3, max=128)}
    inputs = *(x.detach() for x in tensors), table
    program = export(LighthouseAttention(config), inputs, dynamic_shapes=(dims, dims, dims, None))
    others = qkv(64, 3, *shape[6:], torch.float32, 1, DEVICE)
    expected = LighthouseAttention(config)(*others, table)
    torch.testing.assert_close(program.module()(*others, table), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FULL, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer_equals_an_fp32_reference_at_full_size(shape, dtype, monkeypatch):
    tensors, freqs_cis, config = inputs_of(shape, dtype)
    ours = layer_and_gradients(tensors, config, freqs_cis, attention=attend)
    # rounding may move a selection
    slots = triton_ops.select(triton_ops.score(*tensors, config), config)
    monkeypatch.setattr(torch_ops, "select", lambda *_: slots)
    monkeypatch.setattr(layer, "ops_for", lambda _: torch_ops)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    assert_near(ours, layer_and_gradients(exact, config, freqs_cis, attention=attend), dtype)
