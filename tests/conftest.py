"""Run kernels on the GPU if there is one, else in Triton's interpreter on the CPU."""

import gc
import os
import runpy
import sys
from functools import cache

import pytest
from helpers.commands import ROOT, SCRIPTS
from hypothesis import settings

# Before torch loads OpenMP: waiting threads must not spin where other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A process of a test that crashes says where.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")

# An example's milliseconds say how busy the machine is.
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")


def pytest_collection():
    """Before a test is imported, and not in a process that only starts others, as pytest-xdist's does."""
    gc.disable()  # what is imported stays
    os.chdir(ROOT)  # job files name their paths from there
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

    from torchtitan.config import ConfigManager
    from triton.runtime import interpreter
    from tyro import _docstrings

    from torchtitan_ext.train.spec import register

    register()  # as a run's start does

    # At each parse, torchtitan makes its classes and adds its rule anew, and tyro reads their sources for help texts.
    ConfigManager._merge_configs = staticmethod(cache(ConfigManager._merge_configs))
    ConfigManager.register_tyro_rules = staticmethod(cache(ConfigManager.register_tyro_rules))
    _docstrings.get_class_tokenization_with_field = cache(_docstrings.get_class_tokenization_with_field)

    # At each call of a function in a kernel, Triton's interpreter looks for what it would have to patch.
    patch_once = cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):
        patch_once(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def triton_everywhere(monkeypatch):
    """The layer takes the Triton operators on any device."""
    from torchtitan_ext.lighthouse import attention, triton_ops

    monkeypatch.setattr(attention, "ops_for", lambda _: triton_ops)


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls a verb or a script in this process, which ends with an exit code: what it wrote to stdout and stderr."""
    from torchtitan_ext.__main__ import entry

    def call(name, *arguments, code=0):
        program = SCRIPTS.get(name)
        words = [program] if program else ["torchtitan_ext", name]
        monkeypatch.setattr(sys, "argv", list(map(str, [*words, *arguments])))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(program), run_name="__main__") if program else entry()
        written = capsys.readouterr()
        assert stop.value.code == code, written
        return written

    return call


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Parses a job file of configs/text with overrides, in a fresh dump folder; legal without any."""
    from torchtitan_ext.jobs.job_file import parse_job

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def parse(*overrides, stage="stage1", dump="run", file=None):
        return parse_job(file or f"configs/text/{stage}.toml", [f"--job.dump_folder={tmp_path / dump}", *overrides])

    return parse
