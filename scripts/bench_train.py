"""Train a few steps of several job files in one call: speed, memory, MFU and the ratio to the first.

    python scripts/bench_train.py                                       # the 530M recipe, dense and stage 1
    python scripts/bench_train.py --nproc 2 --run dense configs/530m/dense.toml \\
        --run selective configs/530m/stage1.toml activation_checkpoint.mode=selective

A run is a name, a job file and settings of it. Every run trains on local sources, one sequence a device and
step, without checkpoints. One that fails, for want of memory say, is reported and the others go on.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tomli
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_ext.records import CONFIG_FILE, LOSS, SECONDS, TOKENS_PER_SECOND
from torchtitan_ext.runner import child_environment, torchrun

MFU, PEAK = "mfu(%)", "memory/max_reserved(GiB)"
WARMUP = 3  # steps that compile and fill caches
RECIPE = [["dense", "configs/530m/dense.toml"], ["stage1", "configs/530m/stage1.toml"]]


def train(config: str, settings: list[str], args: argparse.Namespace, folder: Path) -> str | None:
    """Run one job; returns the last lines of its output if it failed."""
    command = [
        *(*torchrun(args.nproc, config), f"--job.dump_folder={folder}"),
        *("--checkpoint.no_enable", f"--training.steps={args.steps}"),
        *("--training.global_batch_size=-1", "--training.dataset=python_source"),
        *("--metrics.log_freq=1", "--metrics.enable_tensorboard"),
        *(f"--{setting}" for setting in [*settings, *args.settings]),
    ]
    if args.dataset_path:
        command.append(f"--training.dataset_path={args.dataset_path}")
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=child_environment()
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return "\n".join((done.stdout + done.stderr).splitlines()[-60:]) if done.returncode else None


def record(name: str, config: str, settings: list[str], n_gpus: int, folder: Path) -> dict:
    """One row, from the run's TensorBoard events; medians over the steps after the warm-up."""
    [file] = folder.glob("**/events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    values = {
        tag: [point.value for point in events.Scalars(tag)]
        for tag in (LOSS, SECONDS, TOKENS_PER_SECOND, MFU, PEAK)
    }
    job = json.loads((folder / CONFIG_FILE).read_text())
    return {
        "name": name,
        "config": " ".join([config, *settings]),
        "n_gpus": n_gpus,
        "seq_len": job["training"]["seq_len"],
        "tok_s_gpu": statistics.median(values[TOKENS_PER_SECOND][WARMUP:]),
        "step_s": statistics.median(values[SECONDS][WARMUP:]),
        "peak_gib": max(values[PEAK]),
        "mfu": statistics.median(values[MFU][WARMUP:]),
        "loss_first": values[LOSS][0],
        "loss_last": values[LOSS][-1],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| run | devices | seq_len | tok/s a device | step s | peak GiB | MFU % | loss | against the first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["tok_s_gpu"] / rows[0]["tok_s_gpu"]
        lines.append(
            f"| {row['name']} | {row['n_gpus']} | {row['seq_len']:,} | {row['tok_s_gpu']:,.0f} | {row['step_s']:.3f} "
            f"| {row['peak_gib']:.1f} | {row['mfu']:.1f} | {row['loss_first']:.2f} to {row['loss_last']:.2f} "
            f"| {ratio:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--run", action="append", nargs="+", metavar=("NAME CONFIG", "section.field=value")
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a device")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dataset-path", help="a tree of sources (default: the standard library)")
    parser.add_argument(
        "--settings", nargs="+", default=[], help="section.field=value for every run"
    )
    folder = Path("results" if on_gpu else "outputs")
    parser.add_argument("--output", type=Path, default=folder / "bench_train.json")
    args = parser.parse_args()
    if args.steps <= WARMUP:
        parser.error(f"--steps {args.steps}: must be more than the {WARMUP} steps of warm-up")
    runs = args.run or RECIPE
    for run in runs:
        if len(run) < 2 or not Path(run[1]).is_file():
            parser.error(f"--run {' '.join(run)}: give a name and the path of a job file")
        tomli.loads(Path(run[1]).read_text())

    rows, failed = [], []
    for number, (name, config, *settings) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {name}: {args.steps} steps of {config}", flush=True)
        with tempfile.TemporaryDirectory() as tmp:
            error = train(config, settings, args, Path(tmp))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(tmp, "log.txt"), args.output.parent / f"bench_train_{name}.log")
            if error:
                print(f"{name} failed:\n{error}", file=sys.stderr)
                failed.append(name)
                continue
            rows.append(record(name, config, [*settings, *args.settings], args.nproc, Path(tmp)))
    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "command": " ".join(["python", *sys.argv]),
    }
    args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\n{machine}\n\n{table(rows)}\n\nrecords: {args.output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
