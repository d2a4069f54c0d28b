"""Job files: read with the file that they extend; each error is one line."""

import json

import pytest
from helpers.jobs import ROOT
from helpers.streams import write_text
from torchtitan.config import ConfigManager

from torchtitan_ext.jobs.job_file import as_toml, parse_job, read_toml
from torchtitan_ext.lighthouse.scorers import SCORERS
from torchtitan_ext.train.__main__ import main

STAGE1 = ROOT / "configs/text/stage1.toml"


@pytest.fixture
def write(tmp_path):
    return lambda text, name="job.toml": write_text(tmp_path / name, text)


def refusal(file, *overrides):
    with pytest.raises(ValueError) as error:
        parse_job(file, overrides)
    assert str(file.parent) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_file_changes_what_it_extends_section_by_section(write):
    write("[training]\nsteps = 7\nseq_len = 64\n[lighthouse]\ndense_layers = [0, 1]\n", "base.toml")
    write("extends = '../base.toml'\n[training]\nsteps = 8\n[training.dataloader]\nnum_workers = 1\n", "sub/job.toml")
    file = write("extends = 'sub/job.toml'\n[lighthouse]\ndense_layers = [1]\n")
    assert read_toml(file) == {
        "training": {"steps": 8, "seq_len": 64, "dataloader": {"num_workers": 1}},
        "lighthouse": {"dense_layers": [1]},
    }
    job = parse_job(file, ["--training.steps=9"])
    assert (job.training.steps, job.training.seq_len, job.training.dataloader.num_workers) == (9, 64, 1)


def test_the_sections_of_this_package_are_there_without_a_word(write):
    job = parse_job(write("[training]\nsteps = 7\n"))
    assert job.model.name == "llama3_lighthouse" and not job.lighthouse.enable
    assert job.job.custom_config_module == "torchtitan_ext.model.settings"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends = 'job.toml'", "extends itself, by way of"),
        ("extends = 'a/b.toml'", "b.toml: No such file"),
        ("extends = ''", "Is a directory; give the path of a job file"),
        ("extends = ['a.toml']", "extends = ['a.toml']: must be the path of one job file"),
        ("steps: 3", "not TOML"),
        ("steps = 3", "{'steps'}; correct that in the file"),
        ("[training]\ndataloader = 1", ": training.dataloader = 1: must be a table of settings"),
        ("experimental = 1", ": experimental = 1: must be a table"),
        ("[lighthouse]\ntopk = 64", "Lighthouse'> data: {'topk'}"),
        ("[validation]\nenable = true\nsteps = 0", "validation steps"),
        ("[experimental]\ncustom_import = 'nothing'", "custom_import = 'nothing'"),
        ("[job]\ncustom_config_module = 'nothing'", "drop job.custom_config_module"),
    ],
)
def test_what_is_no_job_is_named(write, text, words):
    assert words in refusal(write(text))


def test_an_argument_can_name_the_module_that_registers_the_scorer(write, monkeypatch):
    module = write("from torchtitan_ext.lighthouse.scorers import SCORERS as s\ns['mine'] = s['norm']", "my_scorer.py")
    monkeypatch.syspath_prepend(module.parent)
    file = write("[lighthouse]\nscorer = 'mine'")
    assert parse_job(file, ["--experimental.custom_import=my_scorer"]).lighthouse.scorer == "mine"
    del SCORERS["mine"]


def test_an_override_that_does_not_exist_is_named_beside_the_nearest_that_does():
    said = refusal(STAGE1, "--lighthouse.level=3")
    assert "--lighthouse.level=3" in said and "--lighthouse.levels INT" in said


@pytest.mark.parametrize("field, value", [("levels", 1), ("rope", "later")])
def test_a_setting_that_is_never_legal_stops_the_parsing(write, field, value):
    assert f"{field} = {value!r}" in refusal(STAGE1, f"--lighthouse.{field}={value}")
    assert f"{field} = {value!r}" in refusal(write(f"[lighthouse]\n{field} = {value!r}\n"))


def test_help_needs_no_job(capsys):
    main(["--help"])
    assert "Train a job" in capsys.readouterr().out


def test_the_printed_job_is_the_job(write, capsys):
    overrides = ["--lighthouse.dense_layers", "1", "--training.steps=9", "--optimizer.lr=1e-5"]
    main([f"--job.config_file={ROOT}/configs/text/stage2.toml", "--print-config", *overrides])
    printed = write(capsys.readouterr().out)
    job = parse_job(ROOT / "configs/text/stage2.toml", overrides)
    again = parse_job(printed)
    for job_config in (job, again, ConfigManager().parse_args([f"--job.config_file={printed}"])):
        job_config.job.config_file = None
        assert json.dumps(job_config.to_dict()) == json.dumps(job.to_dict())
    assert as_toml(again) == as_toml(job)
