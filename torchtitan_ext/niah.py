"""Retrieval of a needle in a haystack: a digit hidden at a depth of a context, asked for at its end.

Protocol (the retrieval experiment of the paper). A prompt is

    <bos> filler[:a] needle filler[a:] question

with the needle " The pass key is 7.", the question " The pass key is " and 62 equally likely letters and
digits, without spaces, as filler. Filler holds digits too, so a model has to find the one that the marker
precedes. Lengths are counted in tokens of the model's own tokenizer: the whole prompt is exactly `context`
of them (a tokenizer without bos gets none), the filler is cut to what is left, and a = depth percent of it,
so that at depth 0 the needle follows bos and at depth 100 the question follows the needle. The tokenizer
says what the question's tokens are: those that " The pass key is 0" to "... 9" begin with alike, before the
one token each that is the answer.

The model answers with the likeliest of these ten tokens after the last position, under dense attention
whatever it was trained with. Trial t asks for the digit t mod 10, and trials come in tens: who always answers
the same scores 0.1 exactly. A prompt depends on seed, context, depth and trial alone.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import matplotlib
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from .data.passkey import FILLER, QUESTION, encode, needle, question_and_answers
from .export_hf import find_checkpoint
from .model import LighthouseTransformer
from .records import CONFIG_FILE

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEPTHS = (0, 15, 30, 50, 70, 85, 100)  # percent
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 98304)  # tokens

# [B, N] tokens, int64 -> [B, vocab_size] logits of the token that follows the last
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, its weights not read yet.

    path: where it lies. name: a short one, for a folder. max_context: tokens that it was trained for, as
    `max_context_field` says. lighthouse: whether it comes from a run with Lighthouse on. load: its logits on
    a device, with weights in a dtype.
    """

    path: Path
    name: str
    tokenizer: HuggingFaceTokenizer
    max_context: int
    max_context_field: str
    lighthouse: bool
    load: Callable[[torch.device, torch.dtype], Logits] = field(repr=False)


def find_candidate(path: str | Path) -> Candidate:
    """The checkpoint at `path`: torchtitan's, as `find_checkpoint` takes it, or a Hugging Face folder.

    Raises:
        ValueError: there is none, or what it needs is missing; with the remedy.
    """
    path = Path(path).resolve()
    config_file = path / CONFIG_FILE
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError):
        config = {}  # for find_checkpoint to judge
    if "model_type" in config:
        return _hugging_face(path, config)

    checkpoint = find_checkpoint(path)

    def load(device: torch.device, dtype: torch.dtype) -> Logits:
        with torch.device(device):
            model = LighthouseTransformer(checkpoint.model_args)
        state = {key: value.to(device) for key, value in checkpoint.load_state(dtype).items()}
        # Assigned, not copied: so the parameters take on dtype, and RoPE's table keeps its own.
        model.load_state_dict(state, assign=True)
        _last_alone(model.output)
        return lambda tokens: model(tokens)[:, -1]

    return Candidate(
        path=checkpoint.path,
        name=f"{checkpoint.path.parents[1].name}-{checkpoint.path.name}",
        tokenizer=HuggingFaceTokenizer(str(checkpoint.tokenizer_path)),
        max_context=checkpoint.model_args.max_seq_len,
        max_context_field="training.seq_len",
        lighthouse=checkpoint.lighthouse,
        load=load,
    )


def _hugging_face(path: Path, config: dict) -> Candidate:
    limit = "max_position_embeddings"
    if not isinstance(config.get(limit), int):
        raise ValueError(
            f"{path / CONFIG_FILE} has no whole number {limit}: add it, the longest context in training"
        )
    try:
        tokenizer = HuggingFaceTokenizer(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"{path}: no tokenizer there ({error}); put the model's tokenizer.json beside its weights"
        ) from error
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(
            f"{path} is a Hugging Face folder, and transformers, which loads it, is not installed: "
            "pip install 'transformers>=5.0'"
        ) from error

    def load(device: torch.device, dtype: torch.dtype) -> Logits:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation="sdpa", local_files_only=True
            )
            torch.nn.Module.to(model, device)
        except OSError as error:
            raise ValueError(f"{path} holds no whole model: {error}") from error
        _last_alone(model.get_output_embeddings())
        return lambda tokens: model(tokens, use_cache=False).logits[:, -1]

    return Candidate(path, path.name, tokenizer, config[limit], limit, False, load)


def _last_alone(projection: torch.nn.Module) -> None:
    """Lets the output projection see the last position only: a long context's logits would be its largest
    tensor by far."""
    projection.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, -1:],))


class Prompts:
    """Builds prompts in a tokenizer's tokens.

    answers: the ids of the ten digits' tokens. shortest: tokens of a prompt without filler.

    Raises:
        ValueError: a digit after the question is not one token.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._question, self.answers = question_and_answers(tokenizer)
        self._needle_end = encode(tokenizer, needle("").removeprefix(QUESTION))
        n_needle = len(self._question) + 1 + len(self._needle_end)
        self.shortest = len(self._start) + n_needle + len(self._question)

    def __call__(self, context: int, depth: int, trial: int, seed: int) -> list[int]:
        """The prompt's `context` tokens; `context` must be `shortest` at least."""
        rng = random.Random(f"{seed} {context} {depth} {trial}")
        n_filler = context - self.shortest
        filler: list[int] = []
        while len(filler) < n_filler:  # at most one token a character
            filler += encode(
                self._tokenizer, "".join(rng.choices(FILLER, k=n_filler - len(filler)))
            )
        at = round(n_filler * depth / 100)
        hidden = [*self._question, self.answers[trial % 10], *self._needle_end]
        return [*self._start, *filler[:at], *hidden, *filler[at:], *self._question]


@dataclass(frozen=True)
class Settings:
    """What to evaluate: contexts in tokens, depths in percent, trials a cell."""

    contexts: tuple[int, ...]
    depths: tuple[int, ...] = DEPTHS
    trials: int = 10
    seed: int = 0
    batch_size: int = 10

    def check(self, prompts: Prompts, candidate: Candidate) -> None:
        """Raises ValueError for settings that can't be evaluated, naming option, value and remedy."""
        longest, limit = candidate.max_context, candidate.max_context_field
        too_long = [context for context in self.contexts if context > longest]
        if too_long:
            raise ValueError(
                f"--contexts: {_listed(too_long)} exceed {limit} = {longest} of {candidate.path}, the longest "
                "that the model was trained for: leave them out"
            )
        too_short = [context for context in self.contexts if context < prompts.shortest]
        if too_short:
            raise ValueError(
                f"--contexts: {_listed(too_short)} can't hold the needle and the question: give "
                f"{prompts.shortest} tokens or more"
            )
        outside = [depth for depth in self.depths if not 0 <= depth <= 100]
        if outside:
            raise ValueError(f"--depths: {_listed(outside)} are no percentages: give 0 to 100")
        if self.trials < 1 or self.trials % 10:
            raise ValueError(
                f"--trials = {self.trials}: give a multiple of 10, so that each digit is hidden equally often"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size = {self.batch_size}: give 1 or more")


def contexts_that_fit(candidate: Candidate) -> tuple[int, ...]:
    """Those of the protocol that the model was trained for; ValueError where there are none."""
    contexts = tuple(context for context in CONTEXTS if context <= candidate.max_context)
    if not contexts:
        raise ValueError(
            f"{candidate.max_context_field} = {candidate.max_context} of {candidate.path} is below every "
            f"context of the protocol ({_listed(CONTEXTS)}): give --contexts"
        )
    return contexts


@dataclass(frozen=True)
class Cell:
    """The trials of a context and a depth; answers: the digit given in each, in the trials' order."""

    context: int
    depth: int
    answers: str

    @property
    def correct(self) -> int:
        return sum(int(answer) == trial % 10 for trial, answer in enumerate(self.answers))


@torch.inference_mode()
def evaluate(
    logits: Logits,
    prompts: Prompts,
    settings: Settings,
    device: torch.device,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> list[Cell]:
    """Every cell, by context and depth as `settings` has them. `advance` hears of each batch's tokens.

    Raises:
        ValueError: the device's memory doesn't hold a batch, or the logits aren't finite; with the remedy.
    """
    answers: dict[tuple[int, int], str] = {}
    trials = list(product(settings.depths, range(settings.trials)))
    # The longest first: if it is too long for the device, that shows at once.
    for context in sorted(settings.contexts, reverse=True):
        digits = ""
        for start in range(0, len(trials), settings.batch_size):
            batch = trials[start : start + settings.batch_size]
            tokens = torch.tensor([prompts(context, *trial, settings.seed) for trial in batch])
            try:
                of_digits = logits(tokens.to(device))[:, prompts.answers]  # [B, 10]
            except torch.OutOfMemoryError as error:
                one = settings.batch_size == 1
                remedy = "leave it out of --contexts" if one else "give a smaller --batch-size"
                raise ValueError(
                    f"out of memory with --batch-size = {settings.batch_size} at context {context}: {remedy}"
                ) from error
            if not of_digits.isfinite().all():
                raise ValueError(
                    f"the model's logits at context {context} are not finite: its training diverged, or the "
                    "checkpoint is damaged"
                )
            digits += "".join(map(str, of_digits.argmax(-1).tolist()))
            advance(tokens.numel())
        for i, depth in enumerate(settings.depths):
            answers[context, depth] = digits[i * settings.trials : (i + 1) * settings.trials]
    return [Cell(*place, answers[place]) for place in product(settings.contexts, settings.depths)]


def write(
    folder: Path,
    candidate: Candidate,
    settings: Settings,
    cells: Sequence[Cell],
    dtype: torch.dtype,
) -> tuple[str, list[Path]]:
    """table.md, niah.json and heatmap.png in `folder`; returns the table and the paths written."""
    accuracy = {(cell.context, cell.depth): cell.correct / settings.trials for cell in cells}
    n_trials = len(cells) * settings.trials
    mean = sum(cell.correct for cell in cells) / n_trials
    record = {
        "checkpoint": os.path.relpath(candidate.path),
        "trained_with_lighthouse": candidate.lighthouse,
        candidate.max_context_field: candidate.max_context,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(settings),
        "mean": mean,
        "standard_error": math.sqrt(mean * (1 - mean) / n_trials),
        "cells": [
            {**asdict(cell), "correct": cell.correct, "mean": accuracy[cell.context, cell.depth]}
            for cell in cells
        ],
    }
    paths = [folder / name for name in ("table.md", "niah.json", "heatmap.png")]
    text = _markdown(record, accuracy)
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(record, indent=2) + "\n")
    _heat_map(record, accuracy, paths[2])
    return text, paths


def _markdown(record: dict, accuracy: dict[tuple[int, int], float]) -> str:
    contexts, depths = record["contexts"], record["depths"]

    def mean(places) -> str:
        values = [accuracy[place] for place in places]
        return f"{sum(values) / len(values):.2f}"

    rows = [["depth", *(f"{context:,}" for context in contexts), "mean"]]
    rows += [["---:"] * len(rows[0])]
    for depth in depths:
        row = [(context, depth) for context in contexts]
        rows += [[f"{depth} %", *(mean([place]) for place in row), mean(row)]]
    columns = [mean(product([context], depths)) for context in contexts]
    rows += [["mean", *columns, f"**{mean(accuracy)}**"]]
    return "\n".join(
        [
            f"Retrieval under dense attention, {record['checkpoint']}: mean {record['mean']:.3f} "
            f"± {record['standard_error']:.3f} (standard error), {record['trials']} trials a cell, seed "
            f"{record['seed']}, {record['dtype']}. Context in tokens; chance is 0.1.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    )


def _heat_map(record: dict, accuracy: dict[tuple[int, int], float], path: Path) -> None:
    contexts, depths = record["contexts"], record["depths"]
    values = [[accuracy[context, depth] for context in contexts] for depth in depths]
    figure, axes = plt.subplots(
        figsize=(2.5 + 0.8 * len(contexts), 1.5 + 0.45 * len(depths)), layout="constrained"
    )
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, column in product(range(len(depths)), range(len(contexts))):
        value = values[row][column]
        color = "white" if value < 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_yticks(range(len(depths)), depths)
    title = f"{record['checkpoint']}\nmean {record['mean']:.3f}"
    axes.set(xlabel="context (tokens)", ylabel="depth (%)")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, label="share of digits retrieved (chance 0.1)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
