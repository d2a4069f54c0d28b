"""Documents to train retrieval on: they hide a digit in random letters and digits and ask for it."""

import random
import string

import numpy as np
import torch
from datasets import Dataset
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer

QUESTION = " The pass key is "  # the digit follows
DIGITS = string.digits
FILLER = string.ascii_letters + DIGITS
N_DOCUMENTS = 2**20


def needle(digit: str) -> str:
    return f"{QUESTION}{digit}."


MIN_LENGTH = 2 * len(needle("0"))


def encode(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
    """The tokens of `text` within a line, without the bos or space that some tokenizers put before a text."""
    before, ids = (tokenizer.tokenizer.encode(t, add_special_tokens=False).ids for t in ("\n", f"\n{text}"))
    return ids[len(before) :]


def question_and_answers(tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    """The tokens of `QUESTION` and the token of each digit after it; the last space may belong to either. Raises
    ValueError if a digit is not one token."""
    asked = [encode(tokenizer, QUESTION + digit) for digit in DIGITS]
    question, answers = asked[0][:-1], [token for tokens in asked for token in tokens[-1:]]
    if any(tokens[:-1] != question for tokens in asked) or len(set(answers)) < len(DIGITS):
        raise ValueError(f"the tokenizer does not have one token per digit after {QUESTION!r}; use another")
    return question, answers


def passkey_documents(dataset_path: str, held_out: bool = False) -> Dataset:
    """`N_DOCUMENTS` rows for `passkey_text`; `dataset_path` is the documents' length in characters, as digits.
    held_out: others, for validation."""
    if not dataset_path.isdecimal() or int(dataset_path) < MIN_LENGTH:
        wanted = f"passkey takes its documents' length in characters, {MIN_LENGTH} or more"
        raise ValueError(f"{dataset_path!r}: {wanted}; with a byte tokenizer, seq_len - 1 fills a sequence")
    index = np.arange(N_DOCUMENTS) + N_DOCUMENTS * held_out
    return Dataset.from_dict({"index": index, "length": np.full(N_DOCUMENTS, int(dataset_path))})


def passkey_text(sample: dict[str, int]) -> str:
    """The document of a row: one needle, repeated in filler and at the end.

    Every needle after the first asks and answers. Their number is log-uniform from 2 to as many as fit: near ones are
    learned early, distant ones late.
    """
    rng = random.Random(f"passkey {sample['index']}")
    hidden = needle(rng.choice(DIGITS))
    most = sample["length"] // len(hidden)
    n_needles = min(round(2 * (sample["length"] / MIN_LENGTH) ** rng.random()), most)
    filler = "".join(rng.choices(FILLER, k=sample["length"] - n_needles * len(hidden)))
    cuts = sorted(rng.randint(0, len(filler)) for _ in range(n_needles - 1))
    starts, ends = [0, *cuts], [*cuts, len(filler)]
    return "".join(filler[a:b] + hidden for a, b in zip(starts, ends, strict=True))


def only_answers(tokens: torch.Tensor, labels: torch.Tensor, question: list[int]) -> torch.Tensor:
    """The labels that follow a question, `IGNORE_INDEX` elsewhere: random filler would drown the few digits.

    tokens, labels: [N], int64. All labels if there is no question, because the mean over none is nan.
    """
    before = torch.nn.functional.pad(tokens, (len(question) - 1, 0), value=-1)
    is_answer = (before.unfold(0, len(question), 1) == torch.tensor(question)).all(-1)
    return labels.masked_fill(~is_answer, IGNORE_INDEX) if is_answer.any() else labels
