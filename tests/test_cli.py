"""Every command has help, and reports a user's error in one line.

The commands are found, not listed: a new one without help fails here.
"""

import io
import os
import re
import subprocess
import sys

import pytest
from helpers.commands import ROOT, SCRIPTS, call
from helpers.launches import SHORT
from helpers.streams import write_text
from rich.console import Console

from torchtitan_ext import console, progress
from torchtitan_ext.cli import VERBS
from torchtitan_ext.console import CommandFailed
from torchtitan_ext.evaluate import niah
from torchtitan_ext.experiment import records, report

SHELL = [path.name for path in sorted((ROOT / "scripts").iterdir()) if path.is_file() and path.suffix != ".py"]


@pytest.mark.parametrize("name", [*VERBS, *SCRIPTS])
def test_help_says_what_it_does_and_what_each_argument_is(command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "400")
    out, err = command(name, "--help")
    assert err == "" and re.search(rf"usage: python (-m torchtitan_ext |scripts/){name}", out)
    options = re.split(r"\n *(?=--)", re.sub(r"[─-╿]", "", out.partition("show this help")[2]))[1:]
    assert len(options) >= 1
    for option in options:
        assert re.search(r"[a-z]{2} [a-z]", option) and re.search(r"\((default|required|repeatable)", option), option
    if name == "niah":
        assert {*map(str, (*niah.CONTEXTS, *niah.DEPTHS))} <= set(re.findall(r"\d+", out))


@pytest.mark.parametrize("name", SHELL)
def test_help_of_a_launcher_names_the_variables_that_it_reads(name):
    done = call("bash", f"scripts/{name}", "--help")
    assert done.returncode == 0 and done.stderr == "" and f"scripts/{name}" in done.stdout
    taken = set(re.findall(r"\$\{(NGPU|CONFIG|NNODES|PYTHON|RDZV_\w+):[-?]", (ROOT / "scripts" / name).read_text()))
    assert taken and all(variable in done.stdout for variable in taken)


def test_a_python_without_the_packages_is_answered_in_one_line():
    """-S: no site-packages."""
    done = call(sys.executable, "-S", "-m", "torchtitan_ext", "table", "x", PYTHONPATH="")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"is not installed for {sys.executable}" in done.stderr and "'.[train]'" in done.stderr


TEXT = "configs/text"
BENCH = ["--output", "{}/bench.json", "--run"]
# each ends with 2, and says these words
WRONG = [
    ("patch", ["chek"], ["'chek'", "'apply', 'check', 'revert'"]),
    ("patch", ["check", "--root", "{}"], ["Restore it: pip install"]),
    ("preflight", ["--job.config_file", f"{TEXT}/dense.toml", "--nproc", 0], ["--nproc: '0'"]),
    ("preflight", ["--job.config_file", f"{TEXT}/dense.toml", "--tok-s=nan"], ["--tok-s nan: must be a positive"]),
    ("splits", [], ["--configs PATH", "see --help"]),
    ("splits", ["--configs", "{}/gone"], ["{}/gone/dense.toml: No such file", "give the path"]),
    ("splits", ["--configs", TEXT, "--", "--checkpoint.interval", 0], ["checkpoint.interval = 0", "must be 1 or more"]),
    ("splits", ["--configs", TEXT, "--only"], ["--only: give one value or more"]),
    ("splits", ["--configs", TEXT, "--output", "{}/file"], ["{}/file/dense: Not a directory; choose"]),
    ("ablate", ["--cells", "none"], ["--cells none", "L3-p4-k1536-norm"]),
    ("ablate", ["--grid", "{}/file"], ["--grid {}/file is not a grid", "give a TOML file"]),
    ("table", ["{}/gone"], ["{}/gone holds no records", "torchtitan_ext splits"]),
    ("table", ["{}/empty", "--out", "x"], ["--out: no such argument", "--help"]),
    ("export", ["{}/broken", "--output", "{}/hf"], ["config.json is not the job config", "restore"]),
    ("export", ["s3://bucket/run", "--output", "{}/hf"], ["s3:/bucket/run is not a path on this machine: mount"]),
    ("niah", ["{}/empty", "--depths", "--trials", 10], ["--depths: give one value or more"]),
    ("niah", ["{}/empty"], ["{}/empty is not a complete checkpoint", "give"]),
    ("check-data", ["{}/gone"], ["check-data: '{}/gone': no file that ends in .parquet", "nothing is there", "give"]),
    ("check-data", ["{}/file", "--training.dataset=c4"], ["--training.dataset=c4: DATA names", "a job file"]),
    ("check-data", [f"{TEXT}/stage1.toml"], ["'python_source' is not checked", "that `text` reads"]),
    ("draw_method", ["--output", "{}/file"], ["{}/file: File exists; choose another path"]),
    ("bench_attention", ["--output", "{}/empty"], ["--output {}/empty: is a folder; name"]),
    ("bench_attention", ["--n-kv-heads", 3], ["4 query heads", "multiple of 3 KV heads"]),
    ("bench_attention", ["--seq_lens"], ["--seq-lens: give one value or more"]),
    ("bench_attention", ["--peers"], ["--peers: ", "no CUDA device"]),
    ("bench_train", [], ["CUDA device", "--run"]),
    ("bench_train", ["--steps", 6], ["--steps 6", "multiple of --window 4", "at least 8"]),
    ("bench_train", ["--profile"], ["--profile", "no CUDA device"]),
    ("bench_train", [*BENCH, "one"], ["--run one", "give a name and the path of a job file"]),
    ("bench_train", [*BENCH, "a/b", f"{TEXT}/dense.toml"], ["--run a/b", "letters, digits"]),
    ("bench_train", [*BENCH, "a", f"{TEXT}/dense.toml", "--run", "a", f"{TEXT}/dense.toml"], ["--run a", "unique"]),
    ("bench_train", [*BENCH, "a", "{}/empty"], ["{}/empty", "path of a job file"]),
    ("write_settings", ["--output", "{}/empty"], ["{}/empty: Is a directory; give a file"]),
    ("soak", ["--steps", 10], ["--steps 10: give 100 or more"]),
    ("soak", ["--output", "{}/empty"], ["{}/empty holds the runs", "delete it, or name"]),
    ("soak", ["--output", "{}/file/x"], ["{}/file/x/undisturbed: Not a", "choose"]),
]
assert {name for name, *_ in WRONG} == {*VERBS, *SCRIPTS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments", "words"), WRONG, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else str(x)
)
def test_what_is_wrong_is_named_with_a_remedy(command, monkeypatch, tmp_path, name, arguments, words):
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "file", "junk")
    write_text(tmp_path / "broken/config.json", '{"training": ')
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, said = command(name, *(str(argument).format(tmp_path) for argument in arguments), code=2)
    program = f"python scripts/{name}.py" if name in SCRIPTS else f"python -m torchtitan_ext {name}"
    assert "Traceback" not in said and f"{program}: " in said
    for word in words:
        assert word.format(tmp_path) in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--x 3: give 4"), 2, "--x 3: give 4"),
        (CommandFailed("it failed"), 1, "it failed"),
        (FileNotFoundError(2, "No such file", "a.toml"), 2, "a.toml: No such file; give one"),
        (FileNotFoundError("there are no records"), 2, "there are no records"),
        (ModuleNotFoundError("No module", name="tyro"), 2, f"not installed for {sys.executable}"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("call again"), 130, "interrupted; call again"),
        *((bug, 1, None) for bug in (TypeError("no"), KeyError(1), RuntimeError("no"), AssertionError())),
        (ModuleNotFoundError("no", name="torchtitan_ext.none"), 1, None),
    ],
)
def test_what_its_user_can_correct_ends_in_one_line_and_a_bug_with_its_traceback(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        console.run(main, "python -m x")
    assert stop.value.code == code
    *traceback, last = capsys.readouterr().err.splitlines()
    if words:
        assert not traceback and last.startswith("python -m x: ") and words in last
    else:
        assert traceback[0].startswith("Traceback") and "in main" in "".join(traceback) and "Error" in last


def test_closed_output_is_answered_in_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "torchtitan_ext", "patch", "check"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.startswith("python -m torchtitan_ext patch: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_verbs_run_a_real_experiment_and_make_its_table(command, tmp_path):
    """Two tiny runs through torchrun and the trainer."""
    overrides = [*SHORT, "--training.steps=6", "--checkpoint.interval=4", "--metrics.log_freq=2"]
    overrides += ["--splits", 4, "--only", "stage1", "stage2"]
    command("splits", "--configs", TEXT, "--output", tmp_path, *overrides)
    out, _ = command("table", tmp_path)
    assert "4 + 2" in out and str(tmp_path / "loss.png") in out
    _, split = report.table(report.read_experiment(tmp_path))
    assert split["status"] == "finished" and {"device_hours", "ktok_s", "jump"} < split.keys()
    # the first step of stage 2 goes on where stage 1's checkpoint was, not where it ended
    tail = records.read_run(tmp_path / "stage2-4")
    assert tail.step.tolist() == [5, 6]  # the first of a process, then every second


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, terminal):
    shown, clock = io.StringIO(), iter(range(0, 10_000, 2))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=terminal, width=100))
    with progress.Display() as display:
        display.get_time = lambda: next(clock)  # 2 seconds a call, of which a count makes three
        display.begin("files", total=50)
        for _ in range(50):
            display.count(1)
    text = shown.getvalue()
    assert "files" in text and "100%, left 0:00:00" in text
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert 10 < len(text.splitlines()) < 50  # a line in 10 seconds
        assert re.match(r"(files  \d+%, left \d+:\d\d:\d\d\n)+$", text)


def test_make_alone_lists_every_target():
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text())
    phony = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[1].split()
    assert sorted(targets) == sorted(phony)
    lines = call("make", "--no-print-directory").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["make", target] for target in targets]
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("version", ["Python 3.10.18", "Python 3.14.0", None])
def test_a_python_that_is_not_supported_is_named_before_anything_is_made(tmp_path, version):
    python = tmp_path / "python"
    if version:
        minor = version.split(".")[1]
        # answers --version itself, and -c as this Python would with another version
        script = f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n'
        script += f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, {minor}); $2"\n'
        write_text(python, script).chmod(0o755)
    done = call("make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for word in (f"PYTHON = {python}", version or "not found", "3.11 to 3.13", "PYTHON=python3.13"):
        assert word in done.stderr
    assert not (tmp_path / "venv").exists()
