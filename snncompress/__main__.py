"""``python -m snncompress``, and the command ``snncompress``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import SNNCompressError
from .saving.describing import describe


def main(arguments: Sequence[str] | None = None) -> int:
    """``snncompress info FILE``: what a file of :func:`snncompress.save` holds. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="snncompress", description="Compressed spiking neural networks.")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="print the plan and the sizes in a file that snncompress.save wrote")
    info.add_argument("file")
    options = parser.parse_args(arguments)
    try:
        print(describe(options.file))
    except SNNCompressError as error:
        print(f"snncompress: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
