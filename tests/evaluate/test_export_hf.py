"""The exported model is the trained model: transformers computes, generates and tokenizes as we do."""

import argparse
import json
import re
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import pytest
import torch
from helpers.jobs import cut_short, save_run
from helpers.models import attentive
from helpers.streams import LAYOUTS, TOKENIZER, write_bpe, write_text
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from torchtitan_ext.evaluate.export_hf import export, find_checkpoint
from torchtitan_ext.evaluate.niah import find_candidate
from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.model.hf_config import llama_config


@pytest.fixture(scope="module", params=["debug", "grouped"])
def exported(request, tmp_path_factory):
    """A model of ours beside its Hugging Face folder; `grouped` has 2 query heads a KV head, tied weights, own RoPE."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        grouped = replace(flavors["debug"], n_heads=4, n_kv_heads=2, enable_weight_tying=True)
        monkeypatch.setitem(flavors, "grouped", grouped)
        rope = {"theta": 5e4, "scaling_factor": 32} if request.param == "grouped" else {}
        model = attentive(request.param, seq_len=9000, rope=rope)
        settings = [f"model.flavor={request.param}", *(f"rope.{name}={value}" for name, value in rope.items())]
        export(find_checkpoint(save_run(folder, model, *settings)), folder / "hf")
    hf = folder / "hf"
    return SimpleNamespace(model=model, hf=hf, tokenizer=AutoTokenizer.from_pretrained(hf))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 257, 9000])
@pytest.mark.parametrize("content", ["random", "text"])
def test_logits_are_transformers(exported, length, content):
    if content == "random":
        vocab_size = exported.model.model_args.vocab_size
        tokens = torch.randint(vocab_size, (1, length), generator=torch.manual_seed(length))
    else:
        tokens = exported.tokenizer(Path(argparse.__file__).read_text(), return_tensors="pt").input_ids[:, :length]
    llama = LlamaForCausalLM.from_pretrained(exported.hf)
    assert tokens.shape == (1, length) and llama.config.max_position_embeddings == 9000
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, exported.model(tokens), rtol=0, atol=1e-4)


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
def test_weights_keep_their_values_in_the_dtype_asked_for(command, tmp_path, dtype):
    model, option = attentive(), ["--dtype", dtype] if dtype != "float32" else []  # the default
    path = save_run(tmp_path, model, *([] if option else ["lighthouse.enable"]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n_bytes, file in ((100, rf"{tempfile.gettempdir()}/\w+"), (10**5, f"{tmp_path}/hf/model.safetensors")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
        try:
            _, err = command("export", path, "--output", tmp_path / "hf", *option, code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.search(f"{file} could not be saved: ", err)
    _, err = command("export", path, "--output", tmp_path / "hf", *option)
    assert (f"warning: {path} is from a first stage" in err) == (not option)
    expected = Llama3StateDictAdapter(model.model_args, None).to_hf(model.state_dict())
    got, dtype = load_file(tmp_path / "hf" / "model.safetensors"), getattr(torch, dtype)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == dtype and torch.equal(got[key], value.to(dtype)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("<bos><<eos>> <pad>\n e\u0301 \r\n\0 don 't")
def test_the_tokenizer_begins_with_bos_and_gives_the_text_back(exported, text):
    ids = exported.tokenizer(text).input_ids
    assert ids == TOKENIZER.encode(text, add_bos=True, add_eos=False)
    assert exported.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GPT2Tokenizer", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_users_tokenizer_leaves_as_it_trained(tmp_path, layout, tokenizer_class):
    named = {"tokenizer_class": tokenizer_class, "chat_template": "{{ messages }}"} if tokenizer_class else {}
    write_bpe(tmp_path / "tokenizer", LAYOUTS[layout] | named)
    if not tokenizer_class:
        (tmp_path / "tokenizer/chat_template.jinja").write_text("{{ messages }}")
    path = save_run(tmp_path, attentive(), f"model.hf_assets_path={tmp_path}/tokenizer")
    export(find_checkpoint(path), tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = HuggingFaceTokenizer(str(tmp_path / "tokenizer"))
    for text in ("In 2023 it was", "  it\n\tit  20", "é 漢字 'll <|x|>"):
        ids = exported(text).input_ids
        assert ids == own.encode(text, add_bos=True, add_eos=False)
        assert exported.decode(ids, skip_special_tokens=True) == text
    assert exported.chat_template == "{{ messages }}"
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "hf/tokenizer_config.json").read_text()  # of every version
    named = [LAYOUTS[layout].get(f"{name}_token") for name in ("bos", "eos")]
    assert [exported.bos_token, exported.eos_token] == named
    llama = LlamaConfig.from_pretrained(tmp_path / "hf")
    assert [llama.bos_token_id, llama.eos_token_id] == [name and own.token_to_id(name) for name in named]


def test_an_environment_without_transformers_exports(command, tmp_path, monkeypatch):
    path = save_run(tmp_path, attentive())
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if re.match(r"torchtitan_ext\.(evaluate|cli)|transformers\.", name)]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "transformers", None)
        _, err = command("export", path, "--output", tmp_path / "hf")
    assert re.fullmatch(r"[1-9]\d*\.\d+ [kMG]B read and written  100%, left 0:00:00\n", err)
    LlamaForCausalLM.from_pretrained(tmp_path / "hf")


def test_a_dump_folder_stands_for_its_newest_complete_step(tmp_path):
    for step in (9, 10, 11):
        path = save_run(tmp_path, attentive(), step=step)
    (path / ".metadata").unlink()  # saved last: step 11 is not complete
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint" / "step-10"
    (tmp_path / "checkpoint").rename(tmp_path / "scratch")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "scratch")
    assert find_candidate(tmp_path / "checkpoint/step-9").load
    assert find_candidate(tmp_path).name == f"{tmp_path.parent.name}-{tmp_path.name}-step-10"


@pytest.mark.parametrize("spoil", [rmtree, lambda path: next(path.glob("*.distcp")).write_bytes(bytes(10**6))])
def test_a_checkpoint_that_is_deleted_or_damaged_while_it_is_read_is_named(tmp_path, spoil):
    checkpoint = find_checkpoint(save_run(tmp_path, attentive()))
    with pytest.raises(ValueError, match=f"{checkpoint.path} could not be read: "):
        checkpoint.load_state(torch.float32, lambda n_bytes: spoil(checkpoint.path))


def changed(setting, value):
    def change(run):
        section, field = setting.split(".")
        job = json.loads((run / "config.json").read_text())
        job[section][field] = value
        (run / "config.json").write_text(json.dumps(job))

    return change


def another_tokenizer(run):
    """torchtitan doesn't read this field, transformers does."""
    write_bpe(run / "own", {"eos_token": "</s>", "additional_special_tokens": ["was"]})
    changed("model.hf_assets_path", str(run / "own"))(run)


STEP, INCOMPLETE = "checkpoint/step-3", "{path} is not a complete checkpoint"
# what is done to a run's folder or to a setting of its job, what of it is exported, the reason and the remedy given
SPOILED = {
    "no checkpoint": (lambda run: rmtree(run / "checkpoint"), ".", "no complete checkpoint", "checkpoint.interval"),
    "not there": (lambda run: None, "checkpoint/step-4", INCOMPLETE, "or its run's folder"),
    "no metadata": (lambda run: (run / STEP / ".metadata").unlink(), STEP, INCOMPLETE, "or its run's folder"),
    "cut short": (lambda run: cut_short(run / STEP), STEP, INCOMPLETE, "restore it"),
    "no job": (lambda run: (run / "config.json").unlink(), STEP, "config.json: No such file", "give one that exists"),
    "another config": (lambda run: (run / "config.json").write_text("{}"), ".", "not the job config", "restore"),
    "unknown flavor": (changed("model.flavor", "7B"), ".", "model.flavor = '7B'", ", ".join(flavors)),
    "wrong flavor": (changed("model.flavor", "270M"), ".", "no model of flavor '270M'", "correct model.flavor"),
    "no tokenizer": (changed("model.hf_assets_path", "gone"), ".", "hf_assets_path = 'gone'", "correct the path"),
    "no extension": (changed("experimental.custom_import", "gone"), ".", "custom_import = 'gone' in ", "call from the"),
    "another tokenizer": (another_tokenizer, ".", 'transformers would encode "In 2023 it was', "compare the tokens"),
    "full folder": (lambda run: write_text(run / "hf/mine"), ".", "exists and is not empty", "name another folder"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_cannot_be_exported_is_refused_in_a_sentence(command, tmp_path, kind):
    spoil, place, reason, remedy = SPOILED[kind]
    save_run(tmp_path, attentive())
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    _, message = command("export", tmp_path / place, "--output", tmp_path / "hf", code=2)
    assert message.count("\n") == 1 and "Traceback" not in message
    assert reason.format(path=tmp_path / place) in message and remedy in message
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written
