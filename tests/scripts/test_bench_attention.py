"""The layer's benchmark times every scorer in one call, the scorer's own part apart."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers.commands import run_command

from torchtitan_ext.lighthouse import LighthouseConfig
from torchtitan_ext.lighthouse.kernels import dense_attention
from torchtitan_ext.lighthouse.scorers import SCORERS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_row_for_each_scorer_at_each_length(tmp_path, monkeypatch, capsys):
    output, lengths = tmp_path / "bench.json", (512, 1024)
    sizes = ("--top-k=32", "--tile-winners=8", "--n-heads=4", "--n-kv-heads=2", "--head-dim=8")
    arguments = [*sizes, "--repeats=1", f"--output={output}", "--seq-lens", *lengths]
    assert run_command(monkeypatch, "bench_attention", *arguments) == 0

    records, printed = json.loads(output.read_text()), capsys.readouterr().out
    rows = {(row["seq_len"], row["scorer"]): row for row in records["rows"]}
    assert list(rows) == [(seq_len, scorer) for seq_len in lengths for scorer in SCORERS]
    config = LighthouseConfig(top_k=32, tile_winners=8)
    for (seq_len, scorer), row in rows.items():
        assert row["gathered_len"] == config.gathered_len(seq_len) and row["kernel"] == "sdpa"
        times = {key: value for key, value in row.items() if key.endswith("_ms")}
        assert len(times) == 7 and all(value > 0 for value in times.values())
        for name in ("dense", "floor", "lighthouse"):
            assert {f"{name}_fwd_ms", f"{name}_fwd_bwd_ms"} < times.keys()
        [scored] = [stage["ms"] for stage in row["stages"] if stage["stage"] == "score"]
        assert row["score_ms"] == scored and f"| {scorer} | {scored:.3f} |" in printed
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    cute = SimpleNamespace(flash_attn_func=lambda q, k, v, **_: (dense_attention(q, k, v), None))
    for module, stand_in in {"flash_attn.cute": cute, "fla.ops.gla": None, "fla.ops.nsa": None}.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr("torchtitan_ext.lighthouse.kernels.unusable_reason", lambda *_, **__: None)
    output, sizes = tmp_path / "bench.json", ("--top-k=32", "--tile-winners=8", "--head-dim=8", "--scorers=norm")
    kernels = ("--kernels", "cudnn", "sdpa", "--peers")  # cuDNN needs a GPU
    arguments = [*sizes, "--repeats=1", f"--output={output}", *kernels, "--seq-lens", 512, 1024]
    assert run_command(monkeypatch, "bench_attention", *arguments) == 1

    records, printed = json.loads(output.read_text()), capsys.readouterr()
    measured = [(row["seq_len"], row["kernel"]) for row in records["rows"]]
    assert measured == [(512, "sdpa"), (1024, "sdpa")] and all("dense_peak_gib" in row for row in records["rows"])
    assert [peer["seq_len"] for peer in records["peers"]] == [512, 1024]  # the window
    assert all(f"{peer['ms']:.2f}" in printed.out for peer in records["peers"])
    failed = [title.partition(", ")[2] for title in records["errors"]]
    assert failed == ["norm, cudnn"] * 2 + ["gated linear attention"] * 2 + ["native sparse attention"] * 2
    assert all(error in printed.err for error in records["errors"].values())
