"""Patching on real copies of the released torchtitan, and what each patch makes it do."""

import base64
import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_ext import patching

REPOSITORY = Path(__file__).resolve().parents[1]
METADATA = f"torchtitan-{patching.VERSION}.dist-info/METADATA"
TOUCHED = sorted(patching.blob_ids())


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    """A folder with torchtitan as released, made from the installed one in whatever state it is."""
    root = tmp_path_factory.mktemp("clean")
    installed = patching.installed_root()
    for name in ("torchtitan", Path(METADATA).parent):
        shutil.copytree(installed / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    patching.change(root, patched=False)
    return root


@pytest.fixture(scope="session")
def patched(clean, tmp_path_factory) -> Path:
    """A folder with the patched torchtitan; only to be read."""
    root = tmp_path_factory.mktemp("patched") / "root"
    shutil.copytree(clean, root)
    patching.change(root, patched=True)
    return root


@pytest.fixture
def tree(clean, tmp_path) -> Path:
    """A copy of `clean` to change."""
    shutil.copytree(clean, tmp_path / "root")
    return tmp_path / "root"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torchtitan_ext.patching", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def git(root: Path, *arguments) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *who, *map(str, arguments)], cwd=root, check=True, capture_output=True, text=True
    ).stdout


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Path -> bytes and mode of everything under `root` that isn't git's or bytecode."""
    files = [p for p in root.rglob("*") if p.is_file() and not {".git", "__pycache__"} & {*p.parts}]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode) for p in files}


def test_clean_copy_is_the_released_wheel(clean):
    """What a revert makes of an installation has the digests that the wheel came with."""
    record = (clean / METADATA).with_name("RECORD").read_text().splitlines()
    digests = dict(line.split(",")[:2] for line in record if line.startswith("torchtitan/"))
    for name in TOUCHED:
        digest = hashlib.sha256((clean / name).read_bytes()).digest()
        encoded = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        assert digests[name] == f"sha256={encoded}"


def test_round_trip_gives_the_same_bytes_and_modes(tree):
    (tree / TOUCHED[0]).chmod(0o664)
    before = contents(tree)
    umask = os.umask(0o077)
    try:
        assert run("check", "--root", tree).returncode == 1
        assert run("apply", "--root", tree).returncode == 0
        after = contents(tree)
        assert run("check", "--root", tree).returncode == 0
        assert run("revert", "--root", tree).returncode == 0
    finally:
        os.umask(umask)
    assert contents(tree) == before
    assert run("check", "--root", tree).returncode == 1
    assert after.keys() == before.keys()
    assert {name for name in after if after[name][0] != before[name][0]} == {*TOUCHED}
    assert all(after[name][1] == before[name][1] for name in after)


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_second_time_says_so_and_changes_nothing(tree, action):
    patching.change(tree, patched=True)
    if action == "revert":
        patching.change(tree, patched=False)

    def state():
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in [tree, *tree.rglob("*")]}

    before = contents(tree), state()
    second = run(action, "--root", tree)
    assert second.returncode == 0 and "already" in second.stdout
    assert (contents(tree), state()) == before


def test_untouched_files_keep_their_times(tree):
    times = {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}
    patching.change(tree, patched=True)
    assert {str(p.relative_to(tree)) for p in times if p.stat().st_mtime_ns != times[p]} <= {
        *TOUCHED
    }


def test_plain_git_apply_does_the_same(tree, patched):
    git(tree, "init")
    git(tree, "apply", *sorted(patching.PATCHES.glob("*.patch")))
    assert contents(tree) == contents(patched)


def test_every_patch_is_in_the_series_and_says_why():
    assert patching.series() == sorted(patching.PATCHES.glob("*.patch"))
    for patch in patching.series():
        header, diff = patch.read_text().split("diff --git ", 1)
        title, blank, *reason = header.splitlines()
        assert title and not blank and len(" ".join(reason).split()) > 20
        assert f"diff --git {diff}".count("diff --git ") == len(
            patching._INDEX_LINE.findall(patch.read_text())
        )


@pytest.fixture
def checkout(tree) -> Path:
    """A git checkout of upstream."""
    shutil.rmtree((tree / METADATA).parent)
    (tree / "assets").mkdir()
    (tree / "assets" / "version.txt").write_text(f"{patching.VERSION}\n")
    git(tree, "init")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--message", "release")
    return tree


def test_a_git_checkout(checkout):
    assert run("apply", "--root", checkout).returncode == 0
    assert git(checkout, "diff", "--name-only").split() == TOUCHED
    assert not git(checkout, "ls-files", "--others")
    assert run("revert", "--root", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain")


def test_an_environment_inside_a_repository_that_ignores_it(clean, tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    root = tmp_path / ".venv" / "lib"
    shutil.copytree(clean, root)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert run("apply", "--root", root).returncode == 0
    assert patching.is_patched(root)


def refused(root: Path, *expected: str) -> None:
    """Every action is refused with a short message that has the `expected` parts."""
    before = contents(root)
    for action in ("apply", "check", "revert"):
        answer = run(action, "--root", root)
        assert answer.returncode == 3
        assert len(answer.stderr.splitlines()) <= 2
        for part in expected:
            assert part in answer.stderr
    assert contents(root) == before


REINSTALL = "--force-reinstall --no-deps torchtitan==0.2.2"


def test_another_version_is_refused(tree):
    metadata = (tree / METADATA).read_text()
    (tree / METADATA).write_text(metadata.replace("Version: 0.2.2", "Version: 0.2.1"))
    refused(tree, "0.2.1", "0.2.2", REINSTALL)


def test_a_checkout_of_another_version_is_refused(checkout):
    (checkout / "assets" / "version.txt").write_text("0.3.0\n")
    refused(checkout, "0.3.0", "0.2.2", "git checkout v0.2.2")


@pytest.mark.parametrize("count", range(1, len(patching.series())))
def test_some_of_the_patches_are_refused(checkout, count):
    git(checkout, "apply", *patching.series()[:count])
    names = git(checkout, "diff", "--name-only").split()
    refused(checkout, "in part", *names)
    git(checkout, "checkout", "--", *names)  # the remedy that the message names
    assert run("apply", "--root", checkout).returncode == 0


@pytest.mark.parametrize("name", TOUCHED)
def test_a_half_patched_installation_is_refused(tree, patched, name):
    shutil.copy(patched / name, tree / name)
    refused(tree, "in part", name, REINSTALL)


@pytest.mark.parametrize("state", ["clean", "patched"])
def test_a_local_change_is_refused(tree, state):
    patching.change(tree, patched=state == "patched")
    for name in (TOUCHED[0], TOUCHED[-1]):
        content = (tree / name).read_bytes()
        (tree / name).write_bytes(content + b"\n")
        refused(tree, "changed", name, REINSTALL)
        (tree / name).unlink()
        refused(tree, "changed", name, REINSTALL)
        (tree / name).write_bytes(content)


def test_a_folder_without_torchtitan_is_refused(tmp_path):
    refused(tmp_path, str(tmp_path), "--root")
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "--root")


def test_patches_that_are_not_there(tree, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(patching, "PATCHES", tmp_path / "nowhere")
    assert patching.main(["apply", "--root", str(tree)]) == 3
    assert str(tmp_path / "nowhere" / "series") in capsys.readouterr().err


# Numbers what Python does to the file system, and dies at the number that it is given (0: never;
# then it prints the numbers of the swap, and the last one).
KILLED_AT = """
import os, signal, sys
from torchtitan_ext import patching
count, at, swap = 0, int(sys.argv[1]), []
def hook(event, arguments):
    global count
    count += event.startswith(("open", "os.", "shutil.", "subprocess.", "ctypes."))
    if event.startswith(("ctypes.", "os.rename")):
        swap.append(count)
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
patching.main(sys.argv[2:])
print(*swap, count)
"""


def killed_at(event: int, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", KILLED_AT, str(event), *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_killed_at_any_instant_leaves_all_or_none(clean, patched, tree, action):
    wanted, other = (patched, clean) if action == "apply" else (clean, patched)
    shutil.copytree(other, tree, dirs_exist_ok=True)
    output = killed_at(0, action, "--root", tree).stdout.splitlines()[-1]
    *swap, events = map(int, output.split())
    states = {}
    for event in [*range(1, events, events // 20), *swap, swap[-1] + 1, events]:
        patching.change(tree, patched=action != "apply")
        assert killed_at(event, action, "--root", tree).returncode == -9
        states[event] = patching.is_patched(tree)
        assert contents(tree / "torchtitan") == contents(
            (patched if states[event] else clean) / "torchtitan"
        )
        again = run(action, "--root", tree)
        assert again.returncode == 0, again.stderr
        assert contents(tree) == contents(wanted)
    assert {*states.values()} == {True, False}  # killed before the swap, and after it


def raising(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.EXDEV])
def test_a_failing_swap_changes_nothing(tree, monkeypatch, capsys, number):
    before = contents(tree)
    monkeypatch.setattr(patching, "_exchange", raising(number))
    assert patching.main(["apply", "--root", str(tree)]) == 3
    assert contents(tree) == before
    if number == errno.EXDEV:
        assert REINSTALL in capsys.readouterr().err


def test_where_the_file_system_cannot_exchange(tree, patched, monkeypatch):
    monkeypatch.setattr(patching, "_exchange", raising(errno.EINVAL))
    assert patching.change(tree, patched=True)
    assert contents(tree) == contents(patched)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_is_rolled_back(tree, monkeypatch, failing):
    before, rename, calls = contents(tree), os.rename, []

    def fail_once(*paths):
        calls.append(paths)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(patching, "_exchange", raising(errno.EINVAL))
    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        patching.change(tree, patched=True)
    assert contents(tree) == before


def test_killed_between_two_renames_is_found_again(tree, patched, monkeypatch):
    work = tree / patching.WORK_DIR
    work.mkdir()
    (tree / "torchtitan").rename(work / "old")
    monkeypatch.setattr(sys, "path", [str(tree)])
    monkeypatch.delitem(sys.modules, "torchtitan", raising=False)  # other tests import it
    assert patching.installed_root() == tree
    assert patching.change(tree, patched=True)
    assert contents(tree) == contents(patched)


def test_a_linked_package_stays_a_link(clean, tree, tmp_path, patched):
    shutil.move(tree / "torchtitan", tmp_path / "sources")
    (tree / "torchtitan").symlink_to(tmp_path / "sources")
    assert patching.change(tree, patched=True)
    assert (tree / "torchtitan").is_symlink()
    assert contents(tmp_path / "sources") == contents(patched / "torchtitan")


# ---- what the patched torchtitan does, in a process of its own that has no accelerator ----


def python(root: Path, code: str, *, launcher: tuple[str, ...] = (), **environment) -> str:
    """Standard output of `code`, run with the torchtitan in `root`."""
    script = root.parent / f"script_{hashlib.sha1(code.encode()).hexdigest()}.py"
    script.write_text(code)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script)],
        env=os.environ
        | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | environment,
        cwd=root.parent,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_bytecode_of_the_other_state_is_not_used(tree):
    """Not even bytecode that says of itself that it needs no check."""
    unchecked = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    name = "torchtitan/components/dataloader.py"
    subprocess.run([sys.executable, *unchecked, tree / name], check=True)
    patching.change(tree, patched=True)
    code = "import torchtitan.components.dataloader as d; print(hasattr(d, 'logger'))"
    assert python(tree, code).split() == ["False"]


def test_default_root_is_found_without_importing(patched):
    code = (
        "import sys; from torchtitan_ext import patching\n"
        "print(patching.installed_root(), 'torchtitan' in sys.modules)"
    )
    assert python(patched, code).split() == [str(patched), "False"]


def test_the_device_is_the_cpu_where_there_is_no_accelerator(patched):
    python(
        patched,
        """
import math, os
from datetime import timedelta

import torch
import torchtitan.tools.utils as utils
from torchtitan.components.metrics import DeviceMemoryMonitor, build_device_memory_monitor
from torchtitan.config import Comm, Profiling
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import init_distributed, set_pg_timeouts
from torchtitan.tools.profiling import maybe_enable_profiling

assert utils.device_type == "cpu" and utils.device_module is torch.cpu
for found, taken in [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda"), ("xpu", "xpu")]:
    utils._get_available_device_type = lambda: found
    assert utils.get_device_info() == (taken, getattr(torch, taken))

monitor = build_device_memory_monitor()
before = monitor.get_peak_stats()
kept = torch.ones(2**28, dtype=torch.uint8)
monitor.reset_peak_stats()
after = monitor.get_peak_stats()
# A process starts with the peak of the one that started it, so only bounds are certain.
assert max(before.max_reserved_gib, 0.25) <= after.max_reserved_gib
assert 0 < after.max_active_pct <= 100
physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
assert math.isclose(after.max_reserved_gib / after.max_reserved_pct * 100, physical)

def no_warning(message):
    raise AssertionError(message)
utils.logger.warning = no_warning
assert math.isnan(utils.get_peak_flops(monitor.device_name))

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
assert init_distributed(Comm()) == 1
assert torch.distributed.get_backend() == "gloo"
dims = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)
set_pg_timeouts(timedelta(seconds=5), dims)

profiling = Profiling(enable_profiling=True, profile_freq=2, profiler_active=1, profiler_warmup=1)
with maybe_enable_profiling(profiling, base_folder="profile") as profiler:
    for _ in range(2):
        kept.sum()
        profiler.step()
assert os.path.getsize("profile/profile_traces/iteration_2/rank0_trace.json")
torch.distributed.destroy_process_group()
""",
    )


def test_no_dense_model_needs_triton(patched):
    code = """
import sys
sys.modules["triton"] = None
import torchtitan.train
import torchtitan.models.llama3, torchtitan.models.qwen3
try:
    import torchtitan.models.moe.kernels
except ImportError:
    print("blocked")
"""
    assert python(patched, code).split() == ["blocked"]


def test_a_dataloader_state_of_other_ranks_is_an_error(patched):
    python(
        patched,
        """
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader

class Counting(IterableDataset):
    def __iter__(self):
        return iter(range(100))

def loader(rank, degree):
    return ParallelAwareDataloader(Counting(), rank, degree, batch_size=1)

saved = loader(1, 2)
batches = iter(saved)
next(batches)
state = saved.state_dict()
expected = [batch.item() for batch in batches]

same = loader(1, 2)
same.load_state_dict(state)
assert [batch.item() for batch in same] == expected
loader(3, 4).load_state_dict({})  # a run that saved no dataloader

for rank, degree in [(3, 4), (0, 2), (1, 7)]:
    try:
        loader(rank, degree).load_state_dict(state)
    except ValueError as error:
        for part in (f"dp rank {rank}", "degree 2", "checkpoint.exclude_from_loading"):
            assert part in str(error), error
    else:
        raise AssertionError((rank, degree))
""",
    )


def test_shards_start_different_and_replicas_equal(patched):
    """Two gloo ranks; seeded and not."""
    python(
        patched,
        """
import os, torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtitan.config import Comm, Debug
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import init_distributed, set_determinism

init_distributed(Comm())
rank = int(os.environ["RANK"])
for seed in (None, 7):
    for fsdp, tp in ((2, 1), (1, 2), (1, 1)):
        shards = fsdp * tp
        dims = ParallelDims(2 // shards, fsdp, 1, tp, 1, 1, 1, 2)
        dims.build_mesh()
        set_determinism(dims, torch.device(f"cpu:{rank}"), Debug(seed=seed), ["pp"])
        with torch.device("meta"):
            model = torch.nn.Linear(8, 8)
        if tp == 2:
            parallelize_module(model, dims.get_mesh("tp"), ColwiseParallel())
        if fsdp == 2:
            fully_shard(model, mesh=dims.get_mesh("fsdp"))
        model.to_empty(device="cpu")
        with torch.no_grad():
            torch.nn.init.normal_(model.weight)
        mine = model.weight.to_local() if shards == 2 else model.weight.detach()
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert both[0].equal(both[1]) == (shards == 1)
os._exit(0)  # gloo's threads may still hold tensors
""",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )


def test_no_rank_leaves_while_gloo_may_hold_its_tensors(patched):
    python(
        patched,
        """
import time
from unittest.mock import MagicMock

import torch
from torchtitan.config import JobConfig
from torchtitan.train import Trainer

torch.distributed.get_rank = lambda: 1
for device, least, most in [("cpu", 0.5, 1.5), ("cuda", 0, 0.5)]:
    trainer = MagicMock(device=torch.device(device), job_config=JobConfig(), step=0)
    trainer.should_continue_training.return_value = False
    start = time.monotonic()
    Trainer.train(trainer)
    assert least <= time.monotonic() - start <= most
""",
    )


def test_what_one_rank_saw_all_ranks_answer(patched):
    """Two gloo ranks: a loss that isn't finite, a norm that isn't, and SIGTERM."""
    python(
        patched,
        """
import math, os
from collections import deque
from unittest.mock import MagicMock

import torch
from torchtitan.config import Comm, JobConfig
from torchtitan.distributed.utils import init_distributed
from torchtitan.train import Trainer

init_distributed(Comm())
here = int(os.environ["RANK"]) == 1
trainer = MagicMock(step=7, nonfinite_steps=0, job_config=JobConfig(), device="cpu")
trainer.checkpointer.describe_latest.return_value = "LATEST"
allowed = trainer.job_config.training

trainer.outcomes, trainer.interrupted, trainer.sigterm_received = deque(), False, False
assert Trainer.check_outcomes(trainer)  # no step yet

def share(loss=2.0, norm=3.0):
    Trainer.share_outcome(trainer, torch.tensor(loss), torch.tensor(norm))

def finite(**case):
    share(**case)
    trainer.step += 1  # asked in the next step
    try:
        return Trainer.check_outcomes(trainer)
    finally:
        trainer.step -= 1

assert finite()
for value in (math.nan, math.inf, -math.inf):
    for case in ({"loss": value if here else 2.0}, {"norm": value}):
        allowed.skip_nonfinite_steps = 2
        assert not finite(**case) and not finite(**case)
        assert finite() and not finite(**case)  # in a row
        allowed.skip_nonfinite_steps = 1
        try:
            finite(**case)
        except RuntimeError as error:
            assert str(error).startswith("Step 7 is not finite: ") and "LATEST" in str(error)
            named = f"loss {value} on rank 1, gradient norm 3.0."
            assert (named if "loss" in case else f": gradient norm {value}.") in str(error)
        else:
            raise AssertionError(case)
        assert finite()

assert not trainer.interrupted
trainer.sigterm_received = here
assert finite() and trainer.interrupted

# read after the next step, or before a checkpoint: none is saved from a bad step on
def train_step(_):
    share(loss=math.nan if here and trainer.step == bad else 2.0)

trainer.train_step = train_step
trainer.check_outcomes = lambda **which: Trainer.check_outcomes(trainer, **which)
trainer.checkpointer._should_save = lambda step: step % 3 == 0
trainer.should_continue_training = lambda: trainer.step < 8
trainer.sigterm_received = trainer.interrupted = False
allowed.skip_nonfinite_steps = 0
for bad in range(1, 9):
    trainer.step, trainer.nonfinite_steps = 0, 0
    trainer.outcomes.clear()
    trainer.checkpointer.save.reset_mock()
    try:
        Trainer.train(trainer)
    except RuntimeError as error:
        assert str(error).startswith(f"Step {bad} is not finite: loss nan on rank 1, ")
    else:
        raise AssertionError(bad)
    asked = {call.args[0] for call in trainer.checkpointer.save.call_args_list}
    assert asked & {3, 6, 8} == {step for step in (3, 6, 8) if step < bad}
    assert trainer.step == (bad if bad in (3, 6, 8) else bad + 1)
os._exit(0)  # gloo's threads may still hold tensors
""",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )


def test_gradients_reduced_once_a_step_are_those_reduced_in_each_microbatch(patched):
    """Two gloo ranks, two steps of three microbatches: the parameters, and how often ranks talk."""
    python(
        patched,
        """
import os
from unittest.mock import MagicMock

import torch
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
from torchtitan.config import Comm, JobConfig
from torchtitan.distributed.utils import init_distributed
from torchtitan.train import Trainer

init_distributed(Comm())

def train(no_sync, reshard):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model:
        fully_shard(module, mp_policy=policy, reshard_after_forward=reshard != "never")
    fully_shard(model, mp_policy=policy)
    model.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MagicMock(job_config=JobConfig(), model_parts=[model], optimizers=optimizer)
    trainer.job_config.parallelism.fsdp_no_sync = no_sync
    trainer.job_config.parallelism.fsdp_reshard_after_forward = reshard
    trainer.gradient_accumulation_steps = 3
    trainer.parallel_dims.dp_enabled = trainer.parallel_dims.ep_enabled = False
    trainer.parallel_dims.get_optional_mesh.return_value = None
    trainer.metrics_processor.should_log.return_value = False
    trainer.to_device = lambda tensor: tensor
    trainer.set_fsdp_sync = lambda sync: Trainer.set_fsdp_sync(trainer, sync)

    def forward_backward_step(input_dict, labels, global_valid_tokens):
        loss = (model(input_dict["input"]) - labels).square().sum()
        loss.backward()
        return loss

    trainer.forward_backward_step = forward_backward_step
    data = torch.Generator().manual_seed(int(os.environ["RANK"]))
    batches = iter(
        ({"input": torch.randn(4, 8, generator=data)}, torch.randn(4, 8, generator=data)) for _ in range(6)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            Trainer.train_step(trainer, batches)
    gathers, reductions = (
        sum(event.name.startswith(name) for event in profile.events())
        for name in ("FSDP::all_gather (", "FSDP::post_backward_reduce (")
    )
    parameters = [parameter.full_tensor() for parameter in model.parameters()]
    return parameters, gathers, reductions

for reshard in ("never", "always"):
    expected, gathered, reduced = train(False, reshard)
    parameters, gathered_once, reduced_once = train(True, reshard)
    torch.testing.assert_close(parameters, expected)
    assert reduced == 3 * reduced_once == 3 * 4, (reduced, reduced_once, gathered, gathered_once)
    assert gathered == (3 * gathered_once if reshard == "never" else gathered_once)
os._exit(0)  # gloo's threads may still hold tensors
""",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    )


def test_context_parallel_indices_are_torchs_and_made_once(patched):
    python(
        patched,
        """
from torchtitan.distributed.context_parallel import _head_tail_load_balancer, _HeadTailLoadBalancer

for world_size in (1, 2, 3, 8):
    for seq_len in (2 * world_size, 10 * world_size):
        for restore in (False, True):
            case = seq_len, world_size, "cpu"
            indices = _head_tail_load_balancer(*case)._generate_indices(restore)
            assert indices.equal(_HeadTailLoadBalancer(*case)._generate_indices(restore))
            assert indices is _head_tail_load_balancer(*case)._generate_indices(restore)
""",
    )


def test_torchtitans_other_trainers_share_outcomes_or_end_as_before(patched):
    python(
        patched,
        """
from unittest.mock import MagicMock, patch

from torchtitan.experiments.ft.train import FTTrainer
from torchtitan.models.flux import train as flux

assert FTTrainer.interrupted is False  # its own __init__ and train() know nothing of it
trainer = MagicMock(gradient_accumulation_steps=1)
trainer.metrics_processor.should_log.return_value = False
with patch.object(flux.dist_utils, "clip_grad_norm_", return_value="norm"):
    flux.FluxTrainer.train_step(trainer, iter([({}, None)]))
loss = trainer.forward_backward_step.return_value
trainer.update_parameters.assert_called_once_with(loss, "norm")
trainer.optimizers.step.assert_not_called()
""",
    )


def test_what_an_interrupted_process_saved_goes_when_a_later_checkpoint_is_complete(patched):
    python(
        patched,
        """
import tempfile
from pathlib import Path
from unittest.mock import MagicMock, patch

from torchtitan.components.checkpoint import INTERRUPTED, CheckpointManager

def deleted(keep_latest_k, *steps, bridges=(), half_saved=()):
    with tempfile.TemporaryDirectory() as folder, patch("torch.distributed.get_rank", return_value=0):
        for step in steps:
            path = Path(folder, f"step-{step}")
            path.mkdir()
            if step in bridges:
                (path / INTERRUPTED).touch()
            if step not in half_saved:
                (path / ".metadata").touch()
        manager = MagicMock(
            keep_latest_k=keep_latest_k, folder=folder, enable_ft_dataloader_checkpoints=False
        )
        CheckpointManager._purge_stale_checkpoints(manager)
        put = manager.purge_queue.put.call_args_list
        return [int(Path(call.args[0]).name[5:]) for call in put]

assert deleted(2, 100, 200, 250, bridges=[250]) == []
assert deleted(2, 100, 200, 250, 300, bridges=[250]) == [100, 250]
assert deleted(2, 50, 100, bridges=[50], half_saved=[100]) == []  # the only one to go on from
# saved at another interval, or as a first step: kept like any other
assert deleted(4, 9000, 10000, 11000, 11400) == []
assert deleted(10, 1, 10000, 11000, 12400) == []
assert deleted(2, 1, 100, 200) == [1]
""",
    )


def test_an_interrupted_run_does_not_end_like_a_complete_one(patched):
    python(
        patched,
        """
import signal, sys
from unittest.mock import MagicMock

from torchtitan.train import main

sys.argv = ["train"]
main(lambda config: MagicMock(interrupted=False))
try:
    main(lambda config: MagicMock(interrupted=True))
except SystemExit as end:
    assert end.code == 128 + signal.SIGTERM
else:
    raise AssertionError
""",
    )


def test_stock_llama3_trains_on_the_cpu(patched, tmp_path):
    """torchtitan's own trainer, model and data set; the loss of a repeated text falls."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.json").write_text('{"text": "' + "the keeper lit the lamp " * 400 + '"}\n')
    python(
        patched,
        f"""
import sys
sys.argv[1:] = '''
    --job.dump_folder={tmp_path} --model.name=llama3 --model.flavor=debugmodel
    --model.hf_assets_path={REPOSITORY}/torchtitan_ext/data/byte_tokenizer
    --training.dataset=c4_test --training.dataset_path={data} --training.steps=3
    --training.local_batch_size=1 --training.seq_len=64
    --training.mixed_precision_param=float32 --lr_scheduler.warmup_steps=1 --metrics.log_freq=1
'''.split()
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.train import Trainer, main

losses = []
log = MetricsProcessor.log
def record(self, step, loss, *args, **kwargs):
    losses.append(loss)
    return log(self, step, loss, *args, **kwargs)
MetricsProcessor.log = record
main(Trainer)
assert len(losses) == 3 and losses[0] > losses[1] > losses[2], losses
""",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
    )
