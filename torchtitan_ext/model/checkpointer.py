"""torchtitan's checkpointer, for which only what is named step-N, as a whole, is a checkpoint."""

from pathlib import Path

from torch.distributed import get_rank
from torchtitan.components.checkpoint import CheckpointManager

from .checkpoints import complete_steps, stale_checkpoints


def find_load_step(self: CheckpointManager, folder: str = "") -> int:
    return max(complete_steps(Path(folder or self.folder)), default=-1)


def purge_stale_checkpoints(self: CheckpointManager) -> None:
    if self.keep_latest_k > 0 and get_rank() == 0:
        for path in stale_checkpoints(Path(self.folder), self.keep_latest_k):
            self.purge_queue.put(str(path))


def use_step_folders() -> None:
    """Torchtitan's own methods search names for step-N: step-12-hf would count as step 12, and be deleted as it."""
    CheckpointManager._find_load_step = find_load_step  # type: ignore[method-assign]
    CheckpointManager._purge_stale_checkpoints = purge_stale_checkpoints  # type: ignore[method-assign]
