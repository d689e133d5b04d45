"""``snncompress compress``: a network and settings in, a compressed file, a table and a report out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from snncompress.model.plan import plan_of
from snncompress.pruning.apply import apply
from snncompress.reports.reporting import Measured, written
from snncompress.saving.storage import save

from .networks import MODEL, WEIGHTS, framework, network, several
from .options import Option, Options, UsageError

ABOUT = "Compress a network: remove channels or weights, quantize, repair; write it into one file; say what came of it."
EXAMPLE = """\
    # compress.toml, for: snncompress compress compress.toml --bits 8
    model = "networks:build"          # def build(): in networks.py
    weights = "trained.pt"
    data = "datasets:calibration"     # a tensor, an (x, y) batch, a DataLoader
    test = "datasets:test"
    timesteps = 4
    criterion = "svs"                 # or {name = "cqp", tau = 0.9}
    ratio = 0.5                       # or {"conv*" = 0.5}; or budget = {energy = 0.5}
    bits = 4
    output = "small.safetensors"
    report = "report.html"
    checkpoint = "run"                # interrupted, the same command goes on from there"""
OWN = (
    MODEL,
    WEIGHTS,
    Option("output", str | None, "The file to write: snncompress.load reads it."),
    Option("report", str | None, "A page of HTML to write: what was done, and what came of it."),
    Option(
        "test",
        str | None,
        "Data to measure on, package.module:name; by default those that calibrate.",
    ),
)


def compress(arguments: Sequence[str]) -> None:
    """Do what the line and its file say, and print the plan and a table of before and after."""
    options = Options("compress", ABOUT, EXAMPLE, OWN, apply, {"model", "progress"})
    values = options.parsed(arguments)
    options.writable(values, "output", "report")
    if values["report"] and values["data"] is None and values["test"] is None:
        raise UsageError("--report needs data to measure on: --data or --test names some.")
    torch.manual_seed(values["seed"])  # a model and data that are drawn at random are the same in a run that goes on
    model = network(values)
    values["data"], test = (several(options.resolved(name, values[name])) for name in ("data", "test"))
    small = options.call(values, model=model)
    print(plan_of(small))
    if values["output"]:
        save(small, values["output"], adapter=framework(options, values))
        print(f"\n{values['output']}: {os.path.getsize(values['output']):,} bytes")
    data = values["data"] if test is None else test
    if data is None:
        print("\nNot measured: there are no data. --data or --test names some.")
        return
    names = ("timesteps", "forward", "adapter", "neurons", "time_dim")
    how = {name: options.resolved(name, values[name]) for name in names}
    found = Measured.of({"before": model, "after": small}, data, **how)
    print(f"\n{found}")
    if values["report"]:
        print(f"\n{written(found, values['report'])}: the report")
