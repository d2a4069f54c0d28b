"""Run `python -m torchtitan_ext <verb>`."""

import os
import sys

from .console import run


def entry() -> None:
    sys.path.insert(1, os.getcwd())  # as in training, for modules that a job names

    def main() -> int | None:
        from .cli import main  # here, so that a missing package ends in one line

        return main(sys.argv[1:])

    run(main, " ".join(["python -m torchtitan_ext", *sys.argv[1:2]]))


if __name__ == "__main__":
    entry()
