"""The model and the job files: one switch, one set of parameters."""

import dataclasses

import pytest
import torch
from helpers.launches import ROOT
from helpers.models import args, build
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.llama3 import Transformer, llama3_args

from torchtitan_ext.jobs.job_file import read_toml
from torchtitan_ext.lighthouse.scorers import SCORERS, Scorer
from torchtitan_ext.model import Lighthouse, flavors
from torchtitan_ext.model.loss import linear_cross_entropy_loss
from torchtitan_ext.model.model import meta_model

SMALL = Lighthouse(enable=True, levels=2, top_k=8, tile_winners=4)


def test_530m_is_the_published_model_and_270m_has_a_byte_vocabulary():
    model = meta_model(flavors["530M"])
    assert sum(p.numel() for p in model.parameters()) == 530_117_632
    assert {block.feed_forward.w1.out_features for block in model.layers.values()} == {1536}
    own = map(flavors.get, ("27M", "85M", "270M", "530M"))
    assert {(x.dim // x.n_heads, x.rope_theta) for x in own} == {(128, 10_000)}
    big, small = (dataclasses.asdict(flavors[name]) for name in ("530M", "270M"))
    assert {key: small[key] for key in big if big[key] != small[key]} == {"vocab_size": 384}


@pytest.mark.parametrize("fuse_output", [False, True])
def test_a_tied_weight_gets_the_gradients_of_embeddings_and_projection(fuse_output):
    tied, apart = (build(args(enable_weight_tying=tied, fuse_output=fuse_output)) for tied in (True, False))
    weights = tied.state_dict()
    assert "output.weight" not in weights and weights["tok_embeddings.weight"].std() < 0.3  # a projection's
    apart.load_state_dict(weights | {"output.weight": weights["tok_embeddings.weight"].clone()})
    tokens, loss_fn = torch.randint(0, 384, (2, 64)), linear_cross_entropy_loss if fuse_output else cross_entropy_loss
    losses = [loss_fn(model(tokens), tokens.roll(-1, 1)) for model in (tied, apart)]
    sum(losses).backward()
    assert losses[0] == losses[1]
    expected = apart.tok_embeddings.weight.grad + apart.output.weight.grad
    torch.testing.assert_close(tied.tok_embeddings.weight.grad, expected)
    counts = [model.model_args.get_nparams_and_flops(model, 64) for model in (tied, apart)]
    assert counts[0] == (counts[1][0] - 384 * 32, counts[1][1])


def test_1b_and_3b_are_as_large_as_llama_32_and_8b_is_torchtitans():
    sizes = [sum(p.numel() for p in meta_model(flavors[name]).parameters()) for name in ("1B", "3B")]
    assert sizes == [1_235_814_400, 3_212_749_824]
    rope = [(flavors[name].rope_theta, flavors[name].rope_scaling_args.scaling_factor) for name in ("1B", "3B")]
    assert rope == [(500_000, 32)] * 2
    for x in map(flavors.get, ("530M", "1B", "3B", "8B")):
        assert x.dense_layers == (0, 1, x.n_layers - 2, x.n_layers - 1)
    with torch.device("meta"):
        stock = Transformer(llama3_args["8B"])
    models = meta_model(flavors["8B"]), stock
    ours, theirs = ({name: weight.shape for name, weight in model.state_dict().items()} for model in models)
    assert ours == theirs


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_parameters_do_not_depend_on_the_switch(n_kv_heads):
    on, off = (build(args(n_kv_heads=n_kv_heads, **given)).state_dict() for given in ({"lighthouse": SMALL}, {}))
    assert list(on) == list(off) and all(map(torch.equal, on.values(), off.values()))


def test_switched_off_it_is_torchtitans_llama3():
    off, stock, tokens = build(args()), build(args(), Transformer), torch.randint(0, 384, (2, 64))
    assert torch.equal(off(tokens), stock(tokens))


@pytest.mark.parametrize("n_kv_heads, rope", [(None, "selected"), (2, "base")])
@pytest.mark.parametrize("dense_layers", [None, [], [0, 3], [0, 1, 2, 3]])
def test_exactly_the_layers_not_listed_as_dense_use_lighthouse_and_all_learn(dense_layers, n_kv_heads, rope):
    settings = dataclasses.replace(SMALL, dense_layers=dense_layers, rope=rope)
    model = build(args(n_kv_heads=n_kv_heads, lighthouse=settings, kernel="flash"))
    lengths = []
    for block in model.layers.values():
        block.attention.inner_attention.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    model(torch.randint(0, 384, (1, 64))).square().mean().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())
    dense = [0] if dense_layers is None else dense_layers
    assert lengths == [64 if layer in dense else SMALL.gathered_len(64) for layer in range(4)]
    assert {block.attention.inner_attention.kernel for block in model.layers.values()} == {"flash"}


@pytest.mark.parametrize("change", [{"attn_mask_type": "block_causal"}, {"attn_type": "flex"}])
def test_other_masks_and_attention_types_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        meta_model(args(**change))


def test_flops_count_the_pairs_that_each_layer_and_its_scorer_attend(monkeypatch):
    monkeypatch.setitem(SCORERS, "added", Scorer(lambda *_: None, lambda n, d, _: 8 * d * n))

    def keys(**section):
        """Keys a token pays for in all layers; each costs 6 * 2 * dim FLOPs."""
        model_args = args(lighthouse=dataclasses.replace(SMALL, **section))
        model = meta_model(model_args)
        weights = 6 * sum(p.numel() for p in model.parameters() if p is not model.tok_embeddings.weight)
        return (model_args.get_nparams_and_flops(model, 64)[1] - weights) / (12 * model_args.dim)

    n_layers, lighthouse = args().n_layers, SMALL.gathered_len(64) ** 2 / 64 / 2
    assert keys(enable=False) == n_layers * 32  # causal: half of the 64 x 64 pairs
    assert keys(dense_layers=list(range(n_layers))) == n_layers * 32
    assert keys(dense_layers=[]) == pytest.approx(n_layers * lighthouse)
    assert keys(dense_layers=[1]) == pytest.approx(32 + (n_layers - 1) * lighthouse)
    # A scorer attends twice, forward only, which is a third of a step: half of a residue class, or a [D, D] state.
    state = args().dim // args().n_heads
    for scorer, dilation, scored in (("dilated", 1, 32), ("dilated", 4, 8), ("gla", 4, state), ("added", 4, 64)):
        more = keys(dense_layers=[], scorer=scorer, dilation=dilation) - keys(dense_layers=[])
        assert more == pytest.approx(n_layers * 2 * scored / 3)


@pytest.mark.parametrize("recipe", sorted(path.parent.name for path in ROOT.glob("configs/*/stage1.toml")))
def test_the_stages_differ_only_where_they_must(recipe):
    def settings(stage):
        sections = read_toml(ROOT / f"configs/{recipe}/{stage}.toml").items()
        return {(f"{section}.{field}", repr(value)) for section, fields in sections for field, value in fields.items()}

    stage1, stage2, dense = map(settings, ("stage1", "stage2", "dense"))
    initial_load = {"checkpoint.initial_load_path", "checkpoint.initial_load_model_only"}
    initial_load |= {"checkpoint.initial_load_in_hf"} & dict(stage1).keys()
    switched = {"lighthouse.enable", "training.steps", "job.dump_folder"}
    switched |= {"activation_checkpoint.mode"} if recipe == "530m-1m" else set()  # dense attention's outputs are longer
    assert {field for field, _ in stage1 ^ stage2} == initial_load | switched
    assert {field for field, _ in stage2 ^ dense} == initial_load | {"job.dump_folder"}
