"""Save and load checkpoints: torchtitan's manager, with clear errors and checkpoints on SIGTERM."""

import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager

from torchtitan_ext.jobs.resume import INTERRUPTED, METADATA, complete_steps, stale_checkpoints


class LighthouseCheckpointManager(CheckpointManager):
    """torchtitan's checkpoint manager for interruptible runs; see `stale_checkpoints`."""

    interrupting = False  # saving on SIGTERM
    temporary = False  # and at a step that is not due
    saving = "a checkpoint"  # the latest begun
    due = CheckpointManager._should_save  # whether `save` saves a step that is not the last

    def describe_latest(self) -> str:
        """The checkpoint that the next start would load, as a clause for messages."""
        if not self.enable or (step := self._find_load_step()) == -1:
            return "there is no checkpoint to continue from"
        return f"the newest checkpoint is {self._create_checkpoint_id(step)}"

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save a checkpoint if due. Raises RuntimeError if it, or the previous asynchronous one, can't be saved."""
        try:
            super().save(curr_step, last_step)
        except (Exception, CheckpointException) as error:
            failures = getattr(error, "failures", {dist.get_rank(): (error,)})
            said = {rank: traceback.format_exception_only(cause)[-1].strip() for rank, (cause, *_) in failures.items()}
            causes = "; ".join(f"{cause} (rank {rank})" for rank, cause in said.items())
            state = f"Training stops after step {curr_step}; {self.describe_latest()}"
            remedy = "Make space, or remove another cause, and launch again."
            raise RuntimeError(f"{self.saving} could not be saved: {causes}. {state}. {remedy}") from error

    def save_interrupted(self, step: int) -> None:
        """Save a full checkpoint in the foreground, regardless of interval and `async_mode`."""
        self.temporary = not self.due(step)
        self.interrupting = True
        self.save(step)

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        self.saving = checkpoint_id
        if self.temporary and dist.get_rank() == 0:
            with suppress(OSError):  # which the save meets on all ranks
                Path(checkpoint_id).mkdir(parents=True, exist_ok=True)
                Path(checkpoint_id, INTERRUPTED).touch()  # first, or a kill would leave a regular checkpoint
        return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _async_wait(self) -> None:
        super()._async_wait()
        if self.interrupting:
            self.save_future, self.async_mode = None, AsyncMode.DISABLED

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return super()._should_save(curr_step, last_step or self.interrupting)

    def _find_load_step(self, folder: str = "") -> int:
        # torchtitan's counts step-12-hf as step 12
        return max(complete_steps(Path(folder or self.folder)), default=-1)

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            for path in stale_checkpoints(Path(self.folder), self.keep_latest_k):
                if not path.is_symlink():  # which is not deleted
                    with suppress(OSError):  # first, or a kill could leave one that looks complete
                        (path / METADATA).unlink()
                self.purge_queue.put(str(path))
