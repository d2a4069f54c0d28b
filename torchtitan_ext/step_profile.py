"""Where a training step's time goes, read from torch.profiler's trace, each part beside its limit.

A part's limit is the bytes that it has to move over the bandwidth of a copy, its FLOPs over the rate of a
large matrix product, or, for attention, the time of the stock kernel alone: all measured on the same device.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from .model import LighthouseModelArgs, LighthouseTransformer

BF16 = 2  # bytes

DENSE_ATTENTION = "attention of the dense layers"
GATHERED_ATTENTION = "attention of the Lighthouse layers (the floor)"
LIGHTHOUSE = "Lighthouse around it: score, select, gather, scatter"
BLOCK_GEMMS = "GEMMs of the blocks"
OUTPUT_GEMMS = "GEMMs of the output projection"
LOSS = "rest of the loss"
ELEMENTWISE = "norms, RoPE, SwiGLU, residuals"
EMBEDDING = "embedding"
SHARDING = "FSDP: casts, copies, collectives"
OPTIMIZER = "optimizer and clipping"
OTHER = "other kernels"
IDLE = "idle"
PARTS = (DENSE_ATTENTION, GATHERED_ATTENTION, LIGHTHOUSE, BLOCK_GEMMS, OUTPUT_GEMMS, LOSS)
PARTS += (ELEMENTWISE, EMBEDDING, SHARDING, OPTIMIZER, OTHER, IDLE)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a trace: times in microseconds, and what launched it, innermost last."""

    name: str
    start: float
    end: float
    stack: tuple[str, ...]
    dims: frozenset[int]  # of the inputs of the innermost operator that recorded any
    rows: int  # dimension 2 of its first input, 0 if it has none
    alone: float = 0.0  # microseconds in which no kernel that started earlier ran


def read_kernels(trace: Path) -> list[Kernel]:
    """The kernels, copies and fills of a Chrome trace, by start, with the operators around their launches."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    launches, ranges, kernels = {}, defaultdict(list), []
    for event in events:
        category = event.get("cat")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif category in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event
        elif category in ("cpu_op", "user_annotation"):
            ranges[event["tid"]].append(event)
    for of_thread in ranges.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"]))
    stack_at = _stacks(ranges, launches.values())
    found = []
    for event in sorted(kernels, key=lambda event: event["ts"]):
        launch = launches.get(event["args"].get("correlation"))
        stack = stack_at[id(launch)] if launch else ()
        shapes: list = next(
            (s for op in reversed(stack) if any(s := op["args"].get("Input Dims", []))), []
        )
        # a list of tensors is recorded as a list of their shapes
        flat = [d for shape in shapes for d in shape if isinstance(d, int)]
        first = shapes[0] if shapes else []
        found.append(
            Kernel(
                name=event["name"],
                start=event["ts"],
                end=event["ts"] + event["dur"],
                stack=tuple(op["name"] for op in stack),
                dims=frozenset(flat),
                rows=first[2] if len(first) == 4 and isinstance(first[2], int) else 0,
            )
        )
    return found


def _stacks(ranges: dict[int, list[dict]], launches: Iterable[dict]) -> dict[int, list[dict]]:
    """The ranges of a launch's thread that are open at the launch, outermost first."""
    by_thread = defaultdict(list)
    for launch in launches:
        by_thread[launch["tid"]].append(launch)
    stacks = {}
    for tid, of_thread in by_thread.items():
        of_thread.sort(key=lambda launch: launch["ts"])
        todo = iter(ranges[tid])
        open_ranges: list[dict] = []
        following = next(todo, None)
        for launch in of_thread:
            while following and following["ts"] <= launch["ts"]:
                open_ranges = [r for r in open_ranges if r["ts"] + r["dur"] > following["ts"]]
                open_ranges.append(following)
                following = next(todo, None)
            open_ranges = [r for r in open_ranges if r["ts"] + r["dur"] > launch["ts"]]
            stacks[id(launch)] = list(open_ranges)
    return stacks


def _in_optimizer(kernel: Kernel) -> bool:
    return any("Optimizer.step" in op for op in kernel.stack)


def part_of(kernel: Kernel, seq_len: int, vocab_size: int) -> str:
    """The part of the step that a kernel belongs to."""
    stack = " ".join(kernel.stack)
    if "FSDP::" in stack or "fsdp::" in stack or "nccl" in kernel.name:
        return SHARDING
    if _in_optimizer(kernel) or "_foreach" in stack or "clip_grad" in stack:
        return OPTIMIZER
    if "scaled_dot_product" in stack:
        return DENSE_ATTENTION if kernel.rows == seq_len else GATHERED_ATTENTION
    if "lighthouse::" in stack:
        return LIGHTHOUSE
    is_gemm = any(op in ("aten::mm", "aten::addmm", "aten::bmm") for op in kernel.stack)
    of_loss = vocab_size in kernel.dims or "CrossEntropy" in stack or "cross_entropy" in kernel.name
    if is_gemm:
        return OUTPUT_GEMMS if of_loss else BLOCK_GEMMS
    if "embedding" in stack or "embedding" in kernel.name:
        return EMBEDDING
    if of_loss:
        return LOSS
    compiled = kernel.name.startswith("triton_") or "Compiled" in stack
    return ELEMENTWISE if compiled or "norm" in stack else OTHER


def last_step(kernels: list[Kernel]) -> tuple[list[Kernel], float]:
    """The kernels of a trace's last step, which lies between the ends of two optimizer steps, and the milliseconds
    in which none ran.

    Where several run at once the time belongs to the one that started first, so that the times `alone` and the idle
    time add up to the step.

    Raises:
        ValueError: the trace holds fewer than two optimizer steps.
    """
    adam = [k.end for k in kernels if _in_optimizer(k)]
    gaps = [i for i in range(1, len(adam)) if adam[i] - adam[i - 1] > (adam[-1] - adam[0]) / 5]
    if not gaps:
        raise ValueError("the trace holds fewer than two optimizer steps: profile two or more")
    begin = covered = adam[gaps[-1] - 1]
    found = []
    for kernel in kernels:
        if begin <= kernel.start < adam[-1]:
            alone = max(0.0, kernel.end - max(kernel.start, covered))
            found.append(replace(kernel, alone=alone))
            covered = max(covered, kernel.end)
    return found, (covered - begin - sum(kernel.alone for kernel in found)) / 1e3


def breakdown(
    kernels: list[Kernel], idle: float, seq_len: int, vocab_size: int
) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of each of PARTS in `last_step`'s step, and a row a kernel name, the longest first."""
    parts = dict.fromkeys(PARTS, 0.0) | {IDLE: idle}
    rows: dict[tuple[str, str], dict] = {}
    for kernel in kernels:
        part = part_of(kernel, seq_len, vocab_size)
        parts[part] += kernel.alone / 1e3
        row = rows.setdefault(
            (part, kernel.name), {"part": part, "kernel": kernel.name, "calls": 0, "ms": 0.0}
        )
        row["calls"] += 1
        row["ms"] += (kernel.end - kernel.start) / 1e3
    return parts, sorted(rows.values(), key=lambda row: -row["ms"])


def _times_ms(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of the calls, ascending, after three to warm up."""
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in times[3:])


def measure_rates() -> dict[str, float]:
    """The best of this GPU: `tflops`, a bf16 product of 8,192-square random matrices, `gb_s`, a copy of 2 GiB, read
    and written. A GPU at rest is cooler, and faster for some milliseconds than it stays."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    torch.cuda.synchronize()
    time.sleep(2)
    return {
        "tflops": 2 * 8192**3 / _times_ms(lambda: a @ b, 20)[0] / 1e9,
        "gb_s": 2 * source.nbytes / _times_ms(lambda: target.copy_(source), 20)[0] / 1e6,
    }


def attention_ms(rows: int, n_heads: int, n_kv_heads: int, head_dim: int) -> float:
    """Milliseconds of stock causal SDPA alone, bf16, batch 1, forward and backward."""
    q, k, v = (
        torch.randn(1, h, rows, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (n_heads, n_kv_heads, n_kv_heads)
    )
    grad = torch.randn_like(q)
    attend = ScaledDotProductAttentionWrapper()  # as the model calls it

    def step():
        out = attend(q, k, v, enable_gqa=n_heads > n_kv_heads)
        torch.autograd.grad(out, (q, k, v), grad)

    return _times_ms(step, 7)[3]


def limits(
    seq_len: int, batch: int, args: LighthouseModelArgs, rates: dict[str, float]
) -> dict[str, float]:
    """Milliseconds that each part of a step on one device takes at least, with no activation recomputed.

    Every kernel reads its inputs and writes its outputs once, in bf16. What stands between two GEMMs or attention
    calls counts as one kernel; a sum of gradients counts as done by the GEMM that makes one of them.
    """
    tokens, n, dim = seq_len * batch, args.n_layers, args.dim
    n_lighthouse = len(args.lighthouse_layers)
    heads, kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
    head_dim = dim // heads
    with torch.device("meta"):
        model = LighthouseTransformer(args)
        width = model.layers["0"].feed_forward.w1.out_features
        n_params = sum(p.numel() for p in model.parameters())
    kv = kv_heads / heads
    row = tokens * dim * BF16  # bytes of a [B, N, dim] tensor

    def flops_ms(flops: float) -> float:
        return flops / rates["tflops"] / 1e9

    def bytes_ms(n_bytes: float) -> float:
        return n_bytes / rates["gb_s"] / 1e6

    found = dict.fromkeys(PARTS, 0.0)
    if n_lighthouse < n:
        found[DENSE_ATTENTION] = (
            (n - n_lighthouse) * batch * attention_ms(seq_len, heads, kv_heads, head_dim)
        )
    if n_lighthouse:
        gathered = args.lighthouse.gathered_len(seq_len)
        found[GATHERED_ATTENTION] = (
            n_lighthouse * batch * attention_ms(gathered, heads, kv_heads, head_dim)
        )
        # score reads q and k; gather and its backward move q, k and v, scatter and its backward the output
        qkv = 1 + 2 * kv
        rows = (1 + kv) + 2 * qkv + 2 + (2 * qkv + 2) * gathered / seq_len
        found[LIGHTHOUSE] = n_lighthouse * bytes_ms(rows * row)
    found[BLOCK_GEMMS] = n * flops_ms(6 * tokens * dim * ((2 + 2 * kv) * dim + 3 * width))
    found[OUTPUT_GEMMS] = flops_ms(6 * tokens * dim * args.vocab_size)
    # the logits are read for the sum of their exponentials and again for the gradient, which is written
    found[LOSS] = bytes_ms(3 * tokens * args.vocab_size * BF16)
    # a layer forward: twice residual and norm 4, SwiGLU 3 of `width`; backward: SwiGLU 5, twice residual and norm 4
    rows = 16 * n + 8 * n * width / dim
    rows += 4 * (1 + kv) * (n - n_lighthouse)  # RoPE reads and writes q and k, twice
    rows += 5  # the first norm, and the last one's backward
    found[ELEMENTWISE] = bytes_ms(rows * row)
    found[EMBEDDING] = bytes_ms(4 * row)
    found[SHARDING] = bytes_ms(n_params * 2 * (4 + BF16))  # parameters to bf16, gradients from it
    found[OPTIMIZER] = bytes_ms(
        n_params * 4 * 8
    )  # the gradient twice, three tensors read and written
    return found


def table(parts: dict[str, float], least: dict[str, float] | None = None) -> str:
    """The parts of a step, beside their limits where there are any, Markdown."""
    step = sum(parts.values())
    head, rule = "| part of the step | ms | share |", "|---|---:|---:|"
    if least:
        head, rule = head + " limit ms | of the limit |", rule + "---:|---:|"
    lines = [head, rule]
    for part, ms in [*parts.items(), ("step", step)]:
        line = f"| {part} | {ms:.1f} | {100 * ms / step:.1f} % |"
        if least:
            limit = sum(least.values()) if part == "step" else least[part]
            line += f" {limit:.1f} | {f'{ms / limit:.2f}x' if limit else '-'} |"
        lines.append(line)
    return "\n".join(lines)
