"""What may be unpickled when a run resumes: plain data, tensors and the classes of a checkpoint's metadata.

A pickle names the functions that build it, whatever they are, and loading it calls them; a checkpoint lies on a
disk that others may write to. Importing this module restricts, for the whole process, the two places where torch
unpickles a checkpoint without a limit: `pickle.load` of `.metadata`, and `torch.load(..., weights_only=False)` of
what is no tensor (torch.distributed.checkpoint has no setting for either). Classes that torch allows by itself where
that limit is set go too: those of distributed tensors open a process group when they are built. The third, torchtitan's own
`pickle.loads` of the data position, is restricted by `load_plain` in `data/dataloader.py`.
"""

import io
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

OF_METADATA = (
    *(Metadata, MetadataIndex, StorageMeta, _StorageInfo, BytesStorageMetadata),
    *(TensorStorageMetadata, ChunkStorageMetadata, TensorProperties, _MEM_FORMAT_ENCODING),
    *(torch.Size, torch.serialization._get_layout, type(Path())),
)
NAMES_OF_METADATA = {
    *((allowed.__module__, allowed.__qualname__) for allowed in OF_METADATA),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Collection[tuple[str, str]] = ()):
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which has no place there")
        return super().find_class(module, name)


def load_plain(data: bytes) -> Any:
    """Unpickles numbers, text, bytes, None, and lists, tuples, sets and dicts of them.

    Raises:
        pickle.UnpicklingError: it names a class or a function; none is looked up.
        Exception: of any kind, where `data` is no whole pickle.
    """
    return _Unpickler(io.BytesIO(data)).load()


def load_object(saved: bytes) -> Any:
    """What torch.save made of plain data and tensors.

    Raises:
        pickle.UnpicklingError: it names anything else; nothing is called.
        Exception: of any kind, where it is damaged.
    """
    try:
        return torch.load(io.BytesIO(saved), weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message is of many lines, and advises to load it without this check.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {named[1]}, which has no place there" if named else "no plain data"
        raise pickle.UnpicklingError(reason) from None


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as file:
        metadata = _Unpickler(cast(IO[bytes], file), NAMES_OF_METADATA).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(
            f"it holds a {type(metadata).__name__}, no checkpoint's metadata"
        )
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
torch.serialization.clear_safe_globals()
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # stronger than an argument of the call
