"""Split a training step's time into parts, from torch.profiler's trace, and compare each with its limit.

A part's limit is its bytes over the bandwidth of a copy, its FLOPs over the rate of a large matrix product, or, for
attention, the time of its kernel, all measured on the same device.
"""

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from torchtitan_ext.figures import markdown_table
from torchtitan_ext.lighthouse.kernels import dense_attention
from torchtitan_ext.model import LighthouseModelArgs
from torchtitan_ext.model.model import meta_model

from .timing import copy_gb_s, forward_backward, random_qkv, times_ms

BF16 = 2  # bytes
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of a trace's events

DENSE_ATTENTION = "attention of the dense layers"
GATHERED_ATTENTION = "attention of the Lighthouse layers (the floor)"
LIGHTHOUSE = "Lighthouse around it: score, select, gather, scatter"
BLOCK_GEMMS = "GEMMs of the blocks"
OUTPUT_GEMMS = "GEMMs of the output projection"
LOSS = "rest of the loss"
ELEMENTWISE = "norms, RoPE, SwiGLU, residuals"
EMBEDDING = "embedding"
SHARDING = "FSDP: casts, copies, collectives"
EXCHANGE = "exchange between the GPUs of a sequence"
OPTIMIZER = "optimizer and clipping"
OTHER = "other kernels"
IDLE = "idle"
PARTS = (DENSE_ATTENTION, GATHERED_ATTENTION, LIGHTHOUSE, BLOCK_GEMMS, OUTPUT_GEMMS, LOSS)
PARTS += (ELEMENTWISE, EMBEDDING, SHARDING, EXCHANGE, OPTIMIZER, OTHER, IDLE)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a trace: times in microseconds, and the operators that launched it, innermost last."""

    name: str
    start: float
    end: float
    stack: tuple[str, ...]
    shapes: list  # inputs of the innermost operator with recorded shapes; nested for a list of tensors


def read_kernels(trace: Path) -> list[Kernel]:
    """The kernels, copies and fills of a Chrome trace, by start, with the operators around their launches."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    events.sort(key=lambda event: (event["ts"], event.get("cat") in LAUNCHES, -event["dur"]))
    stacks: dict[int | None, list[dict]] = {}  # open ranges by launch, outermost first
    open_ranges: defaultdict[int, list[dict]] = defaultdict(list)  # by thread
    for event in events:
        if event.get("cat") in (*LAUNCHES, "cpu_op", "user_annotation"):
            stack = [r for r in open_ranges[event["tid"]] if r["ts"] + r["dur"] > event["ts"]]
            if event["cat"] in LAUNCHES:
                stacks[event["args"].get("correlation")] = stack
            open_ranges[event["tid"]] = stack if event["cat"] in LAUNCHES else [*stack, event]
    kernels = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            stack = stacks.get(event["args"].get("correlation"), [])
            shapes: list = next((s for op in reversed(stack) if any(s := op["args"].get("Input Dims", []))), [])
            names = tuple(op["name"] for op in stack)
            kernels.append(Kernel(event["name"], event["ts"], event["ts"] + event["dur"], names, shapes))
    return kernels


def part_of(kernel: Kernel, seq_len: int, vocab_size: int) -> str:
    """The part of the step that a kernel belongs to."""
    stack = " ".join(kernel.stack)
    if "FSDP::" in stack or "fsdp::" in stack:
        return SHARDING
    if "Optimizer.step" in stack or "_foreach" in stack or "clip_grad" in stack:
        return OPTIMIZER
    if "nccl" in kernel.name:
        return EXCHANGE
    if "scaled_dot_product" in stack or "flash_attention_4" in stack:
        is_full_length = any(seq_len in query for query in kernel.shapes[:1])
        return DENSE_ATTENTION if is_full_length else GATHERED_ATTENTION
    if "lighthouse::" in stack:
        return LIGHTHOUSE
    is_loss = any(vocab_size in shape for shape in kernel.shapes)
    is_loss = is_loss or "CrossEntropy" in stack or "cross_entropy" in kernel.name
    if any(op in ("aten::mm", "aten::addmm", "aten::bmm") for op in kernel.stack):
        return OUTPUT_GEMMS if is_loss else BLOCK_GEMMS
    if "embedding" in stack or "embedding" in kernel.name:
        return EMBEDDING
    if is_loss:
        return LOSS
    compiled = kernel.name.startswith("triton_") or "Compiled" in stack
    return ELEMENTWISE if compiled or "norm" in stack else OTHER


def breakdown(kernels: list[Kernel], seq_len: int, vocab_size: int) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of each of PARTS in a trace's last step, and a row per kernel name, longest first.

    A step is the time between the ends of two optimizer steps. Time of overlapping kernels counts for the first, so
    parts add up to the step. Raises ValueError for fewer than two optimizer steps.
    """
    adam = [k.end for k in kernels if any("Optimizer.step" in op for op in k.stack)]
    gaps = [i for i in range(1, len(adam)) if adam[i] - adam[i - 1] > (adam[-1] - adam[0]) / 5]
    if not gaps:
        raise ValueError("the trace holds fewer than two optimizer steps: profile two or more")
    begin = covered = adam[gaps[-1] - 1]
    parts = dict.fromkeys(PARTS, 0.0)
    rows: dict[tuple[str, str], dict] = {}
    for kernel in kernels:
        if begin <= kernel.start < adam[-1]:
            part = part_of(kernel, seq_len, vocab_size)
            parts[IDLE] += max(0.0, kernel.start - covered) / 1e3
            parts[part] += max(0.0, kernel.end - max(kernel.start, covered)) / 1e3
            covered = max(covered, kernel.end)
            row = rows.setdefault((part, kernel.name), {"part": part, "kernel": kernel.name, "calls": 0, "ms": 0.0})
            row["calls"] += 1
            row["ms"] += (kernel.end - kernel.start) / 1e3
    return parts, sorted(rows.values(), key=lambda row: -row["ms"])


def measure_rates() -> dict[str, float]:
    """This GPU's peak rates: `tflops` in a bf16 product of 8,192-square matrices, `gb_s` in a copy, both ways."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    time.sleep(2)  # a cool GPU is faster for some milliseconds
    return {"tflops": 2 * 8192**3 / min(times_ms(lambda: a @ b, 20)) / 1e9, "gb_s": copy_gb_s()}


def attention_ms(rows: int, args: LighthouseModelArgs) -> float:
    """Milliseconds of causal attention by the model's kernel, bf16, batch 1, forward and backward."""
    qkv = random_qkv(rows, args.n_heads, args.n_kv_heads or args.n_heads, args.dim // args.n_heads)
    attention = partial(dense_attention, kernel=args.kernel)
    return median(times_ms(partial(forward_backward, attention, qkv, torch.randn_like(qkv[0])), 7))


def limits(seq_len: int, batch: int, args: LighthouseModelArgs, rates: dict[str, float]) -> dict[str, float]:
    """Least milliseconds of each part of a step on one device that recomputes no activation.

    Every kernel reads its inputs and writes its outputs once, in bf16. Operations between two GEMMs or attention calls
    count as one kernel; sums of gradients count as part of a GEMM.
    """
    tokens, n, dim = seq_len * batch, args.n_layers, args.dim
    n_lighthouse = len(args.lighthouse_layers)
    model = meta_model(args)
    width = model.layers["0"].feed_forward.w1.out_features
    n_params = sum(p.numel() for p in model.parameters())
    kv = (args.n_kv_heads or args.n_heads) / args.n_heads
    row = tokens * dim * BF16  # bytes of a [B, N, dim] tensor

    flops_per_ms, bytes_per_ms = rates["tflops"] * 1e9, rates["gb_s"] * 1e6
    least = dict.fromkeys(PARTS, 0.0)
    if n_lighthouse < n:
        least[DENSE_ATTENTION] = (n - n_lighthouse) * batch * attention_ms(seq_len, args)
    if n_lighthouse:
        gathered = args.lighthouse.gathered_len(seq_len)
        least[GATHERED_ATTENTION] = n_lighthouse * batch * attention_ms(gathered, args)
        # score reads q and k; gather and its backward move q, k and v, scatter and its backward the output
        qkv = 1 + 2 * kv
        rows = (1 + kv) + 2 * qkv + 2 + (2 * qkv + 2) * gathered / seq_len
        least[LIGHTHOUSE] = n_lighthouse * rows * row / bytes_per_ms
    least[BLOCK_GEMMS] = n * 6 * tokens * dim * ((2 + 2 * kv) * dim + 3 * width) / flops_per_ms
    least[OUTPUT_GEMMS] = 6 * tokens * dim * args.vocab_size / flops_per_ms
    # the logits are read for the sum of their exponentials and again for the gradient, which is written
    least[LOSS] = 3 * tokens * args.vocab_size * BF16 / bytes_per_ms
    # a layer forward: twice residual and norm 4, SwiGLU 3 of `width`; backward: SwiGLU 5, twice residual and norm 4
    rows = 16 * n + 8 * n * width / dim
    rows += 4 * (1 + kv) * (n - n_lighthouse)  # RoPE reads and writes q and k, twice
    rows += 5  # the first norm, and the last one's backward
    least[ELEMENTWISE] = rows * row / bytes_per_ms
    least[EMBEDDING] = 4 * row / bytes_per_ms
    least[SHARDING] = n_params * 2 * (4 + BF16) / bytes_per_ms  # parameters to bf16, gradients back to fp32
    least[OPTIMIZER] = n_params * 4 * 8 / bytes_per_ms  # the gradient twice, three tensors read and written
    return least


def table(parts: dict[str, float], least: dict[str, float] | None = None) -> str:
    """The parts of a step, with their limits if given, as Markdown."""
    step = sum(parts.values())
    head, rows = ["part of the step", "ms", "share"], []
    for part, ms in [*parts.items(), ("step", step)]:
        rows.append([part, f"{ms:.1f}", f"{100 * ms / step:.1f} %"])
        if least:
            limit = (least | {"step": sum(least.values())})[part]
            rows[-1] += [f"{limit:.1f}", f"{ms / limit:.2f}x" if limit else "-"]
    return markdown_table([*head, *(("limit ms", "of the limit") if least else ())], rows)
