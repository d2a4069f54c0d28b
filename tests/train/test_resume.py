"""Exact resume, seen from outside: runs of torchtitan.train, on one process and on several.

On a CPU the tests train the demo's jobs, with -m eight on eight processes. With -m gpu they train six layers of the
530M recipe on one GPU and on two: more layers cost time, a large vocabulary gigabytes per checkpoint. On GPUs the
groups of runs train at the same time.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from helpers.launches import SHORT, losses, train
from helpers.streams import stream
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMON = (
    *("--lr_scheduler.warmup_steps=2", "--checkpoint.interval=2", "--metrics.log_freq=1"),
    *("--experimental.custom_import=helpers.recording_import", "--training.dataset=python_source"),
)
VALIDATED = (
    *("--validation.enable", "--validation.dataset=python_source_validation", "--validation.freq=2"),
    *("--validation.seq_len=256", "--validation.local_batch_size=2", "--validation.steps=3"),
)
DEMO = SimpleNamespace(configs="configs/text", steps=6, split=4, repeats=True, rounding=1e-5)
DEMO.overrides = (*SHORT, *VALIDATED)
# Sixteen tiles and eight heads, for eight ranks that share a sequence.
LONGER = SimpleNamespace(**vars(DEMO))
LONGER.overrides += ("--training.seq_len=1024", "--validation.seq_len=1024")
LONGER.overrides += ("--lighthouse.top_k=64", "--model.flavor=eight-heads")
# The backward pass of cuDNN's attention sums with atomics, so it does not repeat.
RECIPE = SimpleNamespace(configs="configs/530m", steps=4, split=2, repeats=False, rounding=1e-2)
# A sequence per rank and step; after a warm-up of two steps the recipe's rate would diverge.
RECIPE.overrides = ("--model.flavor=six-layers", "--training.global_batch_size=-1", "--optimizer.lr=2e-4")
DETERMINISTIC = SimpleNamespace(**vars(RECIPE) | {"repeats": True})
DETERMINISTIC.overrides += ("--debug.deterministic",)


def on_gpus(group):
    return pytest.mark.gpu, pytest.mark.xdist_group(group)


@pytest.fixture(
    scope="module",
    params=[
        # job, data-parallel degree, context-parallel degree, and the one of the run that moves
        pytest.param((DEMO, 1, 1, None), id="one-process"),
        pytest.param((DEMO, 2, 2, 1), id="four-ranks-two-a-sequence"),
        pytest.param((DEMO, 8, 1, None), id="eight-ranks", marks=pytest.mark.eight),
        pytest.param((DEMO, 4, 2, 1), id="eight-ranks-two-a-sequence", marks=pytest.mark.eight),
        pytest.param((LONGER, 1, 8, 1), id="eight-ranks-a-sequence", marks=pytest.mark.eight),
        pytest.param((DETERMINISTIC, 1, 1, None), id="530M-on-a-GPU", marks=on_gpus(0)),
        pytest.param((RECIPE, 2, 1, None), id="530M-on-two-GPUs", marks=on_gpus(1)),
        pytest.param((RECIPE, 1, 2, 1), id="530M-on-two-GPUs-a-sequence", marks=on_gpus(2)),
    ],
)
def runs(request, tmp_path_factory):
    """Stage 1; the same killed and resumed; from the former's checkpoint, stage 2 and the rest on other ranks."""
    folder, (job, dp, cp, moved_cp) = tmp_path_factory.mktemp("runs"), request.param

    def launch(name, *overrides, stage="stage1", steps=job.steps, dump=None, dp=dp, cp=cp, **env):
        records, dump = folder / f"{name}-records", folder / (dump or name)
        records.mkdir()
        arguments = [f"--job.config_file={job.configs}/{stage}.toml", f"--job.dump_folder={dump}"]
        arguments += [f"--parallelism.context_parallel_degree={cp}"]
        # beside the trainer, or in it
        arguments += [f"--training.dataloader.num_workers={int(dp == 2)}"]
        arguments += [*COMMON, *job.overrides, f"--training.steps={steps}", *overrides]
        _, output = train(dp * cp, arguments, ends_well="KILL_AT_BATCH" not in env, RECORDS=str(records), **env)
        return SimpleNamespace(dump=dump, records=records, output=output)

    wandb = {"WANDB_MODE": "offline"} if job is DEMO and dp * cp == 1 else {}
    recorded = ["--metrics.enable_wandb"] * bool(wandb)
    whole = launch("whole")
    runs, killed = {"whole": whole}, None
    if job.repeats or not moved_cp:  # on GPUs once
        killed = launch("killed", *recorded, KILL_AT_BATCH=str(job.split + 2), **wandb)
        runs["resumed"] = launch("resumed", *recorded, dump="killed", **wandb)
    start = f"--checkpoint.initial_load_path={whole.dump}/checkpoint/step-{job.split}"
    runs["stage2"] = launch("stage2", start, *recorded, stage="stage2", steps=job.split + 1, **wandb)
    if dp * cp == 1:
        runs["again"] = launch("again", start, stage="stage2", steps=job.split + 1)
    if moved_cp:
        runs["moved"] = launch("moved", start, "--checkpoint.no_initial_load_model_only", cp=moved_cp)
    if wandb:  # one process, on a CPU
        runs["longer"] = launch("longer", start, "--training.seq_len=512", stage="stage2", steps=job.split + 1)
    return SimpleNamespace(job=job, dp=dp, n_ranks=dp * cp, killed=killed, wandb=wandb, **runs)


def batch(run, rank, count):
    return torch.load(run.records / f"batch-{rank}-{count}.pt")


def continued(runs):
    """What started from a checkpoint of step `split`."""
    return [getattr(runs, name) for name in ("stage2", "resumed", "moved", "longer") if hasattr(runs, name)]


def drawn(run, rank, first, last):
    """The tokens of these batches, in the order drawn."""
    return stream(batch(run, rank, count) for count in range(first, last + 1))


def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(runs):
    if not runs.killed:
        return
    assert "SIGKILL" in runs.killed.output
    job, whole = runs.job, dict(losses(runs.whole.dump))
    assert sorted(whole) == list(range(1, job.steps + 1))
    # The kill came after a step that the checkpoint doesn't hold: that one was trained twice.
    resumed = losses(runs.resumed.dump)
    assert [step for step, _ in resumed] == sorted([*whole, job.split + 1])
    first, again = (loss for step, loss in resumed if step == job.split + 1)
    assert first == again
    if job.repeats:
        assert all(loss == whole[step] for step, loss in resumed)


def test_a_dense_stage_repeats_bit_for_bit(runs):
    if hasattr(runs, "again"):
        assert losses(runs.again.dump) == losses(runs.stage2.dump)


def test_every_validation_of_every_start_reads_the_same_documents(runs):
    if "--validation.enable" in runs.job.overrides:
        whole, resumed = (losses(run.dump, "validation_metrics/loss") for run in (runs.whole, runs.resumed))
        assert [step for step, _ in whole] == [1, 2, 4, 6]
        assert resumed == whole
        assert whole == sorted(whole, key=lambda point: -point[1])  # it learns


def test_what_continues_draws_first_what_stage_1_would_have_drawn_next(runs):
    for rank in range(runs.dp):
        rest = drawn(runs.whole, rank, runs.job.split + 1, runs.job.steps)
        for run in continued(runs):
            first = drawn(run, rank, 1, 1)
            assert first == rest[: len(first)]
        each = {tuple(drawn(runs.whole, rank, count, count)) for count in range(1, runs.job.steps + 1)}
        assert len(each) == runs.job.steps


def test_what_continues_starts_from_the_optimizer_schedule_and_step_of_the_checkpoint(runs):
    names = {"optimizer", "lr_scheduler", "train_state"}
    for run in continued(runs):
        # the killed run's own: on a GPU two runs don't have the same
        source = run if run.dump.name == "killed" else runs.whole
        checkpoint = f"{source.dump}/checkpoint/step-{runs.job.split}"
        saved = _load_state_dict_from_keys(names, checkpoint_id=checkpoint)
        moments = [key for key in saved["optimizer"] if key.endswith(("exp_avg", "exp_avg_sq"))]
        assert any(saved["optimizer"][key].any() for key in moments)
        loaded = torch.load(run.records / "loaded.pt", map_location="cpu")
        assert loaded["step"] == saved["train_state"]["step"] == runs.job.split
        assert loaded["lr"] == saved["lr_scheduler"]["_last_lr"]
        assert loaded["ntokens_seen"] == saved["train_state"]["ntokens_seen"]
        optimizer = {key: loaded[key] for key in saved["optimizer"]}
        torch.testing.assert_close(optimizer, saved["optimizer"], rtol=0, atol=0)


def test_stage_2_attends_densely_differs_from_stage_1_by_that_alone_and_may_be_longer(runs):
    whole, longer = dict(losses(runs.whole.dump)), getattr(runs, "longer", None)
    for run in filter(None, (runs.stage2, longer)):
        [(step, loss)] = losses(run.dump)
        assert step == runs.job.split + 1 and whole[step] != loss == pytest.approx(whole[step], abs=1)
        assert "lighthouse.enable = False (was True)" in run.output
    assert not longer or batch(longer, 0, 1)[1].shape == (1, 512)
    assert not runs.killed or "Changed since" not in runs.resumed.output


def test_another_context_parallel_degree_trains_the_same_from_a_checkpoint_on(runs):
    tags = ("loss_metrics/global_avg_loss", "grad_norm", "validation_metrics/loss", "n_tokens_seen")
    for tag in tags if hasattr(runs, "moved") else ():
        whole, rest = (dict(losses(run.dump, tag)) for run in (runs.whole, runs.moved))
        whole = {step: value for step, value in whole.items() if step > runs.job.split}
        assert rest == pytest.approx(whole, rel=runs.job.rounding)


def test_what_is_logged_adds_up_where_ranks_share_a_sequence(runs):
    n_tokens = sum(batch(runs.whole, rank, 1)[1].numel() for rank in range(runs.dp))
    steps = range(1, runs.job.steps + 1)
    assert losses(runs.whole.dump, "n_tokens_seen") == [(step, step * n_tokens) for step in steps]
    assert losses(runs.whole.dump, "n_devices") == [(step, runs.n_ranks) for step in steps]
    mean = dict(losses(runs.whole.dump))
    for step, greatest in losses(runs.whole.dump, "loss_metrics/global_max_loss"):
        assert greatest >= mean[step]
    # before it has learned much, what it trained on last is no easier than what it never saw
    first = dict(losses(runs.whole.dump, "validation_metrics/loss"))
    assert all(loss == pytest.approx(mean[step], rel=0.3) for step, loss in first.items())


def test_weights_and_biases_records_every_start_of_a_run_as_one(runs):
    if not runs.wandb:
        return
    files = [[*run.dump.glob("tb/*/wandb/offline-run-*/run-*.wandb")] for run in (runs.stage2, runs.resumed)]
    assert [len(starts) for starts in files] == [1, 2]
    assert len({file.stem for starts in files for file in starts}) == 2
    for starts in files:
        deadline = time.monotonic() + 10  # W&B's own process may still write
        while b"loss_metrics/global_avg_loss" not in max(starts).read_bytes():  # not the killed start's
            assert time.monotonic() < deadline
            time.sleep(0.1)
