"""examples/external_plugin: an outsider's distribution, built, installed, found and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.lines import code_lines

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "external_plugin"
SOURCE = EXAMPLE / "snncompress_peak" / "__init__.py"

USE = """
import functools, json
import snncompress, snntorch, torch
from snncompress.testing import check_criterion
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

shapes = {}
for framework, neuron in {
    "spikingjelly": LIFNode,
    "snntorch": functools.partial(snntorch.Leaky, beta=0.9, init_hidden=True),
}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), neuron(), nn.Linear(6, 6), neuron(), nn.Linear(6, 3))
    small = snncompress.apply(model, criterion="peak", ratio=0.5, skip=[], data=torch.rand(5, 4), timesteps=3)
    shapes[framework] = [list(p.shape) for p in small.parameters() if p.dim() == 2]

(entry,) = [e for e in snncompress.criteria() if e.name == "peak"]
check_criterion(entry.cls())
print(json.dumps({
    "records": [[r.name, r.distribution, r.status, r.error] for r in snncompress.plugins()],
    "peak": [entry.distribution, entry.summary],
    "criterion": snncompress.plan_of(small).origin["criterion"],
    "shapes": shapes,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed from a wheel that was built without the network."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(target), str(EXAMPLE)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_the_example_is_found_and_prunes(site: Path) -> None:
    for framework in ("spikingjelly", "snntorch"):
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert ["peak", "snncompress-peak 0.1.0", "loaded", ""] in seen["records"]
    assert {status for _, _, status, _ in seen["records"]} == {"loaded"}
    assert seen["peak"][0] == "snncompress-peak 0.1.0"
    assert seen["peak"][1].startswith("The highest membrane potential")
    assert seen["criterion"] == {"name": "peak", "options": {}}
    assert seen["shapes"] == {key: [[3, 4], [3, 3], [3, 3]] for key in ("spikingjelly", "snntorch")}


def test_without_the_example_there_is_no_peak() -> None:
    import snncompress

    assert "peak" not in {entry.name for entry in snncompress.criteria()}


def test_the_plugin_is_as_short_as_the_readme_says() -> None:
    code = code_lines(SOURCE.read_text())
    assert len(code) <= 20, "\n".join(code)
