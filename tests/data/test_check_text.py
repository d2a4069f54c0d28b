"""The check of a local copy of C4: it counts the contents and names all damage, as training does."""

import codecs
import gzip
import tempfile
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path

import pytest
from helpers.damage import SHARDS, SKIPPED, N, lines_are, with_bytes, with_line, write_damaged
from helpers.streams import JOB, loader, stopped, stream, write_c4, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_ext.data import check_text, datasets
from torchtitan_ext.data.datasets import text_files

RUN = replace(JOB.training, seq_len=8, global_batch_size=2, steps=10)


def check(path, workers=2):
    files = text_files(str(path))
    checked = list(check_text.check_files(files, workers, repeat("text")))
    return checked, check_text.report(files, checked, replace(JOB, training=RUN))


def test_a_healthy_copy_is_counted_and_tokens_sequences_and_passes_are_those_of_training(tmp_path):
    path = write_c4(tmp_path, shards := [*SHARDS, SHARDS[3][:1]])
    checked, report = check(path)
    assert "damaged files: 0" in report
    assert [contents.documents for contents in checked] == list(map(len, shards))
    texts = "".join(chain(*shards))
    assert (sum(c.characters for c in checked), sum(c.utf8_bytes for c in checked)) == (len(texts), len(texts.encode()))
    sequences = list(loader("c4_local", path, RUN.seq_len, infinite=False))
    tokens = sum(c.tokens for c in checked)
    assert f"{tokens:,} tokens" in report and f"{len(sequences):,} sequences" in report
    assert f"{len(sequences) // RUN.global_batch_size:,} steps" in report
    passes = RUN.steps * RUN.global_batch_size * (RUN.seq_len + 1) / tokens
    assert float(report.split(" times the data")[0].split()[-1]) == pytest.approx(passes, abs=0.006)


DAMAGE = SKIPPED | {
    "no document": (with_bytes(lambda data: gzip.compress(b"")), "", "no document"),
    "blank lines": (with_bytes(lambda data: gzip.compress(MARK + b"\n \n")), "", "no document"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "after line 0", "director"),
}
MARK = codecs.BOM_UTF8

HARMLESS = {
    "blank lines": lines_are(lambda data: b"\n" + data.replace(b"\n", b"\n \t\n\n") + b" \x0c"),
    "no last newline": lines_are(lambda data: data[:-1]),
    "CRLF": lines_are(lambda data: b"\r\n" + data.replace(b"\n", b" \r\n")),
    "a mark": lines_are(lambda data: MARK + data),
    "a mark in a line of its own": lines_are(lambda data: MARK + b" \n" + data),
    "marked members": with_bytes(
        lambda data: b"".join(gzip.compress(MARK + line) for line in gzip.decompress(data).splitlines(keepends=True))
    ),
    "an empty member and padding": with_bytes(lambda data: data + gzip.compress(b"") + gzip.compress(MARK) + bytes(9)),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_blank_lines_and_marks_change_nothing_that_is_trained_on(kind, tmp_path):
    clean, path = (write_c4(tmp_path / name, [SHARDS[0]] * 2) for name in ("clean", "other"))
    [HARMLESS[kind](Path(file)) for file in text_files(str(path))]
    # Into the second pass.
    expected = stream(islice(loader("c4_local", clean, 64), 20))
    for stop in range(0, 20, 3):
        assert stopped(lambda: loader("c4_local", path, 64), stop, 20 - stop)[0] == expected
    checked, report = check(path, workers=1)
    assert "damaged files: 0" in report and [contents.documents for contents in checked] == [N, N]


def test_a_run_that_ends_amid_a_file_ends_quietly(tmp_path, monkeypatch):
    """Python closes the generator when the module's names may be gone."""
    documents = datasets.read_documents(text_files(str(write_c4(tmp_path, SHARDS)))[0])
    next(documents)
    for name in ("gzip", "zlib"):
        monkeypatch.setattr(datasets, name, None)
    documents.close()


@pytest.mark.slow
@settings(max_examples=20)
@given(kinds=st.lists(st.sampled_from([None, *DAMAGE]), min_size=1, max_size=5))
def test_every_damaged_file_is_reported_and_no_other(kinds):
    with tempfile.TemporaryDirectory() as folder:
        path, _ = write_damaged(folder, kinds, DAMAGE)
        files = text_files(str(path))
        checked, report = check(path)
    assert f"damaged files: {sum(map(bool, kinds))}" in report
    assert report.count("remedy: restore the file") == sum(map(bool, kinds))
    for file, kind, contents in zip(files, kinds, checked, strict=True):
        if kind is None:
            assert contents.documents == N and file not in report
            continue
        _, place, what = DAMAGE[kind]
        [problem] = contents.problems
        assert problem in report and what in problem
        assert problem.startswith(f"{file}, {place}: " if place else f"{file}: ")


def test_reading_goes_on_after_a_damaged_line_and_to_the_end_of_the_damage(tmp_path):
    path = write_c4(tmp_path, [SHARDS[0]] * 2)
    file, other = map(Path, text_files(str(path)))
    with_line(b'{"text": ""}', 5)(file)
    for kind in ("no UTF-8", "no JSON"):  # from below, so that each stays in its line
        DAMAGE[kind][0](file)
    with_line(b"", 2)(file)
    DAMAGE["cut short"][0](file)
    lines = 3 * check_text.PROBLEMS_KEPT
    other.write_bytes(gzip.compress(b"no JSON\n" * lines))
    [contents, many], report = check(path)
    places = [problem.split(": ")[0].removeprefix(f"{file}, ") for problem in contents.problems]
    assert places == ["line 4", "line 6", f"after line {N + 4}"]
    assert contents.documents == N + 1 and "1 of them empty, damaged lines" in report
    assert many.n_problems == lines and len(many.problems) == check_text.PROBLEMS_KEPT
    assert f"{lines - check_text.PROBLEMS_KEPT} more problems" in report


def test_the_command_exits_by_what_it_found(command, tmp_path):
    path = write_c4(tmp_path / "copy", SHARDS)
    out, err = command("check-data", path)
    assert "damaged files: 0" in out and f"{len(SHARDS) * N} documents" in out
    assert "compared with /" in out and "/configs/530m/dense.toml: 16," in out and f"{len(SHARDS)}/{len(SHARDS)}" in err

    DAMAGE["cut short"][0](Path(text_files(str(path))[2]))
    out, _ = command("check-data", path / "en", "--workers", 1, "--training.seq_len", 16, code=1)
    assert "damaged files: 1" in out and "sequences of 16," in out

    entry = "[[training.mixture]]\nweight = 0.5\n"
    job = write_text(tmp_path / "job.toml", f"{entry}path = '{path}/en'\n{entry}dataset = 'python_source'\n")
    out, _ = command("check-data", job, code=1)
    assert "tokens: a mixture, by weight; not counted: python_source" in out and "times the data" not in out
