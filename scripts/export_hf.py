"""Export a checkpoint as a Hugging Face folder, which transformers loads as a plain Llama.

    python scripts/export_hf.py outputs/passkey/stage2-900 outputs/demo_hf
    python scripts/export_hf.py outputs/530m/stage2-10000/checkpoint/step-16000 530m_hf --dtype bfloat16

Needs no GPU. The model is the one that config.json in the run's dump folder describes.
Exit code: 0 if exported, 2 with the reason where that can't be.
"""

import argparse
import sys

import _start

from torchtitan_ext.command_line import Display, local_path, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=local_path, help="a step-N folder, or a dump folder for its newest step"
    )
    parser.add_argument("folder", type=local_path, help="where to; must be new or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    args = parser.parse_args()

    import torch

    from torchtitan_ext.export_hf import export, find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint)
    if checkpoint.lighthouse:
        print(
            f"warning: {checkpoint.path} is of a first stage (lighthouse.enable = true): the model has "
            "not been finished under dense attention, all that it has from here on; resume it in a "
            "stage 2 and export that",
            file=sys.stderr,
        )
    dtype = getattr(torch, args.dtype)
    with Display() as display:
        n_bytes = checkpoint.n_bytes(dtype)
        display.start(f"{size(n_bytes)} read and written", 2 * n_bytes)
        export(checkpoint, args.folder, dtype, display.advance)
    print(f"{checkpoint.path} exported to {args.folder}")


if __name__ == "__main__":
    _start.run(main, refused=2)
