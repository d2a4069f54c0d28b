"""Every cell of the repository's grids is a job that can run."""

import tomllib

import pytest
from helpers.commands import ROOT

from torchtitan_ext.experiment import ablations
from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.jobs.rules import job_problems

GRIDS = {"530m": ROOT / "configs/published.toml", "27m": ROOT / "configs/27m/ablations.toml"}
CELLS = [
    pytest.param(configs, cell["settings"], ablations.read_grid(file)[cell["run"]], id=f"{configs}-{cell['run']}")
    for configs, file in GRIDS.items()
    for cell in tomllib.loads(file.read_text())["ablations"]
]


@pytest.mark.parametrize("configs, settings, arguments", CELLS)
def test_every_cell_of_a_grid_is_a_legal_job_with_its_settings(configs, settings, arguments):
    stages = [parse_job(f"configs/{configs}/{stage}.toml", arguments) for stage in ("stage1", "stage2")]
    for job in stages:
        for section, fields in settings.items():
            assert fields.items() <= vars(getattr(job, section)).items()
        assert job_problems(job, n_ranks=8 if configs == "530m" else 1, with_start=False) == []
    assert stages[0].lighthouse.enable and not stages[1].lighthouse.enable


def test_a_cell_may_turn_switches_on_and_off(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text('[[ablations]]\nrun = "a"\nsettings = { loss.fuse_output = true, compile.enable = false }\n')
    job = parse_job(ROOT / "configs/27m/stage1.toml", ablations.read_grid(file)["a"])
    assert job.loss.fuse_output and not job.compile.enable
    file.write_text(2 * file.read_text())
    with pytest.raises(ValueError, match="2 cells have 1 names, a"):
        ablations.read_grid(file)


def test_a_cell_runs_both_stages_from_ten_sixteenths_into_a_folder_of_its_name(tmp_path):
    cells = {"a": ["--lighthouse.top_k=256"], "b": ["--lighthouse.rope=base", "--training.steps=192"]}
    runs = ablations.plan(cells, ROOT / "configs/text", tmp_path, ["--debug.seed=7"])
    assert [run.name for run in runs] == ["a/stage1", "a/stage2-200", "b/stage1", "b/stage2-120"]
    assert [run.config.lighthouse.rope for run in runs[::2]] == ["selected", "base"]
    assert all(run.folder == tmp_path / run.name and run.config.debug.seed == 7 for run in runs)
