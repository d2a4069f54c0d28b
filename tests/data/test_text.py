"""Text data of every format, alone and mixed: content, damage, shares of the sources, resume after a kill."""

import logging
import re
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.damage import flip, with_bytes
from helpers.launches import ROOT, SHORT, losses, train
from helpers.streams import WRITE, documents, loader, stream, write_lines, write_parquet, write_sources, write_text

from torchtitan_ext.data import datasets
from torchtitan_ext.data.datasets import read_documents, text_files

TEXTS = [f"é {i} 🗼" * (i + 2) for i in range(9)]


def write(file, **settings):
    (write_parquet if file.suffix == ".parquet" else write_lines)(file, TEXTS, **settings)
    return file


def test_a_file_folder_glob_and_name_on_the_hub_give_the_files_in_order(tmp_path, monkeypatch):
    for name in ("b.parquet", "a[1]/a.jsonl.zst", "a[1]/z.txt/z.txt", ".cache/a.json", "a.md", "dataset_infos.json"):
        write_lines(tmp_path / name, ["text"])
    files = [str(tmp_path / name) for name in ("a[1]/a.jsonl.zst", "a[1]/z.txt/z.txt", "b.parquet")]
    assert text_files(str(tmp_path)) == files
    assert text_files(files[0]) == text_files(f"{tmp_path}/*/*.zst") == files[:1]
    hub = SimpleNamespace(config=SimpleNamespace(data_files={"train": files[:2], "test": files[2:]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", {"me/mine": hub}.__getitem__)
    assert text_files("me/mine") == files[:2]
    with pytest.raises(ValueError, match=r"^'me/other': no file .*KeyError: 'me/other'"):
        text_files("me/other")


def test_a_text_comes_in_pieces_and_keeps_its_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LONGEST_DOCUMENT", 4)
    (tmp_path / "a::b.TXT").write_bytes("\ufeffé\r\n🗼\nab".encode())
    assert documents("text", tmp_path) == ["é\r\n🗼".encode(), b"\nab"]


DAMAGE = {  # to a file of this name: what it does, what the problem says, the documents that are left
    "cut.jsonl.zst": (lambda data: data[:-4], "after line 0: .*ended before the end", 0),
    "corrupt.jsonl.zst": (lambda data: data[:20] + bytes(40) + data[60:], "after line 0: ", 0),
    "empty.jsonl.zst": (lambda data: b"", "after line 0: the file has no bytes", 0),
    "line.jsonl": (lambda data: data.replace(b'{"text"', b'{"test"', 1), "line 1: not a JSON object", len(TEXTS) - 1),
    "cut.parquet": (lambda data: data[:-4], "after row 0: ", 0),
    "page.parquet": (lambda data: flip(data, data.index(TEXTS[6].encode())), "after row 0: .*CRC", 0),
    "latin.txt": (lambda data: b"caf\xe9", "after piece 0: .*can't decode", 0),
    "utf-16.txt": (lambda data: "text".encode("utf-16-le"), "after piece 0: NUL", 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_any_format_stops_a_run_or_is_left_out(name, tmp_path, caplog):
    change, problem, left = DAMAGE[name]
    settings = {"compression": None, "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    file = write(tmp_path / name, **(settings if name.endswith(".parquet") else {}))
    with_bytes(change)(file)
    write(tmp_path / "intact.parquet")
    data = loader("text", tmp_path, 1, infinite=False, skip=True)
    text = bytes(token for token in stream(data) if token < 256).decode()
    assert text in ("".join(TEXTS[-left:] * bool(left)) + "".join(TEXTS), "".join(TEXTS + TEXTS[-left:] * bool(left)))
    assert re.search(f"{file}, {problem}.*: skipped", caplog.text)
    with pytest.raises(ValueError, match=f"{file}, {problem}.*training.text_field.*training.skip_damaged_data"):
        list(loader("text", tmp_path, 1, infinite=False))


def test_a_text_field_that_is_not_there_is_named_with_those_that_are(tmp_path):
    [sample] = read_documents(str(write(tmp_path / "a.parquet")), "content")
    assert "no column 'content' (training.text_field), only number, text" in sample["damage"]


def test_weights_are_the_shares_of_documents_and_the_log_says_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shards = [[f"{i} {j} " * 9 for j in range(50)] for i in range(2)]
    data = loader("mixture", write_sources(tmp_path, shards), 64)
    list(islice(data, 600))
    last = [line for line in caplog.messages if line.startswith("mixture after")][-1]
    n_documents, *shares = re.findall(r"([\d,.]+)(?:%| documents)", last)
    assert int(n_documents.replace(",", "")) >= 512
    assert np.allclose([float(share) for share in shares[::2]], 100 * np.arange(1, 4) / 6, atol=6)
    assert all(name in last for name in WRITE)


@pytest.mark.slow
def test_a_mixture_that_is_killed_twice_trains_the_same_losses_and_is_checked_whole(command, tmp_path):
    for i in range(2):
        write_parquet(tmp_path / f"{i}.parquet", [f"{i} {j} " * 90 for j in range(3)])
        write_lines(tmp_path / f"{i}.jsonl.zst", [f"{i} zst {j} " * 70 for j in range(3)])
    mixture = f"[[training.mixture]]\npath = '{tmp_path}/*.parquet'\nweight = 0.7\n"
    mixture += f"[[training.mixture]]\npath = '{tmp_path}/*.jsonl.zst'\nweight = 0.3\n"
    job = write_text(tmp_path / "job.toml", f"extends = '{ROOT}/configs/text/stage1.toml'\n{mixture}")
    arguments = [f"--job.config_file={job}", *SHORT, "--checkpoint.interval=3", "--training.steps=12"]
    arguments += ["--training.dataloader.num_workers=1", "--experimental.custom_import=helpers.recording_import"]

    def launch(name, kill=0):
        dump = f"--job.dump_folder={tmp_path / name}"
        env = {"RECORDS": str(tmp_path), "KILL_AT_BATCH": str(kill)}
        return train(2, [*arguments, dump], ends_well=not kill, **env)

    _, output = launch("whole")
    assert "mixture after 4 documents" in output and "is being re-looped" in output, output
    for kill in (5, 6, 0):
        launch("killed", kill)
    whole, killed = (losses(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 12 < len(killed) and set(killed) == set(whole)
    assert "4 files, 12 documents" in command("check-data", job, "--training.global_batch_size", 2).out
