"""What is exported is the trained model: transformers computes, generates and tokenizes as we do."""

import argparse
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.checkpoints import build, save_run
from helpers.commands import run_command
from helpers.jobs import cut_short
from helpers.launches import SHORT, train
from helpers.streams import LAYOUTS, TOKENIZER, write_bpe
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from torchtitan_ext.evaluate.export_hf import export, find_checkpoint
from torchtitan_ext.evaluate.niah import find_candidate
from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.model.hf_config import llama_config

TEXT = Path(argparse.__file__).read_text()
TOLERANCE = 1e-4  # largest absolute difference of two logits, fp32

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module", params=["debug", "grouped"])
def exported(request, tmp_path_factory):
    """A model of ours beside its Hugging Face folder; `grouped` has 2 query heads a KV head, tied weights, own RoPE."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        grouped = replace(flavors["debug"], n_heads=4, n_kv_heads=2, enable_weight_tying=True)
        monkeypatch.setitem(flavors, "grouped", grouped)
        rope = {"theta": 5e4, "scaling_factor": 32} if request.param == "grouped" else {}
        model = build(request.param, seq_len=9000, rope=rope)
        export(find_checkpoint(save_run(folder, model, flavor=request.param, rope=rope)), folder / "hf")
    hf = folder / "hf"
    return SimpleNamespace(model=model, hf=hf, tokenizer=AutoTokenizer.from_pretrained(hf))


@torch.no_grad()
def largest_difference(ours, llama, tokens):
    """Of the two models' logits."""
    a, b = ours(tokens), llama(tokens).logits
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 257, 9000])
@pytest.mark.parametrize("content", ["random", "text"])
def test_logits_are_transformers(exported, length, content):
    if content == "random":
        vocab_size = exported.model.model_args.vocab_size
        tokens = torch.randint(vocab_size, (1, length), generator=torch.manual_seed(length))
    else:
        tokens = exported.tokenizer(TEXT, return_tensors="pt").input_ids[:, :length]
    assert tokens.shape == (1, length)
    assert largest_difference(exported.model, LlamaForCausalLM.from_pretrained(exported.hf), tokens) < TOLERANCE


def test_logits_would_show_rope_without_its_scaling(exported):
    tokens = torch.randint(384, (1, 3000), generator=torch.manual_seed(0))
    config = LlamaConfig.from_pretrained(exported.hf)
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    assert config.max_position_embeddings == exported.model.model_args.max_seq_len
    llama = LlamaForCausalLM.from_pretrained(exported.hf, config=config)
    assert largest_difference(exported.model, llama, tokens) > 100 * TOLERANCE


@pytest.mark.parametrize("flavor", flavors)
def test_every_flavor_has_the_tensors_of_its_llama(flavor):
    args = flavors[flavor]
    with torch.device("meta"):
        expected = LlamaForCausalLM(LlamaConfig(**llama_config(args))).state_dict()
        got = LighthouseTransformer(args).state_dict()
    if args.enable_weight_tying:
        del expected["lm_head.weight"]  # which is not in their files
    got = Llama3StateDictAdapter(args, None).to_hf(got)
    assert {key: t.shape for key, t in got.items()} == {key: t.shape for key, t in expected.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_keep_their_values_in_the_dtype_asked_for(tmp_path, monkeypatch, dtype):
    model, option = build(), ["--dtype", dtype] if dtype != "float32" else []  # the default
    path = save_run(tmp_path, model)
    assert run_command(monkeypatch, "export", path, "--output", tmp_path / "hf", *option) == 0
    expected = Llama3StateDictAdapter(model.model_args, None).to_hf(model.state_dict())
    got, dtype = load_file(tmp_path / "hf" / "model.safetensors"), getattr(torch, dtype)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == dtype and torch.equal(got[key], value.to(dtype)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("<bos><<eos>> <pad>\n e\u0301 \r\n\0 don 't")
def test_the_tokenizer_begins_with_bos_and_gives_the_text_back(exported, text):
    ids = exported.tokenizer(text).input_ids
    assert ids == TOKENIZER.encode(text, add_bos=True, add_eos=False)
    assert exported.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GPT2Tokenizer", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_users_tokenizer_leaves_as_it_trained(tmp_path, layout, tokenizer_class):
    config = LAYOUTS[layout] | {"chat_template": "{{ messages }}"}
    if tokenizer_class:
        config["tokenizer_class"] = tokenizer_class
    write_bpe(tmp_path / "tokenizer", config)
    path = save_run(tmp_path, build())
    changed_job(path, "model", "hf_assets_path", str(tmp_path / "tokenizer"))
    export(find_checkpoint(path), tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = HuggingFaceTokenizer(str(tmp_path / "tokenizer"))
    for text in ("In 2023 it was", "  it\n\tit  20", "é 漢字 'll <|x|>"):
        ids = exported(text).input_ids
        assert ids == own.encode(text, add_bos=True, add_eos=False)
        assert exported.decode(ids, skip_special_tokens=True) == text
    assert exported.chat_template == config["chat_template"]
    named = [LAYOUTS[layout].get(f"{name}_token") for name in ("bos", "eos")]
    assert [exported.bos_token, exported.eos_token] == named
    llama = LlamaConfig.from_pretrained(tmp_path / "hf")
    assert [llama.bos_token_id, llama.eos_token_id] == [name and own.token_to_id(name) for name in named]


@pytest.mark.slow
def test_a_lighthouse_trained_model_finished_densely_leaves_as_a_llama(tmp_path, monkeypatch, capsys):
    """Two steps with Lighthouse, exported with a warning, two more under dense attention, exported without."""
    first, start = tmp_path / "stage1/checkpoint/step-2", []
    for stage, steps in (("stage1", 2), ("stage2", 4)):
        arguments = [f"--job.config_file=configs/text/{stage}.toml", f"--job.dump_folder={tmp_path / stage}"]
        good, output = train(1, [*arguments, *SHORT, "--checkpoint.interval=2", f"--training.steps={steps}", *start])
        assert good, output
        assert run_command(monkeypatch, "export", tmp_path / stage, "--output", tmp_path / f"{stage}_hf") == 0
        warned = f"warning: {first} is of a first stage" in capsys.readouterr().err
        assert warned == (stage == "stage1")
        start = [f"--checkpoint.initial_load_path={first}"]

    model = build("debug", seq_len=256)
    dcp.load(model.state_dict(), checkpoint_id=tmp_path / "stage2/checkpoint/step-4", no_dist=True)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "stage2_hf")
    assert type(llama) is LlamaForCausalLM
    tokens = AutoTokenizer.from_pretrained(tmp_path / "stage2_hf")(TEXT, return_tensors="pt").input_ids[:, :256]
    assert largest_difference(model, llama, tokens) < TOLERANCE

    prompt = tokens[:, :100]
    generated = llama.generate(prompt, do_sample=False, max_new_tokens=20)
    new = generated[0, prompt.shape[1] :]
    assert len(new) == 20 or new[-1] == TOKENIZER.eos_id
    # greedy: each token is the one that our own model finds likeliest after those before it
    assert torch.equal(model(generated)[0, prompt.shape[1] - 1 : -1].argmax(-1), new)


def test_an_environment_without_transformers_exports(tmp_path, monkeypatch, capsys):
    path = save_run(tmp_path, build())
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if re.match(r"torchtitan_ext\.(evaluate|cli)|transformers\.", name)]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "transformers", None)
        assert run_command(patch, "export", path, "--output", tmp_path / "hf") == 0
    assert re.fullmatch(r"[1-9]\d*\.\d+ [kMG]B read and written  100%, left 0:00:00\n", capsys.readouterr().err)
    LlamaForCausalLM.from_pretrained(tmp_path / "hf")


def save_last_in_hf(dump_folder, model):
    """What torchtitan leaves as step 12 under checkpoint.last_save_in_hf."""
    path = dump_folder / "checkpoint" / "step-12"
    adapter = Llama3StateDictAdapter(model.model_args, None)
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    dcp.save(adapter.to_hf(model.state_dict()), storage_writer=writer, no_dist=True)
    return path


def test_a_dump_folder_stands_for_its_newest_complete_step_in_either_format(tmp_path):
    older, newest = build(), build()
    newest.output.weight.data += 1
    for step in (9, 10, 11):
        path = save_run(tmp_path, older, step=step)
    (path / ".metadata").unlink()  # saved last: step 11 is not complete
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint" / "step-10"
    path = save_last_in_hf(tmp_path, newest)
    for found in map(find_checkpoint, (tmp_path, path)):
        assert found.path == path
        for dtype in (torch.float32, torch.bfloat16):
            state, expected = found.load_state(dtype), newest.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key].to(dtype)) for key in state)
    assert find_candidate(tmp_path).name == f"{tmp_path.name}-step-12"


def cut_short_in_hf(path):
    cut_short(save_last_in_hf(path.parents[1], build()), "*.safetensors")


def job_of(path):
    return path.parents[1] / "config.json"


def changed_job(path, section, field, value):
    changed = {"experimental": {}} | json.loads(job_of(path).read_text())
    changed[section][field] = value
    job_of(path).write_text(json.dumps(changed))


def another_tokenizer(path):
    """torchtitan doesn't read this field, transformers does."""
    write_bpe(path.parents[1] / "own", {"eos_token": "</s>", "additional_special_tokens": ["was"]})
    changed_job(path, "model", "hf_assets_path", str(path.parents[1] / "own"))


def job(*change):
    return lambda path: changed_job(path, *change)


STEP, INCOMPLETE = "checkpoint/step-3", "{path} is not a complete checkpoint"
# what is done to a run's step-3, what of the run is exported, and the reason and the remedy given
SPOILED = {
    "no checkpoint": (lambda path: shutil.rmtree(path.parent), ".", "no complete checkpoint", "checkpoint.interval"),
    "not there": (lambda path: None, "checkpoint/step-4", INCOMPLETE, "or its run's folder"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), STEP, INCOMPLETE, "or its run's folder"),
    "cut short": (cut_short, STEP, INCOMPLETE, "restore it"),
    "cut short in HF": (cut_short_in_hf, "checkpoint/step-12", INCOMPLETE, "restore it"),
    "no job": (lambda path: job_of(path).unlink(), STEP, "config.json: No such file", "give one that exists"),
    "another config": (lambda path: job_of(path).write_text("{}"), ".", "not the job config", "restore"),
    "unknown flavor": (job("model", "flavor", "7B"), ".", "model.flavor = '7B'", ", ".join(flavors)),
    "wrong flavor": (job("model", "flavor", "270M"), ".", "no model of flavor '270M'", "correct model.flavor"),
    "no tokenizer": (job("model", "hf_assets_path", "gone"), ".", "hf_assets_path = 'gone'", "correct the path"),
    "no extension": (job("experimental", "custom_import", "gone"), ".", "custom_import = 'gone' in ", "call from the"),
    "another tokenizer": (another_tokenizer, ".", 'transformers would encode "In 2023 it was', "look at the tokens"),
    "full folder": (lambda path: None, ".", "exists and is not empty", "name another folder"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, kind):
    spoil, place, reason, remedy = SPOILED[kind]
    spoil(save_run(tmp_path, build()))
    if kind == "full folder":
        (tmp_path / "hf/mine").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(monkeypatch, "export", tmp_path / place, "--output", tmp_path / "hf") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    assert reason.format(path=tmp_path / place) in message and remedy in message
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written
