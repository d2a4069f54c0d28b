"""Time one Lighthouse layer beside dense attention and beside attention on the gathered rows only (the floor).

All three attend by the same kernel. On a GPU: bf16, 8 heads of 128, the settings of the paper's latency figure over a
range of contexts, and the recipe's context by each scorer; minutes. On a CPU: one small case by each; seconds. Writes
the records as JSON and, for several lengths, a log-log plot of the first scorer beside them. --peers also times other
layers for long contexts, which need flash-linear-attention and [fa4]. NSA has 16 query heads and one KV
head; --n-heads 16 --n-kv-heads 1 gives dense attention and Lighthouse the same.
"""

import json
import sys
import traceback
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchtitan.models.llama3.model.model import precompute_freqs_cis

from torchtitan_ext import figures
from torchtitan_ext.arguments import Positive, Positives, start
from torchtitan_ext.console import CommandFailed, make_folder
from torchtitan_ext.experiment import timing
from torchtitan_ext.experiment.timing import DEVICE, DTYPE, ON_GPU
from torchtitan_ext.lighthouse import LighthouseConfig, lighthouse_attention
from torchtitan_ext.lighthouse import attention as layer
from torchtitan_ext.lighthouse.kernels import KERNELS, CausalAttention, dense_attention, unusable_reason
from torchtitan_ext.lighthouse.scorers import SCORERS
from torchtitan_ext.progress import Display

# Contexts of the figure, and the settings that differ there: short ones need smaller tiles, the longest a fourth
# level. The recipe's context is timed by every scorer.
FIGURE: list[tuple[int, dict]] = [
    *((seq_len, {"tile_winners": 32}) for seq_len in (4_096, 8_192, 16_384, 32_768, 65_536)),
    *((98_304, {"scorer": scorer}) for scorer in SCORERS),
    *((seq_len, {}) for seq_len in (262_144, 524_288)),
    (1_048_576, {"levels": 4, "top_k": 4_096}),
]
DENSE_UP_TO = 524_288  # tokens; beyond, dense SDPA is not timed
DIRECTIONS = {"fwd": "forward", "fwd_bwd": "forward + backward"}
CURVES = {
    "dense": ("dense", figures.VERMILION),
    "lighthouse": ("Lighthouse", figures.BLUE),
    "floor": ("gathered rows only", figures.GREEN),
}
STYLES = ("o-", "x--", ".:", "+-.")  # of the kernels
WINDOW = 4_096  # tokens that each token sees in the layer with a window only
PEER_DIM = 128  # channels of a peer's query and key


def window(q: Tensor, k: Tensor, v: Tensor, size: int = WINDOW) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True, window_size=(size - 1, 0))
    return out[0] if isinstance(out, tuple) else out


def gla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    gates = torch.nn.functional.logsigmoid(k.detach().float()) / 16  # the paper's temperature
    return chunk_gla(q, k, v, gates.to(q.dtype))[0]


def nsa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compressed blocks, selected blocks and a window, as gates of 1 add them up; sizes as in its paper."""
    from fla.ops.nsa import parallel_nsa

    gates = torch.ones(*q.shape[:3], device=q.device, dtype=q.dtype)
    return parallel_nsa(q, k, v, gates, gates, block_counts=16, block_size=64) + window(q, k, v, 512)


# function of q, k and v; query heads, KV heads, channels per value
PEERS = {
    f"window of {WINDOW:,}, FlashAttention-4": (window, 8, 8, 128),
    "gated linear attention": (gla, 4, 4, 256),
    "native sparse attention": (nsa, 16, 1, 128),  # last: it compiles for minutes
}


@dataclass
class BenchAttention:
    seq_lens: Positives = () if ON_GPU else (8192,)  # tokens; on a GPU, by default those of the figure
    scorers: tuple[Literal[tuple(SCORERS)], ...] = tuple(SCORERS)  # used with --seq-lens
    kernels: tuple[Literal[KERNELS], ...] = ()  # of attention; by default cuDNN and FlashAttention-4, if they can run
    levels: Positive = 3  # of the pyramid, the base included
    pooling_factor: Positive = 4  # entries that one of the next level averages
    top_k: int = 0 if ON_GPU else 256  # winners; 0 is a 64th of the tokens
    tile_winners: Positive = 128 if ON_GPU else 32  # winners per tile
    n_heads: Positive = 8 if ON_GPU else 4  # query heads
    n_kv_heads: Positive = 8 if ON_GPU else 4  # key and value heads
    head_dim: Positive = 128 if ON_GPU else 64  # channels per head
    repeats: Positive = 30 if ON_GPU else 5  # of each timing; the median counts
    peers: bool = False  # time other layers at these lengths too, forward + backward
    output: Path = Path("outputs/bench_attention.json")  # the plot goes beside it

    def run(self) -> None:
        if self.output.is_dir():
            raise ValueError(f"--output {self.output}: is a folder; name a file")
        unusable_here = partial(unusable_reason, dtype=DTYPE, head_dim=self.head_dim)
        kernels = self.kernels or [name for name in ("cudnn", "fa4") if not unusable_here(name)] or ["sdpa"]
        for name in kernels:
            if reason := unusable_here(name):
                raise ValueError(f"--kernels {name}: {reason}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads: must be a multiple of {self.n_kv_heads} KV heads")
        if self.peers and (reason := unusable_reason("fa4", DTYPE, PEER_DIM)):
            raise ValueError(f"--peers: {reason}")
        cases = [(n, {"scorer": scorer}) for n in self.seq_lens for scorer in self.scorers] or FIGURE
        layers = [self.case(seq_len, **settings) for seq_len, settings in cases]
        make_folder(self.output.parent)

        heads = f"B=1, H={self.n_heads}, H_kv={self.n_kv_heads}, D={self.head_dim}"
        machine = {**timing.this_machine(), "threads": torch.get_num_threads(), "copy_gb_s": timing.copy_gb_s()}
        machine |= {"settings": f"{'bf16' if ON_GPU else 'fp32'}, {heads}", "command": " ".join(["python", *sys.argv])}
        records: dict = {"machine": machine, "rows": [], "peers": [], "errors": {}}
        rows, peers, errors = records["rows"], records["peers"], records["errors"]
        todo = []
        for (n, config), kernel in product(layers, kernels):
            work = min(n, DENSE_UP_TO) ** 2  # dense attention takes most of the time and grows quadratically
            todo.append((f"{n:,} tokens, {config.scorer}, {kernel}", work, rows, partial(self.time, n, config, kernel)))
        for name, n in product(PEERS if self.peers else (), dict(layers)):
            todo.append((f"{n:,} tokens, {name}", n * WINDOW, peers, partial(self.time_peer, name, n)))
        with Display() as display:
            display.begin(f"{len(todo)} layers", sum(work for _, work, *_ in todo))
            for title, work, measured, measure in todo:
                display.say(f"{title} ...")
                try:
                    measured.append(measure())
                except Exception as error:  # the next starts
                    display.say(traceback.format_exc())
                    errors[title] = f"{type(error).__name__}: {error}"[:200]
                self.output.write_text(json.dumps(records, indent=1) + "\n")
                display.count(work)

        print(f"\n{machine}\n\n{table(rows)}\n")
        if peers:
            cells = [[f"{x:.2f}" if isinstance(x, float) else x for x in row.values()] for row in peers]
            print(f"{figures.markdown_table([*peers[0]], cells)}\n")
        print(f"records: {self.output}")
        if len({row["seq_len"] for row in rows}) > 1:
            path = self.output.with_suffix(".png")
            draw(rows, machine).savefig(path, dpi=150)
            print(f"plot: {path}")
        if errors:
            raise CommandFailed("; ".join(f"{title}: {error}" for title, error in errors.items()))

    def case(self, seq_len: int, scorer: str = "norm", **settings: int) -> tuple[int, LighthouseConfig]:
        """A layer to time: these arguments with some settings replaced. Raises ValueError."""
        args = replace(self, **settings)  # type: ignore[arg-type]
        top_k = args.top_k or max(seq_len // 64, args.tile_winners)
        config = LighthouseConfig(args.levels, args.pooling_factor, top_k, scorer, tile_winners=args.tile_winners)
        config.check_seq_len(seq_len)
        return seq_len, config

    def time(self, seq_len: int, config: LighthouseConfig, kernel: str) -> dict:
        torch.manual_seed(0)
        sizes = self.n_heads, self.n_kv_heads, self.head_dim
        inputs = timing.random_qkv(seq_len, *sizes)
        grad = torch.randn_like(inputs[0])
        # Each layer's peak before anything else is in memory.
        dense, timed = partial(dense_attention, kernel=kernel), seq_len <= DENSE_UP_TO
        dense_peak = timing.peak_gib(partial(timing.forward_backward, dense, inputs, grad)) if timed else None
        freqs_cis, attention = precompute_freqs_cis(self.head_dim, seq_len).to(DEVICE), CausalAttention(kernel)
        lighthouse = partial(lighthouse_attention, config=config, freqs_cis=freqs_cis, attention=attention)
        peak = timing.peak_gib(partial(timing.forward_backward, lighthouse, inputs, grad))
        rows = timing.random_qkv(config.gathered_len(seq_len), *sizes)
        cases = {"lighthouse": (lighthouse, inputs, grad), "floor": (dense, rows, torch.randn_like(rows[0]))}
        times = medians_ms(cases, self.repeats)
        if timed:
            times |= medians_ms({"dense": (dense, inputs, grad)}, max(self.repeats // 10, 2))
        stages = self.time_stages(config, attention, *inputs, freqs_cis)
        settings = {name: getattr(config, name) for name in ("levels", "pooling_factor", "top_k", "scorer")}
        record = {"seq_len": seq_len, **settings, "kernel": kernel, "gathered_len": rows[0].shape[1], **times}
        return record | {"peak_gib": peak, "dense_peak_gib": dense_peak, "score_ms": stages[0]["ms"], "stages": stages}

    def time_peer(self, name: str, seq_len: int) -> dict:
        function, heads, kv_heads, value_dim = PEERS[name]
        row = {"layer": name, "seq_len": seq_len, "heads": heads, "kv_heads": kv_heads, "value_dim": value_dim}
        torch.manual_seed(0)
        inputs = timing.random_qkv(seq_len, heads, kv_heads, PEER_DIM, value_dim)
        grad = torch.randn(1, seq_len, heads, value_dim, device=DEVICE, dtype=DTYPE)
        step = partial(timing.forward_backward, function, inputs, grad)
        return row | {"peak_gib": timing.peak_gib(step), "ms": median(timing.times_ms(step, self.repeats))}

    def time_stages(self, config: LighthouseConfig, attention: CausalAttention, q, k, v, freqs_cis) -> list[dict]:
        """Milliseconds of each stage, timed separately, and the megabytes that it must move."""
        ops, n_heads, n_kv_heads = layer.ops_for(q), self.n_heads, self.n_kv_heads
        row = self.head_dim * q.element_size() / 1e6
        base, all_rows = q.shape[1] * row, (q.shape[1] + config.gathered_len(q.shape[1])) * row
        read_by_scorer = n_heads + n_kv_heads * (1 if config.scorer == "norm" else 2)
        score = partial(ops.score, q, k, v, config, kernel=attention.kernel)
        scores = score()
        slots = ops.select(scores, config)
        gather = partial(layer.gather, q, k, v, freqs_cis, slots, config)
        gathered = gather()
        grads = [torch.randn_like(x) for x in gathered]
        out = layer.call_attention(attention, *(x.detach() for x in gathered)).requires_grad_()
        positions = ops.scatter(out, slots, config)
        grad = torch.randn_like(positions)
        backward = partial(torch.autograd.grad, retain_graph=True)
        stages = {
            "score": (score, base * read_by_scorer + scores.nbytes / 1e6),
            "select": (lambda: ops.select(scores, config), (scores.nbytes + slots.nbytes) / 1e6),
            "gather": (gather, all_rows * (n_heads + 2 * n_kv_heads)),
            "scatter": (lambda: ops.scatter(out, slots, config), all_rows * n_heads),
            "scatter backward": (lambda: backward(positions, out, grad), all_rows * n_heads),
            "gather backward": (lambda: backward(gathered, (q, k, v), grads), all_rows * (n_heads + 2 * n_kv_heads)),
        }
        ms = timing.kernels_ms if ON_GPU else lambda call, repeats: median(timing.times_ms(call, repeats))
        return [{"stage": name, "ms": ms(call, self.repeats), "mb": mb} for name, (call, mb) in stages.items()]


def medians_ms(cases: dict[str, tuple], repeats: int) -> dict[str, float]:
    """Medians of function, inputs and output gradient, forward and forward + backward, all interleaved."""
    calls = {}
    for name, (function, inputs, grad) in cases.items():
        calls[f"{name}_fwd_ms"] = partial(function, *(x.detach() for x in inputs))
        calls[f"{name}_fwd_bwd_ms"] = partial(timing.forward_backward, function, inputs, grad)
    return {name: median(times) for name, times in timing.interleaved_times_ms(calls, repeats).items()}


def table(rows: list[dict]) -> str:
    """Milliseconds and the two ratios, forward and forward + backward."""
    head = ["seq_len", "L, p, k", "S", "scorer", "score ms", "kernel", "pass", "dense ms", "floor ms"]
    head += ["Lighthouse ms", "against dense", "of the floor", "peak GiB", "dense peak GiB"]
    cells = []
    for r, (direction, label) in product(rows, DIRECTIONS.items()):
        dense, floor, ours = (r.get(f"{name}_{direction}_ms") for name in ("dense", "floor", "lighthouse"))
        cells.append([f"{r['seq_len']:,}", f"{r['levels']}, {r['pooling_factor']}, {r['top_k']}"])
        cells[-1] += [f"{r['gathered_len']:,}", r["scorer"], f"{r['score_ms']:.3f}", r["kernel"], label]
        cells[-1] += [f"{dense:.2f}" if dense else "-", f"{floor:.3f}", f"{ours:.3f}"]
        cells[-1] += [f"{dense / ours:.1f}x" if dense else "-", f"{ours / floor:.3f}x"]
        peaks = [r.get(name) if direction == "fwd_bwd" else None for name in ("peak_gib", "dense_peak_gib")]
        cells[-1] += [f"{peak:.2f}" if peak else "-" for peak in peaks]
    return figures.markdown_table(head, cells)


def draw(rows: list[dict], machine: dict) -> Figure:
    """Milliseconds against context by every kernel; a line joins the points of one number of levels."""
    first = rows[0]
    rows = [row for row in rows if row["scorer"] == first["scorer"]]
    styles = dict(zip(dict.fromkeys(row["kernel"] for row in rows), STYLES, strict=False))
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for panel, (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
        for (name, (label, color)), (kernel, style) in product(CURVES.items(), styles.items()):
            timed = [row for row in rows if row["kernel"] == kernel and f"{name}_{direction}_ms" in row]
            for levels, part in groupby(timed, lambda row, name=name: name != "dense" and row["levels"]):
                points = [(row["seq_len"], row[f"{name}_{direction}_ms"]) for row in part]
                named = f"{label}, {kernel}" if levels in (False, first["levels"]) else None
                panel.plot(*zip(*points, strict=True), style, color=color, label=named)
        for row in rows:
            if row["levels"] != first["levels"] and row["kernel"] == first["kernel"]:
                point = row["seq_len"], row[f"lighthouse_{direction}_ms"]
                note = f"L={row['levels']}, k={row['top_k']:,}"
                panel.annotate(note, point, (0, -20), textcoords="offset points", ha="right", size="small")
        panel.set(yscale="log", xlabel="context (tokens)", title=title)
        panel.set_xscale("log", base=2)
        lengths = [row["seq_len"] for row in rows]
        panel.set_xticks(lengths, [f"{length // 1024}K" for length in lengths], size="small")
        panel.grid(True, which="major", alpha=0.3)
        panel.minorticks_off()
    panels[0].set_ylabel("milliseconds per layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    settings = f"L={first['levels']}, p={first['pooling_factor']}, k=N/{first['seq_len'] / first['top_k']:g}"
    figure.suptitle(f"One attention layer, {machine['device']}, {machine['settings']}; {settings}", size="medium")
    return figure


if __name__ == "__main__":
    start(BenchAttention)
