"""Patching on real copies of the released torchtitan, and what each patch makes it do."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.launches import start_ranks, train

from torchtitan_ext import patching

ROOT = Path(__file__).resolve().parents[1]
RECORD = f"torchtitan-{patching.VERSION}.dist-info/RECORD"
TOUCHED = sorted(patching.blob_ids())
REINSTALL = "--force-reinstall --no-deps torchtitan==0.2.2"


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    """A folder with torchtitan as released, made from the installed one in whatever state it is."""
    root = tmp_path_factory.mktemp("clean")
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(patching.installed_root() / "torchtitan", root / "torchtitan", ignore=no_bytecode)
    patching.change(root, patched=False)
    return root


@pytest.fixture
def tree(clean, tmp_path) -> Path:
    """A copy of `clean` to change."""
    return shutil.copytree(clean, tmp_path / "root")


@pytest.fixture
def checkout(tree) -> Path:
    """A git checkout of upstream."""
    git(tree, "init")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--message", "release")
    git(tree, "tag", f"v{patching.VERSION}")
    git(tree, "tag", "released")
    return tree


def patch(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torchtitan_ext", "patch", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def git(root: Path, *arguments) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *who, *map(str, arguments)]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Path -> bytes and mode of everything under `root` that isn't git's or bytecode."""
    files = [p for p in root.rglob("*") if p.is_file() and not {".git", "__pycache__"} & {*p.parts}]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode) for p in files}


def test_clean_copy_is_the_released_wheel(clean):
    """What a revert makes of an installation has the digests that the wheel came with."""
    record = (patching.installed_root() / RECORD).read_text().splitlines()
    digests = dict(line.split(",")[:2] for line in record if line.startswith("torchtitan/"))
    for name in TOUCHED:
        digest = base64.urlsafe_b64encode(hashlib.sha256((clean / name).read_bytes()).digest())
        assert digests[name] == f"sha256={digest.decode().rstrip('=')}"


def test_round_trip_gives_the_same_bytes_and_modes(tree):
    (tree / TOUCHED[0]).chmod(0o664)
    before, umask = contents(tree), os.umask(0o077)
    try:
        codes = [patch(action, "--root", tree).returncode for action in ("check", "apply", "check")]
        after = contents(tree)
        again = patch("apply", "--root", tree)
        codes += [patch(action, "--root", tree).returncode for action in ("revert", "check")]
    finally:
        os.umask(umask)
    assert codes == [1, 0, 0, 0, 1]
    assert again.returncode == 0 and "already" in again.stdout
    assert contents(tree) == before and after.keys() == before.keys()
    assert {name for name in after if after[name][0] != before[name][0]} == {*TOUCHED}
    assert all(after[name][1] == before[name][1] for name in after)


def test_what_is_so_already_is_left_untouched(tree):
    patching.change(tree, patched=True)
    times = {p: p.stat().st_mtime_ns for p in [tree, *tree.rglob("*")]}
    assert not patching.change(tree, patched=True)
    assert {p: p.stat().st_mtime_ns for p in [tree, *tree.rglob("*")]} == times


def test_git_am_does_the_same_and_gives_the_series_back(checkout, tmp_path):
    git(checkout, "am", *patching.series())
    assert patching.is_patched(checkout)
    subprocess.run([ROOT / "scripts" / "patches.sh", checkout, tmp_path], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.patch")}
    assert written == {path.name: path.read_bytes() for path in patching.series()}


def test_every_patch_says_why():
    for file in patching.series():
        subject, _, reason = file.read_text().partition("Subject: [PATCH] ")[2].partition("\n\n")
        assert 10 < len(subject) <= 72 and len(reason.partition("\n---\n")[0].split()) > 20


def test_a_git_checkout(checkout):
    assert patch("apply", "--root", checkout).returncode == 0
    assert git(checkout, "diff", "--name-only").split() == TOUCHED
    assert not git(checkout, "ls-files", "--others")
    assert patch("revert", "--root", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain")


def test_an_environment_inside_a_repository_that_ignores_it(clean, tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    root = shutil.copytree(clean, tmp_path / ".venv" / "lib")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert patching.change(root, patched=True) and patching.is_patched(root)


def refused(root: Path, *expected: str) -> None:
    """Every action is refused with a short message that has the `expected` parts."""
    before = contents(root)
    for action in ("apply", "check", "revert"):
        answer = patch(action, "--root", root)
        assert answer.returncode == 2 and len(answer.stderr.splitlines()) <= 2
        assert all(part in answer.stderr for part in expected), answer.stderr
    assert contents(root) == before


def test_some_of_the_patches_are_refused_with_the_way_back(checkout):
    git(checkout, "apply", patching.series()[0])
    names = git(checkout, "diff", "--name-only").split()
    remedy = f"git checkout v0.2.2 -- {' '.join(names)}"
    refused(checkout, remedy)
    git(checkout, *remedy.split()[1:])
    assert patching.change(checkout, patched=True)


@pytest.mark.parametrize("name", TOUCHED)
def test_a_changed_or_missing_file_is_refused(tree, name):
    for patched in (False, True):
        patching.change(tree, patched)
        content = (tree / name).read_bytes()
        for change in ((tree / name).unlink, partial((tree / name).write_bytes, content + b"\n")):
            change()
            with pytest.raises(patching.PatchingError, match=f"(?s){name}.*{REINSTALL}"):
                patching.change(tree, patched=not patched)
        (tree / name).write_bytes(content)


def test_a_folder_without_torchtitan_is_refused(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "pip install")


def test_patches_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(patching, "PATCHES", tmp_path / "nowhere")
    with pytest.raises(patching.PatchingError, match="nowhere has no patches"):
        patching.blob_ids()


def test_a_failing_swap_is_undone(tree, monkeypatch):
    before, rename, calls = contents(tree), Path.rename, []

    def fail_once(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        patching.change(tree, patched=True)
    assert contents(tree) == before and len(calls) == 3


def test_a_linked_package_stays_a_link(tree, tmp_path):
    shutil.move(tree / "torchtitan", tmp_path / "sources")
    (tree / "torchtitan").symlink_to(tmp_path / "sources")
    assert patching.change(tree, patched=True) and patching.is_patched(tree)
    assert (tree / "torchtitan").is_symlink()


def test_bytecode_of_the_other_state_is_not_taken_along(tree):
    cache = tree / "torchtitan" / "__pycache__"
    cache.mkdir()
    (cache / "train.cpython-311.pyc").touch()
    patching.change(tree, patched=True)
    assert not cache.exists()


# ---- what the patches make torchtitan do, where there is no accelerator ----


def cpu_is_the_device(rank, n_ranks, folder):
    import torchtitan.tools.utils as utils
    from torchtitan.components.metrics import build_device_memory_monitor
    from torchtitan.config import Comm, Profiling
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import init_distributed, set_pg_timeouts
    from torchtitan.tools.profiling import maybe_enable_profiling

    assert utils.device_type == "cpu" and utils.device_module is torch.cpu
    for found, taken in [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda"), ("xpu", "xpu")]:
        utils._get_available_device_type = lambda found=found: found
        assert utils.get_device_info() == (taken, getattr(torch, taken))

    monitor = build_device_memory_monitor()
    before = monitor.get_peak_stats()
    kept = torch.ones(2**28, dtype=torch.uint8)
    monitor.reset_peak_stats()
    after = monitor.get_peak_stats()
    # A process starts with the peak of the one that started it, so only bounds are certain.
    assert max(before.max_reserved_gib, 0.25) <= after.max_reserved_gib
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert math.isclose(after.max_reserved_gib / after.max_reserved_pct * 100, physical)
    assert math.isnan(utils.get_peak_flops(monitor.device_name))

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    assert init_distributed(Comm()) == 1 and torch.distributed.get_backend() == "gloo"
    set_pg_timeouts(timedelta(seconds=5), ParallelDims(1, 1, 1, 1, 1, 1, 1, 1))

    profiling = Profiling(enable_profiling=True, profile_freq=2, profiler_active=1, profiler_warmup=1)
    with maybe_enable_profiling(profiling, base_folder=folder) as profiler:
        for _ in range(2):
            kept.sum()
            profiler.step()
    assert os.path.getsize(f"{folder}/profile_traces/iteration_2/rank0_trace.json")
    torch.distributed.destroy_process_group()


def test_the_device_is_the_cpu_where_there_is_no_accelerator(tmp_path):
    start_ranks(cpu_is_the_device, 1, str(tmp_path))


def test_no_dense_model_needs_triton():
    code = """
import sys
sys.modules["triton"] = None
import torchtitan.train, torchtitan.models.llama3, torchtitan.models.qwen3
try:
    import torchtitan.models.moe.kernels
except ImportError:
    print("blocked")
"""
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert answer.stdout == "blocked\n", answer.stderr


def test_stock_llama3_trains_on_the_cpu(tmp_path):
    """torchtitan's own trainer, model and data set; the loss of a repeated text falls."""
    text = "the keeper lit the lamp " * 400
    (tmp_path / "text.json").write_text(json.dumps({"text": text}) + "\n")
    settings = {
        "job.dump_folder": tmp_path, "model.name": "llama3", "model.flavor": "debugmodel",
        "model.hf_assets_path": "torchtitan_ext/data/byte_tokenizer",
        "training.dataset": "c4_test", "training.dataset_path": tmp_path, "training.steps": 3,
        "training.local_batch_size": 1, "training.seq_len": 64,
        "training.mixed_precision_param": "float32", "lr_scheduler.warmup_steps": 1, "metrics.log_freq": 1,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    ended_well, log = train(1, arguments, stock=True, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert ended_well, log
    losses = [float(loss) for loss in re.findall(r"step: .*?loss: .*?([\d.]+)", log)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], log
