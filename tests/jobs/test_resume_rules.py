"""A launch loads the right checkpoint completely, or says why not."""

import json
import shutil
from dataclasses import replace
from functools import partial
from queue import Queue
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers.jobs import cut_short, only_problem, put_aside, save, start, start_from
from helpers.streams import write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import LlamaConfig

from torchtitan_ext import model
from torchtitan_ext.jobs.recorded import write_config
from torchtitan_ext.jobs.resume import checkpoint_to_load, complete_metadata, excluded_states
from torchtitan_ext.jobs.rules import check_job, parallel_dims
from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.model.hf_config import computed, llama_config
from torchtitan_ext.train.checkpointer import LighthouseCheckpointManager
from torchtitan_ext.train.trainer import LighthouseTrainer

TRAINING_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
OWN_ROPE = {"rope_theta": 5e5, "rope_scaling": llama_config(flavors["debug"])["rope_scaling"] | {"factor": 32.0}}


@pytest.fixture(params=["initial", "own"])
def launch(request, job, tmp_path):
    """Saves a checkpoint, from which the job starts or which is its own: its path, and the job with overrides."""

    def saved(**options):
        path = save(tmp_path / ("run" if request.param == "own" else "old"), **options)
        return path, partial(job, *(() if request.param == "own" else start_from(path)))

    return saved


def test_a_link_to_a_checkpoint_leads_to_the_record_of_its_run(job, tmp_path):
    (tmp_path / "link").symlink_to(save(tmp_path / "old"))
    write_config(job("--rope.theta=5e5", dump="old"))
    only_problem(job(*start_from(tmp_path / "link")), "rope.theta = 10000", "link has 500000")


def test_tokens_are_counted_on_with_another_data_parallel_degree(job, tmp_path):
    save(tmp_path / "run", degree=4)
    trainer = object.__new__(LighthouseTrainer)
    trainer.job_config = job("--checkpoint.exclude_from_loading=dataloader")
    trainer.parallel_dims = parallel_dims(trainer.job_config, 2)
    trainer.load_state_dict({"step": 10, "ntokens_seen": 8})
    assert trainer.ntokens_seen == 8 * 4 / 2


def test_another_rope_or_flavor_than_the_checkpoints_is_an_error(launch, monkeypatch):
    path, job = launch()
    trained = job("--rope.theta=5e5", "--rope.scaling_factor=8")  # 8 is the flavor's own
    trained.job.dump_folder = str(path.parents[1])
    write_config(trained)
    only_problem(job(), "rope.theta = 10000", f"{path} has 500000", "export")
    check_job(job("--rope.theta=5e5"))
    monkeypatch.setitem(flavors, "eight", replace(flavors["debug"], n_heads=8))  # same shapes
    words = "model.flavor = 'eight'", f"{path} is of 'debug'", "num_attention_heads is 2 there and 8 here"
    only_problem(job("--rope.theta=5e5", "--model.flavor=eight"), *words)


def test_a_dropped_optimizer_or_step_is_an_error(job, tmp_path):
    path = save(tmp_path / "old")
    config = job(f"--checkpoint.initial_load_path={path}", "--checkpoint.initial_load_model_only")
    only_problem(config, "checkpoint.initial_load_model_only = true", "set it to false")
    only_problem(job(*start_from(path), "--checkpoint.load_step=5"), "load_step = 5", f"-1 to start from {path}")
    weights = save(tmp_path / "weights", without=TRAINING_STATE)
    check_job(job(*start_from(weights), f"--checkpoint.exclude_from_loading={','.join(TRAINING_STATE)}"))


@pytest.mark.slow
def test_an_ignored_initial_checkpoint_is_an_error(job, tmp_path):
    old, other = save(tmp_path / "old"), save(tmp_path / "other")
    config, own = job(*start_from(old)), tmp_path / "run" / "checkpoint"
    start(job(*start_from(old), "--checkpoint.load_only"))
    start(config)  # killed before its first checkpoint

    (own / "step-20").mkdir(parents=True)  # killed while its first checkpoint was written
    only_problem(job(*start_from(old), "--checkpoint.load_only"), f"delete {own}")  # which deletes nothing itself
    with patch("os.listdir", side_effect=FileNotFoundError):  # rank 0 is deleting it
        assert checkpoint_to_load(config) == old
    start(config)
    assert checkpoint_to_load(config) == old and not own.exists()  # or torchtitan would ignore the path
    own.mkdir()
    with patch("pathlib.Path.is_mount", return_value=True):  # stays, as do a link and other files
        only_problem(config, f"delete {own}")
    own.symlink_to(own.rename(tmp_path / "linked"))
    only_problem(config, "checkpoint.initial_load_path", old, f"delete {own}")
    (tmp_path / "rival").mkdir()
    (tmp_path / "rival/checkpoint").symlink_to(tmp_path / "linked")
    start(job(dump="rival"))
    assert (tmp_path / "linked.lock").exists()
    (tmp_path / "linked").rmdir()
    only_problem(job(), f"checkpoint.folder = 'checkpoint': {own} links to {tmp_path}/linked, which is not there")
    own.unlink()

    save(tmp_path / "run", step=20)
    start(config)  # continues the run that it started, and the next launch too
    check_job(config)
    only_problem(job(*start_from(other)), other, f"started from {old}", "job.dump_folder")
    only_problem(job(), f"started from {old}", f"set it to {old}")
    for saves_nothing in (["--checkpoint.no_enable"], [*start_from(old), "--checkpoint.load_only"]):
        only_problem(job(*saves_nothing), "job.dump_folder", "this launch saves none", "choose another folder")


def test_a_run_from_scratch_is_not_taken_for_one_with_an_initial_checkpoint(job, tmp_path):
    old = save(tmp_path / "old")
    start(job())
    (tmp_path / "run/checkpoint/export").mkdir(parents=True)
    check_job(job())  # nothing saved yet, so from scratch is right
    only_problem(job("--checkpoint.initial_load_in_hf"), "initial_load_in_hf = true", f"delete {tmp_path}/run/check")
    save(tmp_path / "run", step=20)
    check_job(job())
    only_problem(job(*start_from(old)), old, "started from scratch", "drop the path")
    (tmp_path / "run/config.json").write_text('{"checkpoint": {}}')
    only_problem(job(), "run/config.json is not the job config of a run")


def test_a_run_whose_folder_was_moved_goes_on_as_it_would_have_there(job, tmp_path):
    old, other = save(tmp_path / "outputs/stage1"), save(tmp_path / "other")
    start(job(*start_from(old), dump="outputs/run"))
    save(tmp_path / "outputs/run", step=20)
    (tmp_path / "outputs").rename(tmp_path / "moved")
    for wrong in (start_from(other), ()):
        only_problem(job(*wrong, dump="moved/run"), f"set it to {old} (deleted since, but not read again)")
    check_job(job(*start_from(old), dump="moved/run"))
    start(job(*start_from(tmp_path / "moved/stage1/checkpoint/step-10"), dump="moved/run"))
    save(tmp_path / "outputs/stage1")
    only_problem(job(*start_from(old), dump="moved/run"), f"started from {tmp_path}/moved")


def test_an_exclusion_holds_for_the_start_and_not_for_what_the_run_has_saved_since(job, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "1")
    caplog.set_level("INFO")
    config = partial(job, *start_from(save(tmp_path / "old")), "--checkpoint.exclude_from_loading=optimizer,dataloader")

    def left_out():
        caplog.clear()
        launched = config()
        expected = excluded_states(launched, parallel_dims(launched, 1))
        start(launched)
        assert launched.checkpoint.exclude_from_loading == expected
        return expected

    assert left_out() == ["optimizer", "dataloader"]
    assert left_out() == ["optimizer", "dataloader"]  # killed before its first checkpoint
    assert "own checkpoint" not in caplog.text
    save(tmp_path / "run", step=20)
    assert left_out() == []  # what was started over goes on
    assert "own checkpoint, with dataloader, optimizer; to leave that out, start from" in caplog.text
    save(tmp_path / "run", step=30, degree=2)
    assert left_out() == ["dataloader"]  # which one rank can't use
    assert "own checkpoint, with optimizer" in caplog.text


@pytest.mark.parametrize("saved, world_size, shared", [(1, 2, "tensor"), (4, 2, "context")])
def test_another_data_parallel_degree_is_an_error(launch, monkeypatch, saved, world_size, shared):
    path, job = launch(degree=saved)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    only_problem(job(), f"data-parallel degree = {world_size}", path, f"degree of {saved}")
    check_job(job("--checkpoint.exclude_from_loading=dataloader"))
    monkeypatch.setenv("WORLD_SIZE", str(saved))
    check_job(job(f"--parallelism.data_parallel_replicate_degree={saved}"))
    monkeypatch.setenv("WORLD_SIZE", str(2 * saved))
    check_job(job(f"--parallelism.{shared}_parallel_degree=2"))


def test_what_is_checked_is_the_checkpoint_that_will_be_loaded(job, tmp_path, monkeypatch):
    save(tmp_path / "run", step=10, degree=1)
    later = save(tmp_path / "run", step=20, degree=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    only_problem(job(), "step-20")
    only_problem(job("--checkpoint.load_step=300"), "load_step = 300", "not exist", "from step-20, launch again, with")
    only_problem(job("--checkpoint.load_step=15"), "load_step = 15", "not exist", "from step-20")
    shutil.rmtree(later)
    check_job(job("--checkpoint.load_step=10"))


def test_a_checkpoint_of_another_model_is_an_error(job, tmp_path):
    wider = save(tmp_path / "wider", vocab_size=512)
    only_problem(job(*start_from(wider)), wider, "(2 of ", "[512, 64] there and [384, 64] here")
    deeper = save(tmp_path / "run", n_layers=1)
    only_problem(job(), deeper, "model.flavor = 'debug'", "layers.1.", "is not there")


def test_a_checkpoint_without_its_training_state_is_an_error(launch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for missing in TRAINING_STATE:
        path, job = launch(without=(missing,))
        only_problem(job(), path, f"holds no {missing}")
    save(path.parents[1], step=9)
    only_problem(job(), path, "step-9, put it aside" if path.parents[1].name == "run" else "near it is")


def test_a_seed_checkpoint_is_only_weights_and_must_be_complete(job, tmp_path):
    save(tmp_path / "run", step=0)
    check_job(job("--optimizer.lr=0.1"))  # only weights are loaded
    path = save(tmp_path / "run", step=0, without=TRAINING_STATE)
    check_job(job())
    only_problem(job(*start_from(path), dump="new"), f"{path} holds no ")
    cut_short(path)
    only_problem(job(), path, "not a complete checkpoint")


@pytest.mark.parametrize(
    ("field", "value", "saved"),
    [("name", "SGD", "AdamW"), ("lr", 0.1, 1e-2), ("beta2", 0.99, 0.95), ("eps", 1e-6, 1e-8), ("weight_decay", 0, 0.1)],
)
def test_another_optimizer_than_the_checkpoints_must_be_asked_for(launch, field, value, saved, tmp_path):
    path, job = launch()
    change = f"--optimizer.{field}={value}"
    only_problem(job(change), path, f"optimizer.{field} = {value!r}", repr(saved), "optimizer.override_checkpoint")
    check_job(job(change, "--optimizer.override_checkpoint"))
    for state in ("optimizer", "lr_scheduler") if path.is_relative_to(tmp_path / "old") else ():  # lr is in both
        config = job(change, f"--checkpoint.exclude_from_loading={state}")
        only_problem(config, field) if field == "lr" or state == "lr_scheduler" else check_job(config)


def test_a_rate_that_would_jump_where_a_checkpoint_goes_on_is_refused(job, tmp_path):
    """A dense run that has decayed to its end, a tenth of 20 steps, and one amid its warm-up."""
    own = save(tmp_path / "run", step=19, rate=5e-3)
    dense = partial(job, "--lr_scheduler.decay_ratio=0.1", "--lr_scheduler.warmup_steps=2", stage="dense")
    check_job(dense("--training.steps=20"))
    only_problem(dense("--training.steps=30"), "training.steps = 30", "from 0.005 to 0.01", own, "override_checkpoint")
    check_job(dense("--training.steps=30", "--optimizer.override_checkpoint"))
    save(tmp_path / "early")
    check_job(job(dump="early"))
    only_problem(job("--lr_scheduler.warmup_steps=41", dump="early"), "warmup_steps = 41", "step 10")


def test_more_steps_than_the_checkpoint_has_done_must_be_asked_for(job, tmp_path):
    (latest := tmp_path / "latest").symlink_to(save(tmp_path / "old", step=100))
    for path in (latest, latest.resolve()):
        only_problem(job(*start_from(path), "--training.steps=100"), "training.steps = 100", path)
        check_job(job(*start_from(path), "--training.steps=101"))
    excluded = "--checkpoint.exclude_from_loading=train_state"  # counts from 0
    check_job(job(*start_from(path), "--training.steps=100", excluded))

    own = save(tmp_path / "own", step=100).parent
    check_job(job("--training.steps=100", dump="own"))  # done, and so is its repetition
    only_problem(job("--training.steps=99", dump="own"), "training.steps = 99", own, "step 100")


def test_a_broken_checkpoint_is_named_and_another_is_loaded_when_it_is_put_aside(job, tmp_path):
    older, newer, newest = (save(tmp_path / "run", step=step) for step in (9, 10, 100))
    cut_short(newest)
    size = next(newest.glob("*.distcp")).stat().st_size
    put_aside(only_problem(job(), newest, f"holds {size:,} of {size + 1:,} bytes", f"from {newer.name}, put"))
    check_job(job())
    assert checkpoint_to_load(job()) == newer
    cut_short(newer)
    put_aside(only_problem(job("--checkpoint.load_step=10"), newer, older.name))
    check_job(job())
    assert checkpoint_to_load(job()) == older
    cut_short(older)
    only_problem(job(), older, "holds no other", "choose another job.dump_folder")


def test_what_is_no_complete_checkpoint_to_start_from_is_answered_with_one(job, tmp_path):
    older, newer = (save(tmp_path / "old", step=step) for step in (10, 20))
    next(newer.glob("*.distcp")).unlink()
    only_problem(job(*start_from(newer)), newer, "not a complete checkpoint")
    (newer / ".metadata").unlink()
    remedy = f"near it is {older}: to start from that, set checkpoint.initial_load_path"
    for path, words in ((newer, "not a complete checkpoint"), (tmp_path / "old", ""), (older.parent, "")):
        only_problem(job(*start_from(path)), "checkpoint.initial_load_path", path, words, remedy)
    only_problem(job(*start_from(tmp_path / "gone")), tmp_path / "gone", "does not exist; train it first")
    check_job(job(*start_from(older)))


places = st.floats(0, 1, exclude_max=True)  # of the file


@pytest.mark.slow
@settings(max_examples=60)
@given(cut=places | st.just(1.0), changes=st.dictionaries(places, st.binary(max_size=2), max_size=3))
def test_no_damage_of_metadata_gets_past_the_check_with_another_error(tmp_path_factory, cut, changes):
    path = save(tmp_path_factory.mktemp("run"))
    whole = (path / ".metadata").read_bytes()
    damaged = bytearray(whole)
    for place, replacement in changes.items():
        at = int(place * len(whole))
        damaged[at : at + 1] = replacement
    (path / ".metadata").write_bytes(damaged[: int(cut * len(damaged))])
    try:
        assert complete_metadata(path).state_dict_metadata
    except ValueError as error:
        assert str(path) in str(error)


def test_only_what_is_named_step_n_and_nothing_more_is_a_checkpoint(job, tmp_path):
    folder = save(tmp_path / "run", step=20).parent
    for name in ("step-30.broken", "old-step-30", "step-030", "step-10-hf", "step-", "step-\u0663"):
        write_text(folder / name / ".metadata")
    (folder / "step-40").touch()
    for step in (10, 15, 16):
        save(tmp_path / "run", step=step)
    (folder / "step-16" / ".interrupted").touch()
    start(job())
    assert checkpoint_to_load(job()) == folder / "step-20"

    (folder / "step-10").rename(tmp_path / "archived")
    (folder / "step-10").symlink_to(tmp_path / "archived")
    manager = SimpleNamespace(folder=str(folder), keep_latest_k=2, purge_queue=Queue())
    with patch("torch.distributed.get_rank", return_value=0):
        LighthouseCheckpointManager._purge_stale_checkpoints(manager)
    assert LighthouseCheckpointManager._find_load_step(manager) == 20
    assert [*manager.purge_queue.queue] == [str(folder / f"step-{step}") for step in (10, 16)]
    # Half deleted it doesn't count; torchtitan deletes no link.
    assert (tmp_path / "archived/.metadata").exists() and not (folder / "step-16/.metadata").exists()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["load_step=16", "create_seed_checkpoint"])
def test_no_launch_writes_over_a_checkpoint(job, tmp_path, setting):
    paths = [save(tmp_path / "run", step=step) for step in (12, 16, 20, 24)]
    folder, written = paths[0].parent, paths if "load" not in setting else paths[2:]
    words = setting.replace("=", " = "), *(path.name for path in written), "to go on from step-24, drop that"
    put_aside(only_problem(job(f"--checkpoint.{setting}"), *words))
    assert not any(path.exists() for path in written)
    check_job(job())
    assert checkpoint_to_load(job()) == (folder / "step-16" if "load" in setting else None)
    check_job(job(f"--checkpoint.{setting}"))


def test_what_a_killed_save_left_is_gone_before_the_step_is_saved_again(job, tmp_path):
    folder = save(tmp_path / "run", step=20).parent
    for left in ("__7_0.distcp", ".interrupted", ".metadata.tmp", "sharded/shard-00007.safetensors"):
        write_text(folder / "step-30" / left)
    (folder / "step-40").mkdir()
    (folder / "step-10").symlink_to(folder / "step-40")
    only_problem(job("--checkpoint.load_only"), "this launch saves none")
    assert (folder / "step-40").exists()
    start(job("--checkpoint.load_step=20"))
    assert {path.name for path in folder.iterdir()} == {"step-10", "step-20"}
    (folder / "step-20").rename(folder / "step-50")
    (folder / "step-50/.metadata").rename(folder / "step-50/model.safetensors")
    assert "to go on from" not in only_problem(job(), "load_step = -1", "step-50", "put them aside")  # it can't


def test_only_the_first_rank_records_the_job_and_a_kill_leaves_the_record_before_it(job, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    start(job())
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    start(job("--checkpoint.no_enable"))
    record = (tmp_path / "run/config.json").read_text()
    with patch("pathlib.Path.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        start(job("--debug.seed=2"))
    assert (tmp_path / "run/config.json").read_text() == record


def test_no_checkpoint_rule_binds_a_job_that_keeps_none(job, tmp_path):
    start(config := job("--checkpoint.no_enable", "--checkpoint.last_save_model_only", "--checkpoint.interval=0"))
    assert checkpoint_to_load(config) is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "run.lock"]


def from_hugging_face(folder):
    """The settings of a launch from weights of the debug flavor, which it writes to the folder."""
    state = LighthouseTransformer(flavors["debug"]).state_dict()
    save_file(Llama3StateDictAdapter(flavors["debug"], None).to_hf(state), folder / "model.safetensors")
    return f"--checkpoint.initial_load_path={folder}", "--checkpoint.initial_load_in_hf"


def test_weights_of_hugging_face_must_be_there_whole_and_of_this_model(job, tmp_path):
    start, file, field = from_hugging_face(tmp_path), tmp_path / "model.safetensors", "checkpoint.initial_load_path = "
    only_problem(job("--checkpoint.initial_load_path=gone", start[1]), field, "no *.safetensors")
    only_problem(job(start[1]), "model.hf_assets_path", "no *.safetensors")
    for text in ("", "[]", '{"rope_scaling": "llama3"}', "{}", '{"model_type": "qwen2"}', '{"num_attention_heads": 0}'):
        (tmp_path / "config.json").write_text(text)
        only_problem(job(*start, "--model.flavor=27M"), tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    check_job(job(*start))
    only_problem(job(*start, "--model.flavor=27M"), tmp_path, "model.flavor = '27M'", "[384, 64] there")
    file.write_bytes(file.read_bytes()[:-1])
    only_problem(job(*start), field, file, "can't be read")


def test_weights_of_hugging_face_may_come_in_shards(job, tmp_path):
    """Of whole tensors, as transformers writes, or of rows, as torch does from several ranks."""
    config = job(*from_hugging_face(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    def rows(i):
        starts = {name: {"saved_offsets": [i * ((len(w) + 1) // 2), 0][: w.ndim]} for name, w in state.items()}
        shard = {name: w.tensor_split(2)[i].clone() for name, w in state.items()}
        return shard, {"DCP_SHARDING_INFO": json.dumps(starts)}

    for shard in (lambda i: (dict([*state.items()][i::2]), None), rows):
        for i in range(2):
            tensors, metadata = shard(i)
            save_file(tensors, tmp_path / f"model-0000{i}.safetensors", metadata)
        check_job(config)
    (tmp_path / "model-00000.safetensors").unlink()
    only_problem(config, f"{len(state)} of {len(state)} weights: ", "is not there")


ODD = {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "head_dim": 64, "partial_rotary_factor": 0.5}
ODD |= {"quantization_config": {"quant_method": "fp8"}, "rope_scaling": {"rope_type": "yarn", "factor": 1.0}}
OTHER = {"num_hidden_layers": 3, "rope_scaling": {"type": "linear", "factor": 1.0}, "rms_norm_eps": 1e-6}
OTHER |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True}


@pytest.mark.parametrize("spelling", ["exported", "transformers"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_position_embeddings": 1, "partial_rotary_factor": None}, None),
        (OWN_ROPE, ["rope_theta is 500000.0 there and", "'factor': 32.0", "'factor': 8.0", "flavors['mine'] = "]),
        (OTHER, ["flavors['mine'] = ", "rms_norm_eps is 1e-06 there and", *(f"{name} is " for name in OTHER)]),
        (ODD, ["; no flavor can match it (", *(f"{name} is " for name in ODD)]),
        ({"hidden_size": 112, "intermediate_size": 450, "head_dim": 56}, ["hidden_size is 112", "flavors['mine'] = "]),
    ],
)
def test_hugging_faces_config_must_be_of_the_flavor(job, tmp_path, monkeypatch, changes, words, spelling):
    """In either spelling of RoPE; of another model it comes with the flavor to add."""
    start, config = from_hugging_face(tmp_path), llama_config(flavors["debug"]) | changes
    if spelling == "transformers":
        LlamaConfig(**config).save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if words is None:
        check_job(job(*start))
    else:
        problem = only_problem(job(*start), tmp_path / "config.json", "model.flavor = 'debug'", *words)
        if "flavors['mine'] = " in problem:
            monkeypatch.setitem(flavors, "mine", None)
            exec(problem[problem.index("flavors['mine']") :], vars(model))
            only_problem(job(*start), "set it to 'mine'")
    assert computed({}) == computed(LlamaConfig().to_dict())  # what a config leaves out
    if changes.keys() <= {"rope_theta", "rope_scaling"}:  # on purpose
        check_job(job(*start, "--rope.theta=5e5", "--rope.scaling_factor=4"))
