"""Train a small run twice on the CPU, undisturbed and with random kills, and compare all losses bit by bit.

Each kill is a SIGKILL to a random rank at a random moment of a random step; then torchrun restarts all ranks from the
newest checkpoint. Writes all losses, and the undisturbed ranks' resident memory and open files. Takes 10 minutes on 2
cores. Exit code: 0 equal losses, 1 a loss differs in any bit or a process grows, 2 wrong arguments.
"""

import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from torchtitan_ext.arguments import Positive, start
from torchtitan_ext.console import CommandFailed, make_folder
from torchtitan_ext.experiment.records import LOSS, read_scalars
from torchtitan_ext.figures import markdown_table, write_csv
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
)
RANKS = 2
INTERVAL = 50  # steps between two checkpoints
PER_KILL = 100  # steps of the second run
SAMPLE = 20  # steps between two looks at the processes
APART = 5  # least steps between two kills: the log lags behind
NOISE = 0.02  # of the resident memory: smaller growth is ignored


@dataclass
class Soak:
    steps: Positive = 2000  # of each run
    output: Path = Path("outputs/soak")  # folder of runs and tables; must be new

    def run(self) -> int:
        if self.steps < PER_KILL:
            raise ValueError(f"--steps {self.steps}: give {PER_KILL} or more")
        if self.output.exists():
            raise ValueError(f"{self.output} holds the runs of an earlier soak: delete it, or name another --output")

        self.samples: list[tuple] = []  # step, rank, MiB resident, open files
        moments = random.Random(0)
        steps = moments.sample(range(1, self.steps - INTERVAL, APART), self.steps // PER_KILL)
        kills = {step + moments.randrange(APART - 2): moments.randrange(RANKS) for step in steps}
        with Display() as self.display:
            self.train("undisturbed", {})
            self.train("killed", kills)
        return int(self.report())

    def train(self, name: str, kills: dict[int, int]) -> None:
        """Train the run `name` to its end. kills: the rank to kill, by the step whose log line it follows."""
        folder = make_folder(self.output / name)
        command = [*torchrun(RANKS, CONFIG), *SETTINGS, f"--job.dump_folder={folder}"]
        command += [f"--training.steps={self.steps}", f"--checkpoint.interval={INTERVAL}"]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PET_MAX_RESTARTS": str(len(kills))}
        self.display.begin(name, self.steps)
        with training(command, folder / "log.txt", **environment) as child:
            for step, *_ in child.steps():
                self.display.show(step, f"{step}/{self.steps}, ")
                if step in kills:
                    self.display.say(f"rank {kills[step]} is killed in or after step {step}")
                    time.sleep(random.uniform(0, 0.1))
                    ranks(child.process.pid)[kills[step]].kill()
                elif step % SAMPLE == 0 and not kills:
                    for rank, process in ranks(child.process.pid).items():
                        self.samples.append((step, rank, process.memory_info().rss / 2**20, process.num_fds()))
        if code := child.process.returncode:
            ended = f"{folder} ended with exit code {code}, as said above and in its log.txt"
            raise CommandFailed(f"{child.output}\n{ended}: correct that, and call again with another --output")

    def report(self) -> bool:
        """Write the records; return whether something is wrong."""
        undisturbed, killed = losses(self.output / "undisturbed"), losses(self.output / "killed")
        every = range(1, self.steps + 1)
        unequal = [step for step in every if {*undisturbed[step]} != {*killed[step]} or len(undisturbed[step]) != 1]
        rows = [(n, undisturbed[n][0], killed[n][-1], len(killed[n])) for n in every if undisturbed[n] and killed[n]]
        write_csv(self.output / "losses.csv", ("step", "undisturbed", "killed", "times_trained"), rows)
        write_csv(self.output / "processes.csv", ("step", "rank", "resident_mib", "open_files"), self.samples)

        usage = np.array(self.samples).reshape(-1, RANKS, 4)[..., 2:]
        last_third = len(usage) * 2 // 3
        memory, files = (usage[last_third:].max(0) / usage[:last_third].max(0)).max(0) - 1  # of the worst rank
        table = [
            ("steps, and a checkpoint every", f"{self.steps:,}, {INTERVAL}"),
            ("ranks", RANKS),
            ("kills", self.steps // PER_KILL),
            ("steps trained more than once", sum(n_trained > 1 for *_, n_trained in rows)),
            ("steps whose losses differ in any bit", len(unequal)),
            ("growth of a rank's memory in the last third of the undisturbed run", f"{memory:+.1%}"),
            ("growth of a rank's open files, likewise", f"{files:+.0%}"),
        ]
        print(f"{markdown_table(['', ''], table)}\n\nlosses and processes: {self.output}")
        return bool(unequal) or memory > NOISE or files > 0


def ranks(launcher: int) -> dict[int, psutil.Process]:
    """The process of each rank that the torchrun `launcher` started."""
    return {int(process.environ()["RANK"]): process for process in psutil.Process(launcher).children()}


def losses(folder: Path) -> dict[int, list[float]]:
    """The losses that all starts of a run logged for each step."""
    values = defaultdict(list)
    for file in folder.glob("tb/*/*tfevents*"):
        for event in read_scalars(file).get(LOSS, []):
            values[event.step].append(event.value)
    return values


if __name__ == "__main__":
    start(Soak)
