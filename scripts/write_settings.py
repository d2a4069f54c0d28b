"""Write docs/settings.md, the reference of every setting that this project adds to torchtitan's.

Meanings, types and defaults are the config classes' own; rules are what the checks of a launch answer.
Exit code: 0 written, 2 a field has no docstring.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from docstring_parser import DocstringParam, parse_from_object

from torchtitan_ext.arguments import start
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.jobs.rules import job_problems
from torchtitan_ext.model import flavors
from torchtitan_ext.model import settings as own
from torchtitan_ext.model.model import meta_model
from torchtitan_ext.train.spec import register

ROOT = Path(__file__).parents[1]
JOB = "configs/text/stage1.toml"
REFUSED = (  # one per rule between settings
    "--model.flavor 7B",
    "--training.dataset books",
    "--training.seq_len 4100",
    "--training.global_batch_size 3",
    "--lighthouse.top_k 512",
    "--lighthouse.levels 2 --lighthouse.top_k 768 --lighthouse.tile_winners 48",
    "--lighthouse.scorer dilated --lighthouse.dilation 3",
    "--lighthouse.dense_layers 2",
    "--parallelism.context_parallel_degree 2 --lighthouse.tile_winners 64",
    "--parallelism.context_parallel_degree 2 --lighthouse.scorer gla",
    "--loss.fuse_output --parallelism.tensor_parallel_degree 2",
    "--loss.fuse_output --parallelism.fsdp_reshard_after_forward always",
    "--lr_scheduler.decay_ratio 0.1",
    "--lr_scheduler.total_steps 100",
    "--training.steps 20",
)
FIELDS = ("field", "type", "default", "meaning")
FLAVORS = ("flavor", "parameters", "dim", "layers", "heads", "KV heads", "vocabulary", "dense layers")


@dataclass
class WriteSettings:
    output: Path = ROOT / "docs" / "settings.md"  # the file to write

    def run(self) -> None:
        output = self.output.resolve()
        os.chdir(ROOT)
        output.write_text(reference())
        print(output)


def documented(section: str, cls: type) -> list[DocstringParam]:
    """Each field with the docstring below it, the class's own before those that it inherits.

    Raises ValueError for a field without one.
    """
    params = [param for base in cls.__mro__ if is_dataclass(base) for param in parse_from_object(base).params]
    described = {param.arg_name for param in params if param.description}
    if missing := sorted({field.name for field in fields(cls)} - described):
        raise ValueError(f"{section}.{', '.join(missing)} in {cls.__module__}: no docstring below the field; write one")
    return params


def setting_rows(section: str, cls: type) -> Iterator[tuple[str, ...]]:
    for param in documented(section, cls):
        values = (f"`{value}`" for value in (param.arg_name, param.type_name, param.default))
        yield *values, " ".join(param.description.split())


def refusals() -> Iterator[tuple[str, str]]:
    for override in REFUSED:
        # Whatever this machine has trained before is no part of the reference.
        job = parse_job(JOB, ["--job.dump_folder=/nowhere", *override.split()])
        for problem in job_problems(job, 2):
            yield f"`{override}`", problem


def flavor_rows() -> Iterator[tuple[str, ...]]:
    for name, args in flavors.items():
        n_params = sum(p.numel() for p in meta_model(args).parameters())
        kv_heads = args.n_kv_heads or args.n_heads
        numbers = (n_params, args.dim, args.n_layers, args.n_heads, kv_heads, args.vocab_size)
        dense = ", ".join(map(str, args.dense_layers)) or "none"
        yield f"`{name}`", *(f"{number:,}" for number in numbers), dense


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return markdown_table(head, cells, "l" * len(head)) + "\n"


def reference() -> str:
    """The whole page. Must run in the repository's root, from which the job file's paths count."""
    register()
    sections = sorted((section.name, section.default_factory) for section in fields(own.JobConfig))
    tables = [f"\n## [{name}]\n\n{table(FIELDS, setting_rows(name, cls))}" for name, cls in sections]
    return f"""# Settings

Written by `make docs` from the config classes and the checks of the code.

What this project adds to torchtitan's settings: a field of a section in a job's TOML, or `--section.field VALUE` on the
command line, which wins. For all settings with the values that a job file gives them, torchtitan's included:

```bash
python -m torchtitan_ext.train --job.config_file {JOB} --help
```
{"".join(tables)}
## Flavors

`model.flavor`. Dense layers are counted from 0 and keep dense attention in stage 1, unless `lighthouse.dense_layers`
names others.

{table(FLAVORS, flavor_rows())}
## Rules between settings

A launch and the preflight check these before anything is built, and name every problem at once. Here each is broken
by an override of `{JOB}` on 2 ranks:

{table(("override", "what the job says"), refusals())}"""


if __name__ == "__main__":
    start(WriteSettings)
