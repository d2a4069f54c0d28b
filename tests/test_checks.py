"""A job that can't run, or would lose state in silence, stops before anything is built."""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import train
from safetensors.torch import save_file
from test_data import LAYOUTS, write_bpe
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import ConfigManager
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec
from transformers import LlamaConfig

import torchtitan_ext.model
from torchtitan_ext.model import LighthouseTransformer, check_job, flavors
from torchtitan_ext.model.checkpoints import (
    checkpoint_to_load,
    complete_metadata,
    excluded_states,
)
from torchtitan_ext.model.checks import parallel_dims
from torchtitan_ext.model.hf_config import llama_config
from torchtitan_ext.patching import NotPatched

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Parses a job file of the demo with overrides, in a fresh dump folder; legal by itself."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def parse(*overrides, stage="stage1", dump="run", file=None):
        file = f"--job.config_file={file or ROOT / f'configs/demo/{stage}.toml'}"
        return ConfigManager().parse_args(
            [file, f"--job.dump_folder={tmp_path / dump}", *overrides]
        )

    return parse


def save(folder, step=10, degree=1, without=(), rate=None, **changes):
    """A checkpoint of a model like the demo's, with the keys of torchtitan's; returns its path."""
    group = {"initial_lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group["decoupled_weight_decay"] = True
    rate = rate or 1e-2 * min(1, (step + 1) / 40)
    weights = LighthouseTransformer(replace(flavors["debug"], **changes)).state_dict()
    states = {
        **weights,
        "optimizer": {
            "state.output.weight.exp_avg": torch.zeros(4, 4),
            **{f"param_groups.output.weight.{name}": value for name, value in group.items()},
        },
        "lr_scheduler": {"last_epoch": step, "base_lrs": [1e-2], "_last_lr": [rate]},
        "dataloader": {f"dp_rank_{rank}": pickle.dumps({}) for rank in range(degree)},
        "train_state": {"step": step},
    }
    path = Path(folder) / "checkpoint" / f"step-{step}"
    states = {key: value for key, value in states.items() if key not in without}
    dcp.save(states, checkpoint_id=path, no_dist=True)
    return path


def start_from(path):
    return f"--checkpoint.initial_load_path={path}", "--checkpoint.no_initial_load_model_only"


def start(config):
    """What a launch does before it builds anything but a tokenizer."""
    return get_train_spec("llama3_lighthouse").build_tokenizer_fn(config)


def problems(config):
    with pytest.raises(ValueError) as error:
        check_job(config)
    return str(error.value).split("\n- ")[1:]


def only_problem(config, *words):
    [problem] = problems(config)
    for word in words:
        assert str(word) in problem
    return problem


@pytest.mark.parametrize(
    ("section", "setting", "kind"),
    [
        ("lighthouse", "enable = 'false'", "bool"),
        ("lighthouse", "dense_layers = 0", "list[int] | None"),
        ("lighthouse", "dense_layers = [0, 0.5]", "list[int] | None"),
        ("training", "steps = '240'", "int"),
        ("training", "dataset_path = 1", "str | None"),
        ("training.dataloader", "num_workers = 1.0", "int"),
        ("optimizer", "lr = '2e-3'", "float"),
        (
            "checkpoint",
            "async_mode = 'asink'",
            "Literal['disabled', 'async', 'async_with_pinned_mem']",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The field")
def test_a_value_of_another_type_is_an_error(job, tmp_path, section, setting, kind):
    """A launch by torchrun parses a job file as here: torchtitan's parser warns at most."""
    text = (ROOT / "configs/demo/stage1.toml").read_text()
    field = setting.split(" ")[0]
    text = re.sub(rf"^{field} = .*", "", text, flags=re.MULTILINE)
    head, found, tail = text.partition(f"[{section}]\n")
    text = f"{head}{found}{setting}\n{tail}" if found else f"{text}\n[{section}]\n{setting}\n"
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        check_job(job(file=tmp_path / "job.toml"))
    assert f"{setting}: must be of type {kind}" in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        *("job.dump_folder", "checkpoint.folder", "checkpoint.initial_load_path"),
        *("model.hf_assets_path", "training.dataset_path", "metrics.save_tb_folder"),
    ],
)
@pytest.mark.parametrize("path", ["s3://bucket/run", "gs:/bucket", "hf://datasets/me/mine"])
def test_a_path_with_a_scheme_is_refused(job, field, path):
    only_problem(job(f"--{field}={path}"), f"{field} = '{path}' is no path on this machine: mount")


def test_a_launch_into_a_path_with_a_scheme_makes_no_folder_of_that_name():
    good, output = train(
        1, ["--job.config_file=configs/demo/dense.toml", "--job.dump_folder=s3://b/c"]
    )
    assert not good and "job.dump_folder = 's3://b/c' is no path on this machine" in output
    assert not (ROOT / "s3:").exists()


@pytest.mark.parametrize(
    ("environment", "netrc", "words"),
    [
        ({}, "", "set WANDB_API_KEY"),
        ({"WANDB_API_KEY": "0" * 39}, "", "no whole API key"),
        ({"WANDB_MODE": "offlin"}, "", "'offlin'"),
        ({"WANDB_API_KEY": "0" * 40}, "", None),
        ({"WANDB_MODE": "offline"}, "", None),
        ({}, "machine api.wandb.ai login user password 0", None),
    ],
)
def test_weights_and_biases_must_be_able_to_start(
    job, tmp_path, monkeypatch, environment, netrc, words
):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_job(job())
    config = job("--metrics.enable_wandb")
    if words:
        only_problem(config, "metrics.enable_wandb = true", words)
    else:
        check_job(config)


def test_an_unpatched_torchtitan_is_refused(job, monkeypatch):
    monkeypatch.setattr("torchtitan_ext.patching.is_patched", lambda root: False)
    words = "is not patched: python -m torchtitan_ext.patching apply"
    only_problem(job(), words)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(NotPatched, match=words):
        importlib.reload(torchtitan_ext.model)


def test_a_good_job_passes_without_a_word(job, tmp_path, caplog):
    for stage in ("stage1", "dense"):
        check_job(job(stage=stage))
    check_job(job(*start_from(save(tmp_path / "old")), stage="stage2"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("--training.seq_len 4100", ["[training]", "seq_len = 4100"]),
        ("--training.seq_len 512", ["[training]", "top_k = 64", "seq_len = 512"]),
        ("--lighthouse.top_k 512", ["top_k = 512", "seq_len = 4096"]),
        (
            "--lighthouse.levels 2 --lighthouse.top_k 768 --lighthouse.tile_winners 48",
            ["top_k = 768", "gathers 4096 rows", "seq_len = 4096"],
        ),
        (
            "--lighthouse.scorer dilated --lighthouse.dilation 3",
            ["[training]", "dilation = 3", "seq_len = 4096", "dilation = 2 or 4"],
        ),
        ("--lighthouse.dense_layers 0 2", ["lighthouse.dense_layers = [0, 2]", "0 to 1"]),
        ("--lighthouse.dense_layers -1", ["lighthouse.dense_layers = [-1]", "0 to 1"]),
        ("--model.flavor 7B", ["model.flavor = '7B'", ", ".join(flavors)]),
        (
            "--model.hf_assets_path nowhere",
            ["model.hf_assets_path = 'nowhere'", "tokenizer.json", ROOT],
        ),
        ("--model.hf_assets_path tests", ["model.hf_assets_path = 'tests'", "tokenizer.json"]),
        (
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option all",
            ["activation_checkpoint.selective_ac_option = 'all'", "'op'"],
        ),
        ("--training.dataset books", ["books"]),
        ("--training.dataset_path nowhere", ["nowhere"]),
        ("--validation.enable --validation.dataset books", ["validation.dataset = 'books'"]),
        ("--validation.enable --validation.seq_len 100", ["[validation]", "seq_len = 100"]),
        (
            "--parallelism.context_parallel_degree 2 --lighthouse.top_k 64"
            " --parallelism.context_parallel_load_balancer headtail --lighthouse.tile_winners 32",
            [
                "top_k = 64",
                "32 x 4 = 128",
                "degree of 2",
                "nearest: top_k = 128 or 256;",
                "context_parallel_degree = 1",
            ],
        ),
        (
            "--parallelism.context_parallel_degree 4 --parallelism.context_parallel_rotate_method alltoall"
            " --lighthouse.top_k 96 --training.seq_len 6144",
            ["top_k = 96", "16 x 4 = 64", "top_k = 64 or 128;", "degree = 1 or 2 or 3 or 6"],
        ),
        (
            "--parallelism.context_parallel_degree 4 --lighthouse.no_enable",
            ["context_parallel_degree = 4", "2 heads and 2 KV heads", "1, 2", "'alltoall'"],
        ),
        (
            "--parallelism.context_parallel_degree 2 --parallelism.tensor_parallel_degree 4",
            ["tensor_parallel_degree = 4", "2 heads and 2 KV heads", "1, 2"],
        ),
        (
            "--parallelism.context_parallel_degree 2 --lighthouse.scorer gla",
            ["scorer = 'gla'", "degree of 2", "'norm'"],
        ),
        (
            "--parallelism.context_parallel_degree 2 --parallelism.context_parallel_load_balancer ptrr"
            " --lighthouse.no_enable",
            ["context_parallel_load_balancer = 'ptrr'", "'headtail'"],
        ),
        (
            "--parallelism.context_parallel_degree 2 --lighthouse.no_enable --compile.enable"
            " --parallelism.context_parallel_rotate_method alltoall",
            ["context_parallel_rotate_method = 'alltoall'", "load_balancer to 'headtail'"],
        ),
        ("--checkpoint.load_step 10", ["checkpoint.load_step = 10", "-1"]),
        (
            "--checkpoint.no_enable --checkpoint.initial_load_path x",
            ["checkpoint.initial_load_path = 'x'", "checkpoint.enable = false"],
        ),
        (
            "--checkpoint.last_save_model_only",
            ["checkpoint.last_save_model_only = true", "set it to false"],
        ),
        ("--training.steps -1", ["training.steps = -1", "0 or more"]),
        ("--training.local_batch_size 0", ["training.local_batch_size = 0", "1 or more"]),
        ("--lighthouse.no_enable --training.seq_len 0", ["training.seq_len = 0", "1 or more"]),
        ("--training.gc_freq 0", ["training.gc_freq = 0", "1 or more"]),
        ("--metrics.log_freq 0", ["metrics.log_freq = 0", "1 or more"]),
        ("--validation.enable --validation.freq 0", ["validation.freq = 0", "1 or more"]),
        (
            "--validation.enable --validation.seq_len 8192",
            ["validation.seq_len = 8192", "training.seq_len = 4096"],
        ),
        ("--checkpoint.interval 0", ["checkpoint.interval = 0", "1 or more"]),
        ("--checkpoint.keep_latest_k 1", ["checkpoint.keep_latest_k = 1", "2 or more"]),
        ("--checkpoint.exclude_from_loading dataloder", ["dataloder", "dataloader, lr_scheduler"]),
        (
            "--checkpoint.last_save_in_hf",
            ["checkpoint.last_save_in_hf = true", "scripts/export_hf.py"],
        ),
        (
            "--training.dataloader.prefetch_factor 0",
            ["training.dataloader.prefetch_factor = 0", "1 or more"],
        ),
        ("--training.dataloader.num_workers 2", ["training.dataloader.num_workers = 2", "0 or 1"]),
        (
            "--validation.enable --validation.dataloader.num_workers 2",
            ["validation.dataloader.num_workers = 2", "0 or 1"],
        ),
        ("--optimizer.name SGD", ["[optimizer]", "SGD"]),
        ("--optimizer.beta2 2", ["[optimizer]", "2.0"]),
        ("--activation_checkpoint.mode memory_budget", ["memory_budget", "compile.enable"]),
        ("--compile.enable --compile.backend gcc", ["compile.backend = 'gcc'", "inductor"]),
        (
            "--profiling.enable_profiling --profiling.profile_freq 3",
            ["profiling.profile_freq = 3", "4 or more"],
        ),
    ],
)
def test_each_problem_is_named_with_its_value_and_remedy(job, overrides, words):
    extra = ["--validation.dataset=python_source", "--validation.seq_len=4096"]
    only_problem(job(*extra, *overrides.split()), *words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", 1),
        ("pooling_factor", 3),
        ("top_k", 100),
        ("tile_winners", 5),
        ("scorer", "random"),
        ("rope", "later"),
    ],
)
def test_a_setting_that_is_never_legal_stops_the_parsing(job, tmp_path, capsys, field, value):
    with pytest.raises(SystemExit) as stop:
        job(f"--lighthouse.{field}={value}")
    assert stop.value.code != 0
    assert f"{field} = {value!r}" in capsys.readouterr().err

    file = tmp_path / "job.toml"
    file.write_text(
        '[job]\ncustom_config_module = "torchtitan_ext.model.config"\n'
        f"[lighthouse]\n{field} = {value!r}\n"
    )
    with pytest.raises(ValueError, match=f"{field} = {value!r}"):
        ConfigManager().parse_args(["--job.config_file", str(file)])


def test_every_problem_is_reported_at_once(job):
    config = job(
        "--training.seq_len=4100",
        "--training.dataset=books",
        "--model.hf_assets_path=nowhere",
        "--lighthouse.dense_layers=9",
        "--checkpoint.last_save_model_only",
        *start_from("gone"),
    )
    assert len(problems(config)) == 6


def test_a_tokenizer_must_fit_the_embeddings(job, tmp_path):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(1000)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    only_problem(job(f"--model.hf_assets_path={tmp_path}"), "model.hf_assets_path", "to 999", "384")
    few = {"a": 0, "b": 384}  # fewer tokens than embeddings, but one beyond them
    Tokenizer(models.WordLevel(few, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    only_problem(job(f"--model.hf_assets_path={tmp_path}"), "model.hf_assets_path", "to 384", "384")


def test_a_tokenizer_must_keep_documents_apart_whatever_they_spell(job, tmp_path):
    from tokenizers import models, pre_tokenizers

    config = job(f"--model.hf_assets_path={tmp_path}")
    for layout in LAYOUTS.values():
        plain = write_bpe(tmp_path, layout)
        check_job(config)
    for without in ({}, {"pad_token": "<pad>"}, {"eos_token": None}):
        write_bpe(tmp_path, without)
        only_problem(
            config, f"hf_assets_path = '{tmp_path}'", "run into each other", "eos_token in"
        )
    (tmp_path / "tokenizer_config.json").unlink()
    only_problem(config, "run into each other")

    write_bpe(tmp_path, LAYOUTS["two tokens"] | {"unk_token": "<unk>"})
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    for score in (0.0, -99.0):
        pieces = [("<unk>", 0.0), ("<s>", score), ("</s>", score), *((c, -9.0) for c in "</s>▁")]
        plain.model = models.Unigram(pieces, 0)
        plain.add_special_tokens(["<unk>", "<s>", "</s>"])
        plain.save(str(tmp_path / "tokenizer.json"))
        if score == 0.0:
            only_problem(config, "hf_assets_path", "spells <s> or </s>", "lower its score")
    check_job(config)


def test_a_tokenizer_that_changes_documents_or_cannot_be_built_is_named(job, tmp_path):
    whole = json.loads(Path("torchtitan_ext/data/byte_tokenizer/tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    config = job(f"--model.hf_assets_path={tmp_path}")
    shutil.copy("torchtitan_ext/data/byte_tokenizer/tokenizer_config.json", tmp_path)
    for change, words in [
        ({}, None),
        ({"truncation": cut}, "sets truncation"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "no tokenizer"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        if words:
            only_problem(config, "model.hf_assets_path", words)
        else:
            check_job(config)


def from_hugging_face(folder):
    """The settings of a launch from weights of the demo's flavor, which it writes to the folder."""
    state = LighthouseTransformer(flavors["debug"]).state_dict()
    state = Llama3StateDictAdapter(flavors["debug"], None).to_hf(state)
    save_file(state, folder / "model.safetensors")
    return f"--checkpoint.initial_load_path={folder}", "--checkpoint.initial_load_in_hf"


def test_weights_of_hugging_face_must_be_there_whole_and_of_this_model(job, tmp_path):
    def start(*changes, folder=tmp_path):
        start = [f"--checkpoint.initial_load_path={folder}", "--checkpoint.initial_load_in_hf"]
        return job(*start, *changes)

    field = "checkpoint.initial_load_path = "
    only_problem(start(folder=tmp_path / "gone"), field, "gone", "no *.safetensors")
    only_problem(job("--checkpoint.initial_load_in_hf"), "model.hf_assets_path", "no *.safetensors")
    from_hugging_face(tmp_path)
    file = tmp_path / "model.safetensors"
    check_job(start())
    only_problem(
        start("--checkpoint.no_initial_load_model_only"), "weights alone", "set it to true"
    )
    only_problem(start("--model.flavor=27M"), tmp_path, "model.flavor = '27M'", "[384, 64] there")
    file.write_bytes(file.read_bytes()[:-1])
    only_problem(start(), field, file, "can't be read")
    save_file({"lm_head.weight": torch.zeros(384, 64)}, file)
    only_problem(start(), tmp_path, "is not there")


def rope(**changes):
    return {"rope_scaling": llama_config(flavors["debug"])["rope_scaling"] | changes}


@pytest.mark.parametrize("spelling", ["exported", "transformers"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"max_position_embeddings": 1, "torch_dtype": "bfloat16"}, None),
        ({"rope_theta": 5e5}, ["rope_theta is 500000.0 there and 10000 here"]),
        ({"rope_scaling": None}, ["rope_scaling is None there and {'rope_type': 'llama3'"]),
        (rope(factor=32.0), ["'factor': 32.0", "'factor': 8.0"]),
        (rope(original_max_position_embeddings=4096), ["4096", "8192"]),
        ({"rms_norm_eps": 1e-6}, ["rms_norm_eps is 1e-06 there and 1e-05 here"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu' there"]),
        ({"attention_bias": True}, ["attention_bias is True there"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings is True there"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}, ["_heads is 4"]),
    ],
)
def test_weights_of_hugging_face_must_be_of_a_model_that_computes_the_same(
    job, tmp_path, changes, words, spelling
):
    """Where their config.json says so, in either spelling of RoPE: the shapes are the same."""
    start, config = from_hugging_face(tmp_path), llama_config(flavors["debug"]) | changes
    if spelling == "transformers":
        LlamaConfig(**config).save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if words is None:
        check_job(job(*start))
    else:
        only_problem(job(*start), tmp_path / "config.json", "model.flavor = 'debug'", *words)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rope_scaling": "llama3"}', "{}", '{"model_type": "qwen2"}']
)
def test_a_config_that_is_no_llamas_is_named(job, tmp_path, text):
    start = from_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text(text)
    only_problem(job(*start), tmp_path / "config.json")


def test_the_section_is_missed_when_its_module_is_not_named():
    with pytest.raises(ValueError, match=r"job.custom_config_module.*torchtitan_ext.model.config"):
        check_job(ConfigManager().parse_args([]))


def test_the_train_spec_checks_before_it_builds_or_saves(job, tmp_path):
    with pytest.raises(ValueError, match="seq_len = 4100"):
        start(job("--training.seq_len=4100"))
    assert not (tmp_path / "run").exists()
    assert start(job()).get_vocab_size() >= 256
    saved = {path.name: path.read_text() for path in tmp_path.glob("run/*")}
    assert sorted(saved) == ["checkpoint.lock", "config.json", "run.lock"]
    with pytest.raises(ValueError, match="seq_len = 4100"):
        start(job("--training.seq_len=4100"))
    assert {path.name: path.read_text() for path in tmp_path.glob("run/*")} == saved


def test_lighthouse_rules_do_not_bind_a_dense_job(job):
    check_job(job("--training.seq_len=4100", stage="dense"))
    check_job(job("--checkpoint.last_save_model_only", stage="dense"))


# The four ways in which torchtitan drops state in silence.


def test_a_dropped_optimizer_is_an_error(job, tmp_path):
    path = save(tmp_path / "old")
    config = job(f"--checkpoint.initial_load_path={path}", "--checkpoint.initial_load_model_only")
    only_problem(config, "checkpoint.initial_load_model_only = true", "set it to false")
    excluded = "--checkpoint.exclude_from_loading=optimizer,lr_scheduler,dataloader,train_state"
    save(tmp_path / "weights", without=("optimizer", "lr_scheduler", "dataloader", "train_state"))
    check_job(job(*start_from(tmp_path / "weights/checkpoint/step-10"), excluded))


def test_a_step_to_load_of_a_run_that_is_not_there_is_an_error(job, tmp_path):
    config = job(*start_from(save(tmp_path / "old")), "--checkpoint.load_step=5")
    only_problem(
        config,
        "checkpoint.load_step = 5",
        "-1 to start from checkpoint.initial_load_path",
    )


def test_an_ignored_initial_checkpoint_is_an_error(job, tmp_path):
    old, other = save(tmp_path / "old"), save(tmp_path / "other")
    config, own = job(*start_from(old)), tmp_path / "run" / "checkpoint"
    start(config)
    start(config)  # killed before its first checkpoint

    own.mkdir()
    only_problem(config, "checkpoint.initial_load_path", old, f"delete {own}")
    (own / "step-20").mkdir()  # killed while its first checkpoint was written
    only_problem(config, "checkpoint.initial_load_path", old, f"delete {own}")

    save(tmp_path / "run", step=20)
    check_job(config)  # continues the run that it started
    only_problem(job(*start_from(other)), other, f"started from {old}", "job.dump_folder")
    only_problem(job(), f"started from {old}", f"set it to {old}")


def test_a_run_whose_folder_was_moved_goes_on_as_it_would_have_there(job, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    old, other = save(tmp_path / "outputs/stage1"), save(tmp_path / "other")
    start(job(*start_from(old), dump="outputs/whole"))
    save(tmp_path / "outputs/whole", step=20)
    without_data = "--checkpoint.exclude_from_loading=dataloader"
    start(job(*start_from(old), without_data, dump="outputs/over"))

    (tmp_path / "outputs").rename(tmp_path / "moved")
    moved = start_from(tmp_path / "moved/stage1/checkpoint/step-10")
    check_job(job(*moved, dump="moved/whole"))
    config = job(*moved, without_data, dump="moved/over")  # killed before its first checkpoint
    assert excluded_states(config, parallel_dims(config, 1)) == ["dataloader"]
    note = tmp_path / "moved/whole/started_from.txt"
    for wrong in (start_from(other), ()):
        said = only_problem(job(*wrong, dump="moved/whole"), f"started from {old}", f"into {note}")
        assert f"set it to {old}" not in said

    # what has no digest, or is gone itself
    shutil.rmtree(tmp_path / "moved/stage1")
    only_problem(job(*moved, dump="moved/whole"), f"into {note}")
    note.write_text(moved[0].partition("=")[2] + "\n")
    check_job(job(*moved, dump="moved/whole"))


def test_a_run_from_scratch_is_not_taken_for_one_with_an_initial_checkpoint(job, tmp_path):
    old = save(tmp_path / "old")
    start(job())
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    check_job(job())  # nothing saved yet, so from scratch is right
    save(tmp_path / "run", step=20)
    check_job(job())
    only_problem(job(*start_from(old)), old, "started from scratch", "drop the path")


def test_an_exclusion_holds_for_the_checkpoint_for_which_it_was_set(job, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    old = start_from(save(tmp_path / "old"))
    exclude = "--checkpoint.exclude_from_loading=optimizer,dataloader"
    both = ["dataloader", "optimizer"]

    def left_out(*overrides):
        config = job(*old, *overrides)
        foreseen = excluded_states(config, parallel_dims(config, 1))
        start(config)
        assert config.checkpoint.exclude_from_loading == foreseen
        return foreseen

    assert left_out(exclude) == both
    assert left_out(exclude) == both  # killed before its first checkpoint
    save(tmp_path / "run", step=20)
    assert left_out(exclude) == []  # whatever was started over goes on
    assert left_out() == []
    assert left_out(exclude) == both  # set anew
    save(tmp_path / "run", step=30, degree=2)
    assert left_out(exclude) == ["dataloader"]  # which one rank can't go on from
    note = tmp_path / "run" / "excluded_from_loading.json"
    note.write_text(note.read_text()[:-5])
    with pytest.raises(ValueError, match=f"{note} is damaged"):
        left_out(exclude)


@pytest.mark.parametrize("folder", ["", ".", "a/..", ".."])
def test_checkpoints_have_a_folder_of_their_own(job, tmp_path, folder):
    path = save(tmp_path / "old")
    config = job(*start_from(path), f"--checkpoint.folder={folder}")
    only_problem(config, f"checkpoint.folder = {folder!r}", "for example 'checkpoint'")


@pytest.mark.parametrize("saved, world_size", [(1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("own", [False, True])
def test_another_data_parallel_degree_is_an_error(
    job, tmp_path, monkeypatch, saved, world_size, own
):
    path = save(tmp_path / ("run" if own else "old"), degree=saved)
    config = job() if own else job(*start_from(path))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    only_problem(config, f"data-parallel degree = {world_size}", path, f"degree of {saved}")
    monkeypatch.setenv("WORLD_SIZE", str(saved))
    check_job(config)


def test_the_data_parallel_degree_leaves_the_other_dimensions_out(job, tmp_path, monkeypatch):
    config = job(
        *start_from(save(tmp_path / "old", degree=2)), "--parallelism.tensor_parallel_degree=2"
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_job(config)


@pytest.mark.parametrize(
    ("n_ranks", "overrides", "words"),
    [
        (4, "--parallelism.data_parallel_shard_degree 3", ["dp_shard 3", "number of ranks, 4"]),
        (1, "--parallelism.context_parallel_degree 2", ["cp 2", "number of ranks, 1"]),
        (2, "--parallelism.data_parallel_replicate_degree 0", ["dp_replicate 0", "ranks, 2"]),
        (2, "--parallelism.tensor_parallel_degree 0", ["tp 0", "ranks, 2"]),
        (3, "--training.global_batch_size 8", ["global_batch_size = 8", "1 x 3", "6 or 9"]),
        (2, "--training.global_batch_size 1", ["global_batch_size = 1", "1 x 2", "nearest: 2"]),
        (
            2,
            "--lighthouse.no_enable --parallelism.tensor_parallel_degree 2 --training.seq_len 4098",
            ["training.seq_len = 4098", "multiple of 4", "tensor-parallel degree of 2"],
        ),
    ],
)
def test_the_ranks_must_share_the_work(job, monkeypatch, n_ranks, overrides, words):
    config = job("--training.global_batch_size=-1", *overrides.split())
    check_job(config)  # nothing to say before the number of ranks is known
    monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
    only_problem(config, *words)


def test_a_checkpoint_of_another_model_is_an_error(job, tmp_path):
    wider = save(tmp_path / "wider", vocab_size=512)
    only_problem(job(*start_from(wider)), wider, "(2 of ", "[512, 64] there and [384, 64] here")
    deeper = save(tmp_path / "run", n_layers=1)
    only_problem(job(), deeper, "model.flavor = 'debug'", "layers.1.", "is not there")


def test_a_degree_is_compared_with_the_checkpoint_that_will_be_loaded(job, tmp_path, monkeypatch):
    save(tmp_path / "run", step=10, degree=1)
    later = save(tmp_path / "run", step=20, degree=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    only_problem(job(), "step-20")
    only_problem(job("--checkpoint.load_step=30"), "checkpoint.load_step = 30", "[10, 20]")
    shutil.rmtree(later)
    check_job(job("--checkpoint.load_step=10"))


@pytest.mark.parametrize("missing", ["optimizer", "lr_scheduler", "dataloader", "train_state"])
@pytest.mark.parametrize("own", [False, True])
def test_a_checkpoint_without_its_training_state_is_an_error(job, tmp_path, missing, own):
    path = save(tmp_path / ("run" if own else "old"), without=(missing,))
    only_problem(job() if own else job(*start_from(path)), path, f"holds no {missing}")


@pytest.mark.parametrize("damage", ["no metadata", "no data", "cut short", "gone", "parent"])
def test_an_incomplete_checkpoint_is_an_error(job, tmp_path, damage):
    path = save(tmp_path / "old")
    data = next(path.glob("*.distcp"))
    if damage == "no metadata":
        (path / ".metadata").unlink()
    elif damage == "no data":
        data.unlink()
    elif damage == "cut short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "gone":
        shutil.rmtree(path)
    else:
        path = path.parent
    only_problem(
        job(*start_from(path)), "checkpoint.initial_load_path", path, "not a complete checkpoint"
    )


def cut_short(path):
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])


def put_aside(problem):
    [command] = re.findall(r"\((mkdir .* && mv .*?)\)", problem)
    subprocess.run(command, shell=True, check=True)


def test_a_broken_checkpoint_is_named_and_another_is_loaded_when_it_is_put_aside(job, tmp_path):
    older, newer, newest = (save(tmp_path / "run", step=step) for step in (9, 10, 100))
    cut_short(newest)
    size = next(newest.glob("*.distcp")).stat().st_size
    problem = only_problem(job(), newest, f"holds {size:,} of {size + 1:,} bytes", newer.name)
    put_aside(problem)
    check_job(job())
    assert checkpoint_to_load(job()) == newer
    cut_short(newer)
    put_aside(only_problem(job("--checkpoint.load_step=10"), newer, older.name))
    check_job(job())
    assert checkpoint_to_load(job()) == older


def test_where_no_checkpoint_is_complete_there_is_none_to_fall_back_to(job, tmp_path):
    for step in (10, 20):
        cut_short(save(tmp_path / "run", step=step))
    only_problem(job(), "step-20", "no other", "choose another job.dump_folder")


def test_a_broken_checkpoint_to_start_from_is_named_with_a_complete_one_beside_it(job, tmp_path):
    older, newer = (save(tmp_path / "old", step=step) for step in (10, 20))
    next(newer.glob("*.distcp")).unlink()
    only_problem(job(*start_from(newer)), "is missing", f"complete one near it is {older}")
    check_job(job(*start_from(older)))


def test_a_run_to_start_from_is_answered_with_its_newest_complete_checkpoint(job, tmp_path):
    older, newer = (save(tmp_path / "old", step=step) for step in (10, 20))
    (newer / ".metadata").unlink()
    for folder in (tmp_path / "old", older.parent):
        only_problem(
            job(*start_from(folder)),
            "to start from that, set checkpoint.initial_load_path to it",
            older,
        )


def test_a_checkpoint_that_is_not_there_yet_is_to_be_trained(job, tmp_path):
    missing = tmp_path / "stage1/checkpoint/step-10"
    only_problem(job(*start_from(missing)), missing, "does not exist; train it first")


INDICES = [".metadata", "model.safetensors.index.json"]


@pytest.mark.parametrize("index", INDICES)
def test_only_what_is_named_step_n_and_nothing_more_is_a_checkpoint(job, tmp_path, index):
    folder = save(tmp_path / "run", step=20).parent
    names = ["step-30.broken", "old-step-30", "step-030", "step-10-hf", "step-", "step-\u0663"]
    for name in names:
        (folder / name).mkdir()
        (folder / name / index).touch()
    for step in (10, 15, 16):
        save(tmp_path / "run", step=step)
    (folder / "step-16" / ".interrupted").touch()
    start(job())
    assert checkpoint_to_load(job()) == folder / "step-20"

    manager = SimpleNamespace(folder=str(folder), keep_latest_k=2, purge_queue=Queue())
    with patch("torchtitan_ext.model.checkpointer.get_rank", return_value=0):
        CheckpointManager._purge_stale_checkpoints(manager)
    assert CheckpointManager._find_load_step(manager) == 20
    assert [*manager.purge_queue.queue] == [str(folder / f"step-{step}") for step in (10, 16)]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize(
    "setting", ["load_step=16", "create_seed_checkpoint", "exclude_from_loading=train_state"]
)
def test_no_launch_writes_over_a_checkpoint(job, tmp_path, setting, index):
    paths = [save(tmp_path / "run", step=step) for step in (12, 16, 20, 24)]
    folder, written = paths[0].parent, paths if "load" not in setting else paths[2:]
    for path in paths[2:]:
        (path / ".metadata").rename(path / index)
    if index == ".metadata" or "load_step" in setting:
        check_job(job(f"--checkpoint.{setting}", "--checkpoint.load_only"))
    words = [setting.replace("=", " = ").partition(" ")[0], *(path.name for path in written)]
    problem = only_problem(job(f"--checkpoint.{setting}"), *words)
    if "exclude" in setting:
        newest = folder / ("step-24" if index == ".metadata" else "step-16")
        assert f"checkpoint.initial_load_path = '{newest}'" in problem
        return
    put_aside(problem)
    assert not any(path.exists() for path in written)
    check_job(job())
    assert checkpoint_to_load(job()) == (folder / "step-16" if "load" in setting else None)
    check_job(job(f"--checkpoint.{setting}"))


def test_weights_alone_of_a_later_step_are_not_written_over(job, tmp_path):
    path = save(tmp_path / "run", step=20)
    later = path.with_name("step-30")
    later.mkdir()
    (later / "model.safetensors.index.json").touch()
    put_aside(only_problem(job(), "checkpoint.load_step = -1", "step-30"))
    check_job(job())


def test_what_a_killed_save_left_is_gone_before_the_step_is_saved_again(job, tmp_path):
    folder = save(tmp_path / "run", step=20).parent
    for left in (
        "__0_0.distcp",
        "__7_0.distcp",
        ".metadata.tmp",
        "sharded/shard-00007.safetensors",
    ):
        file = folder / "step-30" / left
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "step-40").mkdir()
    start(job("--checkpoint.load_only"))
    assert (folder / "step-40").exists()
    start(job("--checkpoint.load_step=20"))
    assert [path.name for path in folder.iterdir()] == ["step-20"]
    export = folder / "step-50" / "model.safetensors"
    export.parent.mkdir()
    export.touch()
    only_problem(job(), "step-50", "put them aside")


def test_a_seed_checkpoint_is_weights_alone_and_must_be_complete(job, tmp_path):
    training = ("optimizer", "lr_scheduler", "dataloader", "train_state")
    path = save(tmp_path / "run", step=0, without=training)
    check_job(job())
    cut_short(path)
    only_problem(job(), path, "not a complete checkpoint")


places = st.floats(0, 1, exclude_max=True)  # of the file


@settings(max_examples=60)
@given(
    cut=places | st.just(1.0), changes=st.dictionaries(places, st.binary(max_size=2), max_size=3)
)
def test_no_damage_of_metadata_gets_past_the_check_with_another_error(
    tmp_path_factory, cut, changes
):
    path = save(tmp_path_factory.mktemp("run"))
    whole = (path / ".metadata").read_bytes()
    damaged = bytearray(whole)
    for place, replacement in changes.items():
        at = int(place * len(whole))
        damaged[at : at + 1] = replacement
    (path / ".metadata").write_bytes(damaged[: int(cut * len(damaged))])
    try:
        assert complete_metadata(path).state_dict_metadata
    except ValueError as error:
        assert str(path) in str(error)


def test_more_steps_than_the_checkpoint_has_done_must_be_asked_for(job, tmp_path):
    path = save(tmp_path / "old", step=100)
    only_problem(job(*start_from(path), "--training.steps=100"), "training.steps = 100", path)
    check_job(job(*start_from(path), "--training.steps=101"))
    # that count is not taken up
    excluded = "--checkpoint.exclude_from_loading=train_state"
    check_job(job(*start_from(path), "--training.steps=100", excluded))

    own = save(tmp_path / "own", step=100).parent
    check_job(job("--training.steps=100", dump="own"))  # done, and so is its repetition
    only_problem(job("--training.steps=99", dump="own"), "training.steps = 99", own, "step 100")


def test_only_the_first_rank_notes_the_start(job, tmp_path, monkeypatch):
    config = job(*start_from(save(tmp_path / "old")))
    monkeypatch.setenv("RANK", "1")
    start(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    start(config)
    assert any((tmp_path / "run").iterdir())


def test_no_checkpoint_rule_binds_a_job_that_keeps_none(job, tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    check_job(job("--checkpoint.no_enable", "--checkpoint.last_save_model_only"))
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "checkpoint"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_degree", 2),
        ("pipeline_parallel_degree", 2),
        ("fsdp_reshard_after_forward", "always"),
    ],
)
def test_a_fused_output_needs_its_projection_beside_the_loss(job, field, value):
    setting = f"--parallelism.{field}={value}"
    check_job(job(setting))
    only_problem(job(setting, "--loss.fuse_output"), field, value, "loss.fuse_output")


@pytest.mark.parametrize("decay", ["None", "0.1"])
def test_a_rate_that_decays_within_stage_1_is_refused(job, decay):
    setting = f"--lr_scheduler.decay_ratio={decay}"
    only_problem(job(setting), "lr_scheduler.decay_ratio", decay, "0.0", "total_steps")
    check_job(job(setting, "--lr_scheduler.total_steps=320"))
    check_job(job(setting, stage="dense"))


@pytest.mark.parametrize(
    ("field", "value", "saved"),
    [
        ("name", "Adam", "AdamW"),
        ("lr", 1e-3, 1e-2),
        ("beta1", 0.8, 0.9),
        ("beta2", 0.99, 0.95),
        ("eps", 1e-6, 1e-8),
        ("weight_decay", 0.3, 0.1),
    ],
)
def test_another_optimizer_than_the_checkpoints_must_be_asked_for(
    job, tmp_path, field, value, saved
):
    path, own = save(tmp_path / "old"), save(tmp_path / "own")
    change = f"--optimizer.{field}={value}"
    words = f"optimizer.{field} = {value!r}", repr(saved), "optimizer.override_checkpoint"
    only_problem(job(*start_from(path), change), path, *words)
    only_problem(job(change, dump="own"), own, *words)
    check_job(job(change, "--optimizer.override_checkpoint", dump="own"))
    if field != "lr":  # which is in the schedule too
        check_job(job(change, "--checkpoint.exclude_from_loading=optimizer", dump="own"))


@pytest.mark.parametrize("stage", ["stage1", "dense"])
def test_a_schedule_that_a_shorter_run_bends_is_refused(job, stage):
    shorter = partial(job, "--training.steps=20", stage=stage)
    only_problem(shorter(), "lr_scheduler.warmup_steps = 40", "20", "total_steps")
    for whole in ("--lr_scheduler.total_steps=320", "--lr_scheduler.warmup_steps=20"):
        check_job(shorter(whole))
    check_job(shorter("--checkpoint.no_enable"))  # nothing goes on from it
    ended = "--lr_scheduler.total_steps=100"
    only_problem(job(ended, stage=stage), ended.split("=")[0][2:], "100", "training.steps")


def test_a_rate_that_would_jump_where_a_checkpoint_goes_on_is_refused(job, tmp_path):
    """A dense run that has decayed to its end, a tenth of 20 steps, and one amid its warm-up."""
    own = save(tmp_path / "run", step=19, rate=5e-3)
    decay = "--lr_scheduler.decay_ratio=0.1", "--lr_scheduler.warmup_steps=2"
    dense = partial(job, *decay, stage="dense")
    check_job(dense("--training.steps=20"))
    longer = dense("--training.steps=30")
    only_problem(longer, "training.steps = 30", "from 0.005 to 0.01", own, "override_checkpoint")
    check_job(dense("--training.steps=30", "--optimizer.override_checkpoint"))
    save(tmp_path / "early")
    check_job(job(dump="early"))
    only_problem(
        job("--lr_scheduler.warmup_steps=20", dump="early"), "warmup_steps = 20", "step 10"
    )
