"""Retrieval of a hidden digit by a checkpoint, torchtitan's or a Hugging Face folder: table, JSON, heat map.

    python scripts/niah.py outputs/small/stage2-1000
    python scripts/niah.py demo_hf --contexts 1024 4096

The model attends densely, whatever it was trained with. torchtitan_ext/niah.py describes the prompts.
Exit code: 0 if evaluated, 2 with the reason where that can't be.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from torchtitan_ext import niah

RESULTS = Path("results/niah")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a step-N folder, a dump folder for its newest step, or a Hugging Face folder",
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        help=f"in tokens (default: those of {', '.join(map(str, niah.CONTEXTS))} trained for)",
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=niah.DEPTHS,
        help=f"percent (default: {', '.join(map(str, niah.DEPTHS))})",
    )
    parser.add_argument("--trials", type=int, default=10, help="a cell (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=10, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="bfloat16 on cuda, float32 on cpu (default here: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder (default: {RESULTS}/ and the checkpoint's name)"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        candidate = niah.find_candidate(args.checkpoint)
        prompts = niah.Prompts(candidate.tokenizer)
        settings = niah.Settings(
            contexts=tuple(sorted(set(args.contexts or niah.contexts_that_fit(candidate)))),
            depths=tuple(sorted(set(args.depths))),
            trials=args.trials,
            seed=args.seed,
            batch_size=args.batch_size,
        )
        settings.check(prompts, candidate)
        folder = args.output or RESULTS / candidate.name
        folder.mkdir(parents=True, exist_ok=True)
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
        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            n_tokens = sum(settings.contexts) * len(settings.depths) * settings.trials
            task = progress.add_task("tokens", total=n_tokens)
            cells = niah.evaluate(
                logits, prompts, settings, device, lambda n: progress.advance(task, n)
            )
        text, paths = niah.write(folder, candidate, settings, cells, dtype)
    except (OSError, ValueError) as error:
        parser.exit(2, f"niah: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    print(text)
    for kind, path in zip(("table", "records", "heat map"), paths, strict=True):
        print(f"{kind}: {path}")


if __name__ == "__main__":
    main()
