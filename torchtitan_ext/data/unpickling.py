"""Limit unpickling on resume to plain data, tensors and the classes of a checkpoint's metadata.

Loading a pickle calls the functions that it names. torch unpickles without a limit in two places: `.metadata`, and
`torch.load(..., weights_only=False)`; torchtitan in a third, the data position, which `load_plain` reads first.
"""

import io
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

METADATA_CLASSES: list[Any] = [
    *(x for x in vars(metadata).values() if isinstance(x, type) and x.__module__ == metadata.__name__),
    *(filesystem._StorageInfo, torch.Size, torch.serialization._get_layout, type(Path())),
]
NAMES_OF_METADATA = {
    *((allowed.__module__.removesuffix("._local"), allowed.__qualname__) for allowed in METADATA_CLASSES),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Collection[tuple[str, str]]):
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        module = module.removesuffix("._local")  # what Python 3.13 calls pathlib
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which is not plain data")
        return super().find_class(module, name)


def load_plain(data: bytes) -> Any:
    """Unpickle numbers, text, bytes, None and containers of them. Raises UnpicklingError for a class or function."""
    return _Unpickler(io.BytesIO(data), ()).load()


def load_object(saved: bytes) -> Any:
    """Load plain data and tensors that torch.save wrote. Raises UnpicklingError for anything else, before any call."""
    try:
        return torch.load(io.BytesIO(saved), weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's long message advises loading without this check.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {named[1]}, which is not plain data" if named else "not plain data"
        raise pickle.UnpicklingError(reason) from None


def restrict_unpickling() -> None:
    """Limit torch's two unlimited unpicklers of checkpoints in this process."""
    limited = vars(pickle) | {"load": lambda file: _Unpickler(file, NAMES_OF_METADATA).load()}
    filesystem.pickle = SimpleNamespace(**limited)  # type: ignore[assignment]
    torch.serialization.clear_safe_globals()  # a distributed tensor's classes open a process group when built
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # stronger than an argument of the call
