"""One network, through the library and against the oracle: what came of it."""

from __future__ import annotations

import json
import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from snncompress_rescaw import ReScaW
from snncompress_schedules import Iterative
from torch import Tensor, nn

import snncompress
from snncompress import Plan, PluginError, SNNCompressError, plan_of

from .networks import Case, generate
from .oracle import LAYERS, TOLERANCE, difference, silenced

CRITERIA = (*["random"] * 5, "magnitude", "firing_rate", "svs", "sca")  # the last three prefer to take what is silent
BAD = ("wrong", "crashed", "raw", "untrue", "slow", "not run")
"""What must not be: a wrong output, a result that doesn't run, an error that isn't the library's own, another of its
truths that doesn't hold, no end within a minute, and a network that didn't run in the first place."""
_FOREIGN = re.compile(r"\w+Error\b|mat1|size of tensor|invalid for input|must match|expand\(|torch\.\w+\(|0x[0-9a-f]+")
SECONDS = 60


@dataclass
class Finding:
    """What came of one network."""

    seed: int
    index: int
    status: str
    detail: str = ""
    reacts: bool = False
    stages: list[str] = field(default_factory=list)
    left: float = 1.0
    """Share of the parameters."""
    reasons: list[str] = field(default_factory=list)
    more: str = ""
    """Why it was refused further compression."""
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class _TooSlow(Exception):  # noqa: N818
    """No end."""


class _Untrue(Exception):  # noqa: N818
    """A truth doesn't hold."""


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(seed: int, index: int) -> Finding:
    """Draw the network, compress it, and hold it against all that must be true of it."""
    start = time.perf_counter()
    finding = Finding(seed, index, "not run")
    try:
        with warnings.catch_warnings(), _within(SECONDS):
            warnings.simplefilter("ignore")
            case = generate(seed, index)
            finding.stages = case.stages
            _check(case, finding)
    except _TooSlow:
        finding.status, finding.detail = "slow", f"no end after {SECONDS} s"
    except _Untrue as error:
        finding.status, finding.detail = "untrue", str(error)
    except Exception as error:
        finding.status = finding.status if finding.status in BAD else "untrue"
        finding.detail = _told(error)
    finding.seconds = round(time.perf_counter() - start, 3)
    return finding


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f for f in reversed(frames) if "snncompress" in f.filename), frames[-1])
    return f"{type(error).__name__}: {str(error)[:300]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"


def _check(case: Case, finding: Finding) -> None:
    plain = case.run(case.model)
    if not all(bool(t.isfinite().all()) for t in plain):
        finding.detail = "its output isn't finite"
        return
    rng = random.Random(f"check {case.seed}/{case.index}")
    criterion, ratio = rng.choice(CRITERIA), rng.choice([0.25, 0.5, 0.5, 0.5])
    before = _snapshot(case)
    steps = rng.choice(["one_shot", "one_shot", "one_shot", Iterative(steps=2)])
    made = _tried(case, finding, criterion=criterion, ratio=ratio, bits=None, repair=None, scheduler=steps)
    _hold(_same(before, _snapshot(case)), "the original, its data or a random generator were changed")
    if made is None:
        return
    plan = plan_of(made)
    finding.reasons = sorted(set(plan.skipped.values()))
    finding.left = round(_parameters(made) / _parameters(case.model), 4)
    finding.status = "crashed"
    got = case.run(made)
    finding.status = "not run"
    edits = json.loads(plan.to_json())["edits"]
    wanted = case.run(silenced(case, edits)) if edits else plain
    finding.reacts = difference(plain, wanted) > TOLERANCE
    off = difference(wanted, got)
    finding.status = "shrunk" if edits else "whole"
    if off > TOLERANCE:
        finding.status, finding.detail = "wrong", f"off by {off:.2g}"
        return
    foreign = [reason for reason in finding.reasons if _FOREIGN.search(reason)]
    _hold(not foreign, f"a reason in another library's words: {foreign[:1]}")
    _replays(case, made, got, exact=True)
    more: tuple[Callable[[Case, Finding], None], ...] = (_repaired, _masked, _again)
    if case.index % 16 < len(more):
        more[case.index % 16](case, finding)


def _tried(case: Case, finding: Finding, **options: Any) -> nn.Module | None:
    """What ``apply`` makes of it; None where it refuses, or fails."""
    try:
        return snncompress.apply(
            case.model, data=case.data, timesteps=case.timesteps, skip=[], seed=case.index, progress=False,
            **{**case.options, **options},
        )  # fmt: skip
    except PluginError as error:  # of its own plugins
        finding.status, finding.detail = "raw", _told(error.__cause__ or error)
    except SNNCompressError as error:
        told = f"{type(error).__name__}: {error}"[:400]
        if finding.status == "not run":
            finding.status, finding.detail = "refused", told
        else:
            finding.more = told
    except (_TooSlow, _Untrue):
        raise
    except Exception as error:
        finding.status, finding.detail = "raw", _told(error)
    return None


def _hold(holds: bool, what: str) -> None:
    if not holds:
        raise _Untrue(what)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _snapshot(case: Case) -> list[Any]:
    tensors = [*case.model.parameters(), *case.model.buffers()]
    return [
        [t.detach().clone() for t in tensors], [id(t) for t in tensors], [m.training for m in case.model.modules()],
        [sorted(vars(m)) for m in case.model.modules()], case.data.clone(), torch.get_rng_state(), random.getstate(),
    ]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _replays(case: Case, made: nn.Module, got: list[Tensor], *, exact: bool) -> None:
    """The plan, as text, on the original; ``got`` is what ``made`` puts out."""
    replayed = Plan.from_json(plan_of(made).to_json()).apply(case.model, _adapter(case))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (made, replayed)]
    _hold(shapes[0] == shapes[1], "the plan, replayed, gives other keys or shapes")
    replayed.load_state_dict(made.state_dict())
    off = difference(got, case.run(replayed))
    _hold(off <= (0.0 if exact else 1e-6), f"the plan, replayed, gives another output: off by {off:.2g}")


def _adapter(case: Case) -> Any:
    return snncompress.OwnNeurons(case.options["neurons"], case.options["time_dim"]) if case.options else None


def _repaired(case: Case, finding: Finding) -> None:
    """Pruned, quantized and repaired: on its grid, and the plan replays."""
    bits = 2 + case.index // 16 % 7
    made = _tried(case, finding, criterion="reconstruction", ratio=0.5, bits=bits, quantizer=ReScaW(per_channel=False))
    if made is None:
        return
    got = case.run(made)
    _hold(all(bool(t.isfinite().all()) for t in got), "repaired, it puts out numbers that aren't finite")
    modules = dict(made.named_modules())  # a cell's weights are none of them
    for edit in plan_of(made).edits:
        if edit.kind == "quantize_weights" and isinstance(layer := modules.get(edit.layer), LAYERS):
            values = len(layer.weight.detach().unique())
            _hold(values <= 2**bits, f"{edit.layer} has {values} values at {bits} bits")
    _replays(case, made, got, exact=False)


def _masked(case: Case, finding: Finding) -> None:
    """Single weights: exactly 0, as many as were asked for, and the plan replays."""
    made = _tried(case, finding, criterion="weight_magnitude", ratio=0.6, bits=None, repair=None)
    if made is None:
        return
    modules = dict(made.named_modules())
    edits = [e for e in plan_of(made).edits if e.kind == "mask_weights"]
    masked = [modules[e.layer] for e in edits if e.layer in modules]
    zeros = sum(int((layer.weight == 0).sum()) for layer in masked)
    every = sum(layer.weight.numel() for layer in masked)
    enough = 0.5 * every if len(masked) == len(edits) else 1  # in layers and cells together it is 0.6
    _hold(zeros >= enough > 0, f"{zeros} of {every} weights are 0 at ratio 0.6")
    _replays(case, made, case.run(made), exact=False)


def _again(case: Case, finding: Finding) -> None:
    """Twice the same call: twice the same plan."""
    plans = [_tried(case, finding, criterion="svs", ratio=0.5, bits=4, quantizer="uniform") for _ in range(2)]
    if None not in plans:
        _hold(plan_of(plans[0]) == plan_of(plans[1]), "twice the same call gave two plans")
