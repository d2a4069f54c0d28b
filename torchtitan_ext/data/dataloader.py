"""torchtitan's text dataloader, exact on resume in every epoch."""

import os
import signal
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict
from threading import Thread
from typing import Any

import torch
from datasets import IterableDataset
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

from torchtitan_ext.data.passkey import answers_alone, question_and_answers


class TextDataset(HuggingFaceTextDataset):
    """torchtitan's data set, which by itself restarts a streamed one that was saved after a re-loop.

    Of passkey documents the answers alone are labels.
    """

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if self.dataset_name != "passkey":
            yield from super().__iter__()
            return
        question, _ = question_and_answers(self._tokenizer)
        for inputs, labels in super().__iter__():
            yield inputs, answers_alone(inputs["input"], labels, question)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"documents": self._documents()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was saved.

        Raises:
            ValueError: it was saved on another data set, where a position means something else.
        """
        if state_dict.get("documents") != self._documents():
            raise ValueError(
                f"training.dataset and training.dataset_path give {self._documents()}, but the checkpoint was "
                f"saved at a position in {state_dict.get('documents')}: resume with the data that it was saved with"
            )
        super().load_state_dict(state_dict)
        if isinstance(self._data, IterableDataset):
            # It heeds a saved state in that state's epoch alone, and a fresh one stands in epoch 0.
            self._data.set_epoch(state_dict["data"]["epoch"])

    def _documents(self) -> str:
        if isinstance(self._data, IterableDataset):
            return f"{self.dataset_name}, {self._data.num_shards} shards"
        return f"{self.dataset_name}, {len(self._data)} documents"


def _end_with_the_trainer(worker_id: int) -> None:
    # What outlives a killed trainer would wait forever to hand on what it has drawn.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_heed_sigterm_of_the_trainer, daemon=True).start()


def _heed_sigterm_of_the_trainer() -> None:
    # torchrun and schedulers send it to all processes of a job. The trainer saves then, and would
    # fail if its worker were gone.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> ParallelAwareDataloader:
    """Builds what torchtitan's `build_text_dataloader` does, with the data set above.

    Args:
        dp_world_size: number of data-parallel ranks; each document goes to one of them.
        dp_rank: this rank.
        tokenizer: encodes a document, with its bos and eos.
        job_config: `training.dataset`, `dataset_path`, `seq_len`, `local_batch_size` and `dataloader` are read.
        infinite: start over at the data set's end.

    Returns:
        A loader of ({"input": tokens}, labels), int64 [local_batch_size, seq_len] each.

    Raises:
        ValueError: more than one worker, no document for this rank, or a hub that can't be reached.
    """
    training = job_config.training
    if training.dataloader.num_workers > 1:
        raise ValueError(
            f"training.dataloader.num_workers = {training.dataloader.num_workers}: use 0 or 1, "
            "because several workers would read the same files, and resume in another order"
        )
    try:
        dataset = TextDataset(
            dataset_name=training.dataset,
            dataset_path=training.dataset_path,
            tokenizer=tokenizer,
            seq_len=training.seq_len,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            infinite=infinite,
        )
        # A rank without a document would look for one forever. The copy leaves the state alone.
        next(iter(copy(dataset._data)))
    except (IndexError, StopIteration) as error:  # of a map-style split, of a streamed one
        raise ValueError(
            f"training.dataset = {training.dataset!r}, training.dataset_path = {training.dataset_path!r}: "
            f"no document for data-parallel rank {dp_rank}, give at least {dp_world_size} documents"
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"training.dataset = {training.dataset!r}: {error}; without a network, set it to 'c4_local' and "
            "training.dataset_path to a local copy"
        ) from error
    return ParallelAwareDataloader(
        dataset,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        batch_size=training.local_batch_size,
        worker_init_fn=_end_with_the_trainer,
        **asdict(training.dataloader),
    )
