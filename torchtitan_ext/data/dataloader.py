"""Load text as torchtitan does, with exact resume in every epoch and optional skipping of damaged data."""

import os
import signal
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from tokenizers import Encoding, Tokenizer
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.tools.logging import logger

from torchtitan_ext.data.datasets import load_documents, settings_of
from torchtitan_ext.data.passkey import only_answers, question_and_answers
from torchtitan_ext.data.unpickling import load_plain


class TextDataset(HuggingFaceTextDataset):
    """torchtitan's data set, but streams resume in later passes too, map-style data has a new order in each pass, and
    only the answers of passkey documents are labels.

    documents: from `load_documents`. skip: leave out the damage that `read_documents` yields.
    """

    def __init__(
        self, documents: tuple, tokenizer: Any, seq_len: int, rank: int, n_ranks: int, infinite: bool, skip: bool
    ):
        # no super().__init__(), which looks a name up
        self.dataset_name, samples, self._text_processor, self._mixed = documents
        self._data = data = split_dataset_by_node(samples, rank, n_ranks)
        n = f"{data.num_shards} shards" if isinstance(data, IterableDataset) else f"{len(data)} documents"
        self._documents = f"{self.dataset_name}, {n}"  # the data that a saved position belongs to
        self._tokenizer, self.seq_len, self.infinite, self._skip_damaged = tokenizer, seq_len, infinite, skip
        self._sample_idx = 0
        self._token_buffer: list[int] = []
        self._drawn = [[0, 0] for _ in self._mixed]  # documents and characters of each source of a mixture
        self._n_skipped = 0  # over all launches of the run
        self._n_passes = 0  # completed
        self._named: set[str] = set()  # files whose damage the log has named
        # Until its first sample, a resumed stream reports its start as its position.
        self._resumed_at: dict[str, Any] | None = None

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        samples = super()._get_data_iter()
        if self._n_passes and isinstance(self._data, Dataset) and self._sample_idx < len(self._data):
            # In memory: the library would write the order into the data set's folder.
            shuffled = self._data.shuffle(seed=self._n_passes, keep_in_memory=True)
            samples = iter(shuffled.skip(self._sample_idx))
        for sample in samples:
            self._resumed_at = None
            if self._skip_damaged and "damage" in sample:
                self._skip(sample)
            elif sample:  # not a blank line
                if self._mixed and "source" in sample:
                    self._count(sample)
                yield sample
        self._n_passes += 1

    def _skip(self, sample: dict[str, str]) -> None:
        self._n_skipped += 1
        if sample["file"] not in self._named:  # a corrupt file may have damage in every line
            self._named.add(sample["file"])
            others = "with all other damage in this file (python -m torchtitan_ext check-data lists it)"
            logger.warning(f"{sample['damage']}: skipped, {others}; number {self._n_skipped:,} on this rank")

    def _count(self, sample: dict[str, Any]) -> None:
        """Count a document of a mixture's source; log the shares after 1, 2, 4, 8, … documents."""
        counts = self._drawn[sample["source"]]
        counts[:] = counts[0] + 1, counts[1] + len(sample["text"])
        documents, characters = map(sum, zip(*self._drawn, strict=True))
        if documents.bit_count() == 1:
            shares = (
                f"{name}: {n / documents:.1%} of documents, {size / max(1, characters):.1%} of characters"
                for name, (n, size) in zip(self._mixed, self._drawn, strict=True)
            )
            logger.info(f"mixture after {documents:,} documents on this rank: {'; '.join(shares)}")

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        question = question_and_answers(self._tokenizer)[0] if self.dataset_name == "passkey" else None
        for inputs, labels in super().__iter__():
            yield inputs, only_answers(inputs["input"], labels, question) if question else labels

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # A copy: another thread pickles a worker's state while the next document is added.
        state |= {"token_buffer": list(self._token_buffer), "documents": self._documents}
        state |= {"n_skipped": self._n_skipped, "n_passes": self._n_passes, "drawn": deepcopy(self._drawn)}
        return state | ({"data": self._resumed_at} if self._resumed_at is not None else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for the state of another data set, whose positions mean something else."""
        if state_dict.get("documents") != self._documents:
            given = "training.mixture gives a" if self._mixed else "training.dataset and training.dataset_path give"
            saved = f"the checkpoint was saved at a position in {state_dict.get('documents')}"
            raise ValueError(f"{given} {self._documents}, but {saved}: resume with the data that it was saved with")
        super().load_state_dict(state_dict)
        self._n_skipped = state_dict.get("n_skipped", 0)
        self._drawn = state_dict.get("drawn", [])
        # Old checkpoints, from unshuffled passes, finish their pass in order.
        self._n_passes = state_dict.get("n_passes", 0)
        if isinstance(self._data, IterableDataset):
            # The library ignores a state of another epoch.
            self._data.set_epoch(state_dict["data"]["epoch"])
            self._resumed_at = state_dict["data"]


class TextDataloader(ParallelAwareDataloader):
    """torchtitan's loader, but no data position in a checkpoint can run code."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UnpicklingError if this rank's position is not plain data, ValueError for another `num_workers`."""
        if self._rank_id in state_dict:
            saved_workers = int("_num_yielded" not in load_plain(state_dict[self._rank_id]))
            if saved_workers != min(self.num_workers, 1):
                reason = f"the checkpoint's data position was saved with {saved_workers}; set it to that"
                raise ValueError(f"training.dataloader.num_workers = {self.num_workers}: {reason}")
        super().load_state_dict(state_dict)


@dataclass
class _OnlyIds:
    """A tokenizer without token offsets, which take half of the byte tokenizer's time."""

    tokenizer: Tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        # The batch call releases the GIL for the worker's thread that passes batches on.
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def _end_with_the_trainer(worker_id: int) -> None:
    # A worker that outlives a killed trainer would wait forever.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)

    def wait_for_sigterm_of_the_trainer() -> None:
        # torchrun and schedulers signal all processes, but the trainer still needs its worker to save.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=wait_for_sigterm_of_the_trainer, daemon=True).start()


def build_dataloader(
    n_ranks: int, rank: int, tokenizer: Any, job_config: JobConfig, infinite: bool = True, section: str = "training"
) -> ParallelAwareDataloader:
    """torchtitan's loader of ({"input": tokens}, labels), int64 [local_batch_size, seq_len] each, of `TextDataset`.

    It encodes the strings of special tokens as text. section: "training" or "validation". infinite: start over when the
    data ends. Raises ValueError if this data-parallel rank has no document or its first one is damaged.
    """
    training, data = job_config.training, getattr(job_config, section)
    tokenizer = copy(tokenizer)
    tokenizer.tokenizer.encode_special_tokens = True
    tokenizer.tokenizer = _OnlyIds(tokenizer.tokenizer)
    skip = training.skip_damaged_data and section == "training"
    documents = load_documents(job_config, section, n_ranks)
    try:
        dataset = TextDataset(documents, tokenizer, data.seq_len, rank, n_ranks, infinite, skip)
        # A rank without a document would search forever. A shallow copy would move the data's position.
        probe = copy(dataset)
        probe._data, probe._mixed = deepcopy(dataset._data), []
        probe._text_processor(next(probe._get_data_iter()))
    except (IndexError, StopIteration) as error:  # of map-style and streamed splits
        wanted = f"at least {n_ranks} documents{' that are not damaged' if skip else ''}"
        named = settings_of(job_config, section)
        raise ValueError(f"{named}: no document for data-parallel rank {rank}, give {wanted}") from error
    options = asdict(data.dataloader) | {"worker_init_fn": _end_with_the_trainer}
    if section == "training" and not options["prefetch_factor"]:  # one step's batches
        options["prefetch_factor"] = max(2, training.global_batch_size // (training.local_batch_size * n_ranks))
    return TextDataloader(dataset, dp_rank=rank, dp_world_size=n_ranks, batch_size=data.local_batch_size, **options)
