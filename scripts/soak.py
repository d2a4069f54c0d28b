"""Train a small run twice on the CPU, once undisturbed and once killed again and again: are the losses the same?

    python scripts/soak.py    # 2,000 steps, a checkpoint every 50, 20 kills; 10 minutes on 2 cores

Each kill is a SIGKILL to a random rank at a random moment of a random step; then the same command continues from
the newest checkpoint. The moments come from --seed. Writes the losses of all steps, resident memory and open files
of every rank and a plot, and prints a table. Exits with 1 if a loss differs in a single bit or a process grows.
"""

import argparse
import csv
import os
import random
import signal
import time
from collections import defaultdict, deque
from pathlib import Path

import _start

from torchtitan_ext.command_line import CommandFailed, Display, at_least, local_path, make_folder

CONFIG = "configs/demo/stage1.toml"
SETTINGS = (
    *(
        "--training.dataset=python_source",
        "--training.seq_len=256",
        "--lr_scheduler.warmup_steps=20",
    ),
    *("--lighthouse.top_k=16", "--lighthouse.tile_winners=4", "--optimizer.lr=3e-3"),
    "--metrics.disable_color_printing",
)
SAMPLE = 20  # steps between two looks at the processes
NOISE = 0.02  # of the resident memory: growth that counts as none


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, metavar, type_, default, what in (
        ("--steps", "N", at_least(3 * SAMPLE), 2000, "of each run"),
        ("--interval", "STEPS", at_least(1), 50, "between two checkpoints"),
        ("--kills", "N", at_least(1), 20, "of the second run"),
        ("--nproc", "N", at_least(1), 2, "ranks of each run"),
        ("--seed", "N", int, 0, "of the kills' moments"),
        (
            "--output",
            "FOLDER",
            local_path,
            Path("outputs/soak"),
            "of runs, tables and plot; must be new",
        ),
    ):
        parser.add_argument(
            name,
            metavar=metavar,
            type=type_,
            default=default,
            help=f"{what} (default: %(default)s)",
        )
    args = parser.parse_args()
    if args.kills >= args.steps - args.interval:
        parser.error(
            f"--kills {args.kills}: they come before the last checkpoint, so --steps {args.steps} less --interval "
            f"{args.interval} must be more"
        )
    if not Path("/proc/self/statm").exists():
        parser.error("the ranks' memory is read from /proc, which is not here: call on Linux")
    if not Path(CONFIG).is_file():
        raise ValueError(f"{CONFIG} is not in {Path.cwd()}: call from the repository's root")
    if args.output.exists():
        raise ValueError(
            f"{args.output} holds the runs of an earlier soak: delete it, or name another --output"
        )

    moments = random.Random(args.seed)
    steps = sorted(moments.sample(range(1, args.steps - args.interval), args.kills))
    kills = [(step, moments.randrange(args.nproc), moments.uniform(0, 0.1)) for step in steps]
    with Display() as display:
        display.start(f"two runs of {args.steps:,} steps", 2 * args.steps)
        soak = Soak(args, display)
        soak.start("undisturbed")
        for number, kill in enumerate(kills, 1):
            display.say(f"kill {number} of {len(kills)}: rank {kill[1]} in or after step {kill[0]}")
            soak.start("killed", kill)
        soak.start("killed")
    return int(report(args, soak))


class Soak:
    """Starts the two runs, and keeps what it sees of their processes."""

    def __init__(self, args: argparse.Namespace, display: Display) -> None:
        self.args, self.display = args, display
        self.starts: list[dict[str, object]] = []
        self.samples: list[dict[str, object]] = []
        self.began = time.monotonic()

    def start(self, name: str, kill: tuple[int, int, float] | None = None) -> None:
        """Train the run `name` to its end, or to `kill`: step, rank and seconds after the step's log line."""
        from torchtitan_ext.model.checkpoints import complete_steps
        from torchtitan_ext.runner import STEP_LINE, torchrun, training

        args, folder = self.args, make_folder(self.args.output / name)
        first = max([0, *complete_steps(folder / "checkpoint")]) + 1
        command = [*torchrun(args.nproc, CONFIG), *SETTINGS]
        command += [f"--job.dump_folder={folder}", f"--training.steps={args.steps}"]
        command += [f"--checkpoint.interval={args.interval}"]
        step, last, killed = 0, deque(maxlen=60), False
        log = folder / "log.txt"
        on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with training(command, log, **on_cpu) as (process, lines):
            for line in lines:
                last.append(line)
                match = STEP_LINE.search(line)
                if match is None or int(match[1]) <= step:  # each rank logs it
                    continue
                step = int(match[1])
                done = step + args.steps * (name == "killed")
                self.display.advance(
                    done - self.display.done, f"{name}, {step}/{args.steps}, in all "
                )
                if step % SAMPLE == 0 and not killed:
                    self.sample(name, process.pid, step)
                if kill and not killed and step >= kill[0]:
                    killed = True
                    time.sleep(kill[2])
                    os.kill(ranks(process.pid)[kill[1]], signal.SIGKILL)
        self.starts.append(
            {"run": name, "first": first, "last": step, "killed_rank": kill and kill[1]}
        )
        if (process.returncode != 0) != killed:
            raise CommandFailed(
                f"{''.join(last)}\nthis start of {folder} ended with exit code {process.returncode}, as said above and "
                f"in {log}: mend that, and call again with another --output"
            )

    def sample(self, name: str, launcher: int, step: int) -> None:
        for rank, pid in ranks(launcher).items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.samples.append(
                {
                    "run": name,
                    "start": len(self.starts),
                    "rank": rank,
                    "step": step,
                    "resident_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
                    "open_files": len(os.listdir(f"/proc/{pid}/fd")),
                }
            )


def ranks(launcher: int) -> dict[int, int]:
    """The process of each rank, of those that the torchrun `launcher` started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(pid) for v in environment if v.startswith(b"RANK=")}
    return found


def losses(folder: Path) -> dict[int, list[float]]:
    """The losses that all starts of a run logged for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from torchtitan_ext.records import LOSS

    found = defaultdict(list)
    for file in folder.glob("tb/*/*tfevents*"):
        for event in EventAccumulator(str(file), {"scalars": 0}).Reload().Scalars(LOSS):
            found[event.step].append(event.value)
    return found


def report(args: argparse.Namespace, soak: Soak) -> bool:
    """Write what was seen; returns whether something is wrong."""
    whole, killed = losses(args.output / "undisturbed"), losses(args.output / "killed")
    unequal = [
        step
        for step in range(1, args.steps + 1)
        if {*whole[step]} != {*killed[step]} or len(whole[step]) != 1
    ]
    rows = [
        {
            "step": step,
            "undisturbed": whole[step][0],
            "killed": killed[step][-1],
            "times_trained": len(killed[step]),
        }
        for step in sorted(whole.keys() & killed.keys())
    ]
    write(args.output / "losses.csv", rows)
    write(args.output / "starts.csv", soak.starts)
    write(args.output / "processes.csv", soak.samples)
    plot(args.output / "soak.png", soak, rows)

    memory = max(growth(soak.samples, "resident_mib", args.steps).values())
    files = max(growth(soak.samples, "open_files", args.steps).values())
    n_kills = sum(start["killed_rank"] is not None for start in soak.starts)
    table = [
        ("steps, and a checkpoint every", f"{args.steps:,}, {args.interval}"),
        ("ranks", args.nproc),
        ("kills", n_kills),
        ("steps trained more than once", sum(row["times_trained"] > 1 for row in rows)),
        ("steps whose losses differ in any bit", len(unequal)),
        ("growth of a rank's memory in the last third of the undisturbed run", f"{memory:+.1%}"),
        ("growth of a rank's open files, likewise", f"{files:+.0%}"),
        ("minutes in all", f"{(time.monotonic() - soak.began) / 60:.0f}"),
    ]
    print("".join(f"| {name} | {value} |\n" for name, value in [("", ""), ("---", "---:"), *table]))
    print(f"losses, starts, processes and plot: {args.output}")
    return bool(unequal) or memory > NOISE or files > 0


def growth(samples: list[dict[str, object]], key: str, steps: int) -> dict[int, float]:
    """By rank: the most in the last third of the undisturbed run against the most before, less 1."""
    early, late = defaultdict(list), defaultdict(list)
    for sample in samples:
        if sample["run"] == "undisturbed":
            part = late if sample["step"] > steps * 2 / 3 else early
            part[sample["rank"]].append(sample[key])
    return {rank: max(late[rank]) / max(early[rank]) - 1 for rank in early}


def write(file: Path, rows: list[dict[str, object]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(file: Path, soak: Soak, rows: list[dict[str, object]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, memory, files) = plt.subplots(
        3, figsize=(9, 9), sharex=True, layout="constrained"
    )
    steps = [row["step"] for row in rows]
    loss.plot(
        steps, [row["undisturbed"] for row in rows], lw=2.5, color="0.75", label="undisturbed"
    )
    loss.plot(
        steps, [row["killed"] for row in rows], lw=0.7, color="C3", label="killed and resumed"
    )
    for start in soak.starts:
        if start["killed_rank"] is not None:
            loss.axvline(start["last"], color="C3", alpha=0.3, lw=0.8)
    loss.set_ylabel("loss, nats a token")
    loss.legend()
    curves = defaultdict(list)
    for sample in soak.samples:
        curves[sample["run"], sample["start"], sample["rank"]].append(sample)
    for (run, _, _), samples in curves.items():
        color = "0.5" if run == "undisturbed" else "C3"
        for axis, key in ((memory, "resident_mib"), (files, "open_files")):
            axis.plot([s["step"] for s in samples], [s[key] for s in samples], color=color, lw=0.9)
    memory.set_ylabel("resident memory of a rank, MiB")
    files.set_ylabel("open files of a rank")
    for axis in (memory, files):
        axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    files.xaxis.set_major_formatter("{x:,.0f}")
    files.set_xlabel("step (vertical lines: kills)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    _start.run(main)
