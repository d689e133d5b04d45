"""``snncompress profile`` and ``snncompress report``: what networks cost, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snncompress.errors import OptionError
from snncompress.measuring.profiling import profile as profile_
from snncompress.reports.reporting import report as report_

from .networks import MODEL, WEIGHTS, compressed, network, several
from .options import Option, Options, UsageError

_PROFILE = """\
    snncompress profile --model networks:build --data datasets:test --timesteps 4
    snncompress profile --model networks:build --compressed small.safetensors --data datasets:test --csv layers.csv"""
_REPORT = """\
    snncompress report --model networks:build --weights trained.pt --compressed small.safetensors \\
        --data datasets:test --timesteps 4 --path report.html"""


def profile(arguments: Sequence[str]) -> None:
    """Print the table of one network."""
    own = (
        MODEL,
        WEIGHTS,
        Option("compressed", str | None, "A file of snncompress.save or snncompress compress to measure in its place."),
        Option("csv", str | None, "A file for the table, with all digits."),
    )
    about = "Measure a network on data: parameters, size, operations, energy and firing rates, layer by layer."
    options = Options("profile", about, _PROFILE, own, profile_, {"model"})
    values = options.parsed(arguments)
    options.writable(values, "csv")
    model = network(values)
    if values["compressed"]:
        model = compressed(values["compressed"], model, options, values)
    if values["data"] is None:
        raise UsageError("--data is missing: package.module:name of what the network is measured on.")
    result = options.call(values, model=model)
    print(result)
    if values["csv"]:
        result.to_csv(values["csv"])


def report(arguments: Sequence[str]) -> None:
    """Write the page of a network and of what was made of it."""
    own = (
        MODEL,
        WEIGHTS,
        Option("compressed", str | list[str], "A file of snncompress.save or snncompress compress; or [several].", []),
        Option("path", str, "The file to write.", "report.html"),
    )
    about = "Write one page of HTML: what was done to a network, why, and what came of it, layer by layer."
    options = Options("report", about, _REPORT, own, report_, {"models", "path"})
    values = options.parsed(arguments)
    options.writable(values, "path")
    dense = network(values)
    if values["data"] is None:
        raise UsageError("--data is missing: package.module:name of what the networks are measured on.")
    values["data"] = several(options.resolved("data", values["data"]))
    files = [values["compressed"]] if isinstance(values["compressed"], str) else values["compressed"]
    models = {"dense": dense} | {Path(file).stem: compressed(file, dense, options, values) for file in files}
    if len(models) != 1 + len(files):
        raise OptionError(f"--compressed: two files have one name, or one is called 'dense': {', '.join(files)}.")
    print(options.call(values, models=models, path=values["path"]))
