"""A team's own small Llama, tokenizer and text: from a Hugging Face folder through the recipe's stages and back."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers.jobs import problems
from helpers.launches import losses, train
from helpers.streams import END, write_bpe, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torchtitan_ext.evaluate.niah import find_candidate
from torchtitan_ext.model import flavors

CONFIGS = "configs/llama3.2-1b-128k"
SMALL = ["--training.seq_len=512", "--training.global_batch_size=2", "--training.mixed_precision_param=float32"]
SMALL += ["--lighthouse.top_k=32", "--lighthouse.tile_winners=8", "--rope.theta=4e6", "--lr_scheduler.warmup_steps=2"]
SMALL += ["--compile.no_enable", "--metrics.log_freq=1", "--checkpoint.interval=2"]
MODEL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
MODEL |= {"intermediate_size": 160, "vocab_size": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}


@pytest.mark.slow
def test_a_llama_is_extended_and_comes_back(command, job, tmp_path, monkeypatch):
    text, given = Path(argparse.__file__).read_text(), tmp_path / "given"
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(given)
    write_bpe(given, {"eos_token": END}, [("Ġ", digit) for digit in "0123456789"])
    write_lines(tmp_path / "text.jsonl.zst", [text[i : i + 2000] for i in range(0, len(text), 2000)])

    common = [*SMALL, f"--model.hf_assets_path={given}", f"--training.dataset_path={tmp_path}/text.jsonl.zst"]
    [problem] = problems(job(*common, file=f"{CONFIGS}/stage1.toml"))
    flavor = problem[problem.index("flavors['mine']") :]
    (tmp_path / "my_flavor.py").write_text(f"from torchtitan_ext.model import *\n{flavor}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flavors, "mine", None)  # so that it goes with this test
    common += ["--model.flavor=mine", "--experimental.custom_import=my_flavor"]

    def launch(name, stage, steps, *more, n_ranks=1):
        files = [f"--job.config_file={CONFIGS}/{stage}.toml", f"--job.dump_folder={tmp_path / name}"]
        train(n_ranks, [*files, *common, f"--training.steps={steps}", *more])
        return tmp_path / name

    def export(trained):
        command("export", trained, "--output", f"{trained}_hf")
        return Path(f"{trained}_hf")

    # three ranks: shards of the two KV heads begin within one
    untrained = export(launch("untrained", "dense", 2, "--optimizer.lr=0", "--training.global_batch_size=3", n_ranks=3))
    before, after = (load_file(folder / "model.safetensors") for folder in (given, untrained))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)

    whole, _, resumed = launch("whole", "stage1", 4), launch("resumed", "stage1", 2), launch("resumed", "stage1", 4)
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 4
    finished = launch("finished", "stage2", 6, f"--checkpoint.initial_load_path={whole}/checkpoint/step-4")
    llama = AutoModelForCausalLM.from_pretrained(export(finished))
    assert (llama.config.max_position_embeddings, llama.config.rope_parameters["rope_theta"]) == (512, 4e6)
    with torch.no_grad():
        ours = find_candidate(finished).load(torch.device("cpu"), torch.float32)(tokens := torch.arange(512)[None])
        torch.testing.assert_close(ours, llama(tokens).logits[:, -1], rtol=0, atol=1e-4)
    cells = []
    for path in (finished, f"{finished}_hf"):
        command("niah", path, "--contexts", 256, "--depths", 50, "--output", f"{path}_niah")
        cells.append(json.loads(Path(f"{path}_niah/niah.json").read_text())["cells"])
    assert cells[0] == cells[1]
