"""The training benchmark records what ran, reports what failed, and goes on."""

import json
import subprocess
import sys
from pathlib import Path

from torchtitan_ext.runner import child_environment

ROOT = Path(__file__).parents[1]


def test_a_row_for_what_trains_and_a_report_of_what_fails(tmp_path):
    config, output = "configs/demo/stage1.toml", tmp_path / "bench.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "scripts/bench_train.py",
                "--steps",
                "4",
                "--window",
                "2",
                "--output",
                str(output),
            ),
            *("--run", "small", config, "training.seq_len=1024", "lighthouse.top_k=16"),
            *("--run", "broken", config, "lighthouse.top_k=17"),
        ],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "failed: broken" in done.stderr
    assert "top_k = 17: must be a multiple of tile_winners" in done.stderr
    row, broken = json.loads(output.read_text())["rows"]
    assert broken["name"] == "broken" and "failed" in broken["error"]
    assert row["name"] == "small" and row["seq_len"] == 1024 and row["n_gpus"] == 1
    assert row["tok_s_gpu"] > 0 and row["step_s"] > 0 and row["peak_gib"] > 0
    assert row["loss_last"] < row["loss_first"]
    assert f"| small | 1 | 1,024 | {row['tok_s_gpu']:,.0f} |" in done.stdout
    log = (tmp_path / "bench_train_small_1.log").read_text()
    assert "Mixed precision training is handled by fully_shard" in log  # on one device too
    assert log.count("gathered: 192 of 1,024") == 3  # 1,024 / 16 + 2 * 4 * 16, at steps 1, 2 and 4
