"""A share of the generated networks, and that what judges them can fail. By hand: ``python -m tests.generated``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import snncompress
from snncompress import plan_of

from .__main__ import kept, main
from .checks import BAD, Finding, check
from .formats import Format
from .networks import generate
from .oracle import TOLERANCE, difference, silenced
from .stages import STAGES
from .styles import SAMPLES, STYLES, Parallel, Style

SHARE = 32
CHUNK = 8
FORMATS = (
    Format("maps", 4, (4, 4)), Format("maps", 8, (4, 4)), Format("maps", 8, (8,)), Format("maps", 8, (2, 2, 2)),
    Format("tokens", 8, (5,)), Format("vector", 8),
)  # fmt: skip


@pytest.mark.parametrize("start", range(0, SHARE, CHUNK))
def test_generated_networks(start: int) -> None:
    """None is wrong, breaks, or breaks a truth; and the outputs of most show what was silenced."""
    findings = [check(1, index) for index in range(start, start + CHUNK)]
    assert [f for f in findings if f.status in BAD] == []
    assert sum(f.reacts for f in findings) >= CHUNK / 2


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_built_and_makes_what_it_says(name: str) -> None:
    """Of some format in some style: what can't be built is drawn again, so one that never can would go unnoticed."""
    build, _, kinds = STAGES[name]
    rng = random.Random(name)
    built = 0
    for _ in range(60):
        style = rng.choice([s for s in STYLES if s is not Parallel])(rng, 2)
        fmt = rng.choice([f for f in FORMATS if f.kind in kinds])
        try:
            stage, made = build(style, fmt)
        except ValueError:
            continue
        style.finish(stage)
        before = style_shape(style)
        with torch.no_grad():
            y = stage.double().eval()(torch.rand(*before, *fmt.shape, dtype=torch.float64))
        assert y.shape == (*before, *made.shape)
        built += 1
        if built == 3:
            return
    raise AssertionError(f"{name} was built {built} times in 60 tries")


def style_shape(style: Style) -> tuple[int, ...]:
    return (style.steps, SAMPLES) if style.lead == 2 else (style.batch,)


def test_the_oracle_can_fail() -> None:
    """Where one removal too few is silenced, outputs differ: in residual streams that no neuron closes, too."""
    noticed, direct = 0, 0
    for index in (9, 24):
        case = generate(0, index)
        options = {"data": case.data, "timesteps": case.timesteps, "skip": [], "repair": None, **case.options}
        small = snncompress.apply(case.model, "random", 0.5, None, **options)
        edits = json.loads(plan_of(small).to_json())["edits"]
        wanted, got = silenced(case, edits), case.run(small)
        assert difference(case.run(wanted), got) <= TOLERANCE
        fewer = [case.run(silenced(case, [e for e in edits if e is not edit])) for edit in edits]
        noticed += sum(difference(outputs, got) > TOLERANCE for outputs in fewer)
        for module in wanted.modules():
            module._forward_pre_hooks.clear()
        direct += difference(case.run(wanted), got) > TOLERANCE
    assert noticed >= 3
    assert direct == 2


def test_a_network_is_always_the_same() -> None:
    one, other = generate(3, 5), generate(3, 5)
    assert one.stages == other.stages
    assert all(torch.equal(a, b) for a, b in zip(one.run(one.model), other.run(other.model), strict=True))
    assert generate(3, 6).stages != one.stages


def test_a_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "findings.jsonl"
    looked: list[int] = []

    def found(seed: int, index: int) -> Finding:
        looked.append(index)
        return Finding(seed, index, "wrong" if index == 4 else "shrunk", reacts=True)

    monkeypatch.setattr("tests.generated.__main__.check", found)
    monkeypatch.setattr("sys.argv", ["", "--count", "3", "--keep", str(file)])
    assert main() == 0
    file.write_text(file.read_text() + '{"seed": 0, "ind')  # it was killed there
    assert len(list(kept(file))) == 3
    monkeypatch.setattr("sys.argv", ["", "--count", "5", "--keep", str(file)])
    assert main() == 1
    assert looked == [0, 1, 2, 3, 4]
    assert [f.index for f in kept(file)] == looked
    assert "wrong 4" in capsys.readouterr().out
