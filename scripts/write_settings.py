"""Write docs/settings.md, the reference of every setting that this project adds to torchtitan's.

Meanings, types and defaults are the config classes' own. Exit code: 0 written, 2 a field has no docstring.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from docstring_parser import parse_from_object

from torchtitan_ext.arguments import start
from torchtitan_ext.figures import markdown_table
from torchtitan_ext.model import flavors
from torchtitan_ext.model import settings as own
from torchtitan_ext.model.model import meta_model
from torchtitan_ext.train.spec import register

FIELDS = ("field", "type", "default", "meaning")
FLAVORS = ("flavor", "parameters", "dim", "layers", "heads", "KV heads", "vocabulary", "dense layers")


@dataclass
class WriteSettings:
    output: Path = Path(__file__).parents[1] / "docs" / "settings.md"  # the file to write

    def run(self) -> None:
        self.output.write_text(reference())
        print(self.output)


def setting_rows(section: str, cls: type) -> Iterator[tuple[str, ...]]:
    """Each field with the docstring below it, the class's own before those that it inherits.

    Raises ValueError for a field without one.
    """
    params = [param for base in cls.__mro__ if is_dataclass(base) for param in parse_from_object(base).params]
    described = {param.arg_name for param in params if param.description}
    if missing := sorted({field.name for field in fields(cls)} - described):
        raise ValueError(f"{section}.{', '.join(missing)} in {cls.__module__}: no docstring below the field; write one")
    for param in params:
        default = "[]" if param.default == "field(default_factory=list)" else param.default
        values = (f"`{value}`" for value in (param.arg_name, param.type_name, default))
        yield *values, " ".join(param.description.split())


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
    """The whole page."""
    register()
    sections = sorted((section.name, section.default_factory) for section in fields(own.JobConfig))
    tables = [f"\n## [{name}]\n\n{table(FIELDS, setting_rows(name, cls))}" for name, cls in sections]
    return f"""# Settings

Settings that this project adds to torchtitan's. Put them into a job's TOML, or pass `--section.field VALUE` on the
command line, which wins. A file that begins with `extends = "stage1.toml"` holds only what differs from that one. To
list all settings of a job, torchtitan's included:

```bash
python -m torchtitan_ext.train --job.config_file configs/text/stage1.toml --help
```
{"".join(tables)}
## Flavors

`model.flavor` names one. Its dense layers, counted from 0, keep dense attention in stage 1.

{table(FLAVORS, flavor_rows())}"""


if __name__ == "__main__":
    start(WriteSettings)
