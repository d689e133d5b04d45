"""``snncompress``, and ``python -m snncompress``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from snncompress.errors import SNNCompressError
from snncompress.saving.describing import describe
from snncompress.version import __version__

from .compressing import compress
from .measuring import profile, report
from .options import UsageError


def info(arguments: Sequence[str]) -> None:
    """Print what a file holds."""
    parser = argparse.ArgumentParser(
        prog="snncompress info", description="Print the plan and the sizes in a file that snncompress.save wrote."
    )
    parser.add_argument("file")
    print(describe(parser.parse_args(arguments).file))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "info": (info, "the plan and the sizes in a file that snncompress.save wrote"),
    "profile": (profile, "parameters, size, operations, energy and firing rates of a network, layer by layer"),
    "compress": (compress, "compress a network as a file says, and write the result"),
    "report": (report, "a page of HTML: before and after, what was done and why"),
}
_EXAMPLES = """\
  snncompress info small.safetensors
  snncompress profile --model networks:build --data datasets:test --timesteps 4
  snncompress compress compress.toml --bits 8
  snncompress compress --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error, 2 for one in the line, 130 where interrupted."""
    listed = "\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="snncompress", usage="snncompress [--help] [--version] command ...",
        description=f"Compressed spiking neural networks.\n\ncommands:\n{listed}\n\nexamples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"snncompress {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(words)
    with warnings.catch_warnings():
        warnings.showwarning = _say
        try:
            COMMANDS[options.command][0](options.rest)
        except UsageError as error:
            print(f"snncompress {options.command}: {error}", file=sys.stderr)
            return 2
        except SNNCompressError as error:
            print(f"snncompress: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(
                "\nsnncompress: interrupted. With checkpoint= the same command goes on after the last step that was "
                "finished; without, it begins anew.",
                file=sys.stderr,
            )
            return 130
    return 0


def _say(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning is a sentence, and where in the library it was raised is nobody's business."""
    print(f"snncompress: {category.__name__}: {message}", file=sys.stderr)
