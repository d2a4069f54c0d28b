import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import pytest
import rich.console
from rich.console import Console
from torchtitan.config import ConfigManager

from torchtitan_ext import command_line, records, runner, split_points
from torchtitan_ext.model.checks import job_problems

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "demo"
SPLITS = (100, 110, 120)
STEPS = {"dense": 160, "stage1": 120, "stage2": 160}
NAMES = ["dense", "stage1", *(f"stage2-{split}" for split in SPLITS)]

# Stands in for torchtitan.train: resumes, logs, saves and dies as it does, without any training.
TRAINER = """
import argparse, json, os, re, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--job.dump_folder", dest="folder", type=Path)
parser.add_argument("--training.steps", dest="steps", type=int)
parser.add_argument("--checkpoint.initial_load_path", dest="load")
args, _ = parser.parse_known_args()
die_at = json.loads(os.environ.get("DIE_AT", "{}")).get(args.folder.name)

saved = args.folder / "checkpoint"
start = int(re.search("[0-9]+$", args.load)[0]) if args.load else 0
if saved.exists():
    start = max(int(p.parent.name[5:]) for p in saved.glob("step-*/.metadata"))
with open(args.folder.parent / "launches.txt", "a") as f:
    print(args.folder.name, start, args.steps, args.load, file=f)
for step in range(start + 1, args.steps + 1):
    for rank in range(int(os.environ.get("RANKS", 1))):
        print(f"[titan] now - root - INFO - \\x1b[31mstep: {step:2}  \\x1b[32mloss: {9 / step:8.5f}  "
              f"\\x1b[38mgrad_norm:  1.0  \\x1b[34mtps: 1,234  \\x1b[36mtflops: 1.00\\x1b[39m")
    if step == die_at:
        sys.exit("the reason why it died")
    if step % 10 == 0 and os.environ.get("SAVE", "1") == "1":
        (saved / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (saved / f"step-{step}" / ".metadata").touch()
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    with open(args.folder / f"heartbeat-{os.environ.get('RANK', 0)}", "a") as f:
        f.write("x")
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The demo's files, with the steps and checkpoints that the tests below count on."""
    folder = tmp_path_factory.mktemp("configs")
    for name, steps in STEPS.items():
        text = (CONFIGS / f"{name}.toml").read_text()
        for field, value in {"steps": steps, "interval": 10, "keep_latest_k": 4}.items():
            text, n = re.subn(rf"(?m)^{field} = .*", f"{field} = {value}", text, count=1)
            assert n == 1
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture
def plan(configs):
    return partial(runner.plan, configs)


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder whose runs are the stand-in's."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "trainer.py").write_text(TRAINER)
    real = runner.train_command

    def stand_in(run, nproc):
        command = real(run, nproc)
        arguments = command[command.index("torchtitan.train") + 1 :]
        return [sys.executable, str(tmp_path / "trainer.py"), *arguments]

    monkeypatch.setattr(runner, "train_command", stand_in)
    return tmp_path / "runs"


def launches(output) -> list[list[str]]:
    file = output / "launches.txt"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_every_run_starts_where_it_must_and_once(plan, output):
    runner.run_all(plan(output, splits=SPLITS))
    total, last = "160", str(max(SPLITS))
    stage1 = output / "stage1" / "checkpoint"
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


def test_default_splits_are_sixteenths_of_stage_2(plan, output):
    runs = plan(output, overrides=["--training.steps=80", "--checkpoint.interval=5"])
    assert [16 * run.start / run.steps for run in runs if run.load] == [10, 11, 12]


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in CONFIGS.parent.glob("*/stage2.toml"))
)
def test_launched_by_itself_a_job_file_goes_on_where_the_runner_does(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {}
    for run in runner.plan(Path("configs", folder), Path("outputs", folder)):
        runs.setdefault(run.config_file, run)  # of the tails, the earliest split
    assert len(runs) == 3
    for run in runs.values():
        assert run.config.job.dump_folder == str(run.folder)
        assert run.config.checkpoint.initial_load_path == (str(run.load) if run.load else None)


def test_torchtitan_reads_the_command_as_meant(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ["--training.steps=320", "--checkpoint.interval=20", "--checkpoint.keep_latest_k=0"]
    overrides += ["--metrics.no_enable_tensorboard", "--job.dump_folder=elsewhere"]
    for run in plan(tmp_path, splits=[80, 100], overrides=overrides):
        command = runner.train_command(run, nproc=2)
        arguments = command[command.index("torchtitan.train") + 1 :]
        config = ConfigManager().parse_args(arguments)
        assert config.checkpoint.interval == 20  # the user's
        assert config.job.dump_folder == str(run.folder)
        assert config.training.steps == (100 if run.name == "stage1" else 320)
        assert config.checkpoint.initial_load_path == (str(run.load) if run.load else None)
        assert config.metrics.enable_tensorboard and config.checkpoint.enable
        assert config.lighthouse.enable == (run.name == "stage1")


def test_a_failed_run_is_named_and_the_same_command_continues_it(plan, output, monkeypatch):
    monkeypatch.setenv("DIE_AT", '{"stage1": 57}')
    with pytest.raises(runner.RunFailed) as failure:
        runner.run_all(plan(output))
    log = output / "stage1" / "log.txt"
    for part in ("stage1", "exit code 1", str(log), "the reason why it died"):
        assert part in str(failure.value)
    assert [launch[0] for launch in launches(output)] == ["dense", "stage1"]

    monkeypatch.delenv("DIE_AT")
    runner.run_all(plan(output))
    again = launches(output)
    assert [launch[0] for launch in again] == NAMES[1:]
    assert again[0][1] == "50"  # from its newest checkpoint
    steps = [int(step) for step in re.findall(r"step:\s*(\d+)", log.read_text())]
    assert steps == [*range(1, 58), *range(51, 121)]
    assert "\x1b" not in log.read_text()


def test_a_half_saved_checkpoint_does_not_keep_stage_2_from_its_start(plan, output):
    runs = plan(output)
    runner.run_all(runs[:2])
    half_saved = output / "stage2-100" / "checkpoint" / "step-110"
    half_saved.mkdir(parents=True)
    (half_saved / "__0_0.distcp").touch()
    runner.run_all(runs[2:3])
    assert launches(output)[-1][:2] == ["stage2-100", "100"]


def test_a_seed_checkpoint_is_started_from(plan, output):
    seed = output / "stage1" / "checkpoint" / "step-0"
    seed.mkdir(parents=True)
    (seed / ".metadata").touch()
    runner.run_all(plan(output)[1:2])
    assert seed.is_dir()


def test_a_run_whose_last_step_is_in_hugging_faces_format_is_done(plan, output):
    [dense] = plan(output, only=["dense"])
    dense.checkpoint(160).mkdir(parents=True)
    assert not dense.done
    (dense.checkpoint(160) / "model.safetensors.index.json").touch()
    assert dense.done
    runner.run_all([dense])
    assert launches(output) == []


def test_a_run_that_ends_early_without_an_error_has_failed(plan, output, monkeypatch):
    monkeypatch.setenv("SAVE", "0")
    with pytest.raises(runner.RunFailed, match=r"dense failed .*checkpoint of step 160"):
        runner.run_all(plan(output))


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
        ({"overrides": ["--training.dataset=none"]}, ["training.dataset", "none"]),
    ],
    ids=lambda x: "-".join(map(str, next(iter(x.values())))) if isinstance(x, dict) else "",
)
def test_what_can_not_run_is_told_before_anything_starts(plan, output, kwargs, parts):
    with pytest.raises(ValueError) as error:
        plan(output, **kwargs)
    for part in parts:
        assert part in str(error.value)
    assert not output.exists()


@pytest.mark.parametrize("only", [["dense"], ["stage1", "stage2"], ["stage2"]])
@pytest.mark.parametrize("wrong", [["--training.dataset=none"], ["--training.stepz=1"]])
def test_a_wrong_argument_is_told_of_a_run_that_was_asked_for(plan, configs, output, only, wrong):
    with pytest.raises(ValueError) as error:
        plan(output, only=only, overrides=wrong)
    assert str(error.value).startswith(str(configs / f"{only[0]}.toml"))


def test_the_three_tomls_must_be_there_and_end_alike(configs, output, tmp_path):
    for name in ("dense", "stage1", "stage2"):
        with pytest.raises(ValueError, match=f"{name}.toml is missing"):
            runner.plan(tmp_path, output)
        (tmp_path / f"{name}.toml").write_text((configs / f"{name}.toml").read_text())
    dense = tmp_path / "dense.toml"
    dense.write_text(re.sub(r"(?m)^steps = \d+", "steps = 170", dense.read_text()))
    with pytest.raises(ValueError, match=r"dense\.toml: training\.steps = 170.*160"):
        runner.plan(tmp_path, output)


def test_settings_changed_since_a_run_are_not_mixed_with_it(plan, output):
    (run,) = plan(output, only=["dense"], overrides=["--optimizer.lr=0.5"])
    runner.run_all([run])
    (output / "dense" / "config.json").write_text(json.dumps(run.config.to_dict()))
    longer = ["--optimizer.lr=0.5", "--training.steps=320", "--checkpoint.interval=20"]
    assert plan(output, only=["dense"], overrides=longer)
    with pytest.raises(ValueError, match=r"dense was run with optimizer\.lr = 0\.5.* 0\.25 now"):
        plan(output, only=["dense"], overrides=["--optimizer.lr=0.25"])
    with pytest.raises(ValueError, match=r"dense was run with debug\.seed = "):
        plan(output, only=["dense"], overrides=["--optimizer.lr=0.5", "--debug.seed=99"])


def test_a_deleted_checkpoint_of_stage_1_is_missed_at_once(plan, output):
    runs = plan(output)
    runner.run_all(runs[:2])
    (output / "stage1" / "checkpoint" / "step-110" / ".metadata").unlink()
    with pytest.raises(ValueError, match="step-110 is not there for stage2-110"):
        plan(output)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_which_run_step_loss_speed_and_time_left(
    plan, output, monkeypatch, terminal
):
    shown = io.StringIO()
    monkeypatch.setattr(
        rich.console,
        "Console",
        lambda stderr: Console(file=shown, force_terminal=terminal, width=120),
    )
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(command_line, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.setenv("STEP_SECONDS", "0.005")  # long enough for the live line to be drawn
    runner.run_all(plan(output, splits=[100]))
    text = runner.ANSI_COLOR.sub("", shown.getvalue())
    for title in ("[1/3] dense", "[2/3] stage1", "[3/3] stage2-100"):
        assert title in text
    assert "160/160" in text and "100/100" in text
    if not terminal:  # a line a step, though each rank logs it
        assert text.count("100/100") == 1
    assert re.search(r"loss \d\.\d+  1,234 tok/s/device  left 0:\d\d, all 0:\d\d", text)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_worker(configs, output, tmp_path, sent):
    """Through the real torchrun, with two workers."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import signal, sys
from pathlib import Path
from torchtitan_ext import command_line, runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started without
real = runner.train_command
def stand_in(run, nproc):
    command = real(run, nproc)
    at = command.index("torchtitan.train")
    return [*command[: at - 1], {str(tmp_path / "trainer.py")!r}, *command[at + 1 :]]
runner.train_command = stand_in
runs = runner.plan(Path({str(configs)!r}), Path({str(output)!r}))
command_line.run(lambda: runner.run_all(runs, 2))
""")
    env = {**os.environ, "STEP_SECONDS": "0.1"}
    process = subprocess.Popen([sys.executable, str(driver)], env=env, stderr=subprocess.PIPE)
    beats = [output / "dense" / f"heartbeat-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(beat.exists() for beat in beats):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    *progress, last = errors.decode().splitlines()
    assert last == "driver: interrupted; the same command continues"
    assert all(line.startswith("[1/5] dense") for line in progress)
    sizes = [beat.stat().st_size for beat in beats]
    time.sleep(0.5)
    assert [beat.stat().st_size for beat in beats] == sizes
    assert max(sizes) < 160  # it was interrupted, not at its end


# What a user's own module registers, beside their outputs.
EXTENSION = """
from dataclasses import replace

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_ext.model import flavors

DATASETS["squares"] = DatasetConfig(
    path=".",
    loader=lambda path: Dataset.from_dict({"text": [f"{i} x {i} = {i * i}. " * 20 for i in range(50)]}),
    sample_processor=lambda sample: sample["text"],
)
flavors["tiny"] = replace(flavors["debug"], n_layers=1)
"""


def test_tools_run_a_real_experiment_on_data_and_a_flavor_of_its_own(tmp_path):
    """Three tiny runs through torchrun and torchtitan, their table, and what uses the result."""
    overrides = "--training.steps=6 --checkpoint.interval=4"
    overrides += " --lr_scheduler.warmup_steps=2 --metrics.log_freq=2"
    overrides += " --training.seq_len=256 --lighthouse.top_k=16 --lighthouse.tile_winners=4"
    overrides += " --experimental.custom_import=mine --training.dataset=squares --model.flavor=tiny"
    overrides += f" --model.hf_assets_path={ROOT}/torchtitan_ext/data/byte_tokenizer"
    (tmp_path / "mine.py").write_text(EXTENSION)
    said = ""
    for command in (
        f"-m torchtitan_ext.preflight --job.config_file {CONFIGS}/stage1.toml {overrides}",
        f"{ROOT}/scripts/run_splits.py --configs {CONFIGS} --output . --splits 4 -- {overrides}",
        f"{ROOT}/scripts/make_table.py .",
        f"{ROOT}/scripts/export_hf.py stage2-4 hf",
        f"{ROOT}/scripts/niah.py stage2-4 --contexts 64 --depths 0",
    ):
        command = [sys.executable, *command.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert "4 + 2" in said and "plot: loss.png" in said
    (dense, split) = split_points.table(split_points.read_experiment(tmp_path))
    assert dense.status == split.status == "finished"
    for value in (dense.device_hours, dense.ktok_s, split.device_hours, split.jump):
        assert value is not None
    # the first step of stage 2 goes on where stage 1's checkpoint was, not where it ended
    tail = records.read_run(tmp_path / "stage2-4")
    assert tail.step[0] in (5, 6) and tail.step[-1] == 6


GRIDS = [
    (configs, cell)
    for configs, file in (("530m", "published.toml"), ("small", "small/ablations.toml"))
    for cell in tomllib.loads((ROOT / "configs" / file).read_text())["ablations"]
]


@pytest.mark.parametrize(
    "configs, cell", GRIDS, ids=lambda x: x if isinstance(x, str) else x["run"]
)
def test_every_cell_of_a_grid_is_a_legal_job_with_its_settings(configs, cell, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import ablate

    stages = [
        ConfigManager().parse_args(
            ["--job.config_file", f"configs/{configs}/{stage}.toml", *ablate.arguments(cell)]
        )
        for stage in ("stage1", "stage2")
    ]
    for config in stages:
        for section, settings in cell["settings"].items():
            for field, value in settings.items():
                assert getattr(getattr(config, section), field) == value
        config.checkpoint.enable, config.checkpoint.initial_load_path = False, None
        assert job_problems(config, n_ranks=8 if configs == "530m" else 1) == []
    assert stages[0].lighthouse.enable and not stages[1].lighthouse.enable
