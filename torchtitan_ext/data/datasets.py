"""Define the data sets that this project adds to torchtitan's, and load those that a job names."""

import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from io import TextIOWrapper
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
from backports import zstd  # the package zstandard reads truncated files without an error
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE, resolve_pattern
from datasets.iterable_dataset import ExamplesIterable
from datasets.utils.file_utils import xopen
from pyarrow.parquet import ParquetFile
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger, warn_once

from torchtitan_ext.console import is_address
from torchtitan_ext.data.passkey import passkey_documents, passkey_text

TEXT_SUFFIXES = (".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh")
TEXT_SUFFIXES += (".rst", ".md", ".txt", ".toml")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 128  # one of this many files is for validation
# Without pieces a file of megabytes would fill many steps in a row.
PIECE = 2**17  # bytes
# Memory and checkpoints hold a document's tokens until they are trained on, and encoding takes about 150 bytes per
# character: 30 GB for 200 MB. C4's pages end at 1 MiB.
LONGEST_DOCUMENT = 2**20  # characters
# None: all files; False: without those held out for validation; True: only those
SOURCE_PARTS = {"python_source": None, "python_source_train": False, "python_source_validation": True}
FORMAT = re.compile(r"\.(?:parquet|(jsonl?|txt)(?:\.(gz|zst))?)$", re.IGNORECASE)
# in the names of files and folders, as data sets of the hub have them
TRAIN, TESTS = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
    for words in ("train|training", "test|testing|val|valid|validation|dev|eval|evaluation")
)
IGNORED = {*FILES_TO_IGNORE, "state.json"}  # which save_to_disk writes beside Arrow files
OTHER_FORMATS = "docs/data.md says how to train on other formats"
FORMATS = ".parquet, .jsonl, .json or .txt, the last three also with .gz or .zst"


def text_files(dataset_path: str) -> list[str]:
    """The files of a path, folder, glob or data set of the hub (its split `train`); of a folder, those that
    `_for_training` chooses. Raises ValueError if there are none."""
    files, what = [], f"nothing is there; {OTHER_FORMATS}"
    try:
        files = _find(dataset_path)
    except Exception as error:  # the hub and the network raise many kinds
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    dirs = {os.path.dirname(file) for file in files}  # Spark names them like files
    if known := [f for f in files if FORMAT.search(f) and os.path.basename(f) not in IGNORED and f not in dirs]:
        return _for_training(dataset_path, known) if os.path.isdir(dataset_path) else known
    what = f"{os.path.basename(files[-1])!r} doesn't; {OTHER_FORMATS}" if files else what
    remedy = "give a file, a folder, a glob or the name of a data set of the Hugging Face hub"
    raise ValueError(f"{dataset_path!r}: no file that ends in {FORMATS} ({what}); {remedy}")


@cache  # a large tree takes seconds, and a job asks several times
def _find(dataset_path: str) -> list[str]:
    """What is at a path, of any format; each file once, by its shortest path, though links to folders lead to more."""
    if is_address(dataset_path):
        return resolve_pattern(dataset_path, base_path="")
    if _is_remote(dataset_path):
        return load_dataset_builder(dataset_path).config.data_files["train"]
    root = glob.escape(dataset_path) if os.path.exists(dataset_path) else dataset_path
    paths = glob.glob(f"{root}/**/*" if os.path.isdir(dataset_path) else root, recursive=True)
    folder_of, longest_first = cache(os.path.realpath), sorted(paths, key=lambda path: (len(path), path), reverse=True)
    return sorted({(folder_of(os.path.dirname(p)), os.path.basename(p)): p for p in longest_first}.values())


def _for_training(folder: str, files: list[str]) -> list[str]:
    """Of a copy of C4 the files `en/c4-train`; of a folder with files for training all but those for tests."""
    train = {file for file in files if TRAIN.search(file, len(folder))}
    tests = {file for file in files if train and TESTS.search(file, len(folder))} - train
    c4 = {file for file in train if re.match("/*en/c4-train[.]", file[len(folder) :])}
    left_out, which = (set(files) - c4, "beside en/c4-train") if c4 else (tests, "named for tests or validation")
    if left_out:
        what = f"{len(left_out):,} files {which} are not read, {min(left_out)} first"
        warn_once(logger, f"{folder!r}: {what}; a glob reads them: {os.path.join(folder, '**')}")
    return [file for file in files if file not in left_out]


def _is_remote(path: str) -> bool:
    """Whether a path is an address or the name of a data set of the hub."""
    return is_address(path) or bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not os.path.exists(path))


def _pieces(file: Any) -> Iterator[str]:
    text = TextIOWrapper(file, "utf-8-sig", newline="")
    while piece := text.read(LONGEST_DOCUMENT):
        if "\0" in piece:
            raise UnicodeError("NUL characters, which no text in UTF-8 has")
        yield piece


def _rows(file: Any, text_field: str) -> Iterator[pa.Scalar]:
    parquet = ParquetFile(file, page_checksum_verification=True)
    if text_field not in (columns := parquet.schema_arrow.names):
        raise pa.ArrowInvalid(f"no column {text_field!r} (training.text_field), only {', '.join(columns)}")
    for batch in parquet.iter_batches(64, columns=[text_field], use_threads=False):
        yield from batch.column(0)


def _sample(entry: Any, text_field: str) -> dict[str, str]:
    """The sample of a line of JSON, a piece of text or a row of Parquet. Raises an Exception if it is not a string."""
    text = entry.as_py() if isinstance(entry, pa.Scalar) else entry
    if isinstance(entry, bytes):
        if not (line := entry.decode().strip().strip("\ufeff")):
            return {}
        text = json.loads(line)[text_field]
    text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    return {"text": text}


def read_documents(file: str, text_field: str = "text") -> Iterator[dict[str, str]]:
    """The documents of one file in UTF-8: JSON lines, each an object with a string `text_field`; a Parquet column of
    that name; or text, in pieces of LONGEST_DOCUMENT.

    Yields {"text": document}; {} for a blank line, so that positions count lines; for damage {"damage": message with
    file and line, from 1; "file": file}. Raises ValueError if the file can't be opened or read, which is not damage.
    """
    number = 0
    # Bound early: at exit a generator may be closed after the module's names are gone.
    corrupt = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError, pa.ArrowException, UnicodeError)
    kind, packing = FORMAT.search(file.lower()).groups()  # type: ignore[union-attr]
    unit = {None: "row", "txt": "piece"}.get(kind, "line")
    expected = {None: "a string", "txt": "a text"}.get(kind, "a JSON object in UTF-8 with a string")
    try:
        with (xopen if is_address(file) else open)(file, "rb") as raw:
            if (packing or not kind) and not raw.read(1):
                raise EOFError("the file has no bytes")  # gzip accepts it
            raw.seek(0)
            lines = gzip.GzipFile(fileobj=raw) if packing == "gz" else zstd.ZstdFile(raw) if packing else raw
            entries = _pieces(lines) if kind == "txt" else lines if kind else _rows(raw, text_field)
            for number, entry in enumerate(entries, 1):
                try:
                    sample = _sample(entry, text_field)
                except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
                    what = f'not {expected} "{text_field}" ({type(error).__name__}: {error})'
                    sample = {"damage": f"{file}, {unit} {number}: {what}", "file": file}
                yield sample
    except (*corrupt, OSError) as error:
        what = f"{file}, after {unit} {number}: {error}"
        # pyarrow raises OSError without errno for a corrupt page
        if not isinstance(error, corrupt) and (error.errno or type(error) is not OSError):
            raise ValueError(what) from error
        yield {"damage": what, "file": file}


def source_documents(dataset_path: str, held_out: bool | None) -> Dataset:
    """The text files of a tree in pieces of `PIECE` bytes, one row each: file and offset of the first byte.

    The shuffled order depends only on names inside the tree. Skips suffixes outside TEXT_SUFFIXES, SKIPPED_FOLDERS,
    hidden files and folders, symbolic links. Raises ValueError if nothing is left. held_out: True for the files held
    out for validation, False for the rest, None for all.
    """
    if not os.path.isdir(dataset_path):
        raise ValueError(f"{dataset_path!r} is not a folder: give one that exists")
    # Names are bytes: they need not be UTF-8.
    tree, others = _pieces_of_tree(Path(dataset_path))
    pieces = [(os.fsencode(file), start) for _, file, start, is_held_out in tree if held_out in (None, is_held_out)]
    if not pieces:
        among, more = (f" among the one in {HELD_OUT} held out for validation", "more ") if held_out else ("", "")
        remedy = f"give a folder with {more}files that end in {', '.join(TEXT_SUFFIXES)}; {others}".removesuffix("; ")
        raise ValueError(f"{dataset_path!r} has no text file{among}: {remedy}")
    if others:
        logger.info(others)
    files, starts = zip(*pieces, strict=True)
    return Dataset.from_dict({"path": files, "start": starts})


@cache  # large trees take seconds, and a job asks several times
def _pieces_of_tree(root: Path) -> tuple[list[tuple[bytes, str, int, bool]], str]:
    """Digest, file, start and whether the file is held out, by digest; and a message on files of other types."""
    pieces, ignored = [], Counter[str]()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = {name for name in subfolders if name[0] != "."} - SKIPPED_FOLDERS
        for name in (name for name in names if name[0] != "."):
            file = Path(folder, name)
            if not name.endswith(TEXT_SUFFIXES):
                ignored[file.suffix or name] += 1
                continue
            if file.is_symlink():
                continue
            digest = hashlib.sha256(os.fsencode(file.relative_to(root).as_posix())).digest()
            is_held_out = digest[-1] % HELD_OUT == 0
            for start in range(0, max(1, file.stat().st_size), PIECE):
                mixed = hashlib.sha256(digest + str(start).encode()).digest()
                pieces.append((mixed, str(file), start, is_held_out))
    most = ", ".join(suffix for suffix, _ in ignored.most_common(3))
    others = f"{ignored.total():,} other files in {root} are not read ({most}); {OTHER_FORMATS}"
    return sorted(pieces), others if ignored else ""


def is_mixture(job_config: JobConfig, section: str) -> bool:
    return section == "training" and bool(job_config.training.mixture)


def sources(job_config: JobConfig, section: str = "training") -> list[dict[str, Any]]:
    """The dataset, path, text_field and weight of each source that a section reads."""
    data, training = getattr(job_config, section), job_config.training
    single = {"dataset": data.dataset, "path": data.dataset_path}
    entries = training.mixture if is_mixture(job_config, section) else [single]
    default = {"dataset": "text", "path": None, "text_field": training.text_field, "weight": 1.0}
    # torchtitan lowers names too
    return [entry | {"dataset": entry["dataset"].lower()} for entry in (default | entry for entry in entries)]


def settings_of(job_config: JobConfig, section: str) -> str:
    """The settings that choose a section's data, for messages."""
    data = getattr(job_config, section)
    single = f"{section}.dataset = {data.dataset!r}, {section}.dataset_path = {data.dataset_path!r}"
    return "training.mixture" if is_mixture(job_config, section) else single


def check_data(job_config: JobConfig, section: str) -> None:
    """Check every source of a section; doesn't ask the Hugging Face hub. Raises ValueError for an unknown data set,
    missing files of ours or an illegal mixture."""
    mixed = is_mixture(job_config, section)
    for source in sources(job_config, section):
        name = source["dataset"]
        if not 0 < source["weight"] < inf:
            raise ValueError(f"training.mixture: weight = {source['weight']}: give a number above 0")
        if mixed and name == "passkey":
            raise ValueError("training.mixture: dataset = 'passkey' has only answers as labels: train on it alone")
        if name not in DATASETS:
            field = "training.mixture: dataset" if mixed else f"{section}.dataset"
            raise ValueError(f"{field} = {name!r} is not a known data set: use {', '.join(sorted(DATASETS))}")
        if name in OWN_DATASETS and not (name in FILE_BASED and _is_remote(source["path"] or "")):
            _load(job_config, section, source)


def _load(job_config: JobConfig, section: str, source: dict[str, Any]) -> Dataset | IterableDataset:
    """The samples of one of a section's sources. Raises ValueError, which names the field."""
    name = source["dataset"]
    options: dict[str, Any] = {"text_field": source["text_field"]} if name in FILE_BASED else {}
    options |= {"held_out": section == "validation"} if name == "passkey" else {}
    try:
        return DATASETS[name].loader(source["path"] or DATASETS[name].path, **options)
    except ValueError as error:
        field = "dataset_path" if name in OWN_DATASETS else "dataset"
        field = "mixture" if is_mixture(job_config, section) else field
        raise ValueError(f"{section}.{field}: {error}") from error


def load_documents(job_config: JobConfig, section: str, n_ranks: int) -> tuple:
    """A section's data for all ranks: name, samples, the function that returns a sample's text, and the names of a
    mixture's sources. Raises ValueError if there are no documents."""
    parts, mixed = sources(job_config, section), []
    for number, source in enumerate(parts):
        samples = _load(job_config, section, source)
        text_of = DATASETS[source["dataset"]].sample_processor
        if not is_mixture(job_config, section):
            return source["dataset"], samples, text_of, []
        if source["dataset"] in FILE_BASED and not job_config.training.skip_damaged_data:
            text_of(next(filter(None, samples)))  # raises for damage now, not when a rare source is first drawn
        if isinstance(samples, Dataset):
            samples = samples.to_iterable_dataset(num_shards=min(n_ranks, len(samples)))
        # Without declared features the library reads ahead.
        features = Features({"text": Value("string"), "source": Value("int64")})
        mixed.append(samples.map(partial(_mark, source=number, text_of=text_of), features=features))
    total, seed = sum(source["weight"] for source in parts), job_config.debug.seed or 0
    weights = [source["weight"] / total for source in parts]
    samples = interleave_datasets(mixed, weights, seed, stopping_strategy="all_exhausted")
    names = [f"{source['dataset']} {source['path'] or ''}".strip() for source in parts]
    shards = [f"{source['dataset']} ({part.num_shards} shards)" for source, part in zip(parts, mixed, strict=True)]
    return f"mixture of {', '.join(shards)}", samples, _text, names


def _mark(sample: dict[str, Any], source: int, text_of: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """The text and the source of a mixture's sample."""
    return {"text": text_of(sample), "source": source} if sample and "damage" not in sample else {}


def pieces_of_document(text: str) -> list[str]:
    """The text in pieces of LONGEST_DOCUMENT, which training treats as documents."""
    return [text[at : at + LONGEST_DOCUMENT] for at in range(0, max(1, len(text)), LONGEST_DOCUMENT)]


def _read_files(files: list[str], text_field: str) -> Iterator[tuple[int, dict[str, str]]]:
    # The keys are not used. Damage counts as a sample, so that skipping or repairing it moves no position.
    for sample in chain.from_iterable(read_documents(file, text_field) for file in files):
        if "text" in sample:
            yield from ((0, {"text": piece}) for piece in pieces_of_document(sample["text"]))
        else:
            yield 0, sample


def _file_dataset(dataset_path: str, text_field: str = "text") -> IterableDataset:
    files = text_files(dataset_path)
    if gone := [file for file in files if not is_address(file) and not os.path.isfile(file)]:
        reason = f"{len(gone):,} of its files are broken links or not files, {gone[0]} first"
        raise ValueError(f"{dataset_path!r}: {reason}; put the files there, or remove the names")
    if not any(sample for _, sample in _read_files(files, text_field)):
        raise ValueError(f"{dataset_path!r}: no document in its {len(files):,} files; give other files")
    # not from_generator, which writes to a cache in the home folder
    return IterableDataset(ExamplesIterable(_read_files, {"files": files, "text_field": text_field}))


def _text(sample: dict[str, str]) -> str:
    if "damage" in sample:
        find = f"to find all that is damaged, run python -m torchtitan_ext check-data {os.path.dirname(sample['file'])}"
        other = "if the text is in another field, name that in training.text_field"
        skip = "to train without it, set training.skip_damaged_data to true (validation data must be repaired)"
        raise ValueError(f"{sample['damage']}; {other}; {find}; {skip}")
    return sample["text"]


def _text_of_piece(sample: dict[str, Any]) -> str:
    with open(sample["path"], "rb") as file:
        file.seek(sample["start"])
        data = file.read(PIECE + 3)
    # A character belongs to the piece in which it begins.
    begin, end = (at + len(re.findall(rb"[\x80-\xbf]{0,3}", data[at : at + 3])[0]) for at in (0, PIECE))
    data = data[begin if sample["start"] else 0 : end]
    text = data.decode(errors="replace")
    is_text = "\0" not in text
    if not is_text or ("\ufffd" in text and text.encode() != data):
        name, fate = os.fsdecode(sample["path"]), "has wrong characters" if is_text else "is left out"
        warn_once(logger, f"{name!r} is not text in UTF-8 and {fate}: convert it, or move it out of the tree")
    return text.removeprefix("" if sample["start"] else "\ufeff") if is_text else ""


# Not by load_dataset, which drops megabytes for one corrupt line and guesses column types.
FILE_BASED = ("text", "c4_local")  # two names of one data set
OWN_DATASETS = {name: DatasetConfig("", _file_dataset, _text) for name in FILE_BASED}
OWN_DATASETS["passkey"] = DatasetConfig("", passkey_documents, passkey_text)
OWN_DATASETS |= {
    name: DatasetConfig(sysconfig.get_path("stdlib"), partial(source_documents, held_out=held_out), _text_of_piece)
    for name, held_out in SOURCE_PARTS.items()
}
