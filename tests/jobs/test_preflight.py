"""The preflight names everything that would stop a run, and reports what the run needs."""

import glob
import gzip
import importlib.metadata
import logging
import re
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
from helpers.jobs import ROOT, job_of, only, save, start, start_from
from helpers.streams import loader, write_text

from torchtitan_ext import patching
from torchtitan_ext.cli import main
from torchtitan_ext.jobs import environment, preflight
from torchtitan_ext.jobs.memory import peak_memory
from torchtitan_ext.jobs.rules import parallel_dims
from torchtitan_ext.model.model import meta_model

TEXT = "configs/text/stage1.toml"
LARGE, SOURCE = "configs/530m/stage1.toml", "--training.dataset=python_source"
VERSION = importlib.metadata.version
pytestmark = pytest.mark.filterwarnings("ignore")
JOBS = sorted(path for path in ROOT.glob("configs/*/*.toml") if path.stem in ("stage1", "stage2"))  # dense is as stage2
assert JOBS


@pytest.fixture
def check(tmp_path, capsys):
    """Checks a job file with overrides, in a fresh dump folder: the problems and the whole report."""

    def run(*overrides, file=TEXT):
        arguments = [f"--job.config_file={file}", f"--job.dump_folder={tmp_path / 'run'}"]
        code = main(["preflight", *arguments, *map(str, overrides)])
        logging.disable(logging.NOTSET)
        report = capsys.readouterr().out
        head, *problems = report.split("\n- ")
        assert code == (1 if problems else 0)
        count = len(problems)
        assert head.endswith(f"{count} problem{'s' * (count > 1)}:" if count else "no problems\n")
        return problems, " ".join(report.split())

    return run


def test_a_good_run_is_reported_with_what_it_takes(check):
    problems, report = check(SOURCE, "--nproc=8", "--gpu-memory=100", "--tok-s=1000", file=LARGE)
    job, args = job_of(LARGE)
    n_params = sum(p.numel() for p in meta_model(args).parameters())
    training = job.training
    tokens = training.steps * training.global_batch_size * training.seq_len
    memory = sum(peak_memory(job, args, parallel_dims(job, 8)).values())
    assert not problems
    for fact in (
        f"{n_params:,} parameters",
        f"{job.lighthouse.gathered_len(training.seq_len):,} gathered rows of {training.seq_len:,}",
        f"in {training.global_batch_size // 8} accumulation steps",
        f"0 to {training.steps:,}, {tokens:,} tokens",
        f"{tokens / 8 / 1000 / 3600:,.1f} h, ",
        f"about {memory:.1f} of 100.0 GiB",
        f"at most {job.checkpoint.keep_latest_k + 1} more checkpoints of {12 * n_params / 1e9:.2f} GB",
    ):
        assert fact in report
    assert "10,000 to 16,000, " in check(SOURCE, file="configs/530m/stage2.toml")[1]  # of a stage 1 to be trained


@pytest.mark.slow
@pytest.mark.parametrize("file", JOBS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_job_is_good_on_as_many_gpus_as_it_has_sequences_for(check, file):
    """Its data isn't here, if it isn't generated, nor the checkpoint that stage 2 starts from."""
    training = job_of(str(file))[0].training
    here = ["--checkpoint.initial_load_path=None", "--checkpoint.no_initial_load_in_hf"]
    here.append("--model.hf_assets_path=torchtitan_ext/data/byte_tokenizer")
    if training.dataset != "passkey":
        here += ["--training.dataset=python_source", "--training.dataset_path=None"]
    sequences = training.global_batch_size if training.global_batch_size > 0 else 8
    n_gpus = min(8, sequences // training.local_batch_size)
    problems, report = check(*here, f"--nproc={n_gpus}", "--gpu-memory=139", file=file)
    assert [problem for problem in problems if "more checkpoints of" not in problem] == []  # a full disk's
    assert ("Lighthouse in" in report) == (file.stem == "stage1")
    assert "GiB per GPU" in report or "no estimate: compile.enable = false" in report


def test_every_problem_is_named_at_once(check, tmp_path):
    file = write_text(tmp_path / "in_the_way")
    overrides = ["--training.seq_len=4100", "--training.dataset=books", "--model.name=llama3"]
    problems, _ = check(*overrides, f"--job.dump_folder={file}", "--training.global_batch_size=7", "--nproc=2")
    fields = ["seq_len = 4100", "'books'", "model.name", "job.dump_folder", "global_batch_size = 7"]
    assert [sum(field in problem for problem in problems) for field in fields] == [1] * len(problems)


@pytest.mark.slow
def test_versions_are_held_against_the_supported_ones(check, job, monkeypatch, caplog):
    [pin] = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    def version(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return others.get(name) or VERSION(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    missing = None
    for good in ("2.11.0+cu130", pin, "2.15.0a0+nv"):
        others = {"torch": good}
        assert not check()[0]
    for wrong in ("2.10.0", "2.16.1+cpu"):
        others = {"torch": wrong}
        words = [f"torch is {wrong}", "<2.16", ">=2.11", "pip install"]
        only(check()[0], *words)
        # which a launch says too, and trains
        start(job(dump="launched"))
        only([r.message for r in caplog.records if r.levelname == "WARNING"], *words)
        caplog.clear()
    missing, others = "triton", {"torchtitan": "0.2.1"}
    first, second = check()[0]
    assert "triton is not installed" in first and "torchtitan is 0.2.1" in second


def test_what_is_supported_is_what_the_clone_says_however_old_its_installation(check, monkeypatch, tmp_path):
    stale = tmp_path / "torchtitan_lighthouse.egg-info/PKG-INFO"
    extras = 'Requires-Dist: tyro<1; extra == "train"\nRequires-Dist: ruff<0; extra == "dev"\n'
    requires = f"Requires-Python: >=4\nRequires-Dist: torch<2\n{extras}"
    write_text(stale, f"Name: torchtitan-lighthouse\nVersion: 0.1.0\n{requires}")
    monkeypatch.syspath_prepend(tmp_path)
    assert not check()[0]
    # the built package, apart from any clone
    monkeypatch.setattr(environment, "PROJECT", tmp_path / "pyproject.toml")
    problems, _ = check()
    expected = ("needs >=4", "torch<2", "tyro<1")
    assert len(problems) == 3 and all(map(str.__contains__, problems, expected))


def test_patches_must_be_there(check, monkeypatch):
    monkeypatch.setattr(patching, "is_patched", lambda root: False)
    only(check()[0], "is not patched", "torchtitan_ext patch apply")
    monkeypatch.setattr(patching, "is_patched", Mock(side_effect=ValueError("patched in part")))
    only(check()[0], "patched in part")


def test_restarts_that_may_hang_are_named(monkeypatch):
    for restarts, shared, n in (("0", "True", 0), ("3", "False", 0), ("3", "True", 1)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        said = [*environment.environment_problems()]
        assert len(said) == n
    only(said, "torchrun --max_restarts=3", "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


def test_what_cannot_be_imported_is_named(check, monkeypatch):
    only(check("--experimental.custom_import=nothing")[0], "custom_import = 'nothing'")
    monkeypatch.setitem(sys.modules, "torchtitan_ext.jobs.preflight", None)
    only(check()[0], "before this environment is complete")


def test_a_number_that_nothing_can_be_derived_from_is_a_problem_beside_others(check):
    for setting in ("training.local_batch_size=0", "training.seq_len=0", "checkpoint.interval=0"):
        problems = "\n".join(check(f"--{setting}", "--training.dataset=books", "--training.global_batch_size=8")[0])
        assert setting.replace("=", " = ") in problems and "books" in problems


def test_a_crash_of_a_later_check_does_not_hide_the_kernels_problem(check, monkeypatch):
    problem = ValueError("attention.kernel = 'fa4' can't run")
    monkeypatch.setattr(preflight, "choose_kernel", Mock(side_effect=problem))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda n: SimpleNamespace(name="H200", total_memory=2**37))
    monkeypatch.setattr(shutil, "disk_usage", Mock(side_effect=RuntimeError))
    only(check("--attention.kernel=fa4")[0], problem)


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 3])
def test_each_rank_reads_on_where_it_stopped_at_the_checkpoint(check, tmp_path, degree):
    for number in range(5):  # of which ranks get unequal shares
        (tmp_path / f"{number}.txt").write_text("word " * 1000)
    positions = {}
    for rank in range(degree):
        data = loader("python_source", tmp_path, 256, rank=rank, world=degree)
        next(iter(data))
        positions |= data.state_dict()

    def problem(*settings):
        save(tmp_path / "run", positions=positions)
        arguments = [f"--nproc={degree}", f"--training.dataset_path={tmp_path}", *settings]
        return "\n".join(check(*arguments, "--training.global_batch_size=-1")[0])

    assert problem() == ""
    workers, excluded = "--training.dataloader.num_workers=1", "--checkpoint.exclude_from_loading=dataloader"
    assert re.search("num_workers = 1: .* with 0", problem(workers, excluded))
    elsewhere = f"--job.dump_folder={tmp_path}/new", *start_from(tmp_path / "run/checkpoint/step-10")
    assert problem(workers, excluded, *elsewhere) == ""
    other = problem("--training.dataset=passkey", "--training.dataset_path=4095")
    assert re.search("training.dataset and .*passkey.*python_source", other)
    positions[f"dp_rank_{degree - 1}"] = positions["dp_rank_0"]
    assert ("training.dataset and" in problem()) == (degree > 1)


def test_the_first_documents_are_read(check, tmp_path):
    file = write_text(tmp_path / "c4/c4-train.00000-of-00001.json.gz")
    arguments = ["--training.dataset=c4_local", f"--training.dataset_path={file.parent}"]
    file.write_bytes(gzip.compress(b'{"text": "' + b"word " * 500 + b'"}\n'))
    with patch("glob.glob", side_effect=glob.glob) as looked:
        assert not check(*arguments)[0] and looked.call_count == 1  # a large tree takes seconds
    file.write_bytes(gzip.compress(b"no JSON\n"))
    only(check(*arguments)[0], file, "line 1")


def test_a_sequence_of_the_validation_data_is_read(check, tmp_path):
    arguments = ["--validation.enable", "--validation.dataset=python_source_validation", "--validation.steps=-1"]
    arguments += [f"--validation.dataset_path={tmp_path}", "--validation.seq_len=4096"]
    for length in (1, 1000):
        for name in (f"{number}.txt" for number in range(1000)):
            (tmp_path / name).write_text(name * length)
        if length == 1:
            only(check(*arguments)[0], "not one sequence", "4096")
    assert not check(*arguments)[0]
    words = ["validation.dataset_path", "no document for data-parallel rank 63"]
    only(check(*arguments, "--nproc=64", "--training.global_batch_size=64")[0], *words)


def test_the_disk_must_hold_the_checkpoints_to_come(check, monkeypatch, tmp_path):
    job, args = job_of(TEXT)
    n_bytes = 12 * sum(p.numel() for p in meta_model(args).parameters())
    held = n_bytes * (job.checkpoint.keep_latest_k + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=held))
    assert not check()[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=held - 1))
    only(check()[0], "job.dump_folder", "checkpoint.keep_latest_k")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").symlink_to(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=held * (path == tmp_path)))
    at_most = f"at most {job.checkpoint.keep_latest_k + 2} more"  # an asynchronous save ends beside the next
    only(check("--checkpoint.async_mode=async")[0], at_most, f"free in {tmp_path};")
    assert not check("--checkpoint.no_enable", "--checkpoint.initial_load_path=None")[0]


@pytest.mark.parametrize(
    "keep, there, steps, more",
    # the oldest goes after the next is written; of more than are kept, all go after the first save
    [(0, 0, 1, 1), (0, 3, 35, 4), (2, 0, 35, 3), (2, 1, 35, 2), (2, 3, 35, 1)],
)
def test_checkpoints_to_come_are_those_that_training_will_hold(tmp_path, keep, there, steps, more):
    for n in range(1, there + 1):
        write_text(tmp_path / f"checkpoint/step-{10 * n}/.metadata")
    settings = f"job.dump_folder={tmp_path}", f"training.steps={10 * there + steps}", f"checkpoint.keep_latest_k={keep}"
    job, args = job_of("configs/text/dense.toml", "checkpoint.interval=10", *settings)
    assert preflight._checkpoints_to_come(preflight.Plan(job, parallel_dims(job, 1), args, 1, 1, 10 * there)) == more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gpu_memory", "words", "remedy"),
    [
        ("530m", 50, ["'selective' would take"], ["--activation_checkpoint.mode=selective"]),
        ("530m", 13, ["'full'", "on 4 GPUs"], ["--activation_checkpoint.mode=full", "--nproc=4"]),
        # sharing a sequence, where no policy fits
        ("530m-1m", 79, ["on 2 GPUs", "context_parallel_degree = 2"], ["--parallelism.context_parallel_degree=2"]),
        ("530m", 1, ["nothing fits", "training.seq_len"], None),
    ],
)
def test_too_little_memory_is_a_problem_with_a_remedy_that_fits(check, config, gpu_memory, words, remedy):
    file, arguments = f"configs/{config}/stage1.toml", (SOURCE, f"--gpu-memory={gpu_memory}")
    only(check(*arguments, file=file)[0], "': about", f"of {gpu_memory:.1f} GiB", *words)
    if remedy:
        n_gpus = ["--nproc=2"] if "parallelism" in remedy[0] else []
        assert not check(*arguments, *remedy, *n_gpus, file=file)[0]


def test_memory_that_may_be_too_little_is_no_problem_but_said(check):
    problems, report = check(SOURCE, "--nproc=8", "--gpu-memory=70", file=LARGE)
    assert not problems and "; tight: 'selective' would take" in report
    assert "tight" not in check(SOURCE, "--nproc=8", "--gpu-memory=80", file=LARGE)[1]
