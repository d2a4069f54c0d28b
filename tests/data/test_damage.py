"""Damaged data: skipped on request, exactly, across resumes; huge documents take bounded memory."""

import gzip
import json
import logging
import pickle
import re
import resource
import tempfile
import time
from itertools import chain, islice
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from helpers.damage import SKIPPED, N, lines_are, with_line, write_damaged
from helpers.launches import start_ranks
from helpers.streams import EOS, TOKENIZER, documents, loader, stopped, stream, write_c4, write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_ext.data import datasets
from torchtitan_ext.data.check_text import check_file
from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import text_files
from torchtitan_ext.train.spec import register


def n_skipped(data):
    return pickle.loads(data.state_dict()[data._rank_id])["dataset_state"]["n_skipped"]


damaged_files = st.lists(st.sampled_from([None, *SKIPPED]), max_size=2)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    kinds=st.tuples(damaged_files, st.just([None]), damaged_files).map(lambda parts: list(chain(*parts))),
    stops=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seq_len=st.integers(1, 60),
)
def test_what_is_left_is_every_intact_document_in_order_whatever_resumes_between(kinds, stops, seq_len):
    with tempfile.TemporaryDirectory() as folder:
        path, left = write_damaged(folder, kinds)
        data = loader("c4_local", path, 1, infinite=False, skip=True)
        got = bytes(token for token in stream(data) if token < 256)
        assert got == "".join(chain(*left)).encode()
        assert n_skipped(data) == sum(map(bool, kinds))
        whole = loader("c4_local", path, seq_len, skip=True)
        got, part = stopped(lambda: loader("c4_local", path, seq_len, skip=True), *stops, 3)
        assert got == stream(islice(whole, sum(stops) + 3))
        assert n_skipped(part) >= n_skipped(whole)  # a resume reads one document ahead


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_damage_stopped_goes_on_past_it(workers, tmp_path):
    path, _ = write_damaged(tmp_path, [None, "no JSON", "cut short", None])
    args = ("c4_local", path, 16)
    whole = stream(loader(*args, infinite=False, skip=True))
    got, stopped = [], loader(*args, infinite=False, workers=workers)
    with pytest.raises(ValueError, match=r"line 3: not a JSON.*training\.skip_damaged_data") as error:
        for batch in stopped:
            got += stream([batch])
            state = stopped.state_dict()
    [advised] = re.findall(r"torchtitan_ext check-data (\S+);", str(error.value))
    assert text_files(advised) == text_files(str(path))
    resumed = loader(*args, infinite=False, skip=True, workers=workers)
    resumed.load_state_dict(state)
    assert got and got + stream(resumed) == whole


def test_a_source_of_a_mixture_that_begins_with_damage_stops_the_launch(job, tmp_path):
    config, sources = job(), []
    for field, weight in (("text", 1), ("body", 1e-9)):
        file = write_text(tmp_path / f"{field}.jsonl", f'\n{{"{field}": "a document"}}\n')  # after a blank line
        sources.append({"path": str(file), "weight": weight, "dataset": "text"})
    config.training.mixture = sources
    with pytest.raises(ValueError, match=r"body\.jsonl, line 2.*name that in training\.text_field"):
        build_dataloader(1, 0, TOKENIZER, config)


def test_validation_data_is_never_skipped(job, tmp_path):
    path, _ = write_damaged(tmp_path, [None, "no JSON"])
    source = "--validation.dataset=c4_local", f"--validation.dataset_path={path}", "--training.skip_damaged_data"
    config = job(*source, stage="dense")
    with pytest.raises(ValueError, match="validation data must be repaired"):
        list(build_dataloader(1, 0, TOKENIZER, config, infinite=False, section="validation"))


@pytest.mark.slow
@pytest.mark.parametrize("line", [b"no JSON", b""])
def test_a_line_that_is_repaired_moves_no_other(line, tmp_path):
    path, _ = write_damaged(tmp_path, [None, None])
    file = Path(text_files(str(path))[0])
    with_line(line, 1)(file)
    damaged = gzip.decompress(file.read_bytes())
    args = ("c4_local", path, 8)
    epoch = len(list(loader(*args, infinite=False, skip=True)))
    whole = stream(islice(loader(*args, skip=True), epoch))
    for stop in range(1, epoch, 20):
        file.write_bytes(gzip.compress(damaged))
        part, resumed = loader(*args, skip=True), loader(*args, skip=True)
        drawn = stream(islice(part, stop))
        file.write_bytes(gzip.compress(b'{"text": "repaired"}' + damaged.removeprefix(line)))
        resumed.load_state_dict(part.state_dict())
        assert drawn + stream(islice(resumed, epoch - stop)) == whole


def test_every_damage_is_skipped_by_one_rank(tmp_path):
    kinds = [None, "no text", "no UTF-8", "cut in the header", None, "wrong checksum"]
    path, left = write_damaged(tmp_path, kinds)
    for world in (1, 2, 3):
        ranks = [loader("c4_local", path, 1, rank=r, world=world, infinite=False, skip=True) for r in range(world)]
        got = [stream(data) for data in ranks]
        assert sum(tokens.count(EOS) for tokens in got) >= sum(map(len, left)) - world  # odd ones left
        assert sum(map(n_skipped, ranks)) == sum(map(bool, kinds))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_each_damaged_file_is_named_once_with_the_number(workers, tmp_path, capfd):
    path, _ = write_damaged(tmp_path, ["no JSON", None, "cut short"])
    files = text_files(str(path))
    lines_are(lambda data: data + b"no JSON\n" * 7)(Path(files[0]))
    log = [logging.StreamHandler()]  # seen from the worker's process too
    with patch.object(logging.getLogger(), "handlers", log):
        data = loader("c4_local", path, 8, workers=workers, skip=True)
        epoch = len(list(loader("c4_local", path, 8, infinite=False, skip=True)))
        capfd.readouterr()
        list(islice(data, 2 * epoch))
    lines = [line for line in capfd.readouterr().err.splitlines() if ": skipped," in line]
    in_file_2 = f"{files[2]}, after line {N}"
    assert [line.split(": ")[0] for line in lines] == [f"{files[0]}, line 3", in_file_2]
    assert [line.split("number ")[1].split()[0] for line in lines] == ["1", "9"]


def test_a_file_that_cannot_be_read_stops_either_way(tmp_path, monkeypatch):
    path, _ = write_damaged(tmp_path, [None, None])
    file = Path(text_files(str(path))[1])
    data = loader("c4_local", path, 8, infinite=False, skip=True)
    file.unlink()  # or a file system that is gone: skipping would leave out what is intact
    with pytest.raises(ValueError, match=rf"{file}, after line 0: .*No such file"):
        list(data)
    for name, opened, error in (
        (str(file), "open", OSError(5, "Input/output error")),
        ("hf://datasets/me/a.jsonl", "xopen", ConnectionError("no route")),
    ):
        monkeypatch.setattr(datasets, opened, Mock(side_effect=error), raising=False)
        with pytest.raises(ValueError, match=f"after line 0: .*{error.args[-1]}"):
            list(datasets.read_documents(name))


def test_a_data_set_without_an_intact_document_is_named(tmp_path):
    path = write_c4(tmp_path / "empty", [[], []])
    Path(text_files(str(path))[0]).write_bytes(gzip.compress(b"\xef\xbb\xbf\n \n"))  # only blank lines
    with pytest.raises(ValueError, match=rf"training\.dataset_path: '{path}': no document in its 2 files"):
        loader("c4_local", path, 8, world=2)
    path, _ = write_damaged(tmp_path / "damaged", ["no bytes", "no gzip"])
    for skip, words in ((True, r"training\.dataset_path.*no document.*are not damaged"), (False, "0: .*no bytes")):
        with pytest.raises(ValueError, match=words):
            loader("c4_local", path, 8, skip=skip)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 10))
def test_a_long_document_comes_in_pieces(lengths, longest, stop):
    with tempfile.TemporaryDirectory() as folder, patch.object(datasets, "LONGEST_DOCUMENT", longest):
        texts = [("é🗼x" * length)[:length] for length in lengths]
        path = write_c4(Path(folder), [texts])
        got = documents("c4_local", path)
        assert b"".join(got).decode() == "".join(texts)
        assert all(len(piece.decode()) <= longest for piece in got)
        assert len(got) == sum(max(1, -(-length // longest)) for length in lengths)
        checked = check_file(text_files(str(path))[0])
        assert checked.documents == len(lengths)
        assert checked.tokens == sum(len(piece) + 2 for piece in got)

        whole = stream(islice(loader("c4_local", path, 3), stop + 9))
        assert stopped(lambda: loader("c4_local", path, 3), stop, 9)[0] == whole


def draw(rank, folder):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    register()
    data = loader("c4_local", folder, 98304, infinite=False)
    before, start = peak(), time.perf_counter()
    for _ in islice(data, 15):
        pass
    seconds, start = time.perf_counter() - start, time.perf_counter()
    state = data.state_dict()["dp_rank_0"]
    measured = seconds, peak() - before, len(state), time.perf_counter() - start
    (folder / "measured").write_text(json.dumps(measured))


@pytest.mark.slow
def test_a_document_of_200_MB_takes_little_memory_and_little_of_a_checkpoint(tmp_path):
    huge = 200 * 10**6
    (tmp_path / "en").mkdir()
    with gzip.open(tmp_path / "en/c4-train.00000-of-00001.json.gz", "wb", 1) as lines:
        lines.write(b'{"text": "' + b"ten bytes " * (huge // 10) + b'"}\n')
    start_ranks(draw, 1, tmp_path)
    seconds, memory, state, pause = json.loads((tmp_path / "measured").read_text())
    assert memory < 6 * huge  # some 200 times it where all of it is encoded at once
    assert state < 4 * datasets.LONGEST_DOCUMENT and pause < 1
    assert seconds < 60
