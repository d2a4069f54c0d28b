"""Time one Lighthouse layer beside dense SDPA and beside SDPA on the gathered rows alone (the floor).

On a GPU: bf16, 8 heads of 128, the settings of the paper's latency figure over a range of contexts, and the
recipe's context by each scorer. On a CPU: one small case by each. Writes the records as JSON and, for several
lengths, a log-log plot of the first scorer beside them.

    python scripts/bench_attention.py                       # minutes on a GPU, seconds on a CPU
    python scripts/bench_attention.py --seq-lens 98304 --scorers norm dilated --top-k 1536
"""

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from itertools import groupby
from pathlib import Path

import _start
import torch

from torchtitan_ext.command_line import CommandFailed, Display, at_least, make_folder
from torchtitan_ext.lighthouse import LighthouseConfig, lighthouse_attention
from torchtitan_ext.lighthouse import attention as layer
from torchtitan_ext.lighthouse.attention import causal_sdpa
from torchtitan_ext.lighthouse.config import SCORERS

ROPE_THETA = 10000.0
# Contexts of the figure, and the settings that differ there: short ones need smaller tiles, the longest a
# fourth level. The recipe's context is timed by every scorer.
FIGURE = [
    *((seq_len, {"tile_winners": 32}) for seq_len in (4_096, 8_192, 16_384, 32_768, 65_536)),
    *((98_304, {"scorer": scorer}) for scorer in SCORERS),
    *((seq_len, {}) for seq_len in (262_144, 524_288)),
    (1_048_576, {"levels": 4, "top_k": 4_096, "repeats": 10}),
]


def cuda_sdpa(q, k, v, *, enable_gqa=False):
    """Causal SDPA, cuDNN first, then flash."""
    backends = [
        torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
        torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    ]
    with torch.nn.attention.sdpa_kernel(backends, set_priority=True):
        return causal_sdpa(q, k, v, enable_gqa=enable_gqa)


def kernels_ms(function, repeats):
    """Mean milliseconds that the function's kernels take on the GPU, the gaps between their launches left out."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1e3


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def medians_ms(functions, repeats, device):
    """Median milliseconds of each function; the repeats of all are interleaved after one warm-up each."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if device == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                stop.record()
                times[name].append((start, stop))
            else:
                begin = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - begin))
        if repeat == 0:
            synchronize(device)
    synchronize(device)
    return {
        name: statistics.median(t if device == "cpu" else t[0].elapsed_time(t[1]) for t in runs[1:])
        for name, runs in times.items()
    }


def forward_backward(function, inputs, grad):
    torch.autograd.grad(function(*inputs), inputs, grad)


def rotary_table(seq_len, head_dim, device):
    freqs = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(seq_len, device=device)[:, None] * freqs
    return torch.polar(torch.ones_like(angles), angles)


def stages_of(q, k, v, config, freqs_cis, attention, device, repeats):
    """Each stage alone: {stage: (milliseconds, bytes it must move)}."""
    ops = layer._operators_for(q)
    item, (batch, seq_len, n_heads, head_dim), n_kv_heads = q.element_size(), q.shape, k.shape[2]
    base = batch * seq_len * head_dim * item
    rows = batch * config.gathered_len(seq_len) * head_dim * item
    heads = n_heads + 2 * n_kv_heads
    scores = ops.score(q, k, v, config)
    slots = ops.select(scores, config)
    small = scores.numel() * 4 + slots.numel() * 4
    gathered = ops.gather(q, k, v, freqs_cis, slots, config)
    grads = [torch.randn_like(x) for x in gathered]
    out = layer._attend(attention, *(x.detach() for x in gathered)).requires_grad_()
    positions = ops.scatter(out, slots, config)
    grad = torch.randn_like(positions)
    functions = {
        "score": (
            lambda: ops.score(q, k, v, config),
            base * (n_heads + n_kv_heads * (1 if config.scorer == "norm" else 2))
            + scores.numel() * 4,
        ),
        "select": (lambda: ops.select(scores, config), small),
        "gather": (lambda: ops.gather(q, k, v, freqs_cis, slots, config), (base + rows) * heads),
        "scatter": (lambda: ops.scatter(out, slots, config), (base + rows) * n_heads),
        "scatter backward": (
            lambda: torch.autograd.grad(positions, out, grad, retain_graph=True),
            (base + rows) * n_heads,
        ),
        "gather backward": (
            lambda: torch.autograd.grad(gathered, (q, k, v), grads, retain_graph=True),
            (base + rows) * heads,
        ),
    }
    calls = {name: function for name, (function, _) in functions.items()}
    if device == "cuda":
        times = {name: kernels_ms(function, repeats) for name, function in calls.items()}
    else:
        times = medians_ms(calls, repeats, device)
    return {name: (times[name], moved) for name, (_, moved) in functions.items()}


def copy_bandwidth(device):
    """Bytes a second that a large copy moves, reads and writes counted."""
    source = torch.empty(
        2**31 if device == "cuda" else 2**27, dtype=torch.uint8, device=device
    ).random_()
    target = torch.empty_like(source)
    return (
        2e3
        * source.numel()
        / medians_ms({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    )


def config_of(seq_len, args):
    """The layer's settings for one row. Raises ValueError."""
    top_k = args.top_k or max(seq_len // 64, args.tile_winners)
    config = LighthouseConfig(
        args.levels,
        args.pooling_factor,
        top_k,
        args.scorer,
        args.dilation,
        tile_winners=args.tile_winners,
    )
    config.check_seq_len(seq_len)
    return config


def bench(seq_len, args, device):
    """One row of the records, and its stages."""
    config = config_of(seq_len, args)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attention = cuda_sdpa if device == "cuda" else causal_sdpa

    def rows(length, heads):
        return torch.randn(
            1, length, heads, args.head_dim, device=device, dtype=dtype, requires_grad=True
        )

    def attend(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_first, enable_gqa=args.n_heads > args.n_kv_heads).transpose(1, 2)

    freqs_cis = rotary_table(seq_len, args.head_dim, device)
    run = partial(lighthouse_attention, config=config, freqs_cis=freqs_cis, attention=attention)
    heads = (args.n_heads, args.n_kv_heads, args.n_kv_heads)
    inputs = [rows(seq_len, h) for h in heads]
    grad = torch.randn_like(inputs[0])
    gathered_len = config.gathered_len(seq_len)

    peak = None
    if device == "cuda":
        forward_backward(run, inputs, grad)
        torch.cuda.reset_peak_memory_stats()
        forward_backward(run, inputs, grad)
        peak = torch.cuda.max_memory_allocated() / 2**30
    # The floor in the layout the layer hands over: rows of a head next to each other.
    floor_inputs = [
        torch.randn(
            1, h, gathered_len, args.head_dim, device=device, dtype=dtype, requires_grad=True
        )
        for h in heads
    ]
    floor_grad = torch.randn_like(floor_inputs[0])
    floor = partial(attention, enable_gqa=args.n_heads > args.n_kv_heads)
    cases = {"floor": (floor, floor_inputs, floor_grad), "lighthouse": (run, inputs, grad)}
    functions = {}
    for name, (function, tensors, out_grad) in cases.items():
        functions[f"{name}_fwd_ms"] = partial(function, *(x.detach() for x in tensors))
        functions[f"{name}_fwd_bwd_ms"] = partial(forward_backward, function, tensors, out_grad)
    times = medians_ms(functions, args.repeats, device)
    dense = {
        "dense_fwd_ms": partial(attend, *(x.detach() for x in inputs)),
        "dense_fwd_bwd_ms": partial(forward_backward, attend, inputs, grad),
    }
    if seq_len <= args.dense_up_to:
        times |= medians_ms(dense, max(args.repeats // 10, 2), device)
    else:
        times |= dict.fromkeys(dense)
    record = {
        "seq_len": seq_len,
        "levels": config.levels,
        "pooling_factor": config.pooling_factor,
        "top_k": config.top_k,
        "scorer": config.scorer,
        "gathered_len": gathered_len,
        **{name: times[name] for name in (*dense, *functions)},
        "peak_gib": peak,
    }
    stages = stages_of(*inputs, config, freqs_cis, attention, device, args.repeats)
    return record | {"score_ms": stages["score"][0]}, stages


def table(records):
    """Markdown: milliseconds and the two ratios, forward and forward + backward."""

    def cells(record, direction):
        dense, floor, ours = (
            record[f"{w}_{direction}_ms"] for w in ("dense", "floor", "lighthouse")
        )
        against_dense = (
            f"{dense:.2f} | {floor:.3f} | {ours:.3f} | {dense / ours:.1f}x"
            if dense
            else (f"- | {floor:.3f} | {ours:.3f} | -")
        )
        return f"{against_dense} | {ours / floor:.3f}x"

    lines = [
        "| seq_len | L, p, k | S | scorer | its own ms | pass | dense ms | floor ms | Lighthouse ms | against dense | of the floor | peak GiB |"
    ]
    lines.append("|" + "---|" * 12)
    for r in records:
        for direction, label in (("fwd", "forward"), ("fwd_bwd", "forward + backward")):
            peak = f"{r['peak_gib']:.2f}" if r["peak_gib"] and direction == "fwd_bwd" else "-"
            lines.append(
                f"| {r['seq_len']:,} | {r['levels']}, {r['pooling_factor']}, {r['top_k']} | {r['gathered_len']:,} | "
                f"{r['scorer']} | {r['score_ms']:.3f} | {label} | {cells(r, direction)} | {peak} |"
            )
    return "\n".join(lines)


def plot(records, machine, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in records if r["scorer"] == records[0]["scorer"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for axis, direction, title in zip(
        axes, ("fwd", "fwd_bwd"), ("forward", "forward + backward"), strict=True
    ):
        for name, colour, style in (
            ("dense", "#D55E00", "o-"), ("lighthouse", "#0072B2", "o-"), ("floor", "#009E73", ".--"),
        ):  # fmt: skip
            label = {
                "dense": "dense SDPA",
                "lighthouse": "Lighthouse",
                "floor": "SDPA on the gathered rows",
            }
            # no line joins points of different settings
            for _, part in groupby(records, lambda r, name=name: name != "dense" and r["levels"]):
                points = [(r["seq_len"], r[f"{name}_{direction}_ms"]) for r in part]
                points = [point for point in points if point[1]]
                axis.plot(
                    *zip(*points, strict=True), style, color=colour, label=label.pop(name, None)
                )
        for r in records:
            if r["levels"] != records[0]["levels"]:
                point = r["seq_len"], r[f"lighthouse_{direction}_ms"]
                note = f"L={r['levels']}, k={r['top_k']:,}"
                axis.annotate(note, point, (0, -20), textcoords="offset points", ha="right", size=8)
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", title=title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            [r["seq_len"] for r in records], [f"{r['seq_len'] // 1024}K" for r in records]
        )
        axis.grid(True, which="major", alpha=0.3)
        axis.minorticks_off()
    axes[0].set_ylabel("milliseconds a layer")
    axes[0].legend(frameon=False)
    first, usual = records[0], [r for r in records if r["levels"] == records[0]["levels"]]
    shares = {r["seq_len"] / r["top_k"] for r in usual}
    top_k = f"N/{shares.pop():g}" if len(shares) == 1 else f"{first['top_k']:,}"
    settings = f"L={first['levels']}, p={first['pooling_factor']}, k={top_k}"
    figure.suptitle(f"One attention layer, {machine['device']}, {machine['settings']}; {settings}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    positive = at_least(1)
    parser.add_argument(
        "--seq-lens",
        type=positive,
        nargs="+",
        metavar="TOKENS",
        help="(default: the figure's on a GPU, 8192 on a CPU)",
    )
    parser.add_argument(
        "--scorers",
        nargs="+",
        choices=SCORERS,
        default=SCORERS,
        help="of a call with --seq-lens (default: all)",
    )
    folder = Path("results" if on_gpu else "outputs")
    for name, type_, default, what in (
        ("--levels", positive, 3, "of the pyramid, the base included"),
        ("--pooling-factor", positive, 4, "entries that one of the next level averages"),
        ("--top-k", at_least(0), 0 if on_gpu else 256, "winners; 0 is a 64th of the tokens"),
        ("--tile-winners", positive, 128 if on_gpu else 32, "winners a tile"),
        ("--dilation", positive, 4, "residue classes of the dilated scorer"),
        ("--n-heads", positive, 8 if on_gpu else 4, "query heads"),
        ("--n-kv-heads", positive, 8 if on_gpu else 4, "key and value heads"),
        ("--head-dim", positive, 128 if on_gpu else 64, "channels a head"),
        ("--repeats", positive, 30 if on_gpu else 5, "of each timing; the median counts"),
        ("--dense-up-to", positive, 524_288, "tokens; beyond, dense SDPA is not timed"),
        ("--output", Path, folder / "bench_attention.json", "the records; the plot goes beside"),
    ):
        parser.add_argument(
            name,
            metavar="FILE" if type_ is Path else "N",
            type=type_,
            default=default,
            help=f"{what} (default here: %(default)s)",
        )
    args = parser.parse_args()
    if args.n_heads % args.n_kv_heads:
        parser.error(
            f"--n-heads {args.n_heads}: must be a multiple of --n-kv-heads {args.n_kv_heads}"
        )
    if args.head_dim % 2:
        parser.error(f"--head-dim {args.head_dim}: must be even, RoPE turns pairs")
    if args.output.is_dir():
        parser.error(f"--output {args.output}: is a folder; name a file")

    device = "cuda" if on_gpu else "cpu"
    cases = FIGURE
    if args.seq_lens or device == "cpu":
        seq_lens = args.seq_lens or [8_192]
        cases = [(seq_len, {"scorer": scorer}) for seq_len in seq_lens for scorer in args.scorers]
    cases = [
        (seq_len, argparse.Namespace(**vars(args) | {"scorer": "norm"} | settings))
        for seq_len, settings in cases
    ]
    for case in cases:
        config_of(*case)
    make_folder(args.output.parent)

    bandwidth = copy_bandwidth(device)
    machine = {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", *sys.argv]),
        "copy_gb_s": bandwidth / 1e9,
        "settings": f"{'bf16' if on_gpu else 'fp32'}, B=1, H={args.n_heads}, H_kv={args.n_kv_heads}, D={args.head_dim}",
    }
    records, stages = [], {}
    with Display() as display:
        # Dense attention's time, of which there is most, grows with the square.
        work = [min(seq_len, args.dense_up_to) ** 2 for seq_len, _ in cases]
        display.start(f"{len(cases)} layers", sum(work))
        for (seq_len, settings), of_all in zip(cases, work, strict=True):
            display.say(f"{seq_len:,} tokens, {settings.scorer} ...")
            try:
                record, stages_ms = bench(seq_len, settings, device)
            except torch.OutOfMemoryError as error:
                raise CommandFailed(
                    f"--seq-lens {seq_len}: out of memory; leave it out, or lower --dense-up-to or --n-heads "
                    f"(the records of those before are in {args.output})"
                ) from error
            display.advance(of_all)
            records.append(record)
            name = f"{seq_len} L{record['levels']} p{record['pooling_factor']} {record['scorer']}"
            stages[name] = [
                {
                    "stage": name,
                    "ms": ms,
                    "mb": moved / 1e6,
                    "gb_s": moved / ms / 1e6,
                    "limit_ms": 1e3 * moved / bandwidth,
                }
                for name, (ms, moved) in stages_ms.items()
            ]
            args.output.write_text(
                json.dumps({"machine": machine, "rows": records, "stages": stages}, indent=1) + "\n"
            )

    for name, rows in stages.items():
        print(
            f"\n{name}\n| stage | ms | MB moved | GB/s | at the copy's bandwidth, ms |\n|---|---|---|---|---|"
        )
        for r in rows:
            print(
                f"| {r['stage']} | {r['ms']:.3f} | {r['mb']:.0f} | {r['gb_s']:.0f} | {r['limit_ms']:.3f} |"
            )
    print(f"\n{machine}\n\n{table(records)}\n\nrecords: {args.output}")
    if len({r["seq_len"] for r in records}) > 1:
        plot(records, machine, args.output.with_suffix(".png"))
        print(f"plot: {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    _start.run(main)
