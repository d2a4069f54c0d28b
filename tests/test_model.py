"""The model and the job files: one switch, one set of parameters."""

import dataclasses
import importlib
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launches import start_ranks
from torchtitan.components.metrics import LoggerContainer, MetricsProcessor, TensorBoardLogger
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as TorchtitanJobConfig
from torchtitan.config.job_config import Job, Metrics
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_ext.model import Lighthouse, LighthouseTransformer, flavors
from torchtitan_ext.model.train_spec import LighthouseMetricsProcessor, LighthouseValidator

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for path in sorted(ROOT.glob("configs/*/*.toml"))
    if path.stem != "ablations"  # a grid, no job
]
SMALL = Lighthouse(enable=True, levels=2, top_k=8, tile_winners=4)


def parse(path, *overrides):
    return ConfigManager().parse_args(["--job.config_file", str(path), *overrides])


def args(**changes):
    small = {"dim": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "dense_layers": (0,)}
    return dataclasses.replace(flavors["debug"], **small | changes)


def build(model_args, model_cls=LighthouseTransformer, device="cpu"):
    with torch.device("meta"):
        model = model_cls(model_args)
    if device == "meta":
        return model
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model


def test_530m_has_the_published_number_of_parameters():
    model = build(flavors["530M"], device="meta")
    assert sum(p.numel() for p in model.parameters()) == 530_117_632
    assert {block.feed_forward.w1.out_features for block in model.layers.values()} == {1536}
    assert model.model_args.dense_layers == (0, 1, 28, 29)


def test_270m_is_530m_with_a_byte_vocabulary():
    big, small = (dataclasses.asdict(flavors[name]) for name in ("530M", "270M"))
    assert {key for key in big if big[key] != small[key]} == {"vocab_size"}
    vocab = small["vocab_size"]
    assert vocab >= 256 and vocab % 128 == 0


def test_8b_is_torchtitans():
    ours = build(flavors["8B"], device="meta").state_dict()
    with torch.device("meta"):
        theirs = Transformer(llama3_args["8B"]).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_parameters_do_not_depend_on_the_switch(n_kv_heads):
    on = build(args(n_kv_heads=n_kv_heads, lighthouse=SMALL))
    off = build(args(n_kv_heads=n_kv_heads))
    assert list(on.state_dict()) == list(off.state_dict())
    for name, weight in on.state_dict().items():
        assert torch.equal(weight, off.state_dict()[name]), name


def test_switched_off_it_is_torchtitans_llama3():
    tokens = torch.randint(0, 384, (2, 64))
    off, stock = build(args()), build(args(), Transformer)
    assert torch.equal(off(tokens), stock(tokens))


@pytest.mark.parametrize("dense_layers", [None, [], [0, 3], [0, 1, 2, 3]])
def test_exactly_the_layers_not_listed_as_dense_use_lighthouse(dense_layers, monkeypatch):
    model = build(args(lighthouse=dataclasses.replace(SMALL, dense_layers=dense_layers)))
    gathered = {}
    for name, block in model.layers.items():
        block.attention.inner_attention.register_forward_hook(
            lambda _, inputs, __, name=name: gathered.update({int(name): inputs[0].shape[2]})
        )
    model(torch.randint(0, 384, (1, 64)))
    dense = [0] if dense_layers is None else dense_layers
    lengths = {layer: 64 if layer in dense else SMALL.gathered_len(64) for layer in range(4)}
    assert gathered == lengths


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("rope", ["selected", "base"])
def test_every_parameter_gets_a_gradient(n_kv_heads, rope):
    model = build(
        args(n_kv_heads=n_kv_heads, lighthouse=dataclasses.replace(SMALL, rope=rope)),
    )
    model(torch.randint(0, 384, (2, 64))).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


@pytest.mark.parametrize("change", [{"attn_mask_type": "block_causal"}, {"attn_type": "flex"}])
def test_other_masks_and_attention_types_are_refused_with_lighthouse_only(change):
    build(args(**change), device="meta")
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        build(args(**change, lighthouse=SMALL), device="meta")


def test_flops_count_the_pairs_that_each_layer_attends():
    def keys(**section):
        """Keys a token pays for in all layers; each costs 6 * 2 * dim FLOPs."""
        model_args = args(lighthouse=dataclasses.replace(SMALL, **section))
        model = build(model_args, device="meta")
        weights = 6 * sum(p.numel() for p in model.parameters())
        weights -= 6 * model.tok_embeddings.weight.numel()
        return (model_args.get_nparams_and_flops(model, 64)[1] - weights) / (12 * model_args.dim)

    n_layers, lighthouse = args().n_layers, SMALL.gathered_len(64) ** 2 / 64 / 2
    assert keys(enable=False) == n_layers * 32  # causal: half of the 64 x 64 pairs
    assert keys(dense_layers=list(range(n_layers))) == n_layers * 32
    assert keys(dense_layers=[]) == pytest.approx(n_layers * lighthouse)
    assert keys(dense_layers=[1]) == pytest.approx(32 + (n_layers - 1) * lighthouse)


@pytest.mark.parametrize(("scorer", "dilation"), [("dilated", 1), ("dilated", 4), ("gla", 4)])
def test_flops_count_what_the_scorer_attends(scorer, dilation):
    def flops(seq_len, **section):
        model_args = args(lighthouse=dataclasses.replace(SMALL, dense_layers=[], **section))
        return model_args.get_nparams_and_flops(build(model_args, device="meta"), seq_len)[1]

    def of_scorer(seq_len):
        scored = flops(seq_len, scorer=scorer, dilation=dilation)
        return seq_len * (scored - flops(seq_len, scorer="norm"))

    # Matrix products of one head of one layer, forward: two attentions, each of the logits and of the output.
    n, d = 64, args().dim // args().n_heads
    if scorer == "dilated":
        products = 2 * dilation * 2 * (2 * (n // dilation) ** 2 * d) / 2
        assert of_scorer(2 * n) == pytest.approx(4 * of_scorer(n), rel=1e-3)
    else:
        products = 2 * n * 2 * (2 * d * d)  # a token enters the state, and reads it
        assert of_scorer(2 * n) == pytest.approx(2 * of_scorer(n), rel=1e-3)
    assert of_scorer(n) == pytest.approx(args().n_layers * args().n_heads * products, rel=1e-3)


def test_importing_registers_the_model_once():
    spec = get_train_spec("llama3_lighthouse")
    for module in ("torchtitan_ext.model.config", "torchtitan_ext.model"):
        importlib.import_module(module)
    assert get_train_spec("llama3_lighthouse") is spec
    assert spec.model_cls is LighthouseTransformer


def test_every_setting_can_be_given_on_the_command_line():
    stage1 = ROOT / "configs/demo/stage1.toml"
    for field in dataclasses.fields(Lighthouse):
        value = {
            "levels": 2,
            "pooling_factor": 2,
            "top_k": 32,
            "scorer": "dilated",
            "dilation": 8,
            "rope": "base",
            "tile_winners": 8,
            "enable": False,
            "dense_layers": [0, 3],
        }[field.name]
        option = f"--lighthouse.{field.name}"
        if value is False:
            given = ["--lighthouse.no_enable"]
        elif isinstance(value, list):
            given = [option, *map(str, value)]
        else:
            given = [option, str(value)]
        assert getattr(parse(stage1).lighthouse, field.name) != value
        assert getattr(parse(stage1, *given).lighthouse, field.name) == value
    off = ROOT / "configs/demo/stage2.toml"
    assert parse(off, "--lighthouse.enable").lighthouse.enable


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_job_file_builds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = parse(path)
    assert Path(job.model.hf_assets_path).is_dir()
    spec = get_train_spec(job.model.name)
    model_args = dataclasses.replace(spec.model_args[job.model.flavor])
    model_args.update_from_config(job)
    model = build(model_args, spec.model_cls, "meta")
    assert job.lighthouse.enable == bool(model_args.lighthouse_layers)
    if job.lighthouse.enable:
        job.lighthouse.check_seq_len(job.training.seq_len)
    assert model_args.get_nparams_and_flops(model, job.training.seq_len)[1] > 0


def settings(path):
    sections = tomllib.loads(path.read_text())
    return {f"{name}.{key}": v for name, keys in sections.items() for key, v in keys.items()}


def differing(a, b):
    a, b = settings(a), settings(b)
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


@pytest.mark.parametrize("recipe", ["530m", "530m-256k", "530m-1m", "small", "demo"])
def test_the_stages_differ_only_where_they_must(recipe):
    stage1, stage2, dense = (
        ROOT / "configs" / recipe / f"{name}.toml" for name in ("stage1", "stage2", "dense")
    )
    initial_load = {"checkpoint.initial_load_path", "checkpoint.initial_load_model_only"}
    assert differing(stage1, stage2) == initial_load | {
        "lighthouse.enable",
        "training.steps",
        "job.dump_folder",
    }
    assert differing(stage2, dense) == initial_load | {"job.dump_folder"}
    path = settings(stage2)["checkpoint.initial_load_path"]
    assert path.startswith(settings(stage1)["job.dump_folder"] + "/checkpoint/step-")
    step = int(path.rpartition("-")[2])
    saved = range(
        0, settings(stage1)["training.steps"] + 1, settings(stage1)["checkpoint.interval"]
    )
    assert step in saved[-settings(stage1)["checkpoint.keep_latest_k"] :]


def test_a_full_disk_is_named_by_the_log_too(tmp_path, monkeypatch):
    processor = object.__new__(LighthouseMetricsProcessor)
    processor.job_config = TorchtitanJobConfig(job=Job(dump_folder=str(tmp_path)))
    processor.parallel_dims, processor.constants = SimpleNamespace(cp=1), {}
    processor.logger = LoggerContainer()
    processor.logger.add_logger(TensorBoardLogger(str(tmp_path)))
    loss = {"loss": 1.0}
    monkeypatch.setattr(MetricsProcessor, "log", lambda self, step, *_: self.logger.log(loss, step))
    processor.log(1, 1.0, 1.0, 1.0)
    [events] = tmp_path.glob("*tfevents*")
    events.unlink()
    events.symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=rf"step 2 could not .*{tmp_path}: .*No space left"):
        processor.log(2, 1.0, 1.0, 1.0)


def test_the_first_step_of_every_process_is_logged():
    processor = object.__new__(LighthouseMetricsProcessor)
    processor.first_step = True
    processor.job_config = TorchtitanJobConfig(metrics=Metrics(log_freq=10))
    assert [step for step in range(101, 121) if processor.should_log(step)] == [101, 110, 120]


def validators(rank, n_ranks, store):
    """What a rank validates on, to the end of its documents, of which the ranks have different numbers."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    unused = ("parallel_dims", "loss_fn", "validation_context", "maybe_enable_amp")
    unused = dict.fromkeys((*unused, "metrics_processor"))

    def batches(*overrides):
        job = parse("configs/demo/dense.toml", "--validation.enable", *overrides)
        source = n_ranks, rank, build_hf_tokenizer(job)
        return LighthouseValidator(job, *source, **unused).validation_dataloader

    sources = "--validation.dataset=python_source_validation", "--validation.steps=-1"
    n_batches = [None] * n_ranks
    dist.all_gather_object(n_batches, len(batches(*sources, "--validation.seq_len=4096")))
    assert n_batches[0] == n_batches[1] > 1
    longer = "--training.seq_len=1048576", "--validation.seq_len=1048576"
    with pytest.raises(ValueError, match=r"validation\.dataset = .*not one sequence of 1048576"):
        batches(*sources, *longer)
    passkey = "--validation.dataset=passkey", "--validation.dataset_path=511"
    [(_, labels)] = batches(*passkey, "--validation.steps=1", "--validation.seq_len=512")
    assert 0 < (labels != -100).float().mean() < 0.05  # the answers alone, as in training
    dist.barrier()
    os._exit(0)  # past the interpreter's end, gloo's threads may abort the process


def test_ranks_validate_on_as_many_batches_each_and_on_what_training_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    start_ranks(validators, 2, tmp_path / "store")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_patched_rope_is_the_complex_product(dtype):
    """Patched to real arithmetic, with and without given positions."""
    g = torch.Generator().manual_seed(0)
    xq, xk = (torch.randn(2, 16, heads, 8, generator=g).to(dtype) for heads in (4, 2))
    table = precompute_freqs_cis(8, 32)
    positions = torch.randperm(32, generator=g)[:16].expand(2, -1)
    for given, rows in ((None, table[:16]), (positions, table[positions[0]])):
        for x, got in zip((xq, xk), apply_rotary_emb(xq, xk, table, given), strict=True):
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
            expected = torch.view_as_real(pairs * rows[:, None].to(torch.complex128)).flatten(-2)
            assert got.dtype == dtype
            assert (got - expected).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 2e-2}[
                dtype
            ]
