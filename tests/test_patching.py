"""Patching on real copies of the released torchtitan, and the effect of each patch."""

import base64
import hashlib
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchtitan.tools.utils as utils
from helpers.commands import ROOT, call
from torchtitan.components.metrics import build_device_memory_monitor
from torchtitan.config import Profiling
from torchtitan.tools.profiling import maybe_enable_profiling

from torchtitan_ext import patching

RECORD = f"torchtitan-{patching.VERSION}.dist-info/RECORD"
TOUCHED = sorted(patching.blob_ids())


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
    for tag in (f"v{patching.VERSION}", "released"):
        git(tree, "tag", tag)
    return tree


@pytest.fixture
def patch(command):
    """What a `patch` command says."""
    return lambda action, root, code=0: "".join(command("patch", action, "--root", root, code=code))


def git(root: Path, *arguments) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *who, *map(str, arguments)]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def contents(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Path -> bytes, mode and time of everything under `root` that isn't git's or bytecode."""
    files = [p for p in root.rglob("*") if p.is_file() and not {".git", "__pycache__"} & {*p.parts}]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns) for p in files}


def test_clean_copy_is_the_released_wheel(clean):
    """What a revert makes of an installation has the digests that the wheel came with."""
    record = (patching.installed_root() / RECORD).read_text().splitlines()
    digests = dict(line.split(",")[:2] for line in record if line.startswith("torchtitan/"))
    for name in TOUCHED:
        digest = base64.urlsafe_b64encode(hashlib.sha256((clean / name).read_bytes()).digest())
        assert digests[name] == f"sha256={digest.decode().rstrip('=')}"


def test_round_trip_gives_the_same_bytes_and_modes(tree, patch):
    (tree / TOUCHED[0]).chmod(0o664)
    before, umask = contents(tree), os.umask(0o077)
    try:
        for action, code in (("check", 1), ("apply", 0), ("check", 0)):
            patch(action, tree, code)
        after = contents(tree)
        assert patch("apply", tree) == f"{tree}/torchtitan is patched (4 patches)\n"
        assert contents(tree) == after
        for action, code in (("revert", 0), ("check", 1)):
            patch(action, tree, code)
    finally:
        os.umask(umask)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name][0] != before[name][0]}
    # and each in its size, by which Python tells that bytecode is not of this file
    assert changed == {name for name in after if len(after[name][0]) != len(before[name][0])} == {*TOUCHED}
    assert all(after[name][1] == before[name][1] for name in after)
    assert {name: found[:2] for name, found in contents(tree).items()} == {n: was[:2] for n, was in before.items()}


def test_git_am_does_the_same_and_gives_the_series_back(checkout, tmp_path):
    git(checkout, "am", *patching.series())
    assert patching.is_patched(checkout)
    for source, code in ((checkout, 0), (ROOT, 128)):  # without the tag `released`: what is there stays
        assert subprocess.run([ROOT / "scripts" / "patches.sh", source, "new"], cwd=tmp_path).returncode == code
    assert {p.name: p.read_text() for p in tmp_path.glob("new/*")} == {p.name: p.read_text() for p in patching.series()}
    for text in map(Path.read_text, patching.series()):  # each says why it is there
        subject, _, reason = text.partition("Subject: [PATCH] ")[2].partition("\n\n")
        assert 10 < len(subject) <= 72 and len(reason.partition("\n---\n")[0].split()) > 20


def test_some_of_the_patches_are_refused_with_the_way_back(checkout, patch):
    git(checkout, "apply", patching.series()[0])
    names = git(checkout, "diff", "--name-only").split()
    remedy = f"git checkout v0.2.2 -- {' '.join(names)}"
    before = contents(checkout)
    for action in ("apply", "check", "revert"):
        said = patch(action, checkout, 2)
        assert remedy in said and len(said.splitlines()) == 2
    assert contents(checkout) == before
    git(checkout, *remedy.split()[1:])
    patch("apply", checkout)
    assert git(checkout, "diff", "--name-only").split() == TOUCHED
    assert not git(checkout, "ls-files", "--others")


def test_an_environment_inside_a_repository_that_ignores_it(clean, tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    root = shutil.copytree(clean, tmp_path / ".venv" / "lib")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    patching.change(root, patched=True)
    assert patching.is_patched(root)


def test_a_changed_or_missing_file_is_refused(tree):
    for patched in (False, True):
        patching.change(tree, patched)
        for name in TOUCHED:
            content = (tree / name).read_bytes()
            for change in ((tree / name).unlink, partial((tree / name).write_bytes, content + b"\n")):
                change()
                with pytest.raises(ValueError, match=f"(?s){name}.*--force-reinstall --no-deps torchtitan==0.2.2"):
                    patching.change(tree, patched=not patched)
            (tree / name).write_bytes(content)


def test_patches_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(patching, "PATCHES", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere has no patches"):
        patching.blob_ids()


def test_patches_of_one_file_apply_together_or_not_at_all(checkout, clean, tmp_path, monkeypatch):
    git(checkout, "am", *patching.series())
    for word in ("one", "two"):
        file = checkout / TOUCHED[0]
        file.write_text(f"# {word}\n{file.read_text()}")
        git(checkout, "commit", "--all", "--message", word)
    subprocess.run([ROOT / "scripts" / "patches.sh", checkout, tmp_path], check=True)
    monkeypatch.setattr(patching, "PATCHES", tmp_path)
    tree = shutil.copytree(clean, tmp_path / "tree")
    for patched, last, made in ((True, patching.series()[-1], checkout), (False, patching.series()[0], clean)):
        text, before = last.read_text(), contents(tree)
        last.write_text(text.replace("\n ", "\n other"))  # what git comes to last
        with pytest.raises(ValueError, match="patch does not apply"):
            patching.change(tree, patched)
        assert contents(tree) == before
        last.write_text(text)
        patching.change(tree, patched)
        assert all((tree / name).read_bytes() == (made / name).read_bytes() for name in TOUCHED)


def test_a_link_stays_a_link(tree, tmp_path):
    sources = shutil.move(tree / "torchtitan", tmp_path / "sources")
    (tree / "torchtitan").symlink_to(sources)
    patching.change(tree, patched=True)
    assert (tree / "torchtitan").is_symlink() and patching.is_patched(tree)


# ---- what the patches make torchtitan do, where there is no accelerator ----


def test_the_device_is_the_cpu_where_there_is_no_accelerator(tmp_path, monkeypatch):
    assert utils.device_type == "cpu" and utils.device_module is torch.cpu
    for found, taken in [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda"), ("xpu", "xpu")]:
        monkeypatch.setattr(utils, "_get_available_device_type", lambda found=found: found)
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

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    profiling = Profiling(enable_profiling=True, profile_freq=2, profiler_active=1, profiler_warmup=1)
    with maybe_enable_profiling(profiling, base_folder=str(tmp_path)) as profiler:
        for _ in range(2):
            kept[0].clone()
            profiler.step()
    assert (tmp_path / "profile_traces/iteration_2/rank0_trace.json").stat().st_size


@pytest.mark.slow
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
    answer = call(sys.executable, "-W", "ignore", "-c", code)
    assert answer.stdout == "blocked\n", answer.stderr
