"""The training benchmark records what ran, reports what failed and goes on, and refuses what can't run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from torchtitan_ext import records
from torchtitan_ext.runner import child_environment

ROOT = Path(__file__).parents[1]
CONFIG = "configs/demo/stage1.toml"
SMALL = ("training.seq_len=1024", "lighthouse.top_k=16", "loss.fuse_output=true")


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/bench_train.py", *arguments],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )


def test_a_row_for_what_trains_and_a_report_of_what_fails(tmp_path):
    output = tmp_path / "bench.json"
    done = bench(
        *("--steps", "4", "--window", "2", "--output", str(output)),
        *("--run", "broken", CONFIG, "parallelism.data_parallel_shard_degree=3"),
        *("--run", "small", CONFIG, *SMALL),
        *("--run", "stage2", "configs/demo/stage2.toml", *SMALL, "compile.enable=true"),
    )
    assert done.returncode == 1 and "failed: broken" in done.stderr
    assert "WORLD_SIZE" in done.stderr  # torchtitan's own words
    broken, row, compiled = json.loads(output.read_text())["rows"]
    assert broken["name"] == "broken" and "failed" in broken["error"]
    assert row["name"] == "small" and row["seq_len"] == 1024 and row["n_gpus"] == 1
    assert row["tok_s_gpu"] > 0 and row["step_s"] > 0 and row["peak_gib"] > 0
    assert row["loss_last"] < row["loss_first"]
    assert row["losses"][0] == row["loss_first"] and len(row["losses"]) == 3  # steps 1, 2 and 4
    assert f"| 1 | {row['loss_first']:.4f} | {compiled['loss_first']:.4f} |" in done.stdout
    assert f"| small | 1 | 1,024 | {row['tok_s_gpu']:,.0f} |" in done.stdout
    assert compiled["loss_last"] < compiled["loss_first"]
    log = (tmp_path / "bench_train_small_1.log").read_text()
    assert "Mixed precision training is handled by fully_shard" in log  # on one device too
    assert log.count("gathered: 192 of 1,024") == 3  # 1,024 / 16 + 2 * 4 * 16, at steps 1, 2 and 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "6"], ["--steps 6", "multiple of --window 4", "at least 8"]),
        (["--window", "0"], ["--window", "0: must be a positive number"]),
        (["--nproc", "-1"], ["--nproc", "must be a positive number"]),
        (["--run", "one"], ["--run one", "give a name and the path of a job file"]),
        (["--run", "a/b", CONFIG], ["--run a/b", "letters, digits"]),
        (["--run", "a", CONFIG, "--run", "a", CONFIG], ["--run a", "a name of its own"]),
        (["--run", "a", "README.md"], ["--run a README.md"]),
        (["--run", "a", CONFIG, "training.seq_len=100"], ["seq_len = 100", "nearest"]),
        (["--profile"], ["--profile", "no CUDA device"]),
        (["--append", "--output", "README.md"], ["--append", "README.md is no record"]),
    ],
)
def test_what_cannot_run_is_refused_before_any_time_is_spent(arguments, words, tmp_path):
    done = bench("--output", str(tmp_path / "bench.json"), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = " ".join(done.stderr.split())
    assert all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []


def test_warm_up_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_train

    with SummaryWriter(tmp_path) as writer:
        for step, seconds in [(1, 100), (4, 50), (8, 2), (12, 4), (16, 3)]:
            writer.add_scalar(records.LOSS, 10 - step / 10, step)
            writer.add_scalar(records.SECONDS, seconds, step)
            writer.add_scalar(records.TOKENS_PER_SECOND, 1000 / seconds, step)
            writer.add_scalar(bench_train.MFU, 10 / seconds, step)
            writer.add_scalar(bench_train.PEAK, step, step)
    (tmp_path / records.CONFIG_FILE).write_text(json.dumps({"training": {"seq_len": 64}}))
    row = bench_train.record(tmp_path, bench_train.timed_windows(window=4, profile=False))
    assert row["step_s"] == 3 and row["tok_s_gpu"] == pytest.approx(1000 / 3)
    assert row["peak_gib"] == 16 and (row["loss_first"], row["loss_last"]) == pytest.approx(
        (9.9, 8.4)
    )
    row = bench_train.record(tmp_path, bench_train.timed_windows(window=4, profile=True))
    assert row["step_s"] == 3  # of 2 and 4: the last window holds the profile
    row = bench_train.record(tmp_path, bench_train.timed_windows(window=1, profile=False))
    assert row["step_s"] == pytest.approx((3 + 4) / 2)  # of 50, 2, 4, 3
