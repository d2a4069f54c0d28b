"""Retrieval of a hidden digit by a checkpoint, torchtitan's or a Hugging Face folder: table, JSON, heat map.

    python scripts/niah.py outputs/530m/stage2-10000
    python scripts/niah.py outputs/demo_hf --contexts 64 512

The model attends densely, whatever it was trained with. torchtitan_ext/niah.py describes the prompts.
Exit code: 0 if evaluated, 2 with the reason where that can't be.
"""

import argparse
import sys
from pathlib import Path

import _start

from torchtitan_ext.command_line import Display, at_least, local_path, make_folder

RESULTS = Path("outputs/niah")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=local_path,
        help="a step-N folder, a dump folder for its newest step, or a Hugging Face folder",
    )
    parser.add_argument(
        "--contexts",
        type=at_least(1),
        nargs="+",
        metavar="TOKENS",
        help="(default: of 4096, 8192, 16384, 32768, 65536 and 98304, those that it was trained for)",
    )
    parser.add_argument(
        "--depths",
        type=at_least(0),
        nargs="+",
        metavar="PERCENT",
        help="of the filler before the needle (default: 0, 15, 30, 50, 70, 85, 100)",
    )
    parser.add_argument(
        "--trials",
        metavar="N",
        type=at_least(1),
        default=10,
        help="prompts a context and depth, a multiple of 10 (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=at_least(1),
        default=10,
        help="prompts at once (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="bfloat16 on cuda, float32 on cpu (default: cuda where there is one)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=local_path,
        help=f"(default: {RESULTS}/ and the checkpoint's name)",
    )
    args = parser.parse_args()

    import torch

    from torchtitan_ext import niah

    on_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        parser.error("--device cuda: there is no CUDA device here; take cpu")
    device = torch.device(args.device or ("cuda" if on_gpu else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    candidate = niah.find_candidate(args.checkpoint)
    prompts = niah.Prompts(candidate.tokenizer)
    settings = niah.Settings(
        contexts=tuple(sorted(set(args.contexts or niah.contexts_that_fit(candidate)))),
        depths=tuple(sorted(set(args.depths or niah.DEPTHS))),
        trials=args.trials,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    settings.check(prompts, candidate)
    folder = make_folder(args.output or RESULTS / candidate.name)
    if not args.contexts and (left_out := niah.CONTEXTS[len(settings.contexts) :]):
        print(
            f"left out: contexts {', '.join(map(str, left_out))}, beyond {candidate.max_context_field} "
            f"= {candidate.max_context}",
            file=sys.stderr,
        )
    if candidate.lighthouse:
        print(
            f"note: {candidate.path} is of a first stage (lighthouse.enable = true), not finished under "
            "dense attention, which is what this evaluates",
            file=sys.stderr,
        )
    logits = candidate.load(device, dtype)
    with Display() as display:
        n_tokens = sum(settings.contexts) * len(settings.depths) * settings.trials
        display.start(f"{n_tokens:,} tokens", n_tokens)
        cells = niah.evaluate(logits, prompts, settings, device, display.advance)
    text, paths = niah.write(folder, candidate, settings, cells, dtype)
    print(text)
    for kind, path in zip(("table", "records", "heat map"), paths, strict=True):
        print(f"{kind}: {path}")


if __name__ == "__main__":
    _start.run(main, refused=2)
