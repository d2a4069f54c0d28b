"""Kernels run on the GPU where there is one, else under Triton's interpreter, on the CPU."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

sys.path.insert(0, str(Path(__file__).parent))
