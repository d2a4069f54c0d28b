"""Read a command's arguments with tyro: a dataclass defines them, and an error is one line."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from .console import NOT_A_PATH, is_address, run


def _positive(texts: list[str]) -> int:
    if not texts[0].isdecimal() or int(texts[0]) < 1:
        raise ValueError(f"{texts[0]!r}: give a whole number, 1 or more")
    return int(texts[0])


_SPEC: Any = PrimitiveConstructorSpec(1, "N", _positive, lambda value: isinstance(value, int), lambda n: [str(n)])
Positive = Annotated[int, _SPEC]
Positives = tuple[Positive, ...]


def parse(kind: Any, arguments: list[str], program: str, **options: Any) -> Any:
    """Parse `arguments` into a `kind`, with options of tyro.cli. Raises ValueError for wrong ones; --help exits."""
    with errors_in_one_line("see --help"):
        parsed = tyro.cli(kind, args=arguments, prog=program, **options)
    for name, value in vars(parsed[0] if isinstance(parsed, tuple) else parsed).items():
        if value == () and (option := f"--{name}".replace("_", "-")) in [a.replace("_", "-") for a in arguments]:
            raise ValueError(f"{option}: give one value or more after it, or leave it out; see --help")
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and is_address(str(path)):
                raise ValueError(f"{path} {NOT_A_PATH}")
    return parsed


@contextmanager
def errors_in_one_line(remedy: str) -> Iterator[None]:
    """Raise ValueError for the error in tyro's box, without frame, title, help texts and the advice to call --help."""
    try:
        with redirect_stderr(StringIO()) as printed:
            yield
    except SystemExit as error:
        if not error.code:  # --help
            raise
        lines = (line.strip("│ ") for line in printed.getvalue().splitlines() if not re.match("[╭╰]|│ [─ ]{6}", line))
        said = re.sub(r"\.? *(Argument helptext: .*)?For full helptext.*", "", " ".join(lines))
        raise ValueError(f"{said}; {remedy}") from None


def start(kind: Any) -> NoReturn:
    """Run a script: `kind` is a dataclass of its arguments with a method `run`; its docstring is the help text."""
    program, description = f"python scripts/{Path(sys.argv[0]).name}", sys.modules[kind.__module__].__doc__
    run(lambda: parse(kind, sys.argv[1:], program, description=description).run(), program)
