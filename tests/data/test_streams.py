"""Properties of the byte tokenizer and of the token streams: every byte, once per epoch, exact on resume."""

import os
import pickle
import shutil
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from multiprocessing import Value
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import streams
from helpers.streams import TOKENIZER, WRITE, documents, loader, stream, write_bpe, write_c4, write_sources, write_tree
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_ext.data import dataloader, datasets

MIXED = WRITE | {"mixture": write_sources}

any_text = st.text(st.characters(exclude_categories=["Cs"]))
nasty = st.sampled_from(["<bos>", "<eos>", "<pad>", "<", ">", " ", "\0", "\r\n", "\t", "e\u0301"])
nasty_text = st.lists(any_text | nasty).map("".join)
noise = st.binary().map(lambda data: data.decode("utf-8", errors="replace"))


@settings(max_examples=400)
@given(st.one_of(any_text, nasty_text, noise))
@example("\0\x01\x7f\x85\r\n\n\r  \t \u2028\ufeff\U0010ffff")
@example("<bos><<eos>> <pad>\n<eos>")
def test_ids_are_the_utf8_bytes_and_decode_to_the_text(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.encode(text, add_bos=True, add_eos=True) == [256, *ids, 257]
    assert TOKENIZER.token_to_id("<pad>") == 258 == TOKENIZER.get_vocab_size() - 1
    for skip_special_tokens in (True, False):
        assert TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens) == text


@pytest.mark.parametrize("layout", streams.LAYOUTS)
def test_documents_are_kept_apart_and_can_not_spell_what_does_it(tmp_path, layout):
    plain = write_bpe(tmp_path / "tokenizer", streams.LAYOUTS[layout])
    own = HuggingFaceTokenizer(str(tmp_path / "tokenizer"))
    texts = ["it was 2023", f"{streams.END} it <s>it</s><pad>", f"<{streams.END}", "", "it"]
    got = stream(loader("c4_local", write_c4(tmp_path / "data", [texts]), 1, tokenizer=own, infinite=False))
    begin, end = ([id] if id is not None else [] for id in (own.bos_id, own.eos_id))
    expected = [token for text in texts for token in (*begin, *plain.encode(text).ids, *end)]
    assert begin or end
    assert got == expected[: len(got)] and len(expected) - len(got) < 2


texts = st.lists(st.integers(0, 40).map(lambda n: ("é<bos>text " * n)[:n]), max_size=4)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    dataset=st.sampled_from(list(MIXED)),
    shards=st.lists(texts, min_size=1, max_size=4),
    seq_len=st.integers(1, 30),
    batch_size=st.integers(1, 2),
    world=st.integers(1, 3),
    stops=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    data=st.data(),
)
def test_resumed_stream_is_the_uninterrupted_one(dataset, shards, seq_len, batch_size, world, stops, data):
    rank = data.draw(st.integers(0, world - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = MIXED[dataset](Path(folder, "data"), shards)
        args = (dataset, path, seq_len, batch_size, rank, world)
        try:
            whole = loader(*args)
        except ValueError:  # no document for this rank
            assume(False)
        got, _ = streams.stopped(lambda: loader(*args), *stops, 3)
        assert got == stream(islice(whole, sum(stops) + 3))


SHARDS = [[f"{i}.{j} " * (3 * i + 7 * j) for j in range(5 - i)] for i in range(3)]
TEXTS = list(chain(*SHARDS))


@pytest.mark.parametrize("dataset", MIXED)
@pytest.mark.parametrize("workers, drawn", [(0, 0), (0, 3), (0, 100), (1, 100), (0, 149)])  # an epoch has 75
def test_a_resume_that_draws_nothing_moves_nothing(dataset, workers, drawn, tmp_path):
    path = MIXED[dataset](tmp_path / "data", SHARDS)
    got, _ = streams.stopped(lambda: loader(dataset, path, 8, workers=workers), drawn, 0, 2, 20)
    assert got == stream(islice(loader(dataset, path, 8, workers=workers), drawn + 22))


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (1, 3)])
def test_each_pass_of_map_style_data_comes_in_an_order_of_its_own(world, workers, tmp_path):
    path = write_tree(tmp_path, [[f"{i:02}." for i in range(30)]])  # with its ends, 5 tokens
    args = {"dataset": "python_source", "path": path, "rank": world - 1, "world": world}
    first = documents(*args.values())
    n = len(first)
    drawn = islice(loader(**args, seq_len=4, workers=workers), 3 * n)
    rows = [bytes(streams.tokens(batch)[0][1:-1]) for batch in drawn]
    passes = [rows[:n], rows[n : 2 * n], rows[2 * n :]]
    assert passes[0] == first and len(set(map(tuple, passes))) == 3
    assert all(sorted(texts) == sorted(first) for texts in passes)


def test_a_pass_that_began_in_order_ends_in_order(tmp_path):
    """As in checkpoints from before passes were shuffled."""
    path = write_tree(tmp_path, SHARDS)
    data = loader("python_source", path, 1, infinite=False).dataset
    state = data.state_dict() | {"sample_idx": 7, "token_buffer": []}
    del state["n_passes"]
    data.load_state_dict(state)
    drawn = [token for inputs, label in data for token in (*inputs["input"], *label)]
    rest = b"".join(documents("python_source", path)[7:])
    assert rest and bytes(token for token in drawn if token < 256) == rest


@pytest.mark.parametrize(("global_batch_size", "prefetch_factor", "ready"), [(64, None, 8), (-1, None, 2), (64, 3, 3)])
def test_a_worker_has_the_batches_of_a_step_ready(global_batch_size, prefetch_factor, ready, tmp_path, monkeypatch):
    encoded = Value("i", 0)
    encode = dataloader._OnlyIds.encode

    def encode_and_count(*args):
        encoded.value += 1
        return encode(*args)

    monkeypatch.setattr(dataloader._OnlyIds, "encode", encode_and_count)
    # A document and its two ends are a sequence and its last label, so a batch is two of them.
    args = {"path": write_tree(tmp_path, [["text 7."] * 100]), "seq_len": 8, "batch_size": 2, "world": 4, "workers": 1}
    more = {"global_batch_size": global_batch_size, "prefetch_factor": prefetch_factor}
    batches = iter(loader("python_source", **args, **more))
    deadline = time.monotonic() + 60
    while encoded.value < 2 * ready and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # it stops there
    assert encoded.value == 2 * ready
    del batches


def test_other_threads_run_while_a_document_is_encoded(tmp_path):
    """One of a worker's hands over the batches that are ready."""
    length = datasets.LONGEST_DOCUMENT
    batches = loader("c4_local", write_c4(tmp_path, [["text" * (length // 4)]]), length)
    times = [time.perf_counter()]
    with ThreadPoolExecutor() as threads:
        batch = threads.submit(next, iter(batches))
        while not batch.done():
            time.sleep(1e-3)
            times.append(time.perf_counter())
    assert batch.result() and max(b - a for a, b in pairwise(times)) < (times[-1] - times[0]) / 2


@pytest.mark.parametrize("dataset", WRITE)
def test_an_epoch_of_all_ranks_is_every_document_once_and_needs_no_network_or_cache(dataset, tmp_path, monkeypatch):
    for name in ("socket.getaddrinfo", "socket.socket.connect", "datasets.config.HF_DATASETS_CACHE"):
        monkeypatch.setattr(name, "/dev/null/nothing")  # no function, nor a folder
    path = WRITE[dataset](tmp_path / "data", SHARDS)
    streams.check_dataset(dataset.title(), str(path))  # torchtitan takes capitals too
    streams.check_dataset("c4", None)
    expected = [text.encode() for text in TEXTS]
    for world in (1, 2, 5):
        ranks = [documents(dataset.title(), path, rank, world) for rank in range(world)]
        assert all(ranks) and sorted(chain(*ranks)) == sorted(expected)
    if dataset == "c4_local":  # in order, from the copy's root or from en
        first, *_ = datasets.text_files(str(path))
        held_out = Path(shutil.copy(first, path / "en/c4-validation.00000-of-00001.json.gz"))
        assert documents(dataset, path) == documents(dataset, path / "en") == expected
        assert documents(dataset, held_out) == expected[: len(SHARDS[0])]


@pytest.mark.parametrize(
    "names, read",
    [
        (["train-00000.txt", "test-00000.txt", "validation-00000.txt"], ["train-00000.txt"]),
        (["en/Training/a.txt", "en/dev/a.txt", "notes.txt"], ["en/Training/a.txt", "notes.txt"]),
        (["train/test_1.txt", "trainer.txt", "latest.txt"], ["latest.txt", "train/test_1.txt", "trainer.txt"]),
        (["test.txt", "eval.txt"], ["eval.txt", "test.txt"]),
        (["c4-train.0.json.gz", "c4-validation.0.json.gz", "wiki.txt"], ["c4-train.0.json.gz", "wiki.txt"]),
        (["en/c4-train.0.json.gz", "wiki.txt"], ["en/c4-train.0.json.gz"]),
    ],
)
def test_a_folder_with_files_for_training_is_read_without_those_for_tests(names, read, tmp_path, caplog):
    for name in names:
        streams.write_text(tmp_path / "test" / name, "text")  # the folder's own name doesn't count
    (tmp_path / "test/loop").symlink_to(tmp_path / "test")  # files below two links are read once
    assert datasets.text_files(str(tmp_path / "test")) == [str(tmp_path / "test" / name) for name in read]
    assert ("not read" in caplog.text) == (read != sorted(names))  # nothing is left out in silence


def test_python_source_order_depends_on_the_tree_alone_and_takes_any_file_name(tmp_path):
    here = write_tree(tmp_path / "here", SHARDS)
    there = Path(shutil.copytree(here, tmp_path / "site-packages/.there"))
    for ignored in (".git/a.py", "__pycache__/a.py", "b/site-packages/a.py", "a.so", ".hidden.py"):
        streams.write_text(there / ignored, "not a text of this tree")
    (there / "link.py").symlink_to("package_0/module_0.py")
    Path(os.fsdecode(os.fsencode(there) + b"/caf\xe9.py")).write_text("cafe")

    by_name = {file.relative_to(here).as_posix(): file.read_bytes() for file in here.rglob("*.py")}
    mixed = documents("python_source", here)
    assert sorted(mixed) == sorted(by_name.values())
    elsewhere = documents("python_source", there)
    assert elsewhere.count(b"cafe") == 1 and [text for text in elsewhere if text != b"cafe"] == mixed
    assert mixed != [by_name[name] for name in sorted(by_name)]


def test_python_source_mixes_the_pieces_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PIECE", 10)
    (tmp_path / "large.py").write_bytes(large := bytes(range(32, 127)))
    got = documents("python_source", tmp_path)
    pieces = [large[start : start + 10] for start in range(0, len(large), 10)]
    assert got != pieces and sorted(got) == pieces


def pieces_in_order(path):
    source = DATASETS["python_source"]
    pieces = sorted(source.loader(str(path)), key=lambda piece: piece["start"])
    return [piece["start"] for piece in pieces], map(source.sample_processor, pieces)


@settings(max_examples=100)
@given(
    text=st.text(st.sampled_from("aé漢🗼\ufffd\ufeff"), max_size=40),
    stray=st.lists(st.sampled_from(b"a\x80\xbf\xc3\xe6\xf0\xff"), max_size=20).map(bytes),
    piece=st.sampled_from([4, 8, 12]),
)
def test_python_source_cuts_between_characters(text, stray, piece):
    data = text.encode() + stray
    text = data.decode(errors="replace").removeprefix("\ufeff")
    with tempfile.TemporaryDirectory() as folder, patch.object(datasets, "PIECE", piece):
        Path(folder, "a.txt").write_bytes(data)
        starts, pieces = pieces_in_order(folder)
        assert starts == list(range(0, max(1, len(data)), piece))
        assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("content", "read", "warned"),
    [
        ("\r\n\ufffd<eos>".encode(), "\r\n\ufffd<eos>", False),
        ("text".encode("utf-16"), "", True),
        ("text".encode("utf-16-le"), "", True),
        (b"\x7fELF\x00", "", True),
        ("é".encode("latin-1"), "\ufffd", True),
    ],
)
def test_python_source_names_a_file_that_is_no_text(content, read, warned, tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(content)
    for _ in range(2):
        assert "".join(pieces_in_order(tmp_path)[1]) == read
    assert sum(f"{tmp_path}/a.txt' is not text in UTF-8" in message for message in caplog.messages) == warned


def test_python_source_is_the_standard_library_by_default_and_holds_some_files_out_for_validation():
    whole, in_order, held_out = (DATASETS[name].loader(DATASETS[name].path)["path"] for name in datasets.SOURCE_PARTS)
    train, held_out = set(in_order), set(held_out)
    assert train.isdisjoint(held_out) and train | held_out == set(whole)
    assert 0 < len(held_out) < len(train) / 50
    assert [file for file in whole if file in train] == in_order
    root = sysconfig.get_path("stdlib")
    assert os.fsencode(os.path.join(root, "os.py")) in whole
    assert not any(b"site-packages" in file.removeprefix(os.fsencode(root)) for file in whole)
    streams.check_dataset("python_source", None)


@pytest.mark.parametrize(
    "dataset, path, words",
    [
        ("c5", None, ["validation.dataset = 'c5'", *WRITE]),
        ("c4_local", None, ["validation.dataset_path: '': no file that ends in .parquet", "give a file"]),
        ("text", "training.old", ["validation.dataset_path: '{}/training.old': no file", "give a file"]),
        ("python_source", "missing", ["validation.dataset_path: '{}/missing' is not a folder"]),
        ("python_source", "empty", ["validation.dataset_path: '{}/empty' has no text file", ".py"]),
        ("python_source", "other", ["no text file", "3 other files", ".csv", "docs/data.md"]),
        ("python_source_validation", "empty", ["held out for validation", "more files", ".py"]),
        ("text", "other", ["no file that ends in .parquet", "' doesn't", "docs/data.md"]),
        ("text", "empty", ["no file that ends in .parquet", "(nothing is there; docs/data.md"]),
        ("text", "other/data/1.arrow", ["no file that ends in .parquet", "docs/data.md"]),
    ],
)
def test_a_wrong_data_set_is_named_with_field_value_and_remedy(dataset, path, words, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("data/1.arrow", "data/state.json", ".gitattributes", "a.csv"):
        streams.write_text(tmp_path / "other" / name, name)
    with pytest.raises(ValueError) as error:
        streams.check_dataset(dataset, path and str(tmp_path / path))
    assert not [word for word in words if word.format(tmp_path) not in str(error.value)]


@pytest.mark.parametrize("dataset", WRITE)
def test_a_rank_without_documents_is_refused(dataset, tmp_path):
    path = WRITE[dataset](tmp_path / "data", [["a"], ["b"], []])
    with pytest.raises(ValueError, match=r"training\.dataset = .* rank 2, give at least 3"):
        loader(dataset, path, 8, rank=2, world=3)


def test_a_name_without_a_file_is_refused_before_training(tmp_path):
    last = Path(datasets.text_files(str(write_c4(tmp_path, SHARDS)))[-1])
    for replace in (lambda: (last.unlink(), last.mkdir()), lambda: (last.rmdir(), last.symlink_to("nothing"))):
        replace()
        with pytest.raises(ValueError, match=rf"validation\.dataset_path: .*1 of its files.*{last}"):
            streams.check_dataset("c4_local", str(tmp_path))


def test_a_position_in_other_data_is_refused(tmp_path):
    saved = loader("python_source", write_tree(tmp_path / "saved", SHARDS), 8)
    next(iter(saved))
    for dataset in MIXED:
        other = loader(dataset, MIXED[dataset](tmp_path / dataset, SHARDS[:2]), 8)
        other.load_state_dict(saved.state_dict())
        given = "mixture gives a" if dataset == "mixture" else r"training\.dataset and training\.dataset_path give"
        with pytest.raises(ValueError, match=given):
            next(iter(other))


@pytest.mark.parametrize("dataset", MIXED)
def test_a_state_stays_what_it_was_while_drawing_goes_on(dataset, tmp_path):
    """A worker hands its state to a thread that pickles it when it gets to it."""
    samples = loader(dataset, MIXED[dataset](tmp_path / "data", SHARDS), 8).dataset
    drawn = iter(samples)
    for _ in range(20):
        next(drawn)
        state = samples.state_dict()
        before = pickle.dumps(state)
        next(drawn)
        assert pickle.dumps(state) == before
