"""Write docs/settings.md, the reference of every setting that this project adds to torchtitan's.

    python scripts/write_settings.py            # writes docs/settings.md

Meanings, types and defaults are the config classes' own, rules what the checks of a launch answer.
Exit code: 0 if written, 2 where a field has no docstring.
"""

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import _start
import torch
from docstring_parser import DocstringParam, parse_from_object
from torchtitan.config import ConfigManager, JobConfig

from torchtitan_ext.model import LighthouseTransformer, flavors
from torchtitan_ext.model import config as own
from torchtitan_ext.model.checks import job_problems

ROOT = Path(__file__).parents[1]
JOB = "configs/demo/stage1.toml"
REFUSED = (  # one a rule between settings
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


def sections() -> Iterator[tuple[str, type, set[str]]]:
    """Section, its class and which of the class's fields are added to torchtitan's."""
    for section in fields(own.JobConfig):
        yield (
            section.name,
            section.default_factory,
            {f.name for f in fields(section.default_factory)},
        )
    patched = set()
    for patch in (ROOT / "patches").glob("*.patch"):
        for diff in patch.read_text().split("diff --git ")[1:]:
            if diff.startswith("a/torchtitan/config/job_config.py"):
                patched |= set(re.findall(r"^\+    (\w+): ", diff, re.MULTILINE))
    for section in fields(JobConfig):
        if found := patched.intersection(getattr(section.default_factory, "__annotations__", ())):
            yield section.name, section.default_factory, found


def documented(section: str, cls: type, names: set[str]) -> list[DocstringParam]:
    """Each field with the docstring below it, the class's own before those that it inherits.

    Raises:
        ValueError: a field has none.
    """
    params = [
        param
        for base in cls.__mro__
        if is_dataclass(base)
        for param in parse_from_object(base).params
        if param.arg_name in names
    ]
    if missing := names - {param.arg_name for param in params if param.description}:
        raise ValueError(
            f"{section}.{', '.join(sorted(missing))} in {cls.__module__}: no docstring below the field; write one"
        )
    return params


def rule(cls: type, param: DocstringParam) -> str:
    """What the class says of a value of the field's type that is never legal."""
    illegal: dict[str | None, Any] = {"int": -1, "str": "?"}
    if param.type_name not in illegal:
        return ""
    try:
        cls(**{param.arg_name: illegal[param.type_name]})
    except ValueError as error:
        return str(error).partition(": ")[2]
    return ""


def refusals() -> Iterator[tuple[str, str]]:
    for override in REFUSED:
        # Whatever this machine has trained before is no part of the reference.
        arguments = [f"--job.config_file={JOB}", "--job.dump_folder=/nowhere", *override.split()]
        for problem in job_problems(ConfigManager().parse_args(arguments), 2):
            yield f"`{override}`", problem


def models() -> Iterator[tuple[str, ...]]:
    for name, args in flavors.items():
        with torch.device("meta"):
            n_params = sum(p.numel() for p in LighthouseTransformer(args).parameters())
        dense = ", ".join(map(str, args.dense_layers)) or "none"
        kv_heads = args.n_kv_heads or args.n_heads
        numbers = (n_params, args.dim, args.n_layers, args.n_heads, kv_heads, args.vocab_size)
        yield f"`{name}`", *(f"{number:,}" for number in numbers), dense


def table(*rows: tuple[str, ...]) -> str:
    head, *body = (tuple(cell.replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)) + "\n"


def reference() -> str:
    """The whole page. Must run in the repository's root, from which the job file's paths count."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for section, cls, names in sections():
        for param in documented(section, cls, names):
            meaning = " ".join(param.description.split())
            rows.setdefault(section, []).append(
                (
                    f"`{param.arg_name}`",
                    f"`{param.type_name}`",
                    f"`{param.default}`",
                    meaning,
                    rule(cls, param),
                )
            )
    page = f"""# Settings

Written by `make docs` from the config classes and the checks of the code.

What this project adds to torchtitan's settings: a field of a section in a job's TOML, or `--section.field VALUE` on the
command line, which wins. For all settings with the values that a job file gives them, torchtitan's included:

```bash
python -m torchtitan.train --job.config_file {JOB} --help
```
"""
    head = ("field", "type", "default", "meaning", "rule")
    for section in sorted(rows):
        page += f"\n## [{section}]\n\n{table(head, *rows[section])}"
    page += f"""
## Flavors

`model.flavor`. Dense layers are counted from 0 and keep dense attention in stage 1, unless `lighthouse.dense_layers`
names others.

{table(("flavor", "parameters", "dim", "layers", "heads", "KV heads", "vocabulary", "dense layers"), *models())}
## Rules between settings

A launch and the preflight check these before anything is built, and name every problem at once. Here each is broken
by an override of `{JOB}` on 2 ranks:

{table(("override", "what the job says"), *refusals())}"""
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=ROOT / "docs" / "settings.md",
        help="the file to write (default: docs/settings.md)",
    )
    args = parser.parse_args()
    out = args.out.resolve()
    os.chdir(ROOT)
    out.write_text(reference())
    print(out)


if __name__ == "__main__":
    _start.run(main, refused=2)
