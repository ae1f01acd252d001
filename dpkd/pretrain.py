"""`python -m dpkd.pretrain …` is `dpkd pretrain …`."""

import sys
from collections.abc import Sequence

from dpkd import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `dpkd pretrain` with these arguments, and returns the exit code."""
    return cli.main(["pretrain", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    cli.whole_process(main)
