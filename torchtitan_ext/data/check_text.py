"""Check text files: count documents and find damage."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from torchtitan.config import JobConfig

from torchtitan_ext.data.datasets import FILE_BASED, is_mixture, pieces_of_document, read_documents, sources, text_files

REMEDY = "restore the file, convert it to UTF-8 or replace it; if the text is in another field, set training.text_field"
PROBLEMS_KEPT = 5  # per file: a corrupt byte can damage every later line


@dataclass
class Contents:
    """Counts of one file; characters and bytes of its texts."""

    documents: int = 0
    empty: int = 0  # of them
    pieces: int = 0  # that training cuts the documents into
    characters: int = 0
    utf8_bytes: int = 0
    n_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first PROBLEMS_KEPT of them

    @property
    def tokens(self) -> int:
        """Tokens of the byte tokenizer: the bytes, and a bos and an eos per piece."""
        return self.utf8_bytes + 2 * self.pieces

    def add_problem(self, problem: str) -> None:
        self.n_problems += 1
        if self.n_problems <= PROBLEMS_KEPT:
            self.problems.append(problem)


def files_to_check(job_config: JobConfig) -> list[tuple[str, str]]:
    """The files that a job reads, each with its `text_field`. Raises ValueError if there are none."""
    parts = sources(job_config)
    file_sources = [source for source in parts if source["dataset"] in FILE_BASED]
    if not file_sources:
        raise ValueError(f"training.dataset = {parts[0]['dataset']!r} is not checked: give files that `text` reads")
    return [(file, source["text_field"]) for source in file_sources for file in text_files(source["path"] or "")]


def check_file(file: str, text_field: str = "text") -> Contents:
    """Read one file as training does, but continue after damage."""
    contents = Contents()
    try:
        for sample in read_documents(file, text_field):
            if "damage" in sample:
                contents.add_problem(sample["damage"])
            if "text" in sample:
                text = sample["text"]
                contents.documents += 1
                contents.empty += not text
                contents.pieces += len(pieces_of_document(text))
                contents.characters += len(text)
                contents.utf8_bytes += len(text.encode())
    except ValueError as error:
        contents.add_problem(str(error))
    if not contents.documents and not contents.n_problems:
        contents.add_problem(f"{file}: no document")
    return contents


def check_files(files: Sequence[str], workers: int, text_fields: Iterable[str]) -> Iterator[Contents]:
    """Check files in `workers` processes; results come in the order of `files`."""
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # the parent stops them
    with ProcessPoolExecutor(min(workers, len(files)), initializer=signal.signal, initargs=ignore_interrupt) as pool:
        yield from pool.map(check_file, files, text_fields)


def report(files: Sequence[str], checked: list[Contents], job_config: JobConfig) -> str:
    """The report on checked files, compared with what a run reads."""
    problems: list[str] = []
    for file, contents in zip(files, checked, strict=True):
        problems += contents.problems
        if more := contents.n_problems - len(contents.problems):
            problems.append(f"{file}: {more:,} more problems")
        if contents.n_problems:
            problems.append(f"  remedy: {REMEDY}")

    sizes = [(c.documents, c.characters, c.utf8_bytes, c.tokens) for c in checked]
    documents, characters, utf8_bytes, tokens = map(sum, zip(*sizes, strict=True))
    run, training = job_config.job.config_file, job_config.training
    seq_len, batch = training.seq_len, training.global_batch_size
    # A sequence with its labels takes seq_len + 1 tokens.
    sequences, wanted = tokens // (seq_len + 1), training.steps * batch * (seq_len + 1)
    empty = f", {n:,} of them empty" if (n := sum(contents.empty for contents in checked)) else ""
    lines = [
        *problems,
        f"{len(files):,} files, {documents:,} documents{empty}{', damaged lines left out' if problems else ''}",
        f"text: {characters:,} characters, {utf8_bytes:,} bytes in UTF-8",
        f"byte tokenizer: {tokens:,} tokens with bos and eos, {sequences:,} sequences of {seq_len:,}, "
        f"{sequences // batch:,} steps of {batch:,} sequences",
    ]
    if tokens:
        times = f"{wanted / tokens:,.2f} times the data; a BPE of 4 bytes per token {4 * wanted / tokens:,.2f} times"
        if is_mixture(job_config, "training"):  # each source is read another number of times
            others = [source["dataset"] for source in sources(job_config) if source["dataset"] not in FILE_BASED]
            times = f"a mixture, by weight{'; not counted: ' if others else ''}{', '.join(others)}"
        lines.append(f"compared with {run}: {training.steps:,} such steps read {wanted:,} tokens: {times}")
    lines.append(f"damaged files: {sum(contents.n_problems > 0 for contents in checked):,}")
    return "\n".join(lines)
