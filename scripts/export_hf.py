"""Export a checkpoint as a Hugging Face folder, which transformers loads as a plain Llama.

    python scripts/export_hf.py outputs/demo/stage2-200 demo_hf
    python scripts/export_hf.py outputs/530m/stage2/checkpoint/step-16000 530m_hf --dtype bfloat16

Needs no GPU. The model is the one that config.json in the run's dump folder describes.
Exit code: 0 if exported, 2 with the reason where that can't be.
"""

import argparse
import sys
from pathlib import Path

import torch

from torchtitan_ext.export_hf import export, find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a step-N folder, or a dump folder for its newest step"
    )
    parser.add_argument("folder", type=Path, help="where to; must be new or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        if checkpoint.lighthouse:
            print(
                f"warning: {checkpoint.path} is of a first stage (lighthouse.enable = true): the model has "
                "not been finished under dense attention, all that it has from here on; resume it in a "
                "stage 2 and export that",
                file=sys.stderr,
            )
        export(checkpoint, args.folder, getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        parser.exit(2, f"export_hf: {error}\n")
    print(f"{checkpoint.path} exported to {args.folder}")


if __name__ == "__main__":
    main()
