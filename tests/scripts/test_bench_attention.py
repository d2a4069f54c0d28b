"""The layer's benchmark times every scorer in one call, the scorer's own part apart."""

import json

import pytest
from helpers.commands import run_command

from torchtitan_ext.lighthouse import LighthouseConfig
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
