"""The layer over chunks of a sequence, without the ranks that hold them."""

from ast import literal_eval
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import Mock

import pytest
import torch
from helpers.lighthouse_cases import DEVICE, SCORES, hard_scores, proposals_of, qkv, rotary_table, selected
from hypothesis import given
from hypothesis import strategies as st

from torchtitan_ext.lighthouse import LighthouseConfig, torch_ops, triton_ops
from torchtitan_ext.lighthouse.context_parallel import check_context_parallel, context_parallel_attention
from torchtitan_ext.lighthouse.kernels import causal_attention

SEQ_LEN = 2048


@pytest.mark.parametrize(("kind", "ops"), [*((kind, torch_ops) for kind in SCORES), ("tied", triton_ops)])
def test_chunks_select_what_the_whole_sequence_does(kind, ops):
    config, n_chunks, seq_len = LighthouseConfig(levels=3, top_k=16, tile_winners=4), 4, 512
    base = hard_scores(kind, (2, 1, 1, seq_len)).to(DEVICE)
    chunk_config = replace(config, top_k=config.top_k // n_chunks)
    levels, indices = [], []
    for chunk, scores in enumerate(base.chunk(n_chunks, -1)):
        _, (level, index) = selected(scores, chunk_config, [chunk], ops)
        levels.append(level)
        indices.append(index + chunk * (seq_len // n_chunks) // config.pooling_factor**level)
    _, expected = selected(base, config, ops=ops)
    assert torch.equal(torch.cat(levels, -1), expected.level)
    assert torch.equal(torch.cat(indices, -1), expected.index)


def test_inputs_that_do_not_fit_are_named_on_every_rank():
    config = LighthouseConfig(top_k=32, tile_winners=2)
    q, k, v = qkv(SEQ_LEN // 2, n_kv_heads=2)
    for rank, load_balance in product((0, 1), (True, False)):
        mesh = Mock(**{"size.return_value": 2, "get_local_rank.return_value": rank})
        shared = {"mesh": mesh, "load_balance": load_balance, "attention": causal_attention}
        attend = partial(context_parallel_attention, config=config, **shared)
        with pytest.raises(ValueError, match=r"must be \[B, N, H, D\]"):
            attend(q, k[:, :-2], v[:, :-2])
        # One rank's positions lie in the table, the other's don't.
        with pytest.raises(ValueError, match=rf"freqs_cis .*at least N = {SEQ_LEN}"):
            attend(q, k, v, freqs_cis=rotary_table(SEQ_LEN // 2, 4))


@pytest.mark.slow
@given(
    top_k=st.integers(1, 40).map(lambda tiles: 4 * tiles),
    scorer=st.sampled_from(("norm", "norm", "dilated")),
    degree=st.integers(1, 9),
    load_balance=st.booleans(),
    seq_len=st.sampled_from([2048, 3072, 5120, 5000]),
)
def test_what_an_error_proposes_is_legal(top_k, scorer, degree, load_balance, seq_len):
    asked = dict(top_k=top_k, scorer=scorer, dilation=3, tile_winners=4)
    asked |= dict(seq_len=seq_len, context_parallel_degree=degree)

    def refusal(**changes):
        *fields, seq_len, degree = (asked | changes).items()
        try:
            check_context_parallel(LighthouseConfig(**dict(fields)), seq_len[1], degree[1], load_balance)
        except ValueError as error:
            return str(error)

    def legal(field, values):
        return [value for value in values if not refusal(**{field: value})]

    if message := refusal():
        proposals = {field: list(map(literal_eval, values)) for field, values in proposals_of(message).items()}
        assert all(values == legal(field, values) for field, values in proposals.items())
        degrees = [2**n for n in range(degree.bit_length())]
        for field, values in (("top_k", range(4, 324, 4)), ("context_parallel_degree", degrees)):
            best = min((abs(n - asked[field]) for n in legal(field, values)), default=None)
            assert best == min((abs(n - asked[field]) for n in proposals.get(field, [])), default=None)
