import pytest


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Parses a job file of configs/text with overrides, in a fresh dump folder; legal without any."""
    # not sooner: pytest reads this file before the one above it says how kernels run
    from helpers.jobs import ROOT

    from torchtitan_ext.jobs.job_file import parse_job

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def parse(*overrides, stage="stage1", dump="run", file=None):
        file = file or ROOT / f"configs/text/{stage}.toml"
        return parse_job(file, [f"--job.dump_folder={tmp_path / dump}", *overrides])

    return parse
