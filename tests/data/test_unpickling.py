"""A malicious checkpoint runs no code, wherever the code is hidden, and the error names the file."""

import io
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.jobs import only_problem, save, start_from
from helpers.streams import loader, write_tree
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_ext.data import unpickling
from torchtitan_ext.jobs.resume import complete_metadata
from torchtitan_ext.jobs.rules import check_job


class Hostile:
    """A pickle of this creates `file` when it is loaded, by whichever function `call` is."""

    def __init__(self, file, call):
        self.reduced = {
            "os.mkdir": (os.mkdir, (str(file),)),
            "eval": (eval, (f"__import__('os').mkdir({str(file)!r})",)),
            "Path.mkdir": (getattr, (Path(file), "mkdir")),
            "torch.save": (torch.save, (0, str(file))),
            "DeviceMesh": (DeviceMesh, ("cpu", [0])),  # opens a process group when it is built
        }[call]

    def __reduce__(self):
        return self.reduced


PLACES = {
    "metadata": ".metadata",
    "data position": "dataloader.dp_rank_0",
    "object of torch.save": "dataloader.dp_rank_0",
    "schedule": "lr_scheduler.last_epoch",
    "optimizer": "optimizer.param_groups",
}


def write_hostile(folder, place, hostile):
    """A checkpoint with it, through the writer that torchtitan saves with."""
    path = save(folder)
    if place == "metadata":
        metadata = FileSystemReader(path).read_metadata()
        metadata.planner_data["hostile"] = hostile
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        return path
    key = PLACES[place].split(".")
    saved = _load_state_dict_from_keys(checkpoint_id=path)
    saved.setdefault(key[0], {})[key[1]] = pickle.dumps(hostile) if place == "data position" else hostile
    shutil.rmtree(path)
    dcp.save(saved, checkpoint_id=path, no_dist=True)
    return path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("own", [False, True])
def test_a_hostile_checkpoint_is_refused_by_name(job, tmp_path, place, own):
    path = write_hostile(tmp_path / ("run" if own else "old"), place, Hostile(tmp_path / "ran", "eval"))
    only_problem(job(*(() if own else start_from(path))), path, PLACES[place], "it would call ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("call", ["os.mkdir", "eval", "Path.mkdir", "torch.save", "DeviceMesh"])
@pytest.mark.parametrize("place", PLACES)
def test_nor_does_torch_run_it_where_it_came_after_the_check(tmp_path, place, call):
    ran = tmp_path / "ran"
    path = write_hostile(tmp_path, place, Hostile(ran, call))
    states = {PLACES[place].split(".")[0]: {PLACES[place].split(".")[-1]: None}}
    if place == "data position":
        dcp.load(states, checkpoint_id=path, no_dist=True)
        data = loader("python_source", write_tree(tmp_path / "tree", [["a"]]), 8)
        with pytest.raises(pickle.UnpicklingError, match="would call"):
            data.load_state_dict(states["dataloader"] | {"world_size": 1})
    else:
        with pytest.raises(dcp.CheckpointException, match=r"would call|Weights only load failed|metadata is None"):
            dcp.load(states, checkpoint_id=path, no_dist=True)
    assert not ran.exists() and not torch.distributed.is_initialized()


def test_metadata_of_each_rank_is_refused_too(tmp_path):
    """torch falls back to it where a checkpoint's own is missing."""
    path = write_hostile(tmp_path, "metadata", Hostile(tmp_path / "ran", "os.mkdir"))
    (path / ".metadata").rename(path / "__0.metadata")
    with pytest.raises(dcp.CheckpointException, match="metadata is None"):
        dcp.load({"output.weight": torch.zeros(1)}, checkpoint_id=path, no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_an_excluded_data_position_keeps_no_one_from_the_rest(job, tmp_path):
    start = start_from(write_hostile(tmp_path / "old", "data position", Hostile(tmp_path / "ran", "os.mkdir")))
    check_job(job(*start, "--checkpoint.exclude_from_loading=dataloader"))
    assert not (tmp_path / "ran").exists()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(plain, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_what_it_was(value, protocol):
    assert unpickling.load_plain(pickle.dumps(value, protocol)) == value
    torch.save(value, saved := io.BytesIO(), pickle_protocol=2)
    assert unpickling.load_object(saved.getvalue()) == value


@pytest.mark.parametrize("saved_by", [b"pathlib", b"pathlib._local"], ids=["3.11", "3.13"])
def test_metadata_of_any_python_is_read_as_torch_reads_it(tmp_path, saved_by):
    path = save(tmp_path)
    expected = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(re.sub(rb"pathlib[._a-z]*\n", saved_by + b"\n", pickle.dumps(expected, 2)))
    got = complete_metadata(path)
    got.storage_meta.load_id = None
    assert got == expected
