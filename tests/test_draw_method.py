"""The pictures of docs/method.md show what the layer promises."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "draw_method.py"


def test_the_pictures_example_has_no_hole_and_sees_no_future(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    names = runpy.run_path(str(SCRIPT))
    names["main"]()
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3

    selection, reached = names["example"]()
    config = names["CONFIG"]
    n_outputs = reached.sum(1)
    assert n_outputs.min() == 1 and n_outputs.max() == config.levels
    ends = (selection.index + 1) * config.pooling_factor**selection.level - 1
    first = reached.argmax(0)  # position that each row reaches first
    assert (first == ends)[reached.any(0)].all() and (ends == ends.sort().values).all()
