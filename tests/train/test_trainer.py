"""The trainer and the checkpoint manager, on parts of a run: agreement of ranks, gradients, deleted checkpoints."""

import math
from collections import deque
from contextlib import nullcontext
from unittest.mock import MagicMock, patch

import pytest
import torch
from helpers.launches import in_group, losses, train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtitan.config import ConfigManager, Debug
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_determinism
from torchtitan.train import Trainer

from torchtitan_ext.jobs.folder_lock import LOCK
from torchtitan_ext.jobs.resume import INTERRUPTED, stale_checkpoints
from torchtitan_ext.train.checkpointer import LighthouseCheckpointManager
from torchtitan_ext.train.metrics import LighthouseMetricsProcessor
from torchtitan_ext.train.spec import seed_shards
from torchtitan_ext.train.trainer import LighthouseTrainer

JOB = ("--job.custom_config_module=torchtitan_ext.model.settings",)


def bare_trainer(**attributes) -> LighthouseTrainer:
    """A trainer of which nothing is built."""
    trainer = object.__new__(LighthouseTrainer)
    trainer.job_config = ConfigManager().parse_args([*JOB])
    trainer.step, trainer.nonfinite_steps, trainer.outcomes = 7, 0, deque()
    trainer.sigterm_received, trainer.interrupted, trainer.parallel_dims = False, False, MagicMock(pp_enabled=False)
    trainer.device, trainer.gradient_accumulation_steps = torch.device("cpu"), 1
    trainer.checkpointer, trainer.lr_schedulers, trainer.optimizers = MagicMock(), MagicMock(), MagicMock()
    trainer.checkpointer.describe_latest.return_value = "LATEST"
    trainer.metrics_processor = object.__new__(LighthouseMetricsProcessor)
    vars(trainer.metrics_processor).update(job_config=trainer.job_config, must_log=False)
    vars(trainer).update(logged=[], **attributes)
    return trainer


def step(self, loss):
    """Stands in for torchtitan's."""
    self.update_parameters(torch.tensor(loss), torch.tensor(3.0))
    self.logged += [self.step] * self.metrics_processor.should_log(self.step)


@pytest.mark.slow
def test_stock_torchtitan_trains_a_stage_to_the_same_losses(tmp_path):
    arguments = ["--job.config_file=configs/passkey/stage1.toml", "--training.steps=5", "--lr_scheduler.warmup_steps=1"]
    arguments += ["--metrics.log_freq=2"]
    register = [*JOB, "--experimental.custom_import=torchtitan_ext.register"]
    llama3 = [*register, "--model.name=llama3", "--model.flavor=debugmodel"]
    for dump, stock, more in (("stock", True, register), ("ours", False, []), ("llama3", True, llama3)):
        train(1, [*arguments, *more, f"--job.dump_folder={tmp_path / dump}"], stock=stock)
    stock, ours = (losses(tmp_path / dump) for dump in ("stock", "ours"))
    assert stock == ours and [step for step, _ in stock] == [1, 2, 4, 5]  # the last one too
    assert not (tmp_path / "stock" / LOCK).exists() and (tmp_path / "ours" / LOCK).exists()
    first, *_, last = losses(tmp_path / "llama3")  # torchtitan's own model
    assert (first[0], last[0]) == (1, 4) and first[1] > last[1]


def shards_start_different(rank):
    for seed in (None, 7):
        for fsdp, tp in ((2, 1), (1, 2), (1, 1)):
            shards = fsdp * tp
            dims = ParallelDims(2 // shards, fsdp, 1, tp, 1, 1, 1, 2)
            dims.build_mesh()
            set_determinism(dims, torch.device(f"cpu:{rank}"), Debug(seed=seed), ["pp"])
            seed_shards(dims)
            with torch.device("meta"):
                model = torch.nn.Linear(8, 8)
            if tp == 2:
                parallelize_module(model, dims.get_mesh("tp"), ColwiseParallel())
            if fsdp == 2:
                fully_shard(model, mesh=dims.get_mesh("fsdp"))
            model.to_empty(device="cpu")
            with torch.no_grad():
                torch.nn.init.normal_(model.weight)
            mine = model.weight.to_local() if shards == 2 else model.weight.detach()
            both = [torch.empty_like(mine) for _ in range(2)]
            torch.distributed.all_gather(both, mine)
            assert both[0].equal(both[1]) == (shards == 1)


def all_ranks_agree(rank):
    trainer = bare_trainer()
    allowed = trainer.job_config.training

    def finite(loss=2.0, norm=3.0):
        trainer._share_outcome(torch.tensor(loss), torch.tensor(norm))
        return trainer._check_outcomes()

    assert trainer._check_outcomes() and finite()
    for value in (math.nan, math.inf, -math.inf):
        for case in ({"loss": value if rank == 1 else 2.0}, {"norm": value}):
            allowed.skip_nonfinite_steps = 2
            assert not finite(**case) and not finite(**case)
            assert finite() and not finite(**case)  # in a row
            allowed.skip_nonfinite_steps = 1
            named = "loss on rank 1, gradient norm 3.0" if "loss" in case else f"gradient norm {value}"
            with pytest.raises(RuntimeError, match=f"Step 7 is not finite: {named}.*LATEST"):
                finite(**case)
            assert finite()
    assert not trainer.interrupted
    trainer.sigterm_received = rank == 1
    assert finite() and trainer.interrupted


def nothing_is_saved_from_a_bad_step_on(rank):
    for bad in range(1, 9):
        trainer = bare_trainer(step=0)
        trainer.job_config.training.steps = 8
        trainer.checkpointer.due.side_effect = lambda step: step % 3 == 0
        saved = []
        with patch.object(Trainer, "train_step", step), pytest.raises(RuntimeError, match=f"Step {bad} "):
            while True:
                trainer.step += 1
                trainer.train_step(math.nan if rank == 1 and trainer.step == bad else 2.0)
                saved += [trainer.step] * (trainer.step in (3, 6, 8))
        assert saved == [step for step in (3, 6, 8) if step < bad]
        assert trainer.logged == [step for step in (1, 3, 6, 8) if step <= bad]  # or a resume would lose their time
        # read after the next step, or before a checkpoint
        assert trainer.step == (bad if bad in (3, 6, 8) else bad + 1)


def sigterm_saves_no_step_that_is_the_last_or_bad(rank):
    trainer = bare_trainer(step=8, sigterm_received=rank == 1)
    trainer.job_config.training.steps, trainer.checkpointer.due.return_value = 8, False
    ends = nullcontext(), pytest.raises(SystemExit), pytest.raises(RuntimeError, match="Step 7 ")
    for loss, end in zip((2.0, 2.0, math.nan), ends, strict=True):
        with patch.object(Trainer, "train_step", step), end:
            for _ in range(2):
                trainer.train_step(loss)
        assert trainer.interrupted and trainer.checkpointer.save_interrupted.call_count == (trainer.step == 7)
        trainer.step, trainer.interrupted = 7, False
    assert trainer.logged == [8, 8, 7]  # the saved too, or a resume would lose its time


def reduced_once(rank):
    def collectives(no_sync, reshard):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        for module in model:
            fully_shard(module, reshard_after_forward=reshard != "never")
        fully_shard(model)
        trainer = bare_trainer(model_parts=[model], gradient_accumulation_steps=3)
        trainer.job_config.parallelism.fsdp_no_sync = no_sync
        trainer.job_config.parallelism.fsdp_reshard_after_forward = reshard
        model.set_force_sum_reduction_for_comms(True)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            patch.object(Trainer, "forward_backward_step", lambda self, input: model(input).sum().backward()),
        ):
            for microbatch in range(6):
                trainer.microbatch = microbatch % 3
                trainer.forward_backward_step(input=torch.randn(4, 8))
        names = [event.name.partition(" (")[0] for event in profile.events()]
        return [names.count(f"FSDP::{what}") for what in ("all_gather", "post_backward_reduce")]

    for reshard in ("never", "always"):
        (gathered, reduced), (gathered_once, reduced_once) = (collectives(once, reshard) for once in (False, True))
        assert reduced == 3 * reduced_once == 3 * 4
        assert gathered == (3 * gathered_once if reshard == "never" else gathered_once)


def agree(rank):
    all_ranks_agree(rank)
    nothing_is_saved_from_a_bad_step_on(rank)
    sigterm_saves_no_step_that_is_the_last_or_bad(rank)
    reduced_once(rank)
    shards_start_different(rank)


@pytest.mark.slow
def test_what_ranks_agree_on_and_what_differs():
    """A loss that isn't finite, a norm that isn't, SIGTERM; gradients reduced once per step; shards' random numbers."""
    in_group(agree, 2)


def test_the_thread_that_trains_runs_the_backward_pass():
    during: list[bool] = []
    multithreaded = torch._C._is_multithreading_enabled
    with patch("signal.signal"), patch.object(Trainer, "train", lambda _: during.append(multithreaded())):
        bare_trainer().train()
    assert during == [False] and multithreaded()


@pytest.mark.parametrize(
    ("kept", "steps", "bridges", "half_saved", "stale"),
    [
        (2, [100, 200, 250], [250], [], []),
        (2, [100, 200, 250, 300], [250], [], [100, 250]),
        (2, [50, 100], [50], [100], []),  # the only one to go on from
        # saved at another interval, or as a first step: kept like any other
        (4, [9000, 10000, 11000, 11400], [], [], []),
        (2, [1, 100, 200], [], [], [1]),
    ],
)
def test_an_interruptions_checkpoint_goes_when_a_later_is_complete(tmp_path, kept, steps, bridges, half_saved, stale):
    for step in steps:
        (folder := tmp_path / f"step-{step}").mkdir()
        if step in bridges:
            (folder / INTERRUPTED).touch()
        if step not in half_saved:
            (folder / ".metadata").touch()
    assert stale_checkpoints(tmp_path, kept) == [tmp_path / f"step-{step}" for step in stale]


def test_a_kill_while_an_interruption_saves_leaves_no_regular_checkpoint(tmp_path):
    manager = object.__new__(LighthouseCheckpointManager)
    manager.temporary = True
    save = patch("torchtitan.components.checkpoint.CheckpointManager.dcp_save", side_effect=KeyboardInterrupt)
    with save, patch("torch.distributed.get_rank", return_value=0), pytest.raises(KeyboardInterrupt):
        manager.dcp_save({}, str(tmp_path / "step-3"))
    assert (tmp_path / "step-3" / INTERRUPTED).exists()
