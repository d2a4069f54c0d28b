"""The layer's benchmark times every scorer in one call, and the scorer's part separately."""

import json
import sys
from types import SimpleNamespace

import pytest

from torchtitan_ext.lighthouse import LighthouseConfig
from torchtitan_ext.lighthouse.kernels import dense_attention
from torchtitan_ext.lighthouse.scorers import SCORERS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZES = ("--top-k=32", "--tile-winners=8", "--n-heads=4", "--n-kv-heads=2", "--head-dim=8", "--repeats=1")


def test_a_row_for_each_scorer_at_each_length(command, tmp_path):
    output = tmp_path / "bench.json"
    printed, _ = command("bench_attention", *SIZES, f"--output={output}", "--seq-lens", 512, 1024)
    records = json.loads(output.read_text())
    rows = {(row["seq_len"], row["scorer"]): row for row in records["rows"]}
    assert list(rows) == [(seq_len, scorer) for seq_len in (512, 1024) for scorer in SCORERS]
    config = LighthouseConfig(top_k=32, tile_winners=8)
    timed = {f"{name}_{way}_ms" for name in ("dense", "floor", "lighthouse") for way in ("fwd", "fwd_bwd")}
    for (seq_len, scorer), row in rows.items():
        assert row["gathered_len"] == config.gathered_len(seq_len) and row["kernel"] == "sdpa"
        times = {key: value for key, value in row.items() if key.endswith("_ms")}
        assert times.keys() == {"score_ms", *timed} and min(times.values()) > 0
        [scored] = [stage["ms"] for stage in row["stages"] if stage["stage"] == "score"]
        assert row["score_ms"] == scored and f"| {scorer} | {scored:.3f} |" in printed
    assert output.with_suffix(".png").stat().st_size > 0


def test_a_layer_that_fails_leaves_the_others(command, tmp_path, monkeypatch):
    cute = SimpleNamespace(flash_attn_func=lambda q, k, v, **_: (dense_attention(q, k, v), None))
    for module, stand_in in {"flash_attn.cute": cute, "fla.ops.gla": None, "fla.ops.nsa": None}.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr("torchtitan_ext.lighthouse.kernels.unusable_reason", lambda *_, **__: None)
    output, kernels = tmp_path / "bench.json", ("--kernels", "cudnn", "sdpa")  # cuDNN needs a GPU
    arguments = [f"--output={output}", "--scorers=norm", *kernels, "--seq-lens", 512, 1024, "--peers"]
    out, err = command("bench_attention", *SIZES, *arguments, code=1)
    records = json.loads(output.read_text())
    assert [(row["seq_len"], row["kernel"]) for row in records["rows"]] == [(512, "sdpa"), (1024, "sdpa")]
    assert [peer["seq_len"] for peer in records["peers"]] == [512, 1024]  # the window
    assert all(f"{peer['ms']:.2f}" in out for peer in records["peers"])
    failed = [title.partition(", ")[2] for title in records["errors"]]
    assert failed == ["norm, cudnn"] * 2 + ["gated linear attention"] * 2 + ["native sparse attention"] * 2
    assert all(error in err for error in records["errors"].values())
