"""The retrieval evaluation: prompts, counting, loading, and that good models score higher than bad ones."""

import json
import math
import os
import re
import string
import sys
from dataclasses import asdict
from itertools import product
from unittest.mock import Mock

import pytest
import torch
from helpers.jobs import save_run
from helpers.models import attentive
from helpers.streams import TOKENIZER, write_bpe
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from torchtitan_ext.data.passkey import QUESTION, needle
from torchtitan_ext.evaluate import niah
from torchtitan_ext.evaluate.export_hf import export, find_checkpoint
from torchtitan_ext.model import flavors

NEEDLE = re.compile(r" The pass key is (\d)\.")
ALPHABET = {*string.ascii_letters, *string.digits}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["bytes", "words", "space"])
def tokenizer(request, tmp_path_factory):
    """Of words: tokens hold several characters, a digit has the space before it, and encode() adds bos itself.
    Space: these, and a space before each text, as Llama 2's adds."""
    if request.param == "bytes":
        return TOKENIZER
    folder = tmp_path_factory.mktemp("words")
    merges = *(("Ġ", digit) for digit in "0123456789"), ("a", "b"), ("i", "s"), ("4", "2")
    write_bpe(folder, {"bos_token": "<s>", "add_bos_token": True}, merges)
    words = HuggingFaceTokenizer(str(folder))
    words.tokenizer.normalizer = normalizers.Prepend(" ") if request.param == "space" else None
    return words


@pytest.mark.parametrize("n_filler", [0, 1, 300, 1000])
def test_a_prompt_is_exact_in_length_and_hides_its_digit_once(tokenizer, n_filler):
    prompts = niah.Prompts(tokenizer)
    context = prompts.shortest + n_filler
    for depth, trial in product(niah.DEPTHS, range(10)):
        tokens = prompts(context, depth, trial, 0)
        assert len(tokens) == context
        assert tokens[0] == tokenizer.bos_id and tokenizer.bos_id not in tokens[1:]
        text = tokenizer.decode(tokens[1:])
        assert NEEDLE.findall(text) == [str(trial)] and needle(str(trial)) in text  # as in training
        assert text.count(QUESTION.rstrip()) == 2
        # what the answer's token would add to the question is the digit
        answered = tokenizer.decode([*tokens[1:], prompts.answers[trial]])
        assert answered.endswith(f"{QUESTION}{trial}")


@pytest.mark.parametrize("context", [64, 301, 1000])
def test_depth_is_the_share_of_the_filler_before_the_needle(context):
    prompts = niah.Prompts(TOKENIZER)
    for depth in niah.DEPTHS:
        text = bytes(prompts(context, depth, 3, 0)[1:]).decode()
        before, after = NEEDLE.split(text)[0], NEEDLE.split(text)[-1].removesuffix(QUESTION)
        filler = before + after
        assert len(filler) == context - prompts.shortest
        assert set(filler) <= ALPHABET and (context < 1000 or set(filler) == ALPHABET)
        assert abs(len(before) - depth / 100 * len(filler)) <= 0.5
        assert (not before) == (depth == 0) and (not after) == (depth == 100)


def test_a_prompt_depends_only_on_seed_context_depth_and_trial(tokenizer):
    cases = list(product((0, 1), (200, 201), (30, 31), (3, 13)))
    first, again = niah.Prompts(tokenizer), niah.Prompts(tokenizer)
    made = {case: first(case[1], case[2], case[3], case[0]) for case in cases}
    for seed, context, depth, trial in reversed(cases):
        assert again(context, depth, trial, seed) == made[seed, context, depth, trial]
    fillers = {NEEDLE.split(tokenizer.decode(tokens[1:]))[0][:20] for tokens in made.values()}
    assert len(fillers) == len(cases)


def test_a_tokenizer_without_bos_gets_none(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "bos_id", None)
    tokens = niah.Prompts(TOKENIZER)(100, 0, 4, 0)
    assert len(tokens) == 100 and bytes(tokens).startswith(b" The pass key is 4.")


def test_a_tokenizer_without_a_token_for_each_digit_is_refused(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "s Ġ"])}
    tokenizer = Tokenizer(models.BPE({**vocab, "sĠ": len(vocab), "sĠ7": len(vocab) + 1}, [("s", "Ġ"), ("sĠ", "7")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for unfit in (tokenizer, Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))):
        unfit.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="one token per digit"):
            niah.Prompts(HuggingFaceTokenizer(str(tmp_path)))


def says(digit_of):
    """A model that answers each prompt, as text, with the digit that `digit_of` gives."""

    def model(tokens):
        assert torch.is_inference_mode_enabled()
        digits = [ord(digit_of(bytes(prompt[1:].tolist()).decode())) for prompt in tokens]
        return torch.nn.functional.one_hot(torch.tensor(digits), 384).float()

    return model


finder = says(lambda text: NEEDLE.search(text)[1])
always_3 = says(lambda text: "3")
# finds the needle among the last 120 tokens, and says 0 where it isn't there
short_sighted = says(lambda text: (NEEDLE.search(text[-120:]) or "00")[1])


def no_digit(tokens):
    """Likes every letter better than any digit, and of these the right one."""
    logits = finder(tokens)
    logits[:, ord("a") :] = 2.0
    return logits


@pytest.mark.parametrize("model, expected", [(finder, 1.0), (no_digit, 1.0), (always_3, 0.1)])
@pytest.mark.parametrize("trials", [10, 30])
def test_who_finds_it_scores_1_and_who_always_says_the_same_exactly_a_tenth(model, expected, trials):
    cells = niah.evaluate(model, niah.Prompts(TOKENIZER), niah.Settings((100, 400), trials=trials))
    assert [(cell.context, cell.depth) for cell in cells] == list(product((100, 400), niah.DEPTHS))
    assert {(cell.correct, len(cell.answers)) for cell in cells} == {(round(expected * trials), trials)}


def test_each_cell_has_its_own_trials():
    cells = niah.evaluate(short_sighted, niah.Prompts(TOKENIZER), niah.Settings((100, 1000)))
    for cell in cells:
        seen = cell.context == 100 or cell.depth == 100
        assert (cell.answers, cell.correct) == (("0123456789", 10) if seen else ("0" * 10, 1))


def test_batch_size_and_order_change_nothing_but_the_batches():
    seen, prompts = [], niah.Prompts(TOKENIZER)

    def model(tokens):
        """Answers that depend on all of a prompt."""
        seen.append(tokens)
        seeds = (tokens * torch.arange(tokens.shape[1])).sum(1).tolist()
        return torch.stack([torch.rand(384, generator=torch.manual_seed(seed)) for seed in seeds])

    expected = niah.evaluate(model, prompts, niah.Settings((64, 100, 81)))
    prompts_seen = {tuple(row.tolist()) for tokens in seen for row in tokens}
    assert len({cell.answers for cell in expected}) > len(expected) / 2
    for batch_size in (7, 1000):
        seen.clear()
        advances = []
        changed = niah.Settings((81, 64, 100), batch_size=batch_size, depths=niah.DEPTHS[::-1])
        got = niah.evaluate(model, prompts, changed, advances.append)
        assert sorted(map(repr, got)) == sorted(map(repr, expected))
        assert {tuple(row.tolist()) for tokens in seen for row in tokens} == prompts_seen
        assert max(map(len, seen)) == min(batch_size, 10)
        assert sum(advances) == sum(tokens.numel() for tokens in seen) == 70 * (64 + 81 + 100)
        assert seen[0].shape[1] == 100  # out of memory shows in the first batch


def test_out_of_memory_and_logits_that_are_no_numbers_are_no_answer():
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    advice = "--batch-size = 8 at context 200: give a smaller --batch-size, or leave it out"
    for wrong, words in ((full, advice), (lambda tokens: finder(tokens) / (1 - finder(tokens)), "not finite")):
        with pytest.raises(ValueError, match=words):
            niah.evaluate(wrong, niah.Prompts(TOKENIZER), niah.Settings((200,), batch_size=8))


@pytest.fixture
def checkpoint(tmp_path):
    return save_run(tmp_path / "run", attentive(seq_len=600), "lighthouse.enable")


@pytest.fixture
def hugging_face(checkpoint, tmp_path):
    export(find_checkpoint(checkpoint), tmp_path / "hf")
    return tmp_path / "hf"


def test_logits_are_the_models_at_the_last_position_and_no_others_are_computed(checkpoint, hugging_face, monkeypatch):
    model, prompts, linear, shapes = attentive(seq_len=600), niah.Prompts(TOKENIZER), torch.nn.functional.linear, []
    tokens = torch.tensor([prompts(600, 50, trial, 0) for trial in range(3)])
    with torch.inference_mode():
        expected = model(tokens)[:, -1]
    recorded = lambda *args: shapes.append((out := linear(*args)).shape) or out  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    for path in (checkpoint, checkpoint.parents[1], hugging_face):
        candidate = niah.find_candidate(path)
        shapes.clear()
        with torch.inference_mode():
            got = candidate.load(CPU, torch.float32)(tokens)
            in_bf16 = candidate.load(CPU, torch.bfloat16)(tokens)
        assert [shape for shape in shapes if shape[-1] == flavors["debug"].vocab_size] == [(3, 1, 384)] * 2
        assert (got - expected).abs().max() < 1e-4
        assert in_bf16.dtype == torch.bfloat16 and 0 < (in_bf16 - got).abs().max() < 0.2 * got.std()
        assert niah.Prompts(candidate.tokenizer)(600, 50, 2, 0) == tokens[2].tolist()
        assert candidate.max_context == 600


def test_the_command_writes_table_records_and_heat_map(command, checkpoint, tmp_path, monkeypatch):
    folder, digits, wrong = tmp_path / "results", "0123456789" * 2, "1234567890" * 2
    right = [2, 6, 10, 14]  # of 20
    cells = [niah.Cell(*x, digits[:n] + wrong[n:]) for x, n in zip(product((37, 600), (0, 50)), right, strict=True)]
    monkeypatch.setattr(niah, "evaluate", lambda *_: cells)
    options = ["--contexts", 37, 600, "--depths", 0, 50, "--trials", 20, "--seed", 7, "--output", folder]
    out, err = command("niah", checkpoint, *options)
    assert (folder / "table.md").read_text().strip() in out and "first stage" in err
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")

    record = json.loads((folder / "niah.json").read_text())
    assert record["checkpoint"] == os.path.relpath(checkpoint) and record["trained_with_lighthouse"]
    assert [record[key] for key in ("contexts", "depths", "trials", "seed")] == [[37, 600], [0, 50], 20, 7]
    assert (record["max_context"], record["dtype"]) == (600, "float32")
    for cell, n, found in zip(cells, right, record["cells"], strict=True):
        assert found == asdict(cell) | {"correct": n, "mean": n / 20}
    assert record["mean"] == 0.4 and record["standard_error"] == math.sqrt(0.4 * 0.6 / 80)

    head, _, *rows = [line.strip("| ") for line in out.splitlines() if line.startswith("|")]
    assert head == "depth | 37 | 600 | mean"
    assert rows == ["0 % | 0.10 | 0.50 | 0.30", "50 % | 0.30 | 0.70 | 0.50", "mean | 0.20 | 0.60 | 0.40"]


def test_contexts_are_the_protocols_that_the_model_was_trained_for(command, tmp_path, monkeypatch):
    path = save_run(tmp_path / "run", attentive(seq_len=5000))
    monkeypatch.setattr(niah, "CONTEXTS", (100, 200, 5001, 9000))
    _, err = command("niah", path, "--depths", 0, "--output", tmp_path / "out")
    assert "left out: contexts 5001, 9000, beyond the 5000 of training" in err
    assert json.loads((tmp_path / "out/niah.json").read_text())["contexts"] == [100, 200]


SPOILED = [  # given the run's checkpoint and its export
    lambda path, hf: ((hf / "tokenizer.json").unlink() or [hf], "put the model's tokenizer.json"),
    lambda path, hf: ((hf / "model.safetensors").unlink() or [hf, "--contexts", 99], "no file named model.safetensors"),
    lambda path, hf: ([path], "600 tokens"),  # no context of the protocol fits
    lambda path, hf: ([path, "--contexts", 100, 601], "601 exceed the context of 600 tokens"),
    lambda path, hf: ([path, "--contexts", 36], "36 hold no question: give 37"),
    lambda path, hf: ([path, "--contexts", 100, "--depths", -1, 101], "-1, 101 are no percentages"),
    lambda path, hf: ([path, "--contexts", 100, "--trials", 15], "--trials: 15 hide some digits more often"),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(command, checkpoint, hugging_face, spoil):
    arguments, reason = spoil(checkpoint, hugging_face)
    _, message = command("niah", *arguments, code=2)
    assert reason in message and "Traceback" not in message


def test_without_transformers_a_hugging_face_folder_asks_for_it(command, checkpoint, hugging_face, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed" in command("niah", hugging_face, code=2).err
    assert niah.find_candidate(checkpoint).max_context == 600
