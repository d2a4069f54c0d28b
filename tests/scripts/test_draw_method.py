"""The picture of docs/method.md shows what the layer promises."""

from helpers.commands import load_script


def test_the_pictures_example_has_no_hole_and_sees_no_future(tmp_path):
    draw_method = load_script("draw_method")
    draw_method.DrawMethod(tmp_path).run()
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")

    selection, reached = draw_method.example()
    config = draw_method.CONFIG
    n_outputs = reached.sum(1)
    assert n_outputs.min() == 1 and n_outputs.max() == config.levels
    ends = (selection.index + 1) * config.pooling_factor**selection.level - 1
    first = reached.argmax(0)  # position that each row reaches first
    assert (first == ends)[reached.any(0)].all() and (ends == ends.sort().values).all()
