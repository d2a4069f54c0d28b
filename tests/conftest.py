"""Kernels run on the GPU where there is one, else under Triton's interpreter, on the CPU."""

import inspect
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: waiting threads must not spin where other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A process of a test that crashes says where.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

sys.path.insert(0, str(Path(__file__).parent))

from torchtitan_ext.train.spec import register

register()  # as a run's start does

# At each parse tyro looks for help texts in the sources of classes, which torchtitan makes anew.
sources = {}


def getsource(what, read=inspect.getsource):
    if not isinstance(what, type):
        return read(what)
    key = what.__module__, what.__qualname__
    if key not in sources:
        try:
            sources[key] = read(what)
        except (OSError, TypeError) as error:
            sources[key] = error
    if isinstance(sources[key], Exception):
        raise sources[key]
    return sources[key]


inspect.getsource = getsource

# An example's milliseconds say how busy the machine is.
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")
