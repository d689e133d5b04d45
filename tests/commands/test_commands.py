"""The command line says what ``apply`` and its like take, does the same, and fails in a sentence with a status."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import snncompress
from snncompress.commands.main import main

MODULE = """
import os
import torch
from torch import nn
from spikingjelly.activation_based import neuron

def build():
    return nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 8), neuron.IFNode(), nn.Linear(8, 2))

def data():
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.rand(8, 4, generator=generator), torch.arange(8) % 2

batches = [data()]

def stop_once(net):
    if os.path.exists("interrupt") and len(net[0].weight) < 8:
        os.unlink("interrupt")
        raise KeyboardInterrupt

def broken():
    return 1 / 0

class Fire(nn.Module):
    def forward(self, x):  # [N, T, C]
        return (x > 0).float()

def own():
    return nn.Sequential(nn.Linear(4, 8), Fire(), nn.Linear(8, 8), Fire(), nn.Linear(8, 2))

def steps():
    return torch.rand(8, 3, 4)
"""
TOML = """
model = "mine:build"
data = "mine:data"
timesteps = 2
criterion = {name = "magnitude", p = 2}
ratio = {"0" = 0.25, "2" = 0.5}
skip = {prune = [], quantize = ["0"]}
bits = 4
output = "small.safetensors"
"""
YAML = """
model: mine:build
data: mine:batches
timesteps: 2
criterion: {name: magnitude, p: 2}
ratio: {"0": 0.25, "2": 0.5}
skip: {prune: [], quantize: ["0"]}
bits: 8
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of the user's, with a module that is found in it."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "c.toml").write_text(TOML)
    (tmp_path / "c.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("mine", None)


def wanted(bits: int) -> snncompress.Plan:
    """The plan of the same call in Python."""
    import mine
    from snncompress_baselines.baselines import Magnitude

    torch.manual_seed(0)
    small = snncompress.apply(
        mine.build(), Magnitude(p=2), {"0": 0.25, "2": 0.5}, bits, data=mine.data(), timesteps=2,
        skip={"prune": [], "quantize": ["0"]},
    )  # fmt: skip
    return snncompress.plan_of(small)


def test_a_file_says_what_apply_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "c.toml", "--report", "r.html"]) == 0
    import mine

    loaded = snncompress.load("small.safetensors", into=mine.build())
    assert snncompress.plan_of(loaded).edits == wanted(4).edits
    out = capsys.readouterr().out
    assert str(wanted(4)) in out
    assert "accuracy (%)" in out
    assert "</html>" in Path("r.html").read_text()


def test_the_line_holds_against_the_file_and_yaml_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "c.yaml", "--bits", "4"]) == 0
    assert str(wanted(4)) in capsys.readouterr().out


def test_what_is_interrupted_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--finetune", "mine:stop_once", "--checkpoint", "run", "--scheduler", "{name: iterative, steps: 2}"]
    assert main(["compress", "c.toml", *steps, "--output", "whole.safetensors", "--checkpoint", "other"]) == 0
    Path("interrupt").touch()
    assert main(["compress", "c.toml", *steps]) == 130
    assert "goes on after the last step" in capsys.readouterr().err
    assert not Path("small.safetensors").exists()
    assert main(["compress", "c.toml", *steps]) == 0
    assert Path("small.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_profile_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    import mine

    torch.manual_seed(0)
    net = mine.build()
    torch.save(net.state_dict(), "w.pt")
    snncompress.save(snncompress.apply(net, "magnitude", 0.5, data=mine.data(), timesteps=2, skip=[]), "half.st")
    about = ["--model", "mine:build", "--weights", "w.pt", "--data", "mine:data", "--timesteps", "2"]
    assert main(["profile", *about, "--csv", "p.csv"]) == 0
    expected = snncompress.profile(net, mine.data(), timesteps=2)
    assert capsys.readouterr().out == f"{expected}\n"
    assert Path("p.csv").read_text() == expected.to_csv()
    assert main(["report", *about, "--compressed", "half.st", "--path", "r.html"]) == 0
    assert "what became of the layers" in Path("r.html").read_text()
    assert main(["info", "half.st"]) == 0


def test_neurons_of_ones_own_from_end_to_end() -> None:
    about = ["--model", "mine:own", "--data", "mine:steps", "--neurons", "mine:Fire", "--time_dim", "1"]
    made = ["--criterion", "magnitude", "--ratio", "0.5", "--skip", "[]", "--output", "own.st"]
    assert main(["compress", *about, *made]) == 0
    assert main(["profile", *about, "--compressed", "own.st", "--csv", "own.csv"]) == 0
    assert [line.split(",")[2] for line in Path("own.csv").read_text().splitlines() if "weight" in line] == [
        "20", "20", "10",  # (4 + 1)·4, (4 + 1)·4, (4 + 1)·2
    ]  # fmt: skip
    assert main(["report", *about, "--compressed", "own.st", "--path", "own.html"]) == 0
    assert "adapter=snncompress.OwnNeurons(Fire, time_dim=1)" in Path("own.html").read_text()


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("", 2, "examples:"),
        ("nonsense", 2, "invalid choice"),
        ("compress", 2, "--model is missing"),
        ("compress no.toml", 2, "no.toml can't be read"),
        ("compress mine.py", 2, "must be a .toml, .yaml or .yml file"),
        ("compress bad.toml", 2, "'nix' is not accepted"),
        ("compress c.toml --repair x", 2, "--repair: 'x' is none of: Literal['membrane', 'current', 'reinit', 'auto']"),
        ("compress c.toml --rat 0.5", 2, "unrecognized arguments"),
        ("compress c.toml --output no/where.st", 2, "there is no folder"),
        ("compress c.toml --output .", 2, "it is a folder"),
        ("compress --model mine:build --report r.html", 2, "--report needs data"),
        ("profile --model mine:build", 2, "--data is missing"),
        ("compress c.toml --model gone:build", 1, "there is no module 'gone'"),
        ("compress c.toml --model mine:gone", 1, "mine has no 'gone'"),
        ("compress c.toml --model mine", 1, "is no import path"),
        ("compress c.toml --model mine:broken", 1, "mine.py, line 22)"),
        ("compress c.toml --finetune mine:broken", 1, "--finetune: mine:broken failed: TypeError: broken() takes 0"),
        ("compress c.toml --model mine:data", 1, "gives a tuple, not a torch.nn.Module"),
        ("compress c.toml --weights c.toml", 1, "holds no tensors"),
        ("compress c.toml --criterion magnitud", 1, "Did you mean 'magnitude'?"),
        ("compress c.toml --ratio 2", 1, "ratio"),
        ("info c.toml", 1, "can't be read"),
    ],
)
def test_errors_are_sentences_with_a_status(
    line: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_text('nix = 1\nmodel = "mine:build"\n')
    try:
        found = main(line.split())
    except SystemExit as stopped:  # argparse's own
        found = stopped.code
    err = capsys.readouterr().err
    assert found == status
    assert message in err
    assert "Traceback" not in err


def test_help_names_all_that_apply_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    out = capsys.readouterr().out
    taken = set(inspect.signature(snncompress.apply).parameters) - {"progress"}
    assert [name for name in taken if f"  --{name} " not in out] == []
    assert 'model = "networks:build"' in out
    assert "share to remove" in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"snncompress {snncompress.__version__}\n"


def test_without_jsonargparse_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["compress", "c.toml"]) == 1
    assert "pip install 'snncompress[cli]'" in capsys.readouterr().err
