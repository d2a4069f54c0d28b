"""A team's own small Llama, tokenizer and text: from a Hugging Face folder through the recipe's stages and back."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, run_command
from helpers.jobs import problems
from helpers.launches import losses, train
from helpers.models import parse
from helpers.streams import write_lines
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torchtitan_ext.evaluate.niah import find_candidate

CONFIGS = "configs/llama3.2-1b-128k"
SMALL = ["--training.seq_len=512", "--training.global_batch_size=2", "--training.mixed_precision_param=float32"]
SMALL += ["--lighthouse.top_k=32", "--lighthouse.tile_winners=8", "--rope.theta=4e6", "--lr_scheduler.warmup_steps=2"]
SMALL += ["--compile.no_enable", "--metrics.log_freq=1", "--checkpoint.interval=2"]
MODEL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
MODEL |= {"intermediate_size": 160, "vocab_size": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Trains a stage of the recipe on what the team has, with the flavor that the check of its folder says to add."""
    monkeypatch.chdir(ROOT)
    text, (bos, eos) = Path(argparse.__file__).read_text(), ("<|begin|>", "<|end|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[bos, eos], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text, " 0 1 2 3 4 5 6 7 8 9" * 99], trainer)  # few digits in it are like the others
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    write_lines(tmp_path / "text.jsonl.zst", [text[i : i + 2000] for i in range(0, len(text), 2000)])
    data = [f"--model.hf_assets_path={tmp_path}/model", f"--training.dataset_path={tmp_path}/text.jsonl.zst"]
    [problem] = problems(parse(f"{CONFIGS}/extend.toml", *SMALL, *data))
    flavor = problem[problem.index("flavors['mine']") :]
    imports = "from torchtitan_ext.model import LighthouseModelArgs, RoPEScalingArgs, flavors"
    (tmp_path / "my_flavor.py").write_text(f"{imports}\n{flavor}\n")
    monkeypatch.syspath_prepend(tmp_path)

    def run(name, stage, steps, *more):
        arguments = [f"--job.config_file={CONFIGS}/{stage}.toml", f"--job.dump_folder={tmp_path / name}", *SMALL, *data]
        arguments += ["--model.flavor=mine", "--experimental.custom_import=my_flavor", f"--training.steps={steps}"]
        good, output = train(1, [*arguments, *more])
        assert good, output
        return tmp_path / name

    return run


@pytest.mark.slow
def test_a_llama_is_extended_and_comes_back(launch, tmp_path, monkeypatch):
    def export(run):
        folder = tmp_path / f"{run.name}_hf"
        assert run_command(monkeypatch, "export", run, "--output", folder) == 0
        return folder

    untrained = export(launch("untrained", "dense", 2, "--optimizer.lr=0"))
    given, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", untrained))
    assert given.keys() == kept.keys() and all(torch.equal(kept[name], given[name]) for name in given)

    whole, resumed = launch("whole", "extend", 4), launch("resumed", "extend", 2)
    launch("resumed", "extend", 4)
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 4
    start = f"--checkpoint.initial_load_path={whole}/checkpoint/step-4"
    finished = launch("finished", "stage2", 6, start)
    config = AutoConfig.from_pretrained(export(finished))
    assert config.max_position_embeddings == 512 and config.rope_parameters["rope_theta"] == 4e6
    llama, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "finished_hf"), torch.arange(1000)[None, :512]
    with torch.no_grad():
        ours = find_candidate(finished).load(torch.device("cpu"), torch.float32)(tokens)
        torch.testing.assert_close(ours, llama(tokens).logits[:, -1], rtol=0, atol=1e-4)
    for evaluated in (finished, tmp_path / "finished_hf"):
        out = tmp_path / "niah" / evaluated.name
        options = ["--contexts", 256, "--depths", 50, "--output", out]
        assert run_command(monkeypatch, "niah", evaluated, *options) == 0
    tables = [json.loads(file.read_text())["cells"] for file in sorted(tmp_path.glob("niah/*/niah.json"))]
    assert len(tables) == 2 and tables[0] == tables[1]
