"""torchtitan's text dataloader, exact on resume in every epoch, past damaged data where that is to be skipped."""

import math
import os
import signal
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tokenizers import Encoding, Tokenizer
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.tools.logging import logger

from torchtitan_ext.data.passkey import answers_alone, question_and_answers
from torchtitan_ext.unpickling import load_plain

# Texts encoded as a batch may be shared out to threads, of which the library warns at every later fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TextDataset(HuggingFaceTextDataset):
    """torchtitan's data set, which by itself restarts a streamed one that was saved after a re-loop, and gives a
    map-style one in the same order in every pass.

    Of passkey documents the answers alone are labels. skip_damaged: leave out what `read_documents` yields as
    damage; otherwise its first stops the run.
    """

    def __init__(self, *args: Any, skip_damaged: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._skip_damaged = skip_damaged
        self._n_skipped = 0  # since the run started, of all processes
        self._n_passes = 0  # that ended
        # Files whose damage the log has named; many have it in every line.
        self._named: set[str] = set()
        # A streamed data set that hasn't been read yet says that it stands at its start, wherever it resumes.
        self._resumed_at: dict[str, Any] | None = None

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        samples = super()._get_data_iter()
        if (
            self._n_passes
            and isinstance(self._data, Dataset)
            and self._sample_idx < len(self._data)
        ):
            # In memory, because a data set on a disk would write its order beside itself.
            shuffled = self._data.shuffle(seed=self._n_passes, keep_in_memory=True)
            samples = iter(shuffled.skip(self._sample_idx))
        for sample in samples:
            self._resumed_at = None
            if self._skip_damaged and "damage" in sample:
                self._skip(sample)
            elif sample:  # no blank line
                yield sample
        self._n_passes += 1

    def _skip(self, sample: dict[str, str]) -> None:
        self._n_skipped += 1
        # A corrupt file may have damage in every line: its first is named, and the number now and then.
        if sample["file"] not in self._named or math.log10(self._n_skipped).is_integer():
            self._named.add(sample["file"])
            logger.warning(
                f"{sample['damage']}: left out, and with it whatever else is damaged in this file "
                f"(scripts/check_c4.py names it all); number {self._n_skipped:,} on this rank"
            )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if self.dataset_name != "passkey":
            yield from super().__iter__()
            return
        question, _ = question_and_answers(self._tokenizer)
        for inputs, labels in super().__iter__():
            yield inputs, answers_alone(inputs["input"], labels, question)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._resumed_at is not None:
            state["data"] = self._resumed_at
        return state | {
            # A copy: a worker's state is pickled by another thread, while the next document is added to it.
            "token_buffer": list(self._token_buffer),
            "documents": self._documents(),
            "n_skipped": self._n_skipped,
            "n_passes": self._n_passes,
        }

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
        self._n_skipped = state_dict.get("n_skipped", 0)
        # Checkpoints from before passes were shuffled end theirs in the order that they began it in.
        self._n_passes = state_dict.get("n_passes", 0)
        if isinstance(self._data, IterableDataset):
            # It heeds a saved state in that state's epoch alone, and a fresh one stands in epoch 0.
            self._data.set_epoch(state_dict["data"]["epoch"])
            self._resumed_at = state_dict["data"]

    def _documents(self) -> str:
        if isinstance(self._data, IterableDataset):
            return f"{self.dataset_name}, {self._data.num_shards} shards"
        return f"{self.dataset_name}, {len(self._data)} documents"


class TextDataloader(ParallelAwareDataloader):
    """torchtitan's, which by itself unpickles whatever a checkpoint holds in the place of the data position."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was saved.

        Raises:
            ValueError: this rank's position is no pickle of plain data, and nothing of it was built; or it was
                saved with another `num_workers`.
        """
        if self._rank_id in state_dict:
            try:
                beside_trainer = "_num_yielded" not in load_plain(state_dict[self._rank_id])
            except Exception as error:  # whatever its bytes happen to spell
                raise ValueError(
                    f"the checkpoint's data position, dataloader.{self._rank_id}, is damaged or was made to "
                    f"run code ({error}): use another checkpoint, or start the data over with "
                    "checkpoint.exclude_from_loading = ['dataloader']"
                ) from error
            if beside_trainer != bool(self.num_workers):
                raise ValueError(
                    f"training.dataloader.num_workers = {self.num_workers}: the checkpoint's data position was "
                    f"saved with {int(beside_trainer)}, and holds for no other; set it to that"
                )
        super().load_state_dict(state_dict)


@dataclass
class _IdsAlone:
    """A tokenizer that doesn't look where in the text each token stands: half the byte tokenizer's time."""

    tokenizer: Tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        # As a batch, other threads run meanwhile: one of a worker's hands over its batches.
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def _for_documents(tokenizer: Any) -> Any:
    """A copy of a HuggingFaceTokenizer, to which a document that spells a special token is text."""
    tokenizer = copy(tokenizer)
    tokenizer.tokenizer.encode_special_tokens = True
    tokenizer.tokenizer = _IdsAlone(tokenizer.tokenizer)
    return tokenizer


def batches_ready(training: Training, dp_world_size: int) -> int:
    """Batches that a worker has ready: training.dataloader.prefetch_factor, or those of an optimizer step, all of
    which the trainer draws before it computes, and two at least."""
    batches_of_step = training.global_batch_size // (training.local_batch_size * dp_world_size)
    return training.dataloader.prefetch_factor or max(2, batches_of_step)


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
    section: str = "training",
) -> ParallelAwareDataloader:
    """Builds what torchtitan's text data loaders are, with the data set above.

    Args:
        dp_world_size: number of data-parallel ranks; each document goes to one of them.
        dp_rank: this rank.
        tokenizer: a HuggingFaceTokenizer; encodes a document, with its bos and eos. From here on it takes the strings
            of special tokens for text, wherever else it is used.
        job_config: of the section, `dataset`, `dataset_path`, `seq_len`, `local_batch_size` and `dataloader` are read,
            and `training.global_batch_size` and `skip_damaged_data`. A worker of the training's whose
            `prefetch_factor` isn't set has the batches of a whole optimizer step ready, and two at least.
        infinite: start over at the data set's end.
        section: whose data, "training" or "validation".

    Returns:
        A loader of ({"input": tokens}, labels), int64 [local_batch_size, seq_len] each.

    Raises:
        ValueError: no document for this rank, damage in its first one, or a hub that can't be reached.
    """
    training, data = job_config.training, getattr(job_config, section)
    try:
        dataset = TextDataset(
            dataset_name=data.dataset,
            dataset_path=data.dataset_path,
            tokenizer=_for_documents(tokenizer),
            seq_len=data.seq_len,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            infinite=infinite,
            skip_damaged=training.skip_damaged_data,
        )
        # A rank without a document would look for one forever. A shallow copy would move the data on.
        probe = copy(dataset)
        probe._data = deepcopy(dataset._data)
        probe._text_processor(next(probe._get_data_iter()))
    except (IndexError, StopIteration) as error:  # of a map-style split, of a streamed one
        raise ValueError(
            f"{section}.dataset = {data.dataset!r}, {section}.dataset_path = {data.dataset_path!r}: "
            f"no document for data-parallel rank {dp_rank}, give at least {dp_world_size} documents"
            f"{' that are not damaged' * training.skip_damaged_data}"
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"{section}.dataset = {data.dataset!r}: {error}; without a network, set it to 'c4_local' and "
            f"{section}.dataset_path to a local copy"
        ) from error
    options = asdict(data.dataloader)
    if section == "training":
        options["prefetch_factor"] = batches_ready(training, dp_world_size)
    return TextDataloader(
        dataset,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        batch_size=data.local_batch_size,
        worker_init_fn=_end_with_the_trainer,
        **options,
    )
