"""What happens to a run of days, on two gloo ranks: after each fault the same command continues, to the same losses.

One run suffers every fault in turn, each start from where the one before left off.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_resume import COMMON, losses

from torchtitan_ext import runner
from torchtitan_ext.model.checkpoints import complete_steps
from torchtitan_ext.outlook import job_outlook

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)  # of the launches that the first test waits for
STEPS = 10  # and a checkpoint every two
SETTINGS = (
    *COMMON,
    *("--training.seq_len=256", "--lighthouse.top_k=16", "--lighthouse.tile_winners=4"),
    *("--experimental.custom_import=faulty_import", f"--training.steps={STEPS}"),
    *("--training.dataloader.num_workers=1", "--checkpoint.keep_latest_k=2"),
)
FAULTS = {  # in this order: the rank and the step
    "killed": (1, 4),
    "killed-saving": (0, 4),
    "full-disk": (1, 4),
    "not-finite": (1, 5),
    "orphaned": (0, 5),
    "terminated": (1, 7),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: the undisturbed run, and the starts of the suffering one."""
    folder = tmp_path_factory.mktemp("faults")

    def start(dump, *settings, fault="none 0 0", restarts=0):
        command = [*runner.torchrun(2, "configs/demo/stage1.toml"), *SETTINGS, *settings]
        done = subprocess.run(
            [*command, f"--job.dump_folder={folder / dump}"],
            cwd=ROOT,
            env={
                **runner.child_environment(),
                "PET_MAX_RESTARTS": str(restarts),  # torchrun's --max_restarts
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
                "OMP_NUM_THREADS": "1",
                "FAULT": fault,
                "CHANGED": str(folder),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,  # whatever happens, it ends
        )
        first_step = re.search(r"Training starts at step (\d+)", done.stdout)
        return SimpleNamespace(
            dump=folder / dump,
            checkpoints=folder / dump / "checkpoint",
            code=done.returncode,
            output=done.stdout,
            first_step=first_step and int(first_step[1]),
            complete=sorted(complete_steps(folder / dump / "checkpoint")),
            half_written=[path.name for path in folder.glob(f"{dump}/checkpoint/step-4/*")],
        )

    with ThreadPoolExecutor() as at_once:
        both = [at_once.submit(start, "whole") for _ in range(2)]
        whole, rival = sorted((run.result() for run in both), key=lambda run: run.code)
    runs = {"whole": whole, "rival": rival}
    for name, (rank, step) in FAULTS.items():
        runs[name] = start(
            "suffering",
            # which also has the ranks hear of SIGTERM in its own step, not in the next, where a checkpoint is due
            f"--training.skip_nonfinite_steps={int(name in ('not-finite', 'orphaned', 'terminated'))}",
            fault=f"{name} {rank} {step}",
        )
    runs["completed"] = start("suffering", fault="killed 0 10", restarts=1)
    return runs


def test_every_fault_ends_the_run_and_the_same_command_completes_it(runs):
    for name, run in runs.items():
        assert (run.code == 0) == (name in ("whole", "completed")), run.output


@pytest.mark.parametrize("tag", ["loss_metrics/global_avg_loss", "lr", "n_tokens_seen"])
def test_all_starts_together_make_the_curve_of_the_undisturbed_run_bit_for_bit(runs, tag):
    whole = dict(losses(runs["whole"].dump, tag))
    assert sorted(whole) == list(range(1, STEPS + 1))
    suffering = losses(runs["completed"].dump, tag)
    assert {step for step, _ in suffering} == set(whole)
    assert len(suffering) > STEPS  # steps that no checkpoint held were trained again
    # all but the loss of the step that was made nan
    assert {(step, whole[step]) for step, value in suffering if value != whole[step]} <= (
        {(5, whole[5])} if "loss" in tag else set()
    )


def test_of_two_launches_into_a_folder_one_is_refused_with_the_process_of_the_other(runs):
    holder = (runs["whole"].dump / "run.lock").read_text()
    assert f"on host {socket.gethostname()}, since" in holder
    assert f"a launch that is still running writes there ({holder})" in last_lines(runs["rival"])
    assert not re.search(r"step: +1 ", runs["rival"].output)


def test_the_preflight_finds_no_fault_in_a_run_to_be_continued(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = [*SETTINGS, "--experimental.custom_import=torchtitan_ext.model"]
    settings += [f"--job.dump_folder={runs['completed'].dump}", f"--training.steps={STEPS + 2}"]
    facts, problems = job_outlook("configs/demo/stage1.toml", settings, 2, None, None)
    assert problems == [] and facts["steps"].startswith(f"{STEPS} to {STEPS + 2}")


def test_a_rank_that_is_killed_ends_the_others_and_the_report_names_it(runs):
    # torchelastic's report, which lists the other rank too, and first if both had ended when it looked
    report = runs["killed"].output.rpartition("torchtitan.train FAILED")[2]
    assert re.search(r"rank      : 1 \(local_rank: 1\)\n  exitcode  : -9 ", report), report
    assert runs["killed"].complete == [2]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(runs):
    killed = runs["killed-saving"]
    assert killed.first_step == 3 and killed.complete == [2]
    # all of step 4 was there but the metadata, which is written last
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(killed.half_written)
    assert ".metadata" not in killed.half_written
    assert runs["full-disk"].first_step == 3


def test_a_full_disk_is_told_with_checkpoint_rank_and_remedy(runs):
    run = runs["full-disk"]
    assert run.complete == [2]
    message = (
        rf"{run.checkpoints}/step-4 could not be saved: .*File too large.* \(rank 1\)\. Training stops "
        rf"after step 4; the newest checkpoint is {run.checkpoints}/step-2\. Make space"
    )
    assert re.search(message, last_lines(run))


def test_a_step_that_is_not_finite_is_passed_over_as_often_as_allowed_then_training_stops(runs):
    run = runs["not-finite"]
    assert "Step 5 is not finite: loss nan on rank 1, gradient norm nan. Param" in run.output
    message = "Step 6 is not finite: loss nan on rank 1, gradient norm nan. Training stops"
    assert message in last_lines(run)
    assert f"the newest checkpoint is {run.checkpoints}/step-4" in last_lines(run)
    for rank in range(2):
        changed = {
            step: json.loads((run.dump.parent / f"step-{step}-rank-{rank}.json").read_text())
            for step in (3, 4, 5)
        }
        assert changed == {3: ["weights", "moments"], 4: ["weights", "moments"], 5: []}


def test_ranks_whose_launcher_is_killed_save_and_end(runs):
    assert runs["orphaned"].code == -signal.SIGKILL
    assert max(runs["orphaned"].complete) == 5
    assert runs["terminated"].first_step == 6


def test_sigterm_saves_the_step_that_all_ranks_ended_with(runs):
    run = runs["terminated"]
    assert run.complete == [4, 6, 7]
    ended = re.findall(
        r"SIGTERM: training ends after step (\d+) of 10; the newest.*step-7", run.output
    )
    assert ended == ["7", "7"]
    assert "got signal: 15" in last_lines(run)
    assert runs["completed"].first_step == 8


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_goes_on(runs):
    run = runs["completed"]
    assert re.findall(r"Training starts at step (\d+)", run.output) == ["8", "8", "9", "9"]
    # half of the restarts would hang without what the launchers set
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in run.output


def test_what_sigterm_saved_pushes_out_no_checkpoint_that_was_to_be_kept(runs):
    """keep_latest_k is 2, and the last step's checkpoint comes on top of that."""
    assert runs["completed"].complete == [6, 8, 10]


def last_lines(run):
    return "\n".join(run.output.splitlines()[-60:])
