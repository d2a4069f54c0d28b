"""Measure needle-in-a-haystack retrieval: a digit hidden in a context is asked for at the end.

Protocol (the retrieval experiment of the paper). A prompt is

    <bos> filler[:a] needle filler[a:] question

with the needle " The pass key is 7.", the question " The pass key is " and 62 equally likely letters and digits,
without spaces, as filler. The prompt has exactly `context` tokens of the model's own tokenizer, and a is `depth`
percent of the filler. The question's tokens are the common prefix of " The pass key is 0" to "... 9"; each answer is
one more token.

The answer is the likeliest of these ten tokens, always under dense attention. Trial t asks for the digit t mod 10, and
trials come in tens: a constant answer scores exactly 0.1. A prompt depends only on seed, context, depth and trial.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from torchtitan_ext.data.passkey import FILLER, QUESTION, encode, needle, question_and_answers
from torchtitan_ext.data.tokenizer import load_tokenizer
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.jobs.recorded import CONFIG_FILE
from torchtitan_ext.model import LighthouseTransformer

from .export_hf import Advance, find_checkpoint

DEPTHS = (0, 15, 30, 50, 70, 85, 100)  # percent
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 98304)  # tokens

# [B, N] tokens, int64, on the CPU -> [B, vocab_size] logits of the token that follows the last
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate; `load` reads its weights."""

    path: Path
    name: str  # names the folder of the results
    tokenizer: HuggingFaceTokenizer
    max_context: int  # tokens that it was trained for
    lighthouse: bool  # whether its run trained with Lighthouse
    load: Callable[[torch.device, torch.dtype], Logits]


def find_candidate(path: Path) -> Candidate:
    """The checkpoint at `path`: torchtitan's, as for `find_checkpoint`, or a Hugging Face folder. Raises ValueError if
    there is none, or a part is missing."""
    path = path.absolute()
    config_file = path / CONFIG_FILE  # a run has one too
    if config_file.is_file() and '"model_type"' in config_file.read_text():
        return _hugging_face(path)
    checkpoint = find_checkpoint(path)
    path, args = checkpoint.path, checkpoint.model_args

    def load(device: torch.device, dtype: torch.dtype) -> Logits:
        with torch.device(device):
            model = LighthouseTransformer(args)
        state = {key: value.to(device) for key, value in checkpoint.load_state(dtype).items()}
        # assign gives parameters `dtype`, while RoPE's table keeps its own.
        model.load_state_dict(state, assign=True)
        # Logits only at the last position: a long context's would be the largest tensor by far.
        model.output.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, -1:],))
        return lambda tokens: model(tokens.to(device))[:, -1]

    name = "-".join(part.name for part in (path.parents[2], path.parents[1], path))
    return Candidate(path, name, checkpoint.tokenizer, args.max_seq_len, checkpoint.lighthouse, load)


def _hugging_face(path: Path) -> Candidate:
    tokenizer = load_tokenizer(path, str(path), "put the model's tokenizer.json beside its weights")
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(device: torch.device, dtype: torch.dtype) -> Logits:
        settings = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        torch.nn.Module.to(model, device)
        return lambda tokens: model(tokens.to(device), use_cache=False, logits_to_keep=1).logits[:, -1]

    max_context = AutoConfig.from_pretrained(path).max_position_embeddings
    return Candidate(path, path.name, tokenizer, max_context, False, load)


class Prompts:
    """Builds prompts in a tokenizer's tokens. Raises ValueError if a digit after the question is not one token.

    answers: ids of the ten digits' tokens. shortest: tokens of a prompt without filler.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._question, self.answers = question_and_answers(tokenizer)
        self._needle_end = encode(tokenizer, needle("").removeprefix(QUESTION))
        self.shortest = len(self._start) + 2 * len(self._question) + 1 + len(self._needle_end)

    def __call__(self, context: int, depth: int, trial: int, seed: int) -> list[int]:
        """The prompt's `context` tokens; `context` must be at least `shortest`."""
        rng = random.Random(f"{seed} {context} {depth} {trial}")
        n_filler = context - self.shortest
        filler: list[int] = []
        while len(filler) < n_filler:  # at most one token per character
            filler += encode(self._tokenizer, "".join(rng.choices(FILLER, k=n_filler - len(filler))))
        at = round(n_filler * depth / 100)
        hidden = [*self._question, self.answers[trial % 10], *self._needle_end]
        return [*self._start, *filler[:at], *hidden, *filler[at:], *self._question]


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation: contexts in tokens, depths in percent of the filler, trials per context and depth."""

    contexts: tuple[int, ...]
    depths: tuple[int, ...] = DEPTHS
    trials: int = 10
    seed: int = 0
    batch_size: int = 10

    def check(self, prompts: Prompts, candidate: Candidate) -> None:
        """Raises ValueError for settings that can't be evaluated."""
        longest, shortest = candidate.max_context, prompts.shortest
        trained = f"context of {longest} tokens that {candidate.path} was trained for"
        if not self.contexts:
            raise ValueError(f"the {trained} is below all of {', '.join(map(str, CONTEXTS))}: give --contexts")
        for option, wrong, reason in (
            ("contexts", [n for n in self.contexts if n > longest], f"exceed the {trained}: leave them out"),
            ("contexts", [n for n in self.contexts if n < shortest], f"hold no question: give {shortest} or more"),
            ("depths", [depth for depth in self.depths if not 0 <= depth <= 100], "are no percentages: give 0 to 100"),
            ("trials", [self.trials] * (self.trials % 10 > 0), "hide some digits more often: give a multiple of 10"),
        ):
            if wrong:
                raise ValueError(f"--{option}: {', '.join(map(str, wrong))} {reason}")


@dataclass(frozen=True)
class Cell:
    """The trials of a context and a depth; answers: the model's digits, in the trials' order."""

    context: int
    depth: int
    answers: str

    @property
    def correct(self) -> int:
        return sum(int(answer) == trial % 10 for trial, answer in enumerate(self.answers))


@torch.inference_mode()
def evaluate(
    logits: Logits, prompts: Prompts, settings: Settings, advance: Advance = lambda n_tokens: None
) -> list[Cell]:
    """All cells, in the order of the settings' contexts and depths. `advance` gets the tokens of each batch. Raises
    ValueError if a batch exceeds the device's memory, or logits aren't finite."""
    cells = {}
    # Longest first, so that running out of memory shows at once.
    for context, depth in product(sorted(settings.contexts, reverse=True), settings.depths):
        answers = ""
        for start in range(0, settings.trials, settings.batch_size):
            trials = range(settings.trials)[start : start + settings.batch_size]
            tokens = torch.tensor([prompts(context, depth, trial, settings.seed) for trial in trials])
            try:
                digit_logits = logits(tokens)[:, prompts.answers]  # [B, 10]
            except torch.OutOfMemoryError as error:
                reason = f"out of memory with --batch-size = {settings.batch_size} at context {context}"
                raise ValueError(f"{reason}: give a smaller --batch-size, or leave it out of --contexts") from error
            if not digit_logits.isfinite().all():
                reason = "its training diverged, or the checkpoint is damaged"
                raise ValueError(f"the model's logits at context {context} are not finite: {reason}")
            answers += "".join(map(str, digit_logits.argmax(-1).tolist()))
            advance(tokens.numel())
        cells[context, depth] = Cell(context, depth, answers)
    return [cells[place] for place in product(settings.contexts, settings.depths)]


def write(
    folder: Path, candidate: Candidate, settings: Settings, cells: Sequence[Cell], dtype: torch.dtype
) -> tuple[str, list[Path]]:
    """Write table.md, niah.json and heatmap.png to `folder`; return the table and the paths."""
    n_trials = len(cells) * settings.trials
    mean = sum(cell.correct for cell in cells) / n_trials
    error = math.sqrt(mean * (1 - mean) / n_trials)
    name, precision = os.path.relpath(candidate.path), str(dtype).removeprefix("torch.")
    shares = np.array([cell.correct / settings.trials for cell in cells]).reshape(len(settings.contexts), -1).T
    record = {
        "checkpoint": name,
        "trained_with_lighthouse": candidate.lighthouse,
        "max_context": candidate.max_context,
        "dtype": precision,
        **asdict(settings),
        "mean": mean,
        "standard_error": error,
        "cells": [asdict(cell) | {"correct": cell.correct, "mean": cell.correct / settings.trials} for cell in cells],
    }
    titles = [*(f"{depth} %" for depth in settings.depths), "mean"]
    means = np.vstack([np.column_stack([shares, shares.mean(1)]), [*shares.mean(0), mean]])
    body = [[title, *map("{:.2f}".format, row)] for title, row in zip(titles, means, strict=True)]
    how = f"{settings.trials} trials per cell, seed {settings.seed}, {precision}. Context in tokens; chance is 0.1."
    text = f"Retrieval under dense attention, {name}: mean {mean:.3f} ± {error:.3f} (standard error), {how}\n\n"
    head = ["depth", *(f"{context:,}" for context in settings.contexts), "mean"]
    text += markdown_table(head, body, "r" * len(head)) + "\n"

    paths = [folder / file for file in ("table.md", "niah.json", "heatmap.png")]
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(record, indent=2) + "\n")
    title = f"{candidate.name}, dense attention, {precision}\nmean {mean:.3f}"
    draw(shares, settings, title).savefig(paths[2], dpi=150)
    return text, paths


def draw(shares: np.ndarray, settings: Settings, title: str) -> Figure:
    """The heat map of shares of digits retrieved, [depth, context]."""
    figure = Figure(figsize=(2.5 + 0.8 * shares.shape[1], 1.5 + 0.45 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share < 0.6 else "black")
    axes.set_xticks(range(shares.shape[1]), [f"{context:,}" for context in settings.contexts])
    axes.set_yticks(range(len(shares)), map(str, settings.depths))
    axes.set(xlabel="context (tokens)", ylabel="depth (%)")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, label="share of digits retrieved (chance 0.1)")
    return figure
