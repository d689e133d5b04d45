"""check_target: what a chip holds, asked about layers of many sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from snncompress.interfaces import Limit, Placement, Pooling, Stage, Target

from .common import broken, calling, check_name, check_options

_WIDTHS = (1, 3, 16, 100, 4096)


def check_target(target: Target) -> None:
    """Asks a target about networks of two layers, of one channel to thousands.

    Checked: it is a frozen dataclass; each field that has a value by default has its source, and so have rules of its
    own; limits are :class:`Limit` objects with words, and the same when asked again; a stage of more channels never
    needs less; ``place`` puts stages that exist on whole cores, no two on more than the chip has; the options are JSON.

    Raises:
        PluginError: the first of these that fails, or an exception in the target.

    Example:
        >>> from snncompress_chips import Speck
        >>> check_target(Speck())
    """
    check_name(target)
    if not dataclasses.is_dataclass(target) or not type(target).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise broken(target, "it must be a frozen dataclass, as snncompress.extend.Target is.")
    check_options(target)
    _check_sources(target)
    for pair in _networks():
        before = [_needs(target, stage) for stage in pair]
        if [_needs(target, stage) for stage in pair] != before:
            raise broken(target, f"limits() must depend on the stage alone ({pair[0].name}).")
        with calling(target, "place()"):
            placement = target.place(pair)
        _check_placement(target, pair, placement)
    for narrow, wide in itertools.pairwise(_WIDTHS):
        small, large = _needs(target, _conv(narrow)), _needs(target, _conv(wide))
        for what, needs in small.items():
            more = large.get(what, "")
            if not isinstance(needs, str) and not isinstance(more, str) and needs > more:
                raise broken(target, f"{what}: {wide} channels need {more}, and {narrow} need {needs}.")


def _check_sources(target: Target) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(target) if f.name != "name"}
    without = sorted(name for name, value in fields.items() if value is not None and not target.sources.get(name))
    if without:
        raise broken(target, f"sources must say where {', '.join(without)} is written.")
    if type(target).limits is not Target.limits and not target.sources.get("rules"):
        raise broken(target, "sources must say under 'rules' where what limits() adds is written.")


def _needs(target: Target, stage: Stage) -> dict[str, float | str]:
    with calling(target, f"limits() of {stage}"):
        found = list(target.limits(stage))
    for limit in found:
        if not isinstance(limit, Limit) or not limit.what:
            raise broken(target, f"limits() must yield Limit objects that say what they limit, not {limit!r}.")
    return {limit.what: limit.needs for limit in found}


def _check_placement(target: Target, stages: tuple[Stage, ...], placement: object) -> None:
    if not isinstance(placement, Placement):
        raise broken(target, f"place() must return a Placement, not {placement!r}.")
    names = {stage.name for stage in stages}
    if unknown := set(placement.cores) - names:
        raise broken(target, f"place() names stages that it wasn't asked about: {sorted(unknown)}.")
    for cores in placement.cores.values():
        if not cores or any(core < 0 or (target.cores is not None and core >= target.cores) for core in cores):
            raise broken(target, f"place() must give cores from 0 to {target.cores}, not {cores}.")


def _conv(width: int) -> Stage:
    one = (1, 1)
    pool = (Pooling("average", (2, 2), (2, 2), (0, 0)),)
    return Stage(
        "conv", "convolution", 2, width, (16, 16), (16, 16), (3, 3), one, one, one,
        feeds=("fc",), pooling=pool, neuron="if", reset="subtract", weight_bits=8, scales="layer",
    )  # fmt: skip


def _networks() -> Iterator[tuple[Stage, Stage]]:
    for width in _WIDTHS:
        last = Stage("fc", "linear", width, 10, (8, 8), kernel_size=(8, 8), reads=("conv",), neuron="if", weight_bits=8)
        yield _conv(width), last
