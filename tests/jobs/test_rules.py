"""A job that can't run, or would lose state silently, stops before anything is built."""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from helpers.jobs import ROOT, only_problem, problems, save, start, start_from
from helpers.streams import LAYOUTS, write_bpe, write_text
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtitan.config import ConfigManager

from torchtitan_ext.jobs.rules import check_job, parallel_dims
from torchtitan_ext.model import flavors
from torchtitan_ext.train.__main__ import main


@pytest.mark.parametrize(
    ("section", "setting", "kind"),
    [
        ("lighthouse", "enable = 'false'", "bool"),
        ("lighthouse", "dense_layers = [0, 0.5]", "list[int] | None"),
        ("training.dataloader", "num_workers = 1.0", "int"),
        ("checkpoint", "async_mode = 'asink'", "Literal['disabled', 'async', 'async_with_pinned_mem']"),
    ],
)
@pytest.mark.filterwarnings("ignore:The field")
def test_a_value_of_another_type_is_an_error(job, tmp_path, section, setting, kind):
    """torchtitan's parser warns at most."""
    file = write_text(tmp_path / "job.toml", f"extends = '{ROOT}/configs/text/stage1.toml'\n[{section}]\n{setting}\n")
    only_problem(job(file=file), f"{setting}: must be of type {kind}")


def test_an_unpatched_torchtitan_is_refused_and_one_changed_by_its_owner_is_not(monkeypatch, capsys):
    arguments = [f"--job.config_file={ROOT}/configs/text/dense.toml", "--print-config"]
    with monkeypatch.context() as released, pytest.raises(SystemExit, match="2"):
        released.setattr("torchtitan_ext.patching.is_patched", lambda root: False)
        released.delattr("torchtitan.train.Trainer.checkpointer_cls")
        main(arguments)
    assert "is not patched: python -m torchtitan_ext patch apply" in capsys.readouterr().err
    monkeypatch.setattr("torchtitan_ext.patching.is_patched", MagicMock(side_effect=ValueError))
    main(arguments)
    with pytest.raises(SystemExit, match="2"):
        main(arguments[:1])
    assert "launch with torchrun" in capsys.readouterr().err


def test_a_good_job_passes_without_a_word(job, tmp_path, caplog):
    for stage in ("stage1", "dense"):
        check_job(job(stage=stage))
    address = "--training.dataset_path=hf://datasets/me/mine", "--job.description=s3://"
    check_job(job(*start_from(save(tmp_path / "old")), "--training.dataset=C4_local", *address, stage="stage2"))
    # Lighthouse's rules don't bind a dense job
    dense = "--training.seq_len=4100", "--checkpoint.last_save_model_only", "--training.dataset=Text"
    check_job(job(*dense, *address, stage="dense"))
    for more in ("--compile.enable", f"{CP}_degree 4", f"{CP2} --compile.enable --compile.components loss"):
        check_job(job("--lighthouse.no_enable", f"{CP}_rotate_method=alltoall", *more.split()))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


CP = "--parallelism.context_parallel"
CP2 = f"{CP}_degree 2"
FLOAT8 = "quantize.linear.float8"
VALIDATION = "--validation.enable --validation"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("--training.seq_len 4100", ["[training]", "seq_len = 4100"]),
        (f"--lighthouse.no_enable {CP2} --training.seq_len 255", ["training.seq_len = 255", "2 chunks"]),
        ("--training.seq_len 131072 --lighthouse.top_k 192", ["130944 or 131136; top_k = 128 or 256 or 2048"]),
        ("--lighthouse.dense_layers -1 2", ["lighthouse.dense_layers = [-1, 2]: [-1, 2] out", "0 to 1"]),
        ("--parallelism.tensor_parallel_degree 4", ["tensor_parallel_degree = 4: must divide debug's 2 KV heads"]),
        ("--model.flavor 7B", ["model.flavor = '7B'", ", ".join(flavors)]),
        ("--model.converters float8", ["model.converters = ['float8']", "quantize.linear.float8"]),
        (f"--{FLOAT8}.enable_fsdp_float8_all_gather", [f"{FLOAT8}.enable_fsdp_float8_all_gather = true", "to false"]),
        ("--model.hf_assets_path nowhere", ["model.hf_assets_path = 'nowhere'", "tokenizer.json", ROOT]),
        ("--training.dataset_path nowhere", ["training.dataset_path: 'nowhere'"]),
        (f"{VALIDATION}.dataset books", ["validation.dataset = 'books'"]),
        (f"{VALIDATION}.seq_len 100", ["[validation]", "seq_len = 100"]),
        (f"{VALIDATION}.seq_len 8192", ["validation.seq_len = 8192", "training.seq_len = 4096"]),
        ("--training.dataloader.num_workers 2", ["training.dataloader.num_workers = 2", "0 or 1"]),
        (f"{CP2} --lighthouse.scorer gla", ["scorer = 'gla': is not `per_token`", "degree of 2", "scorer = 'norm'"]),
        (
            f"{CP2} --parallelism.context_parallel_load_balancer headtail --lighthouse.tile_winners 32",
            ["top_k = 64", "32 x 4 = 128", "nearest: top_k = 128 or 256;", "context_parallel_degree = 1"],
        ),
        (f"{CP}_degree 4 --lighthouse.no_enable", ["_degree = 4", "2 heads and 2 KV heads", "1, 2", "'alltoall'"]),
        (f"{CP2} --lighthouse.no_enable --parallelism.tensor_parallel_degree 2", ["_degree = 2", "1 heads and 1 KV"]),
        (f"{CP2} --lighthouse.no_enable --compile.enable {CP}_rotate_method alltoall", ["'alltoall'", "to 'headtail'"]),
        ("--checkpoint.no_enable --checkpoint.initial_load_path x", ["initial_load_path = 'x'", "enable = false"]),
        ("--checkpoint.no_enable --checkpoint.initial_load_in_hf", ["initial_load_in_hf = true", "enable = false"]),
        ("--job.dump_folder s3://bucket", ["job.dump_folder = 's3://bucket' is not a path on this machine: mount"]),
        ("--checkpoint.folder gs:/bucket", ["checkpoint.folder = 'gs:/bucket' is not"]),
        ("--training.dataset_path hf://datasets/me", ["training.dataset_path = 'hf://datasets/me' is not"]),
        ("--checkpoint.folder= --checkpoint.initial_load_path x", ["checkpoint.folder = ''", "as 'checkpoint' does"]),
        *((f"--checkpoint.folder {f}", [f"checkpoint.folder = '{f}'", "dump"]) for f in ("..", "//", "/ck", "a/b")),
        ("--checkpoint.last_save_model_only", ["checkpoint.last_save_model_only = true", "set it to false"]),
        ("--lighthouse.no_enable --checkpoint.last_save_model_only --checkpoint.last_save_in_hf", ["in_hf", "export"]),
        ("--optimizer.early_step_in_backward", ["optimizer.early_step_in_backward = true", "set it to false"]),
        ("--lr_scheduler.total_steps 100", ["lr_scheduler.total_steps = 100", "training.steps = 240"]),
    ],
)
def test_each_problem_is_named_with_its_value_and_remedy(job, overrides, words):
    extra = ["--validation.dataset=python_source", "--validation.seq_len=4096"]
    only_problem(job(*extra, *overrides.split()), *words)


@pytest.mark.parametrize("source", [{"weight": 0.0}, {"weight": math.inf}, {"dataset": "passkey"}, {"dataset": "c5"}])
def test_a_source_that_can_not_be_mixed_is_named(job, source):
    config, [(field, value)] = job("--validation.enable"), source.items()
    config.training.mixture = [{"dataset": "python_source"} | source]
    only_problem(config, f"training.mixture: {field} = {value!r}")
    config.training.mixture = [{"dataset": "python_source", "path": "gone"}]
    only_problem(config, "training.mixture: 'gone' is not a folder")


def test_every_number_below_1_that_must_not_be_is_named(job):
    fields = [f"{section}.{name}" for section in ("training", "validation") for name in ("seq_len", "local_batch_size")]
    fields += ["training.steps", "validation.freq", "metrics.log_freq", "checkpoint.interval"]
    fields += ["rope.original_max_position_embeddings"]
    said = problems(job("--validation.enable", *(f"--{field}=0" for field in fields)))
    assert not {f"{field} = 0: must be 1 or more" for field in fields}.difference(said)
    only_problem(job("--training.max_norm=-1"), "training.max_norm = -1.0: gradients", "above 0")


@pytest.mark.parametrize(
    ("n_ranks", "overrides", "words"),
    [
        (4, "--parallelism.data_parallel_shard_degree 3", ["dp_shard 3", "number of ranks, 4"]),
        (2, "--parallelism.data_parallel_replicate_degree 0", ["dp_replicate 0", "ranks, 2"]),
        (3, "--training.global_batch_size 8", ["global_batch_size = 8", "data-parallel degree = 3"]),
        (2, "--training.global_batch_size 0", ["global_batch_size = 0", "data-parallel degree = 2"]),
    ],
)
def test_the_ranks_must_share_the_work(job, monkeypatch, n_ranks, overrides, words):
    config = job("--training.global_batch_size=-1", *overrides.split())
    check_job(config)  # nothing to say before the number of ranks is known
    monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
    only_problem(config, *words)


def test_a_refused_job_leaves_its_folder_as_it_was(job, tmp_path):
    for held in ([], ["checkpoint.lock", "config.json", "run.lock"]):
        before = {path: path.read_text() for path in tmp_path.glob("run/*")}
        assert sorted(path.name for path in before) == held
        with pytest.raises(ValueError, match="seq_len = 4100"):
            start(job("--training.seq_len=4100"))
        assert {path: path.read_text() for path in tmp_path.glob("run/*")} == before
        start(job())
    assert (tmp_path / "run/run.lock").read_text().count("process") == 1


def test_the_section_is_missed_when_its_module_is_not_named():
    with pytest.raises(ValueError, match=r"job.custom_config_module.*torchtitan_ext.model.settings"):
        check_job(ConfigManager().parse_args([]))


def test_a_fused_output_needs_its_projection_beside_the_loss(job):
    ways = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "fsdp_reshard_after_forward": "always"}
    for field, value in ways.items():
        setting = f"--parallelism.{field}={value}"
        check_job(job(setting))
        only_problem(job(setting, "--loss.fuse_output"), field, value, "loss.fuse_output")
        if value == 2:
            only_problem(job(setting, "--model.flavor=1B"), field, value, "the flavor's embeddings")
            assert parallel_dims(job(setting), 2).fsdp_enabled  # torchtitan has no other mixed precision for them


def test_a_rate_that_decays_within_stage_1_is_refused(job):
    for decay in ("None", "0.1"):
        setting = f"--lr_scheduler.decay_ratio={decay}"
        only_problem(job(setting), "lr_scheduler.decay_ratio", decay, "0.0", "total_steps")
        check_job(job(setting, "--lr_scheduler.total_steps=320"))
        check_job(job(setting, stage="dense"))


def test_a_schedule_that_a_shorter_run_bends_is_refused(job):
    shorter = partial(job, "--training.steps=20")
    only_problem(shorter(), "lr_scheduler.warmup_steps = 40", "20", "total_steps")
    only_problem(shorter(stage="dense"), "lr_scheduler.warmup_steps = 40")
    for whole in ("--lr_scheduler.total_steps=320", "--lr_scheduler.warmup_steps=20"):
        check_job(shorter(whole))
    check_job(shorter("--checkpoint.no_enable"))  # nothing continues from it


def test_a_tokenizer_must_fit_the_embeddings(job, tmp_path):
    few_but_one_beyond = {"w0": 0, "b": 384}
    for vocab in ({f"w{i}": i for i in range(1000)}, few_but_one_beyond):
        Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
        config = job(f"--model.hf_assets_path={tmp_path}")
        only_problem(config, "model.hf_assets_path", f"to {max(vocab.values())}", "384")


def test_a_tokenizer_must_keep_documents_apart_whatever_they_spell(job, tmp_path):
    config = job(f"--model.hf_assets_path={tmp_path}")
    for layout in LAYOUTS.values():
        plain = write_bpe(tmp_path, layout)
        check_job(config)
    for without in ({}, {"pad_token": "<pad>"}, {"eos_token": None}):
        write_bpe(tmp_path, without)
        only_problem(config, f"hf_assets_path = '{tmp_path}'", "run into each other", "eos_token in")
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
    pad = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a", "strategy": "BatchLongest"}
    level = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    piece = level | {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    config = job(f"--model.hf_assets_path={tmp_path}")
    shutil.copy("torchtitan_ext/data/byte_tokenizer/tokenizer_config.json", tmp_path)
    for change, words in [
        ({"model": level}, None),
        ({"truncation": cut}, "sets truncation"),
        ({"padding": pad | {"pad_to_multiple_of": None}}, "sets padding"),
        ({"model": level, "pre_tokenizer": None}, "one token"),
        ({"model": piece, "pre_tokenizer": None}, "one token"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "no tokenizer"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        only_problem(config, "model.hf_assets_path", words) if words else check_job(config)


KEYS = {"": "", "WANDB_API_KEY": "0" * 40, "WANDB_IDENTITY_TOKEN_FILE": "token", "WANDB_MODE": "offline"}
KEYS["in netrc"] = "machine api.wandb.ai\n  login user\n  password 0"


@pytest.mark.parametrize("key, value", KEYS.items())
def test_weights_and_biases_need_a_key(job, tmp_path, monkeypatch, key, value):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv(key, value) if key.startswith("WANDB") else (tmp_path / "netrc").write_text(value)
    config = job("--metrics.enable_wandb")
    check_job(config) if key else only_problem(config, "enable_wandb = true", "no API key", "WANDB_MODE=offline")
