"""The parts of a profiled step: every kernel counts in exactly one, and the limits grow as they should."""

import dataclasses
import json

import pytest

from torchtitan_ext.experiment import step_profile
from torchtitan_ext.model import Lighthouse, flavors

SEQ_LEN, VOCAB = 1024, 5000


def trace(tmp_path, *launches):
    """A Chrome trace of (kernel, begin, end, (operator, shapes)...) entries, launched in order, one a microsecond."""
    events = []
    for i, (kernel, begin, end, *operators) in enumerate(launches):
        for depth, (name, shapes) in enumerate(operators):
            margin = 0.4 - depth / 10
            args = {"Input Dims": shapes} if shapes is not None else {}
            span = {"ts": i - margin, "dur": 2 * margin}
            events.append({"cat": "cpu_op", "name": name, "tid": 1, "args": args, **span})
        args = {"correlation": i}
        events.append({"cat": "cuda_driver", "name": "launch", "tid": 1, "ts": i, "dur": 0.01, "args": args})
        gpu = {"ts": begin, "dur": end - begin, "args": args}
        events.append({"cat": "kernel", "name": kernel, "tid": 7, **gpu})
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events[::-1]}))
    return file


ADAM = ("Optimizer.step#AdamW.step", None)
ROWS = [[1, 2, 192, 64]]


def test_a_step_is_split_into_parts_without_gap_or_overlap(tmp_path):
    mm = [[SEQ_LEN, 64], [64, 64]]
    file = trace(
        tmp_path,
        ("first adam", 0, 5_000, ADAM),
        ("gemm", 6_000, 9_000, ("CompiledFunction", None), ("aten::mm", mm)),
        ("gemm", 9_000, 10_000, ("aten::mm", [[SEQ_LEN, 64], [64, VOCAB]])),
        ("sdpa", 10_000, 14_000, ("aten::_scaled_dot_product_x", [[1, 2, SEQ_LEN, 64]])),
        ("sdpa", 14_000, 14_500, ("aten::_scaled_dot_product_x", ROWS)),
        ("flash", 14_500, 15_000, ("lighthouse::flash_attention_4", [[1, 192, 2, 64]])),
        ("_spread_kernel", 15_000, 15_250, ("lighthouse::spread", ROWS)),
        ("ncclDevKernel_SendRecv", 15_250, 15_500, ("nccl:all_to_all", None)),
        ("ncclDevKernel", 15_500, 18_000, ("FSDP::post_backward_reduce", None)),
        ("triton_poi_mul", 16_000, 20_000, ("CompiledFunction", None), ("triton_poi_mul", mm)),
        ("liger_cross_entropy_kernel", 20_000, 21_000),
        ("copy", 21_000, 21_500, ("fsdp::all_gather_copy_in", None), ("aten::_foreach_copy_", mm)),
        ("reduce", 21_500, 21_750, ("aten::_foreach_norm", mm)),
        ("sum", 21_750, 22_000, ("aten::embedding_dense_backward", [[VOCAB, 64]])),
        ("layer_norm", 22_000, 22_250, ("aten::_fused_rms_norm", mm)),
        ("adam", 22_250, 23_000, ADAM),
        ("after", 24_000, 25_000),
    )
    parts, rows = step_profile.breakdown(step_profile.read_kernels(file), SEQ_LEN, VOCAB)
    of = step_profile
    expected = {of.BLOCK_GEMMS: 3, of.OUTPUT_GEMMS: 1, of.DENSE_ATTENTION: 4, of.GATHERED_ATTENTION: 1}
    expected |= {of.LIGHTHOUSE: 0.25, of.EXCHANGE: 0.25, of.EMBEDDING: 0.25}
    expected |= {of.SHARDING: 3, of.LOSS: 1, of.OPTIMIZER: 1, of.IDLE: 1}
    expected |= {of.ELEMENTWISE: 2.25}  # the half that overlaps the collective belongs to that one
    assert {part: ms for part, ms in parts.items() if ms} == expected
    assert {(row["kernel"], row["calls"], row["ms"]) for row in rows} >= {("triton_poi_mul", 1, 4)}
    assert sum(parts.values()) == 23 - 5  # from one optimizer step's end to the next one's


def test_a_trace_of_one_step_is_refused(tmp_path):
    file = trace(tmp_path, ("adam", 0, 1, ADAM), ("adam", 1, 2, ADAM))
    with pytest.raises(ValueError, match="fewer than two optimizer steps"):
        step_profile.breakdown(step_profile.read_kernels(file)[:1], SEQ_LEN, VOCAB)


def test_limits_count_every_layer_once(monkeypatch):
    monkeypatch.setattr(step_profile, "attention_ms", lambda rows, *heads: rows**2 / 1e6)
    rates, n, lighthouse = {"tflops": 700.0, "gb_s": 4000.0}, 98304, Lighthouse(enable=True)
    args = dataclasses.replace(flavors["530M"], lighthouse=lighthouse)
    dense = dataclasses.replace(args, lighthouse=Lighthouse())
    with_lighthouse = step_profile.limits(n, 1, args, rates)
    without = step_profile.limits(n, 1, dense, rates)
    assert without[step_profile.DENSE_ATTENTION] == pytest.approx(30 * n**2 / 1e6)
    assert with_lighthouse[step_profile.DENSE_ATTENTION] == pytest.approx(4 * n**2 / 1e6)
    gathered = lighthouse.gathered_len(n)
    assert with_lighthouse[step_profile.GATHERED_ATTENTION] == pytest.approx(26 * gathered**2 / 1e6)
    assert without[step_profile.LIGHTHOUSE] == 0 < with_lighthouse[step_profile.LIGHTHOUSE]
    # The GEMMs of a step are the six FLOPs a token and parameter of torchtitan's count, embeddings left out.
    gemms = with_lighthouse[step_profile.BLOCK_GEMMS] + with_lighthouse[step_profile.OUTPUT_GEMMS]
    matrices = 530_117_632 - 128_256 * 1024 - 61 * 1024
    assert gemms == pytest.approx(6 * matrices * n / 700e12 * 1e3)
    # The optimizer reads and writes a weight and two moments, and reads the gradient, here and for its norm: fp32.
    assert with_lighthouse[step_profile.OPTIMIZER] == pytest.approx(8 * 4 * 530_117_632 / 4e12 * 1e3)
    twice = step_profile.limits(n, 2, args, rates)
    for part in (step_profile.LOSS, step_profile.ELEMENTWISE, step_profile.LIGHTHOUSE):
        assert twice[part] == pytest.approx(2 * with_lighthouse[part])
