"""Time Lighthouse beside other layers for long contexts: forward + backward of one layer, bf16, on a GPU.

Lighthouse and dense attention also run with the heads that a peer needs. Needs flash-linear-attention and [fa4].
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from torchtitan_ext.arguments import Positive, Positives, start
from torchtitan_ext.console import make_folder
from torchtitan_ext.experiment.timing import forward_backward, peak_gib, random_qkv, this_machine, times_ms
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.lighthouse import LighthouseConfig, lighthouse_attention
from torchtitan_ext.lighthouse.kernels import CausalAttention, dense_attention, unusable_reason

HEAD_DIM = 128
WINDOW = 4_096  # of the layer that has nothing else
NSA_BLOCK, NSA_BLOCKS, NSA_WINDOW = 64, 16, 512  # as in its paper
HEADS = {
    "8 of 128": (8, 8, 128),
    "16 of 128, one for keys and values": (16, 1, 128),
    "4 of 128, values of 256": (4, 4, 256),
}


def window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True, window_size=(size - 1, 0))
    return out[0] if isinstance(out, tuple) else out


def nsa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compressed blocks, selected blocks and a window, as gates of 1 add them up."""
    from fla.ops.nsa import parallel_nsa

    gates = torch.ones(*q.shape[:3], device=q.device, dtype=q.dtype)
    out = parallel_nsa(q, k, v, gates, gates, block_counts=NSA_BLOCKS, block_size=NSA_BLOCK)
    return out + window(q, k, v, NSA_WINDOW)


def gla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    gates = torch.nn.functional.logsigmoid(k.detach().float()) / 16  # the paper's temperature
    return chunk_gla(q, k, v, gates.to(q.dtype))[0]


def layers(seq_len: int) -> list[tuple[str, str, Callable[..., Tensor]]]:
    """For each layer its name, its key of HEADS, and the function of q, k and v."""
    lighthouse = partial(lighthouse_attention, config=LighthouseConfig(3, 4, seq_len // 64))
    eight, grouped, four = HEADS
    both = [
        ("dense, cuDNN", partial(dense_attention, kernel="cudnn")),
        ("dense, FlashAttention-4", partial(dense_attention, kernel="fa4")),
        ("Lighthouse, cuDNN", partial(lighthouse, attention=CausalAttention("cudnn"))),
        ("Lighthouse, FlashAttention-4", partial(lighthouse, attention=CausalAttention("fa4"))),
    ]
    own = [(f"window of {WINDOW:,}, FlashAttention-4", eight, partial(window, size=WINDOW))]
    own += [("gated linear attention", four, gla)]
    own += [("native sparse attention", grouped, nsa)]  # last: it compiles for minutes
    return [(name, heads, function) for heads in (eight, grouped) for name, function in both] + own


@dataclass
class BenchPeers:
    seq_lens: Positives = (98_304, 262_144)  # tokens per sequence
    repeats: Positive = 10  # of each timing; the median counts
    output: Path = Path("results/bench_peers.json")  # the records, written after each layer

    def run(self) -> None:
        for kernel in ("cudnn", "fa4"):
            if reason := unusable_reason(kernel, torch.bfloat16, HEAD_DIM):
                raise ValueError(f"{kernel}: {reason}")
        make_folder(self.output.parent)
        machine = {**this_machine(), "command": " ".join(["python", *sys.argv])}
        rows: list[dict] = []
        for seq_len in self.seq_lens:
            for name, heads, function in layers(seq_len):
                row = {"seq_len": seq_len, "layer": name, "heads": heads}
                try:
                    row |= self.time(seq_len, HEADS[heads], function)
                except Exception as error:  # the others go on
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                rows.append(row)
                print(row, flush=True)
                self.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        print(f"\n{machine}\n\n{table(rows)}\n\nrecords: {self.output}")

    def time(self, seq_len: int, heads: tuple[int, int, int], function: Callable[..., Tensor]) -> dict:
        torch.manual_seed(0)
        inputs = random_qkv(seq_len, heads[0], heads[1], HEAD_DIM, heads[2])
        grad = torch.randn(1, seq_len, heads[0], heads[2], device="cuda", dtype=torch.bfloat16)
        step = partial(forward_backward, function, inputs, grad)
        return {"peak_gib": peak_gib(step), "ms": median(times_ms(step, self.repeats))}


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        measured = [f"{row['ms']:.2f}", f"{row['peak_gib']:.2f}"] if "ms" in row else [row["error"], ""]
        cells.append([f"{row['seq_len']:,}", row["heads"], row["layer"], *measured])
    return markdown_table(("seq_len", "heads", "layer", "ms", "peak GiB"), cells)


if __name__ == "__main__":
    start(BenchPeers)
