"""Properties of the passkey documents: the hidden digit can be found, and only that digit is a label."""

import random
import string
from itertools import islice

import pytest
import torch
from helpers.streams import TOKENIZER, check_dataset, loader
from hypothesis import given
from hypothesis import strategies as st
from torchtitan.components.loss import IGNORE_INDEX

from torchtitan_ext.data import passkey
from torchtitan_ext.data.passkey import MIN_LENGTH, QUESTION, passkey_text


@pytest.mark.slow
@given(st.integers(0, passkey.N_DOCUMENTS - 1), st.integers(MIN_LENGTH, 3000))
def test_a_document_hides_one_digit_several_times_and_last_at_its_end(index, length):
    text = passkey_text({"index": index, "length": length})
    assert len(text) == length
    pieces = text.split(QUESTION)
    assert len(pieces) > 2  # asked at least once after it was said
    [end] = {piece[:2] for piece in pieces[1:]}
    assert end[0] in string.digits and end[1] == "." and pieces[-1] == end
    filler = pieces[0] + "".join(piece[2:] for piece in pieces[1:])
    assert set(filler) <= set(string.ascii_letters + string.digits)


def test_documents_differ_and_their_digits_and_distances_are_spread():
    texts = [passkey_text({"index": i, "length": 1000}) for i in range(500)]
    assert len(set(texts)) == len(texts)
    trained_on, held_out = ({*passkey.passkey_documents("100", part)["index"][:]} for part in (False, True))
    assert len(trained_on) == len(held_out) == passkey.N_DOCUMENTS and trained_on.isdisjoint(held_out)
    digits = [text[-2] for text in texts]
    assert all(digits.count(digit) > 500 / 10 / 2 for digit in string.digits)
    counts = [text.count(QUESTION) for text in texts]
    assert min(counts) == 2 and max(counts) == 1000 // len(passkey.needle("0"))
    starts = [text.index(QUESTION) for text in texts if text.count(QUESTION) == 2]
    assert min(starts) < 250 and max(starts) > 700


@pytest.mark.parametrize("seq_len", [64, 256])
def test_a_document_fills_a_sequence_and_only_its_digits_are_labels(seq_len):
    batches = loader("passkey", str(seq_len - 1), seq_len)
    for index, (inputs, labels) in enumerate(islice(batches, 5)):
        text = passkey_text({"index": index, "length": seq_len - 1})
        assert inputs["input"].tolist() == [[TOKENIZER.bos_id, *text.encode()]]
        assert bytes(labels[labels != IGNORE_INDEX]) == text[-2].encode() * text.count(QUESTION)


@given(st.integers(1, 80), st.integers(0, 2**32))
def test_a_label_is_kept_where_the_question_is_whole_before_it(n_tokens, seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["x", QUESTION, passkey.needle("7"), QUESTION[1:]], k=80)).encode()
    start = rng.randrange(len(text) - n_tokens)
    piece = text[start : start + n_tokens + 1]
    tokens, labels = torch.tensor(list(piece[:-1])), torch.tensor(list(piece[1:]))
    kept = passkey.only_answers(tokens, labels, list(QUESTION.encode()))
    asked = [piece[: i + 1].endswith(QUESTION.encode()) for i in range(n_tokens)]
    if any(asked):
        assert (kept != IGNORE_INDEX).tolist() == asked
        assert torch.equal(kept[kept != IGNORE_INDEX], labels[torch.tensor(asked)])
    else:  # a mean over no label is not a number
        assert torch.equal(kept, labels)


@pytest.mark.parametrize("length", [None, "", "-5", "4k", "data", "0", str(MIN_LENGTH - 1)])
def test_what_is_no_length_is_refused_with_the_way_on(length):
    check_dataset("PassKey", str(MIN_LENGTH))
    with pytest.raises(ValueError, match=rf"validation\.dataset_path: .*{MIN_LENGTH} or more"):
        check_dataset("passkey", length)
