"""The data sets that this package adds to torchtitan's `DATASETS`, and the check of the settings that name one."""

import codecs
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger, warn_once

from torchtitan_ext.data.passkey import passkey_documents, passkey_text

TEXT_SUFFIXES = (".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh")
TEXT_SUFFIXES += (".rst", ".md", ".txt", ".toml")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 128  # one file of so many is for validation
# A generated file of megabytes would fill many steps in a row with itself.
PIECE = 2**17  # bytes
# What a file may begin with, the encoding that this means, and the bytes at a cut that end the character before it.
MARKS = {
    codecs.BOM_UTF32_LE: ("utf-32-le", rb""),  # begins with UTF-16's
    codecs.BOM_UTF32_BE: ("utf-32-be", rb""),
    codecs.BOM_UTF16_LE: ("utf-16-le", rb"(?s:.[\xdc-\xdf])?"),
    codecs.BOM_UTF16_BE: ("utf-16-be", rb"(?s:[\xdc-\xdf].)?"),
    b"": ("utf-8", rb"[\x80-\xbf]{0,3}"),
}
# A document is held as tokens until it is trained on, in memory and in every checkpoint, and encoding takes some
# 150 bytes of memory a character: a document of 200 MB would take 30 GB. Pages of C4 were crawled up to 1 MiB.
LONGEST_DOCUMENT = 2**20  # characters
# of the files held out for validation: all, without them, only them
SOURCE_PARTS = {"python_source": None, "python_source_train": False, "python_source_validation": True}
FROM_THE_HUB = {"c4", "c4_validation"}
OTHER_FORMATS = "docs/data.md, section 5, says how to train on other formats"


def c4_files(dataset_path: str) -> list[str]:
    """The gzip'd JSON-lines files of a copy of allenai/c4, given its root or `en`. Raises ValueError without any."""
    root = _folder(dataset_path)
    pattern = "c4-train.*.json.gz"
    files = sorted(root.glob(f"en/{pattern}")) or sorted(root.glob(pattern))
    if not files:
        raise ValueError(
            f"training.dataset_path = {dataset_path!r} holds neither en/{pattern} nor {pattern}: "
            f"give the root of a copy of allenai/c4, or its en folder; {_what_lies_in(root)}"
        )
    return [str(file) for file in files]


def read_documents(file: str) -> Iterator[dict[str, str]]:
    """The lines of one file of gzip'd JSON, each an object in UTF-8 with a string `text`, with or without a mark.

    Yields {"text": the document}; {} for a blank line, so that a position counts lines; where a line is no document or
    the file can't be decompressed further, {"damage": what is wrong, with file and line, from 1; "file": the file}.
    Raises ValueError where the file can't be read at all, which says nothing of what it holds.
    """
    number = 0
    # Looked up now: a program that ends amid a file closes the generator after the module's names are gone.
    corrupt = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        if not os.path.getsize(file):
            raise EOFError("the file has no bytes")  # gzip takes it for a whole one
        with gzip.open(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    content = line.decode().strip().strip("\ufeff")
                    sample = {"text": json.loads(content)["text"]} if content else {}
                    for text in sample.values():
                        text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
                except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
                    what = f'not a JSON object in UTF-8 with a string "text" ({type(error).__name__}: {error})'
                    sample = {"damage": f"{file}, line {number}: {what}", "file": file}
                yield sample
    except corrupt as error:
        yield {"damage": f"{file}, after line {number}: {error}", "file": file}
    except OSError as error:
        raise ValueError(f"{file}, after line {number}: {error}") from error


def source_documents(dataset_path: str, held_out: bool | None) -> Dataset:
    """The text files of a tree in pieces of `PIECE` bytes, each a row of the file and its first byte in it.

    Their mixed order depends only on the names inside. Left out: other suffixes than TEXT_SUFFIXES, SKIPPED_FOLDERS,
    hidden files and folders, symbolic links. Raises ValueError where nothing is left.

    held_out: only the files held out for validation, only the others, or (None) all.
    """
    # A name need not be UTF-8. Only names and places are held, so a tree of any size loads at once.
    tree = _pieces_of_tree(_folder(dataset_path))
    pieces = [(os.fsencode(file), start) for _, file, start, is_held_out in tree if held_out in (None, is_held_out)]
    if not pieces:
        among, more = (f" among the one in {HELD_OUT} held out for validation", "more ") if held_out else ("", "")
        raise ValueError(
            f"training.dataset_path = {dataset_path!r} has no text file{among}: give a folder with {more}files that "
            f"end in {', '.join(TEXT_SUFFIXES)}; {_what_lies_in(Path(dataset_path))}"
        )
    files, starts = zip(*pieces, strict=True)
    return Dataset.from_dict({"path": files, "start": starts})


@cache  # a job asks several times, and large trees take seconds
def _pieces_of_tree(root: Path) -> list[tuple[bytes, str, int, bool]]:
    """Digest, file, start and whether the file is held out, by digest."""
    pieces = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = {name for name in subfolders if name[0] != "."} - SKIPPED_FOLDERS
        for name in names:
            file = Path(folder, name)
            if name[0] == "." or not name.endswith(TEXT_SUFFIXES) or file.is_symlink():
                continue
            digest = hashlib.sha256(os.fsencode(file.relative_to(root).as_posix())).digest()
            is_held_out = digest[-1] % HELD_OUT == 0
            for start in range(0, max(1, file.stat().st_size), PIECE):
                mixed = hashlib.sha256(digest + str(start).encode()).digest()
                pieces.append((mixed, str(file), start, is_held_out))
    return sorted(pieces)


def check_dataset(dataset: str, dataset_path: str | None) -> None:
    """Raises ValueError for an unknown data set, or no files where they should be; doesn't ask the Hugging Face hub."""
    name = dataset.lower()  # as torchtitan reads it
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"training.dataset = {dataset!r} is not a known data set; there are {known}")
    path = dataset_path or DATASETS[name].path
    if name in OWN_DATASETS:
        OWN_DATASETS[name].loader(path)
    elif name not in FROM_THE_HUB and not os.path.exists(path):
        remedy = "set training.dataset_path to where it lies"
        raise ValueError(f"training.dataset = {dataset!r} reads {path!r}, which doesn't exist: {remedy}")


def _folder(path: str) -> Path:
    if not os.path.isdir(path):
        other = f" ({OTHER_FORMATS})" if os.path.isfile(path) else ""
        raise ValueError(f"training.dataset_path = {path!r} is not a folder: give one that exists{other}")
    return Path(path)


def _what_lies_in(root: Path) -> str:
    files = sorted(path for path in islice(root.rglob("[!.]*"), 10_000) if path.is_file())
    if not files:
        return "it holds no file"
    largest = max(files, key=os.path.getsize).relative_to(root)
    return f"it holds {len(files):,} files, '{largest}' the largest; {OTHER_FORMATS}"


def pieces_of_document(text: str) -> list[str]:
    """The text in pieces of LONGEST_DOCUMENT, each of which training takes for a document."""
    return [text[at : at + LONGEST_DOCUMENT] for at in range(0, max(1, len(text)), LONGEST_DOCUMENT)]


def _read_json_lines(files: list[str]) -> Iterator[dict[str, str]]:
    # Damage is a sample of its own, so that a position means the same whether damage is skipped or repaired.
    for sample in chain.from_iterable(map(read_documents, files)):
        if "text" in sample:
            yield from ({"text": piece} for piece in pieces_of_document(sample["text"]))
        else:
            yield sample


def _c4_dataset(path: str) -> IterableDataset:
    files = c4_files(path)
    if gone := [file for file in files if not os.path.isfile(file)]:
        raise ValueError(
            f"training.dataset_path = {path!r}: {len(gone):,} of its files are links to nothing or no files, "
            f"{gone[0]} first; put the files there, or take the names away"
        )
    if not any(_read_json_lines(files)):
        raise ValueError(f"training.dataset_path = {path!r}: no document in its {len(files):,} files; give others")
    return IterableDataset.from_generator(_read_json_lines, gen_kwargs={"files": files})


def _text(sample: dict[str, str]) -> str:
    if "damage" in sample:
        folder = os.path.dirname(sample["file"])
        raise ValueError(
            f"{sample['damage']}; to find all that is damaged, run python -m torchtitan_ext check-data {folder}; to "
            "train without it, set training.skip_damaged_data to true (validation data is never skipped: repair it)"
        )
    return sample["text"]


def _text_of_piece(sample: dict[str, Any]) -> str:
    with open(sample["path"], "rb") as file:
        beginning = file.read(4)
        file.seek(sample["start"])
        data = file.read(PIECE + 3)
    encoding, tail = next(of_mark for mark, of_mark in MARKS.items() if beginning.startswith(mark))
    # A character that is cut belongs to the piece that it begins in.
    begin, end = (at + len(re.findall(tail, data[at : at + 3])[0]) for at in (0, PIECE))
    data = data[begin if sample["start"] else 0 : end]
    text, unfit = data.decode(encoding, errors="replace"), ""
    if "\0" in text:
        unfit = "NUL characters, which no text has"
    elif "\ufffd" in text and text.encode(encoding) != data:
        unfit = f"bytes that are no {encoding}, and are trained on as U+FFFD"
    if unfit:
        name = os.fsdecode(sample["path"])
        warn_once(logger, f"{name!r} holds {unfit}: write it in UTF-8, or move it out of the tree")
    return text if sample["start"] else text.removeprefix("\ufeff")


# load_dataset("json") asks the hub even for local files, and guesses each column's type from the first file.
OWN_DATASETS = {
    "c4_local": DatasetConfig(path="", loader=_c4_dataset, sample_processor=_text),
    "passkey": DatasetConfig(path="", loader=passkey_documents, sample_processor=passkey_text),
} | {
    name: DatasetConfig(sysconfig.get_path("stdlib"), partial(source_documents, held_out=held_out), _text_of_piece)
    for name, held_out in SOURCE_PARTS.items()
}
