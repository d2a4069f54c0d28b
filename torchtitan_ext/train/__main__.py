"""Train a job (torchrun --nproc_per_node=8 -m torchtitan_ext.train --job.config_file configs/530m/stage1.toml).

Overrides are torchtitan's: --lighthouse.top_k 2048. With a job, --print-config prints it as TOML instead of training,
and --help lists all settings.
"""

import argparse
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan import train

from torchtitan_ext.jobs.job_file import as_toml, parse_job
from torchtitan_ext.patching import check_patched

from .spec import register
from .trainer import LighthouseTrainer


@record
def main(arguments: list[str]) -> None:
    without_job = arguments in (["--help"], ["-h"])  # else torchtitan's --help
    parser = argparse.ArgumentParser("torchtitan_ext.train", None, __doc__, allow_abbrev=False, add_help=without_job)
    parser.add_argument("--job.config_file", "--job.config-file", dest="file", required=True)
    parser.add_argument("--print-config", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    register()
    try:
        if not hasattr(train.Trainer, "checkpointer_cls"):  # which a patch adds
            check_patched()
        job = parse_job(options.file, overrides)
        if not options.print_config and "LOCAL_RANK" not in os.environ:
            raise ValueError("LOCAL_RANK is not set: launch with torchrun, as scripts/train.sh does")
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"torchtitan_ext.train: {error}", file=sys.stderr)
        sys.exit(2)
    if options.print_config:
        print(as_toml(job))
    else:
        train.main(LighthouseTrainer, job)


if __name__ == "__main__":
    main(sys.argv[1:])
