"""Train a small run twice on the CPU, once undisturbed and once killed again and again: are the losses the same?

Each kill is a SIGKILL to a random rank at a random moment of a random step; then the same command continues from
the newest checkpoint. Writes the losses of all steps, and resident memory and open files of every rank, which Linux
tells. Takes 10 minutes on 2 cores. Exit code: 0 all is equal, 1 a loss differs in a single bit or a process grows, 2
wrong arguments.
"""

import csv
import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torchtitan_ext.arguments import Positive, start
from torchtitan_ext.console import CommandFailed, make_folder
from torchtitan_ext.experiment.records import LOSS, read_scalars
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.jobs.launch import torchrun, training
from torchtitan_ext.progress import Display

CONFIG = "configs/text/stage1.toml"
SETTINGS = (
    "--training.dataset=python_source",
    "--training.seq_len=256",
    "--lr_scheduler.warmup_steps=20",
    "--lighthouse.top_k=16",
    "--lighthouse.tile_winners=4",
    "--optimizer.lr=3e-3",
    "--metrics.disable_color_printing",
)
RANKS = 2
SAMPLE = 20  # steps between two looks at the processes
NOISE = 0.02  # of the resident memory: growth that counts as none


@dataclass
class Soak:
    steps: Positive = 2000  # of each run
    interval: Positive = 50  # steps between two checkpoints
    kills: Positive = 20  # of the second run
    output: Path = Path("outputs/soak")  # folder of runs and tables; must be new

    def run(self) -> int:
        if self.steps < 3 * SAMPLE:
            raise ValueError(f"--steps {self.steps}: give {3 * SAMPLE} or more")
        last = self.steps - self.interval  # that a kill may follow
        if self.kills >= last:
            raise ValueError(f"--kills {self.kills}: give fewer than --steps - --interval = {last}")
        if self.output.exists():
            raise ValueError(f"{self.output} holds the runs of an earlier soak: delete it, or name another --output")

        self.samples: list[dict] = []
        began, moments = time.monotonic(), random.Random(0)
        steps = sorted(moments.sample(range(1, last), self.kills))
        kills = [(step, moments.randrange(RANKS), moments.uniform(0, 0.1)) for step in steps]
        with Display() as self.display:
            self.display.begin(f"two runs of {self.steps:,} steps", 2 * self.steps)
            self.train("undisturbed")
            for number, kill in enumerate(kills, 1):
                self.display.say(f"kill {number} of {len(kills)}: rank {kill[1]} in or after step {kill[0]}")
                self.train("killed", kill)
            self.train("killed")
        return int(self.report(time.monotonic() - began))

    def train(self, name: str, kill: tuple[int, int, float] | None = None) -> None:
        """Train the run `name` to its end, or to `kill`: step, rank and seconds after the step's log line."""
        folder = make_folder(self.output / name)
        command = [*torchrun(RANKS, CONFIG), *SETTINGS, f"--job.dump_folder={folder}"]
        command += [f"--training.steps={self.steps}", f"--checkpoint.interval={self.interval}"]
        killed, log = False, folder / "log.txt"
        with training(command, log, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") as child:
            for step, *_ in child.steps():
                done = step + self.steps * (name == "killed")
                self.display.show(done, f"{name}, {step}/{self.steps}, in all ")
                if step % SAMPLE == 0 and not killed:
                    self.sample(name, child.process.pid, step)
                if kill and not killed and step >= kill[0]:
                    killed = True
                    time.sleep(kill[2])
                    os.kill(ranks(child.process.pid)[kill[1]], signal.SIGKILL)
        if ((code := child.process.returncode) != 0) != killed:
            ended = f"this start of {folder} ended with exit code {code}, as said above and in {log}"
            raise CommandFailed(f"{child.output}\n{ended}: correct that, and call again with another --output")

    def sample(self, name: str, launcher: int, step: int) -> None:
        for rank, pid in ranks(launcher).items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            memory, files = pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
            sample = {"run": name, "rank": rank, "step": step}
            self.samples.append(sample | {"resident_mib": round(memory, 2), "open_files": files})

    def report(self, seconds: float) -> bool:
        """Write what was seen; returns whether something is wrong."""
        whole, killed = losses(self.output / "undisturbed"), losses(self.output / "killed")
        every = range(1, self.steps + 1)
        unequal = [step for step in every if {*whole[step]} != {*killed[step]} or len(whole[step]) != 1]
        both = [(n, whole[n], killed[n]) for n in every if whole[n] and killed[n]]
        rows = [{"step": n, "undisturbed": a[0], "killed": b[-1], "times_trained": len(b)} for n, a, b in both]
        for name, records in (("losses", rows), ("processes", self.samples)):
            with (self.output / f"{name}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, records[0])
                writer.writeheader()
                writer.writerows(records)

        memory, files = self.growth("resident_mib"), self.growth("open_files")
        table = [
            ("steps, and a checkpoint every", f"{self.steps:,}, {self.interval}"),
            ("ranks", RANKS),
            ("kills", self.kills),
            ("steps trained more than once", sum(row["times_trained"] > 1 for row in rows)),
            ("steps whose losses differ in any bit", len(unequal)),
            ("growth of a rank's memory in the last third of the undisturbed run", f"{memory:+.1%}"),
            ("growth of a rank's open files, likewise", f"{files:+.0%}"),
            ("minutes in all", f"{seconds / 60:.0f}"),
        ]
        print(f"{markdown_table(['', ''], table)}\n\nlosses and processes: {self.output}")
        return bool(unequal) or memory > NOISE or files > 0

    def growth(self, key: str) -> float:
        """The most in the last third of the undisturbed run against the most before, less 1, of the worst rank."""
        most: defaultdict[tuple[int, bool], float] = defaultdict(float)
        for sample in self.samples:
            if sample["run"] == "undisturbed":
                place = sample["rank"], sample["step"] > self.steps * 2 / 3
                most[place] = max(most[place], sample[key])
        return max(most[rank, True] / most[rank, False] for rank in range(RANKS)) - 1


def ranks(launcher: int) -> dict[int, int]:
    """The process of each rank that the torchrun `launcher` started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(pid) for v in environment if v.startswith(b"RANK=")}
    return found


def losses(folder: Path) -> dict[int, list[float]]:
    """The losses that all starts of a run logged for each step."""
    found = defaultdict(list)
    for file in folder.glob("tb/*/*tfevents*"):
        for event in read_scalars(file).get(LOSS, []):
            found[event.step].append(event.value)
    return found


if __name__ == "__main__":
    start(Soak)
