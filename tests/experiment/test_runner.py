"""Plan, run, interrupt and continue split-point experiments, with stand-ins for the trainings."""

import json
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.launches import CONTEXT, ROOT
from helpers.streams import write_text

from torchtitan_ext import console, progress
from torchtitan_ext.experiment import runner
from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.train.spec import register

CONFIGS = ROOT / "configs" / "text"
SPLITS = (100, 110, 120)
STEPS = {"dense": 160, "stage1": 120, "stage2": 160}

# Stands in for torchtitan.train: resumes, logs, saves and dies as it does, without any training.
TRAINER = """
import argparse, os, re, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--job.dump_folder", dest="folder", type=Path)
parser.add_argument("--training.steps", dest="steps", type=int)
parser.add_argument("--checkpoint.initial_load_path", dest="load")
args, _ = parser.parse_known_args()

saved = args.folder / "checkpoint"
start = int(re.search("[0-9]+$", args.load)[0]) if args.load else 0
start = max((int(p.parent.name[5:]) for p in saved.glob("step-*/.metadata")), default=start)
with open(args.folder.parent / "launches.txt", "a") as f:
    print(args.folder.name, start, args.steps, args.load, file=f)
for step in range(start + 1, args.steps + 1):
    for rank in range(int(os.environ.get("RANKS", 1))):
        print(f"[titan] now - root - INFO - \\x1b[31mstep: {step:2}  \\x1b[32mloss: {9 / step:8.5f}  "
              f"\\x1b[38mgrad_norm:  1.0  \\x1b[34mtps: 1,234  \\x1b[36mtflops: 1.00\\x1b[39m")
    if os.environ.get("DIE_AT") == f"{args.folder.name} {step}":
        sys.exit("the reason why it died")
    if step % 10 == 0 and os.environ.get("SAVE", "1") == "1":
        (saved / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (saved / f"step-{step}" / ".metadata").touch()
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    with open(args.folder / f"heartbeat-{os.environ.get('RANK', 0)}", "a") as f:
        f.write("x")
"""


def write_configs(folder, base, **sections):
    """The job files of an experiment, each on top of that in `base`, with the sections of its name."""
    for name in STEPS:
        (folder / f"{name}.toml").write_text(f'extends = "{base}/{name}.toml"\n{sections.get(name, "")}')
    return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The demo's files, with the steps and checkpoints that the tests below count on."""
    changes = {name: f"[training]\nsteps = {steps}\n" for name, steps in STEPS.items()}
    changes["stage1"] += "[checkpoint]\ninterval = 10\nkeep_latest_k = 4\n"
    return write_configs(tmp_path_factory.mktemp("configs"), CONFIGS, **changes)


@pytest.fixture
def plan(configs):
    return partial(runner.plan, configs)


def by_stand_in(trainer, torchrun=False):
    """Have each run's command call the stand-in, by torchrun or alone."""
    real = runner.train_command

    def stand_in(run, nproc):
        command = real(run, nproc)
        at = command.index("torchtitan_ext.train")
        return [*(command[: at - 1] if torchrun else [sys.executable]), str(trainer), *command[at + 1 :]]

    return stand_in


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder whose runs are the stand-in's."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(runner, "train_command", by_stand_in(tmp_path / "trainer.py"))
    return tmp_path / "runs"


def launches(output) -> list[list[str]]:
    file = output / "launches.txt"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_every_run_starts_where_it_must_and_once_and_a_deleted_checkpoint_is_missed(plan, output):
    runs = plan(output, splits=SPLITS)
    runner.run_all(runs[:2])
    stage1 = output / "stage1" / "checkpoint"
    (stage1 / "step-110" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"stage2-110 starts from .*step-110, which does not exist"):
        plan(output, splits=SPLITS)
    (stage1 / "step-110" / ".metadata").touch()
    runner.run_all(runs)
    total, last = "160", str(max(SPLITS))
    assert launches(output) == [
        ["dense", "0", total, "None"],
        ["stage1", "0", last, "None"],
        *([f"stage2-{s}", str(s), total, str(stage1 / f"step-{s}")] for s in SPLITS),
    ]
    runner.run_all(plan(output, splits=SPLITS))
    assert launches(output) == []
    # one more split: only what is new runs
    runner.run_all(plan(output, splits=(90, *SPLITS), overrides=["--checkpoint.keep_latest_k=0"]))
    assert [launch[0] for launch in launches(output)] == ["stage2-90"]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CONFIGS.parent.glob("*/stage2.toml")))
def test_launched_by_itself_a_job_file_goes_on_where_the_runner_does(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # away from the runs of `make demo`
    runs, here = {}, ["--training.dataset=python_source", "--training.dataset_path=None"]
    here.append(f"--model.hf_assets_path={ROOT}/torchtitan_ext/data/byte_tokenizer")
    for run in runner.plan(CONFIGS.parent / folder, Path("outputs", folder), overrides=here):
        runs.setdefault(run.config_file, run)  # of the tails, the earliest split
        assert not run.load or 16 * run.start / run.steps in (10, 11, 12)  # by default
    assert len(runs) == 3
    for run in runs.values():
        assert run.config.job.dump_folder == str(run.folder)
        assert run.config.checkpoint.initial_load_path == (str(run.load) if run.load else None)


def test_what_an_experiment_needs_holds_over_the_users_arguments_and_no_more(plan, tmp_path):
    overrides = ["--checkpoint.interval=20", "--checkpoint.keep_latest_k=0", "--checkpoint.no_enable"]
    overrides += ["--metrics.no_enable_tensorboard", "--job.dump_folder=elsewhere"]
    for run in plan(tmp_path, splits=[80, 100], overrides=overrides):
        command = runner.train_command(run, nproc=2)
        _, file, *arguments = command[command.index("torchtitan_ext.train") + 1 :]
        config = parse_job(file, arguments)
        assert config.checkpoint.interval == 20 and config.job.dump_folder == str(run.folder)
        assert config.metrics.enable_tensorboard and config.checkpoint.enable


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_same_command_continues_it(plan, output, monkeypatch):
    monkeypatch.setenv("SAVE", "0")  # it ends early, without an error
    with pytest.raises(console.CommandFailed, match=r"dense failed .*checkpoint of step 160"):
        runner.run_all(plan(output))
    assert [launch[0] for launch in launches(output)] == ["dense"]
    monkeypatch.delenv("SAVE")
    monkeypatch.setenv("DIE_AT", "stage1 57")
    with pytest.raises(console.CommandFailed) as failure:
        runner.run_all(plan(output))
    log = output / "stage1" / "log.txt"
    assert re.search(f"(?s)the reason why it died.*stage1 .*exit code 1.*{log}", str(failure.value))
    assert [launch[0] for launch in launches(output)] == ["dense", "stage1"]

    monkeypatch.delenv("DIE_AT")
    runner.run_all(plan(output))
    again = launches(output)
    assert [launch[0] for launch in again] == ["stage1", *(f"stage2-{split}" for split in SPLITS)]
    assert again[0][1] == "50"  # from its newest checkpoint
    steps = [int(step) for step in re.findall(r"step:\s*(\d+)", log.read_text())]
    assert steps == [*range(1, 58), *range(51, 121)]
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"splits": [105]}, ["105", "checkpoint.interval = 10"]),
        ({"splits": [130]}, ["130", "stage1.toml", "training.steps = 120"]),
        ({"splits": [100, 160]}, ["160", "stage 2's training.steps = 160"]),
        ({"splits": [0, 100]}, ["split 0"]),
        ({"splits": [20, 120]}, ["checkpoint.keep_latest_k = 4", "11"]),
        ({"only": ["stage2"]}, ["step-100", "stage1"]),
        ({"overrides": ["--training.seq_len=4000"]}, ["stage1.toml", "seq_len = 4000"]),
        ({"overrides": ["--lr_scheduler.decay_ratio=1", "--checkpoint.last_save_model_only"]}, ["decay", "last_save"]),
        ({"splits": [90], "overrides": ["--lr_scheduler.warmup_steps=100"]}, ["stage1.toml to step 90", "100"]),
        ({"only": ["dense"], "overrides": ["--training.stepz=1"]}, ["dense.toml"]),  # a run that was asked for
        ({"only": ["stage2"], "overrides": ["--training.dataset=none"]}, ["stage2.toml"]),
        ({"overrides": ["--training.global_batch_size=4"], "nproc": 3}, ["global_batch_size = 4", "3"]),
        ({"overrides": ["--checkpoint.folder=/tmp/ck"]}, ["checkpoint.folder = '/tmp/ck'"]),  # the same for all runs
    ],
    ids=lambda x: "-".join(map(str, next(iter(x.values())))) if isinstance(x, dict) else "",
)
def test_what_can_not_run_is_told_before_anything_starts(plan, output, kwargs, parts):
    with pytest.raises(ValueError) as error:
        plan(output, **kwargs)
    assert [part for part in parts if part not in str(error.value)] == []
    assert not output.exists()


def test_the_stages_must_fit_each_other(configs, output, tmp_path):
    """Or stage 2 would be refused only after stage 1 has trained for hours."""
    changed = "[optimizer]\nbeta2 = 0.9\n[rope]\ntheta = 9\n[lr_scheduler]\ndecay_ratio = 0.35\n"
    write_configs(tmp_path, configs, dense="[training]\nsteps = 170\n", stage2=changed)
    words = [rf"{field}: stage 1 .*/stage1\.toml\)" for field in ("rope.theta = 9", "optimizer.beta2 = 0.9")]
    words = [r"dense\.toml: training\.steps = 170.*160", *words, "would jump from 0.01 to 0.00893 at step 110"]
    for name in ("unrelated", *(f"stage1/checkpoint/step-{split}" for split in (100, 110))):  # before and after stage 1
        write_text(output / name / ".metadata")
        with pytest.raises(ValueError) as error:
            runner.plan(tmp_path, output, splits=[100, 110])
        for word, problem in zip(words, str(error.value).splitlines(), strict=True):
            assert re.search(word, problem) and f"{tmp_path}/stage2.toml" in problem


@pytest.mark.slow
def test_settings_changed_since_a_run_are_not_mixed_with_it(plan, output):
    (run,) = plan(output, only=["dense"], overrides=["--optimizer.lr=0.5"])
    runner.run_all([run])
    (output / "dense" / "config.json").write_text(json.dumps(run.config.to_dict()))
    longer = ["--optimizer.lr=0.5", "--training.steps=320", "--checkpoint.interval=20"]
    longer += ["--training.skip_nonfinite_steps=1", "--training.skip_damaged_data"]  # as errors recommend
    longer += ["--optimizer.override_checkpoint"]
    assert plan(output, only=["dense"], overrides=longer)
    with pytest.raises(ValueError, match=r"dense was run with optimizer\.lr = 0\.5.* 0\.25 now"):
        plan(output, only=["dense"], overrides=["--optimizer.lr=0.25"])
    with pytest.raises(ValueError, match=r"dense was run with debug\.seed = "):
        plan(output, only=["dense"], overrides=["--optimizer.lr=0.5", "--debug.seed=99"])
    (output / "dense" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"dense/config\.json is not the job config of a run"):
        plan(output, only=["dense"])


def test_progress_tells_which_run_step_loss_speed_and_time_left(plan, output, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("RANKS", "2")
    runner.run_all(plan(output, splits=[100]))
    text = capsys.readouterr().err
    assert all(title in text for title in ("[1/3] dense", "[2/3] stage1", "[3/3] stage2-100"))
    assert "160/160" in text and text.count("100/100") == 1  # one line per step, though each rank logs it
    assert re.search(r"loss \d\.\d+  1,234 tok/s/device  \d+%, left 0:00:\d\d", text)


def drive(configs, output, trainer, errors):
    """Run the experiment by torchrun, each worker the stand-in."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started without
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["STEP_SECONDS"] = "0.1"
    runner.train_command = by_stand_in(trainer, torchrun=True)
    register()
    runs = runner.plan(configs, output)
    console.run(lambda: runner.run_all(runs, 2), "driver")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_worker(configs, output, tmp_path, sent):
    """Through the real torchrun, with two workers."""
    errors = tmp_path / "errors"
    process = CONTEXT.Process(target=drive, args=(configs, output, tmp_path / "trainer.py", errors))
    process.start()
    beats = [output / "dense" / f"heartbeat-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(beat.exists() for beat in beats):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, sent)
    process.join(timeout=90)
    assert process.exitcode == 130
    *progress, last = errors.read_text().splitlines()
    assert last == "driver: interrupted; the same command continues"
    assert all(line.startswith("[1/5] dense") for line in progress)
    sizes = [beat.stat().st_size for beat in beats]
    time.sleep(0.5)
    assert [beat.stat().st_size for beat in beats] == sizes
    assert max(sizes) < 160  # it was interrupted, not at its end
