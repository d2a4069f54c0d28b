"""The training benchmark records what ran, reports what failed and goes on."""

import json
import os
from functools import partial
from itertools import product
from pathlib import Path

import bench_train
import pytest
from helpers.commands import ROOT, call
from helpers.streams import write_text
from torch.utils.tensorboard import SummaryWriter

from torchtitan_ext.arguments import parse
from torchtitan_ext.experiment import records
from torchtitan_ext.experiment.runner import load_job
from torchtitan_ext.jobs.preflight import plan_report
from torchtitan_ext.jobs.recorded import write_config

CONFIG = "configs/text/stage1.toml"
SMALL = ("training.seq_len=256", "lighthouse.top_k=16", "lighthouse.tile_winners=4", "loss.fuse_output=true")


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/*/stage1.toml")), ids=lambda path: path.parent.name)
def test_every_recipe_can_be_timed_without_its_data_and_weights(recipe):
    bench = bench_train.BenchTrain()
    load_job(recipe, bench.job_arguments(("", "", "model.hf_assets_path=torchtitan_ext/data/byte_tokenizer")))


@pytest.mark.slow
def test_a_row_for_what_trains_and_a_report_of_what_fails(command, tmp_path):
    output, broken = tmp_path / "bench.json", "parallelism.data_parallel_shard_degree=3"
    runs = ["--run", "broken", CONFIG, broken, "--run", "small", CONFIG, *SMALL]
    out, err = command("bench_train", "--steps", 4, "--window", 2, "--output", output, *runs, code=1)
    assert "failed: broken" in err and ": must be the number of ranks, 1; " in err  # the job's own words
    failed, row = json.loads(output.read_text())["rows"]
    assert failed["name"] == "broken" and "failed" in failed["error"]
    assert row["name"] == "small" and row["seq_len"] == 256 and row["n_gpus"] == 1
    assert min(row["tok_s_gpu"], row["step_s"], row["peak_gib"]) > 0
    assert row["loss_last"] < row["loss_first"] == row["losses"][0] and len(row["losses"]) == 3  # steps 1, 2 and 4
    assert f"| small | 1 | 256 | sdpa | {row['tok_s_gpu']:,.0f} |" in out
    log = (tmp_path / "bench_train_small_1.log").read_text()
    assert "Mixed precision training is handled by fully_shard" in log  # on one device too


def test_warm_up_is_not_timed(job, tmp_path):
    write_config(config := job(dump="."))
    with SummaryWriter(tmp_path) as writer:
        for step, seconds in [(1, 100), (4, 50), (8, 2), (12, 4), (16, 3)]:
            values = {records.LOSS: 10 - step / 10, records.SECONDS: seconds, bench_train.PEAK: step}
            values |= {records.TOKENS_PER_SECOND: 1000 / seconds, bench_train.MFU: 10 / seconds}
            [writer.add_scalar(tag, value, step) for tag, value in values.items()]
    measured = partial(bench_train.measured, tmp_path, config)
    row = measured(4, False)
    assert row["step_s"] == 3 and row["tok_s_gpu"] == pytest.approx(1000 / 3)
    assert row["peak_gib"] == 16 and (row["loss_first"], row["loss_last"]) == pytest.approx((9.9, 8.4))
    assert measured(4, True)["step_s"] == 3  # of 2 and 4: the last window holds the profile
    assert measured(1, False)["step_s"] == pytest.approx((3 + 4) / 2)  # of 50, 2, 4, 3


@pytest.mark.slow
def test_the_runs_on_eight_gpus_are_good_and_compare_with_those_on_one(tmp_path):
    stand_in, jobs = tmp_path / "bin/python3", {}
    write_text(stand_in, f"#!/bin/sh\nprintf '%s\\0' \"$@\" END >> {tmp_path}/calls\n").chmod(0o755)
    for part in ("fsdp", "cp", "one"):
        env = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
        assert call("bash", "scripts/bench_eight.sh", part, **env).returncode == 0
    for arguments in (tmp_path / "calls").read_text().split("END\0")[:-1]:
        bench = parse(bench_train.BenchTrain, arguments.split("\0")[1:-1], "bench_train")
        for words, n_gpus in product(bench.runs, bench.nproc):
            _, problems = plan_report(words[1], bench.job_arguments(words), n_gpus, gpu_memory=139)
            assert problems == [] and (words[0], n_gpus) not in jobs  # each run once
            jobs[words[0], n_gpus] = load_job(Path(words[1]), bench.job_arguments(words))
    on_one, on_eight = ({name for name, n in jobs if n == number} for number in (1, 8))
    assert on_one < on_eight and len(jobs) == len(on_one) + len(on_eight)
    for name in on_one:
        one, eight = jobs[name, 1], jobs[name, 8]
        assert one.activation_checkpoint == eight.activation_checkpoint
        # the same sequence, or a rank's share of it that attends to as many rows per token
        lens = [job.training.seq_len for job in (one, eight)]
        assert lens[1] / lens[0] in (1, eight.parallelism.context_parallel_degree)
        attended = [job.lighthouse.gathered_len(n) ** 2 / n for job, n in zip((one, eight), lens, strict=True)]
        assert attended[0] == pytest.approx(attended[1], rel=1e-3)
    row = {"name": "a", "n_gpus": 8, "tok_s_gpu": 100}
    assert bench_train.share_of_one(row, [row, row | {"n_gpus": 1, "tok_s_gpu": 200}]) == "50.0 %"
