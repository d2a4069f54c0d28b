"""Faults of a long run, on two gloo ranks: after each, the same command continues to the same losses.

One run suffers every fault in turn; each start continues where the one before stopped.
"""

import fcntl
import json
import os
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import pytest
from helpers.launches import CONTEXT, SHORT, losses, train

from torchtitan_ext.jobs.folder_lock import lock
from torchtitan_ext.jobs.launch import torchrun, training
from torchtitan_ext.jobs.preflight import plan_report
from torchtitan_ext.jobs.resume import complete_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # of the launches that the first test waits for
CONFIG = "configs/text/stage1.toml"
STEPS = 10  # and a checkpoint every two
SETTINGS = [*SHORT, "--checkpoint.interval=2", "--checkpoint.keep_latest_k=2", "--metrics.log_freq=1"]
SETTINGS += ["--training.dataset=python_source", "--training.dataloader.num_workers=1", f"--training.steps={STEPS}"]
# of each start in this order: the rank, the step, and how many steps in a row may not be finite; as one may not, ranks
# learn of SIGTERM one step later, where a checkpoint is due
STARTS = {
    "saving": ("killed-saving 0 4", 0),
    "full-disk": ("full-disk 1 4", 0),
    "not-finite": ("not-finite 1 5", 1),
    "torchrun": ("killed 1 5,orphaned 0 5", 1),
    "terminated": ("terminated 1 7", 1),
    "completed": ("none 0 0", 0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: the undisturbed run, a launch into its folder, and the starts of the suffering run."""
    folder = tmp_path_factory.mktemp("faults")

    def start(dump, faults="none 0 0", skipped=0, by_torchrun=False):
        settings = [*SETTINGS, f"--job.dump_folder={folder / dump}", f"--training.skip_nonfinite_steps={skipped}"]
        settings += ["--experimental.custom_import=helpers.faulty_import"]
        settings += ["--checkpoint.async_mode=async"] * faults.startswith("terminated")
        env = {"FAULTS": faults, "CHANGED": str(folder)}
        code, log = None, folder / "log"
        if by_torchrun:  # which starts all again, too, if it finds its port taken
            env |= {"PET_MAX_RESTARTS": "3", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
            with training([*torchrun(2, CONFIG), *settings], log, **env) as run:
                list(run.steps())
            code, output = run.process.returncode, log.read_text()
            ended_well = not code
        else:
            ended_well, output = train(2, [f"--job.config_file={CONFIG}", *settings], ends_well=None, **env)
        run = SimpleNamespace(dump=folder / dump, ended_well=ended_well, code=code, output=output)
        run.checkpoints = run.dump / "checkpoint"
        run.first_steps = list(map(int, re.findall(r"Training starts at step (\d+)", output)))
        run.complete = complete_steps(run.checkpoints)
        run.half_written = {path.name for path in run.checkpoints.glob("step-4/*")}
        return run

    with ThreadPoolExecutor() as at_once:
        rival, whole = sorted(at_once.map(start, ["whole"] * 2), key=lambda run: run.ended_well)
    starts = {name: start("suffering", *settings, by_torchrun=name == "torchrun") for name, settings in STARTS.items()}
    return {"whole": whole, "rival": rival} | starts


def test_every_fault_ends_the_run_and_the_same_command_completes_it(runs):
    for name, run in runs.items():
        assert run.ended_well == (name in ("whole", "completed")), run.output


@pytest.mark.parametrize("tag", ["loss_metrics/global_avg_loss", "lr", "n_tokens_seen"])
def test_all_starts_together_make_the_curve_of_the_undisturbed_run_bit_for_bit(runs, tag):
    whole = dict(losses(runs["whole"].dump, tag))
    assert sorted(whole) == list(range(1, STEPS + 1))
    suffering = losses(runs["completed"].dump, tag)
    assert {step for step, _ in suffering} == set(whole)
    assert len(suffering) > STEPS  # steps that no checkpoint held were trained again
    others = {step for step, value in suffering if value != whole[step]}
    assert others <= ({5} if "loss" in tag else set())  # whose loss was made nan


def test_of_two_launches_into_a_folder_one_is_refused_with_the_process_of_the_other(runs):
    holder = (runs["whole"].dump / "run.lock").read_text()
    assert f"on host {socket.gethostname()}, since" in holder
    started = re.escape(holder), "it has just started"  # if it had not written its line yet
    assert re.search(rf"a launch that is still running writes there \(({'|'.join(started)})\)", runs["rival"].output)
    assert not re.search(r"step: +1 ", runs["rival"].output)


def test_a_refused_launch_names_the_holder_and_never_the_one_before(tmp_path):
    path = tmp_path / "a run.lock"
    path.write_text("process 1")  # which was killed
    with path.open("a") as file, CONTEXT.Pool(1) as rival:
        fcntl.lockf(file, fcntl.LOCK_EX)  # the holder's first act, before it writes
        with pytest.raises(ValueError, match=rf"writes there \(it has just started\).*: rm '{path}'"):
            rival.apply(lock, ("", path))
        holder = f"process {os.getpid()} on host {socket.gethostname()}, since "
        with lock("", path), pytest.raises(ValueError, match=rf"writes there \({holder}"):
            rival.apply(lock, ("", path))


def test_the_preflight_finds_no_fault_in_a_run_to_be_continued(runs):
    settings = [*SETTINGS, f"--job.dump_folder={runs['completed'].dump}", f"--training.steps={STEPS + 2}"]
    facts, problems = plan_report(CONFIG, settings, 2, None, None)
    assert problems == [] and facts["steps"].startswith(f"{STEPS} to {STEPS + 2}")


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(runs):
    killed = runs["saving"]
    assert killed.complete == [2]
    # all of step 4 was there but the metadata, which is written last
    assert killed.half_written == {"__0_0.distcp", "__1_0.distcp"}
    assert set(runs["full-disk"].first_steps) == {3}


def test_a_full_disk_is_named_with_checkpoint_rank_and_remedy(runs):
    run = runs["full-disk"]
    assert run.complete == [2]
    failure = rf"{run.checkpoints}/step-4 could not be saved: .*File too large.* \(rank 1\)\. Training stops after "
    assert re.search(rf"{failure}step 4; the newest checkpoint is {run.checkpoints}/step-2\. Make space", run.output)


def test_a_step_that_is_not_finite_is_passed_over_as_often_as_allowed_then_training_stops(runs):
    run = runs["not-finite"]
    assert "Step 5 is not finite: loss on rank 1, gradient norm nan. Param" in run.output
    assert "Step 6 is not finite: loss on rank 1, gradient norm nan. Training stops" in run.output
    assert f"the newest checkpoint is {run.checkpoints}/step-4" in run.output
    for rank, step in product((0, 1), (3, 4, 5)):
        changed = json.loads((run.dump.parent / f"step-{step}-rank-{rank}.json").read_text())
        assert changed == (["weights", "moments"] if step < 5 else [])


def test_torchrun_starts_all_again_for_a_rank_that_is_killed_and_ranks_save_and_end_without_torchrun(runs):
    run = runs["torchrun"]
    # torchrun sees the killed rank first, or the one that lost its peer
    assert re.search(r"exitcode: (-9\) local_rank: 1|1\) local_rank: 0) ", run.output), run.output
    # half of the restarts would hang if torchrun's store stayed
    assert run.first_steps == [5, 5, 5, 5] and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in run.output
    assert run.code == -signal.SIGKILL and max(run.complete) == 5
    assert set(runs["terminated"].first_steps) == {6}


def test_sigterm_to_one_rank_saves_the_step_that_all_ended_with_and_pushes_out_no_checkpoint_to_keep(runs):
    run = runs["terminated"]
    assert run.complete == [4, 6, 7]
    ended = re.findall(r"SIGTERM: training ends after step (\d+) of 10; the newest.*step-7", run.output)
    assert ended == ["7", "7"]
    assert "terminated with exit code 143" in run.output
    assert set(runs["completed"].first_steps) == {8}
    # keep_latest_k is 2, and the last step's checkpoint comes on top of that
    assert runs["completed"].complete == [6, 8, 10]
