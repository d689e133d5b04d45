"""The checks of targets: our own plugins pass them, and every one of them can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest

import snncompress
from snncompress.contract.registry import Entry
from snncompress.extend import Limit, Placement, PluginError, Stage, Target
from snncompress.testing import check_target
from tests.testing.common import named


@pytest.mark.parametrize("entry", snncompress.targets(), ids=named)
def test_our_targets(entry: Entry) -> None:
    check_target(entry.cls())


def made(limits: Callable[[Stage], Iterator[Limit]] | None = None, **body: Any) -> Target:
    space: dict[str, Any] = {"name": "made", "sources": {"rules": "here"}, **body}
    if limits is not None:
        space["limits"] = lambda self, stage: limits(stage)
    cls: Any = make_dataclass("Made", [], bases=(Target,), namespace=space, frozen=True)
    result: Target = cls()
    return result


class Thawed(Target):  # no dataclass of its own, but one by inheritance
    name = "thawed"
    sources: Any = {}  # noqa: RUF012
    extra = 3


def test_a_right_target_passes() -> None:
    check_target(made(lambda stage: iter([Limit.most("channels", stage.out_channels, 10)])))
    check_target(Thawed())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (made(name=""), "'name' must be"),
        (made(options=lambda self: {1: 2}), "come back from JSON"),
        (made(lambda stage: iter([]), sources={}), "under 'rules'"),
        (made(lambda stage: iter([stage.no_such])), "limits\\(\\) of Stage.* failed: AttributeError"),
        (made(lambda stage: iter([3])), "must yield Limit objects"),
        (made(lambda stage: iter([Limit("", 1, 2, True)])), "must yield Limit objects"),
        (
            made(lambda stage: iter([Limit.most("space", -stage.out_channels, 0)])),
            "space: 3 channels need -3, and 1 need -1",
        ),
        (made(place=lambda self, stages: 1 / 0), "place\\(\\) failed: ZeroDivisionError"),
        (made(place=lambda self, stages: {}), "must return a Placement"),
        (made(place=lambda self, stages: Placement({"other": (0,)})), "wasn't asked about"),
        (made(place=lambda self, stages: Placement({"fc": (-1,)})), "must give cores"),
    ],
)
def test_a_broken_target(target: Target, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        check_target(target)


@dataclass(frozen=True)
class Unsourced(Target):
    """A figure from nowhere."""

    name = "unsourced"
    cores: int | None = 4


def test_figures_need_a_source() -> None:
    with pytest.raises(PluginError, match="sources must say where cores is written"):
        check_target(Unsourced())
    check_target(type("Sourced", (Unsourced,), {"sources": {"cores": "a datasheet"}})())


def test_limits_must_not_change_from_call_to_call() -> None:
    calls: list[int] = []

    def count(stage: Stage) -> Iterator[Limit]:
        calls.append(1)
        yield Limit.most("calls", len(calls), 10)

    with pytest.raises(PluginError, match="must depend on the stage alone"):
        check_target(made(count))
