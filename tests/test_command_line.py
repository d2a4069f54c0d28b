"""Every command tells what it takes, and ends in a sentence where something is wrong.

The commands are found, not listed: a new one without --help fails here.
"""

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console

from torchtitan_ext import command_line, niah
from torchtitan_ext.command_line import CommandFailed, Display

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("[!_]*.py"))
SHELL = sorted({*(ROOT / "scripts").glob("*"), *SCRIPTS} - {*(ROOT / "scripts").glob("*.py")})
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "torchtitan_ext").rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]
COMMANDS = {
    **{f"python scripts/{path.name}": [sys.executable, str(path)] for path in SCRIPTS},
    **{f"python -m {module}": [sys.executable, "-m", module] for module in MODULES},
    **{f"scripts/{path.name}": ["bash", str(path)] for path in SHELL if path.is_file()},
}


def call(command, *arguments, **kwargs):
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_and_what_each_argument_is(name):
    done = call(COMMANDS[name], "--help", env={**os.environ, "COLUMNS": "400"})
    assert done.returncode == 0 and done.stderr == ""
    assert name in done.stdout  # an example
    if name.startswith("scripts/"):
        script = (ROOT / name).read_text()
        taken = set(re.findall(r"\$\{(NGPU|CONFIG|NNODES|RDZV_\w+):[-?]", script))
        assert taken and all(variable in done.stdout for variable in taken)
        return
    usage, *_ = done.stdout.split("\n\n")
    described = dict(re.findall(r"(?m)^  (--[\w.-]+)((?:.*\n(?:    .*\n)*))", done.stdout))
    for option in set(re.findall(r"--[\w.-]+", usage)):
        with_value = re.search(rf"\[?{re.escape(option)} [^\]]", usage)
        required = f"[{option}" not in usage
        assert re.search(r"[a-z]{2} [a-z]", described[option]), option
        assert not with_value or required or "default" in described[option], option


def test_help_knows_the_protocols_defaults():
    said = re.findall(r"\d+", call(COMMANDS["python scripts/niah.py"], "--help").stdout)
    assert {*map(str, (*niah.CONTEXTS, *niah.DEPTHS))} <= set(said)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("python")])
def test_a_python_without_the_packages_is_told_which_one_has_them(name):
    """-S: no site-packages."""
    python, *rest = COMMANDS[name]
    arguments = {
        "check_c4": ["x"],
        "export_hf": ["x", "y"],
        "make_table": ["x"],
        "niah": ["x"],
        "run_splits": ["--configs", "x"],
        "patching": ["check"],
        "preflight": ["--job.config_file", "x"],
        "ablate": ["--cells", "all"],
        "soak": ["--output", "gone"],
    }.get(re.split(r"[./]", name.removesuffix(".py"))[-1], [])
    done = call([python, "-S"], *rest, *arguments, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "is not installed" in done.stderr


def run_script(monkeypatch, name, *arguments):
    """The exit code of a script, in this process."""
    script = ROOT / "scripts" / f"{name}.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


@pytest.fixture
def wrong(tmp_path):
    """What is wrong in some way, by name."""
    for folder in ("empty", "broken", "no_config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("junk")
    for stage in ("dense", "stage1", "stage2"):
        (tmp_path / "broken" / f"{stage}.toml").write_text("[training\nsteps = ")
    (tmp_path / "untyped.toml").write_text("[training]\nseq_len = 'ten'\n")
    (tmp_path / "unknown.toml").write_text("[training]\nstepz = 10\n")
    (tmp_path / "flat.toml").write_text("training = 10\n")
    (tmp_path / "broken" / "config.json").write_text('{"training": ')
    return tmp_path


DEMO = "configs/demo"
WRONG = [
    ("run_splits", ["--configs", "{}/gone"], 1, ["{}/gone/dense.toml is missing", "needs"]),
    ("run_splits", ["--configs", "{}/broken"], 1, ["{}/broken/dense.toml: ", "line 1", "correct"]),
    ("run_splits", ["--configs", DEMO, "--nproc", 0], 2, ["--nproc: '0': give", "1 or more"]),
    ("run_splits", ["--configs", DEMO, "--splits", -5], 2, ["--splits: '-5': give"]),
    (
        "run_splits",
        ["--configs", DEMO, "--", "--training.stepz", 5],
        1,
        ["--training.stepz 5", "--training.steps INT", "correct"],
    ),
    ("run_splits", ["--configs", DEMO, "--", "--training.steps", 0], 1, ["steps = 0", "must"]),
    (
        "run_splits",
        ["--configs", DEMO, "--", "--checkpoint.interval", 0],
        1,
        ["checkpoint.interval = 0", "must be 1 or more"],
    ),
    (
        "run_splits",
        ["--configs", DEMO, "--output", "{}/file"],
        1,
        ["{}/file/dense: Not a directory; choose"],
    ),
    ("ablate", ["--cells", "none"], 2, ["--cells none", "L3-p4-k1536-norm"]),
    ("ablate", ["--grid", "{}/gone"], 1, ["{}/gone: No such file", "give one that exists"]),
    ("ablate", ["--grid", "{}/empty"], 1, ["{}/empty: Is a directory; give a file"]),
    ("ablate", ["--grid", "{}/file"], 1, ["--grid {}/file is no grid", "give a TOML file"]),
    ("ablate", ["--cells", "all", "--configs", "{}/empty"], 1, ["stage2.toml", "give the path"]),
    ("make_table", ["{}/gone"], 1, ["{}/gone holds no records", "run_splits.py"]),
    ("make_table", ["{}/empty"], 1, ["{}/empty holds no records"]),
    ("export_hf", ["{}/gone", "{}/hf"], 2, ["{}/gone is not a complete checkpoint", "give"]),
    ("export_hf", ["{}/broken", "{}/hf"], 2, ["config.json is not the job config", "restore"]),
    ("niah", ["{}/empty"], 2, ["{}/empty is not a complete checkpoint", "give"]),
    ("niah", ["{}/empty", "--depths", -1], 2, ["--depths: '-1': give"]),
    ("niah", ["{}/empty", "--device", "cuda"], 2, ["--device cuda", "no CUDA device", "cpu"]),
    ("check_c4", ["{}/gone"], 2, ["{}/gone' is not a folder", "give one that exists"]),
    ("check_c4", ["{}/empty"], 2, ["{}/empty' holds neither", "give"]),
    ("draw_method", ["--out", "{}/file"], 1, ["{}/file: File exists; choose another path"]),
    ("draw_method", ["--out", "{}/file/x"], 1, ["{}/file/x: Not a directory; choose"]),
    ("bench_attention", ["--output", "{}/empty"], 2, ["--output {}/empty: is a folder; name"]),
    ("bench_attention", ["--seq-lens", 100], 1, ["seq_len = 100", "multiple of", "nearest"]),
    ("bench_attention", ["--levels", 1], 1, ["levels = 1"]),
    ("bench_attention", ["--n-kv-heads", 3], 2, ["--n-heads 4", "--n-kv-heads 3", "multiple"]),
    ("bench_train", [], 2, ["CUDA device", "--run"]),
    ("bench_train", ["--run", "a", "{}/empty"], 2, ["{}/empty", "path of a job file"]),
    ("bench_train", ["--run", "a", "{}/broken/dense.toml"], 2, ["dense.toml", "line 1", "correct"]),
    ("bench_train", ["--run", "a", "{}/untyped.toml"], 2, ["training.seq_len = 'ten'", "type int"]),
    ("bench_train", ["--run", "a", "{}/unknown.toml"], 2, ["stepz", "correct"]),
    ("bench_train", ["--run", "a", "{}/flat.toml"], 2, ["training = 10", "[section]", "correct"]),
    (
        "bench_train",
        ["--run", "a", f"{DEMO}/dense.toml", "--append", "--output", "{}/broken/config.json"],
        2,
        ["config.json is no record", "name another"],
    ),
    ("write_settings", ["--out", "{}/empty"], 2, ["{}/empty: Is a directory; give a file"]),
    ("soak", ["--steps", 10], 2, ["--steps: '10': give a whole number, 60 or more"]),
    ("soak", ["--steps", 60], 2, ["--kills 20", "--interval 50", "more"]),
    ("soak", ["--output", "{}/empty"], 1, ["{}/empty holds the runs", "delete it, or name"]),
    ("soak", ["--output", "{}/file/x"], 1, ["{}/file/x/undisturbed: Not a", "choose"]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("script", "arguments", "code", "words"),
    WRONG,
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_what_is_wrong_is_named_with_a_remedy(
    monkeypatch, capsys, wrong, script, arguments, code, words
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = [str(argument).format(wrong) for argument in arguments]
    assert run_script(monkeypatch, script, *arguments) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word.format(wrong) in said


def test_every_script_is_among_those_given_something_wrong():
    assert {script for script, *_ in WRONG} == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--x 3: give 4"), 3, "--x 3: give 4"),
        (CommandFailed("it failed"), 3, "it failed"),
        (FileNotFoundError(2, "No such file", "a.toml"), 3, "a.toml: No such file; give one"),
        (FileNotFoundError("there are no records"), 3, "there are no records"),
        (ModuleNotFoundError("No module", name="tyro"), 3, f"not installed for {sys.executable}"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("call again"), 130, "interrupted; call again"),
    ],
)
def test_what_its_user_can_mend_ends_a_command_in_one_line(monkeypatch, capsys, error, code, words):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["scripts/train_all.py"])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main, refused=3)
    assert stop.value.code == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train_all: ") and words in line


@pytest.mark.parametrize(
    "error", [TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError]
)
def test_a_fault_of_the_program_keeps_its_traceback(capsys, error):
    def main():
        raise error("of ours")

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, refused=2)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in main" in said and error.__name__ in said


def test_a_missing_module_of_ours_is_a_fault_of_the_program(capsys):
    assert command_line.end(ModuleNotFoundError("no", name="torchtitan_ext.none")) == 1
    assert "ModuleNotFoundError" in capsys.readouterr().err


def test_closed_output_is_told_in_a_sentence():
    reader, writer = os.pipe()
    os.close(reader)
    script = COMMANDS["python scripts/ablate.py"]
    done = subprocess.run(script, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.startswith("ablate: ") and len(done.stderr.splitlines()) == 1


def test_ctrl_c_while_a_script_imports_is_an_interruption(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.end_by_hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, terminal):
    shown, console, clock = io.StringIO(), rich.console.Console, iter(range(0, 10_000, 4))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(command_line.time, "monotonic", lambda: next(clock))  # 4 seconds a call
    monkeypatch.setattr(
        rich.console,
        "Console",
        lambda stderr: console(file=shown, force_terminal=terminal, width=100),
    )
    with Display() as display:
        display.start("files", total=50)
        for _ in range(50):
            display.advance(1)
    text = shown.getvalue()
    assert "files" in text and "100%, left 0:00" in text
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert 10 < len(text.splitlines()) < 50  # a line in 10 seconds, each step takes 8
        assert re.match(r"(files  \d+%, left \d+:\d\d\n)+$", text)


# ---- make


def make(*arguments, **env):
    return call(["make", "--no-print-directory"], *arguments, env={**os.environ, **env})


def test_make_alone_lists_every_target():
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text())
    phony = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())[1].split()
    assert sorted(targets) == sorted(phony)
    lines = make().stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["make", target] for target in targets]
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("version", ["Python 3.10.18", "Python 3.14.0", None])
def test_a_python_that_is_not_supported_is_named_before_anything_is_made(tmp_path, version):
    python = tmp_path / "python"
    if version:
        minor = version.split(".")[1]
        # answers --version itself, and -c as this Python would with another version
        python.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n'
            f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, {minor}); $2"\n'
        )
        python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for word in (f"PYTHON = {python}", version or "not found", "3.11 to 3.13", "PYTHON=python3.13"):
        assert word in done.stderr
    assert not (tmp_path / "venv").exists()
