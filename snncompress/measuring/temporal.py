"""``temporal_analysis``: after how many timesteps a network has made up its mind, and what each step costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from snncompress.base.display import new_axes
from snncompress.base.distributed import added, gathered, together
from snncompress.base.progress import Progress, tracked
from snncompress.base.tables import Column, Shown, Table
from snncompress.contract.registry import registry
from snncompress.errors import DataError, OptionError
from snncompress.interfaces import Adapter, EnergyModel, Forward
from snncompress.model.chance import seeded
from snncompress.model.computed_once import evaluating
from snncompress.running.bench import bench
from snncompress.running.data import Batch, Feed
from snncompress.running.scores import main_tensor, samples_axis

from .timestep_counting import Rehearsal, StepMeter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mode = Literal["cumulative", "smoothed", "step"]
_EPSILON = 1e-6


@dataclass(frozen=True)
class TemporalAnalysis(Shown):
    """What every timestep of a network adds, and costs. ``print`` shows a table.

    Fields:
        kl: [T-1], KL(p_t ‖ p_{t+1}) in nats for t = 1 … T-1.
        cumulative: [T-1], Σ_{s≤t} KL_s over the total: non-decreasing, 1 at the end; all 0 where the total is.
        accuracy: [T], share of samples whose class is right after t steps; None where the data have no labels.
        energy_pj: [T], energy of the first t steps in pJ per sample, as :func:`snncompress.profile` gives it for the
            model run for t steps.
        t_star: how many timesteps to keep, 1 … T.
        timesteps: T.
        mode, share: with which ``t_star`` was found.
        n_samples: samples measured.
        title: the model's class.

    Example:
        >>> result = TemporalAnalysis((3.0, 1.0), (0.75, 1.0), None, (9.0, 18.0, 27.0), 2, 3, "cumulative", 0.7)
        >>> print(result)
        model: 2 of 3 timesteps reach 70 % of the KL divergence (cumulative)
          t   KL(t ‖ t+1)   cumulative   energy (pJ)
         ───────────────────────────────────────────
          1             3         0.75             9
         *2             1            1            18
          3                                       27
        energy per sample; n = 0 samples
    """

    kl: tuple[float, ...]
    cumulative: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    energy_pj: tuple[float, ...]
    t_star: int
    timesteps: int
    mode: str
    share: float
    n_samples: int = 0
    title: str = "model"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Cumulative KL, accuracy and energy (share of all T steps) against t, with a line at ``t_star``.

        The cumulative share of KL_1 … KL_{t-1} stands at t, the step that the output has then reached. Draws on
        ``ax``, or on a new figure, and returns the axes; showing or saving them is left to you. Raises OptionError
        where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        steps = range(1, self.timesteps + 1)
        ax.plot(steps, (0.0, *self.cumulative), marker="o", label="cumulative KL")
        if self.accuracy is not None:
            ax.plot(steps, self.accuracy, marker="s", label="accuracy")
        if self.energy_pj[-1]:
            ax.plot(steps, [e / self.energy_pj[-1] for e in self.energy_pj], marker="^", label="energy")
        ax.axvline(self.t_star, linestyle="--", color="grey", label=f"t* = {self.t_star}")
        ax.set(xlabel="timestep t", ylabel="share", title=self.title)
        ax.legend()
        return ax

    def _parts(self) -> Iterator[str | Table]:
        values: dict[Column, Sequence[float]] = {
            Column("kl", "KL(t ‖ t+1)"): self.kl,
            Column("cumulative"): self.cumulative,
            **({} if self.accuracy is None else {Column("accuracy"): self.accuracy}),
            Column("energy_pj", "energy (pJ)"): self.energy_pj,
        }
        step = Column("t", " t", lambda t: f"{'*' if t == self.t_star else ' '}{t}")
        rows = [
            (t, *(column[t - 1] if t <= len(column) else None for column in values.values()))
            for t in range(1, self.timesteps + 1)
        ]
        yield (
            f"{self.title}: {self.t_star} of {self.timesteps} timesteps reach {100 * self.share:g} % of the KL "
            f"divergence ({self.mode})"
        )
        yield Table([step, *values], rows)
        yield f"energy per sample; n = {self.n_samples:,} samples"


def temporal_analysis(
    model: nn.Module,
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    mode: Mode = "cumulative",
    share: float = 0.95,
    energy_model: EnergyModel | str = "horowitz_45nm",
    adapter: Adapter | str | None = None,
    progress: Progress | None = None,
) -> TemporalAnalysis:
    """Find the timestep after which a network's output says nothing new; accuracy and energy at every step.

    From outputs S [T, N, K] of T timesteps, N samples and K classes, for each sample

        p_t = (c_t / Σ_k c_t + ε) / (1 + K·ε),   c_t = Σ_{s≤t} S[s],   ε = 1e-6
        KL_t = KL(p_t ‖ p_{t+1}), averaged over samples,   t = 1 … T-1

    and t* = t + 1 for the first t at which Σ_{s≤t} KL_s reaches ``share`` of its total: KL_t compares steps t and
    t+1, so the distribution has settled at t+1. Where the total is 0, t* = 1. Outputs that aren't spikes (a negative
    or fractional value anywhere: membranes, a linear readout) give p_t = softmax(c_t / t) instead.

    While c_t = 0, a sample has no distribution yet: its KL_t counts as 0, and t* comes no earlier than ``share`` of the
    samples that ever put out a spike have done so. ``mode="smoothed"`` takes p_t as uniform then. That one step from
    nothing to the first spikes holds nearly all of the total, because of ε: t* falls on it whatever comes later.
    ``mode="step"`` is what the paper's author computes: one distribution per step, of that step's output alone,
    averaged over all samples; it doesn't see samples that change their minds in opposite directions.

    One pass over the data in eval mode, on a private copy, after a rehearsal with a sample; memory doesn't grow with
    the number of batches. What is found for t steps holds for a model truncated to t where no step depends on later
    ones (not for neurons that are parallel in time).

    Args:
        model: the network; its output, or the first of a tuple of outputs, is [T, N, K].
        data: a tensor, an (x, y) batch, a DataLoader, or an iterable of either; labels y [N] give accuracy.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        mode: ``"cumulative"`` (default), ``"smoothed"`` or ``"step"``.
        share: of the total KL that makes t*, above 0 and at most 1.
        energy_model: name or instance; operations are counted as :func:`snncompress.profile` does by default.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        progress: a bar on a terminal, a callable, or False for nothing.

    Raises:
        DataError: the output isn't [T, N, K] with the same T in all batches, holds NaN, or the labels don't fit it.
        ModelError: no spiking neuron, or a layer whose calls can't be assigned to timesteps.
        OptionError: a wrong ``mode`` or ``share``.

    Source: KL-based temporal redundancy of the CQP paper (criticality-constrained pruning of spiking networks).

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode())
        >>> _ = nn.init.eye_(net[0].weight)
        >>> result = temporal_analysis(net, (torch.tensor([[1.0, 0.25]]), torch.tensor([0])), timesteps=3)
        >>> result.t_star, result.kl, result.accuracy      # input 0 fires at every step, input 1 not yet
        (1, (0.0, 0.0), (1.0, 1.0, 1.0))
        >>> [round(e, 9) for e in result.energy_pj]        # 2 synapses · 4.6 pJ, once: the input is constant
        [9.2, 9.2, 9.2]
    """
    with bench(model, data, timesteps, forward, adapter=adapter, mixed=True) as table:
        return analyse(table.model, table.feed, mode, share, energy_model, progress)


def analyse(
    model: nn.Module,
    feed: Feed,
    mode: Mode = "cumulative",
    share: float = 0.95,
    energy_model: EnergyModel | str = "horowitz_45nm",
    progress: Progress | None = None,
) -> TemporalAnalysis:
    """The pass behind :func:`temporal_analysis`, on a bench."""
    if mode not in get_args(Mode):
        raise OptionError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}.")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"share must be a number above 0 and at most 1, such as 0.95, not {share!r}.")
    energy: EnergyModel = registry().resolve("energy model", energy_model, EnergyModel)
    with evaluating(model), feed.adapter.alone(model):
        with seeded(model), ExitStack() as stack:
            rehearsal = Rehearsal(model, feed.adapter, stack, products=True)
            output = _over_time(feed.example()(model), feed)
        outputs = _Outputs(len(output), output.shape[2])
        with together(), ExitStack() as stack:
            meter = StepMeter(model, feed.adapter, rehearsal.timelines(len(output), output.shape[1]), stack)
            for batch in tracked(feed, progress, "temporal analysis"):
                meter.begin_batch()
                outputs.add(_over_time(feed(model, batch), feed, batch), batch)
    feed.adapter.reset(model)
    outputs.reduce()
    meter.reduce()
    kl = outputs.divergences(mode)
    running = kl.cumsum(0)
    total = float(running[-1]) if len(kl) else 0.0
    cumulative = running / total if total else torch.zeros_like(kl)
    return TemporalAnalysis(
        kl=tuple(kl.tolist()),
        cumulative=tuple(cumulative.tolist()),
        accuracy=outputs.accuracy(),
        energy_pj=tuple(meter.energy_pj(energy, outputs.n_samples, outputs.steps)),
        t_star=max(int((cumulative < share).sum()) + 2 if total else 1, outputs.begun(mode, share)),
        timesteps=outputs.steps,
        mode=mode,
        share=float(share),
        n_samples=outputs.n_samples,
        title=type(model).__name__,
    )


class _Outputs:
    """Running sums over samples of what the outputs [T, N, K] say at every step."""

    def __init__(self, steps: int, classes: int) -> None:
        self.steps, self.classes, self.n_samples = steps, classes, 0
        self._spiking = self._labelled = True
        self._correct = torch.zeros(steps, dtype=torch.long)
        self._by_step = torch.zeros(steps, classes, dtype=torch.float64)
        self._begun = torch.zeros(steps, dtype=torch.long)  # samples that have put out a spike
        # What the outputs are is known at the end only: one later value may still turn spikes into potentials.
        self._kl = {what: torch.zeros(steps - 1, dtype=torch.float64) for what in ("cumulative", "smoothed", "values")}

    def add(self, output: Tensor, batch: Batch) -> None:
        """One batch."""
        if output.shape[::2] != (self.steps, self.classes):
            raise DataError(
                f"The output of a batch is {list(output.shape)}, that of the first sample [{self.steps}, N, "
                f"{self.classes}]. All batches need the same number of timesteps and classes."
            )
        self._spiking = self._spiking and bool((output.ge(0) & output.frac().eq(0)).all())
        counts = output.cumsum(0)
        if self._spiking:
            begun, kl = counts.sum(2) > 0, _kl(_distribution(counts, True))
            self._begun += begun.sum(1)
            self._kl["smoothed"] += kl.sum(1)
            self._kl["cumulative"] += (kl * begun[:-1]).sum(1)
        means = counts / torch.arange(1, self.steps + 1)[:, None, None]
        self._kl["values"] += _kl(_distribution(means, False)).sum(1)
        self._by_step += output.sum(1)
        self.n_samples += output.shape[1]
        self._labelled = self._labelled and isinstance(batch.y, Tensor)
        if isinstance(batch.y, Tensor):
            self._correct += (counts.argmax(2) == _classes(batch.y, output)).sum(1)

    def reduce(self) -> None:
        """Add up what all processes have."""
        names = ("n_samples", "_spiking", "_labelled", "_correct", "_by_step", "_begun", "_kl")
        found = functools.reduce(added, gathered({name: getattr(self, name) for name in names}))
        vars(self).update(found)

    def divergences(self, mode: Mode) -> Tensor:
        """KL_t [T-1]."""
        if mode == "step":
            return _kl(_distribution(self._by_step / self.n_samples, self._spiking)[:, None]).sum(1)
        return self._kl[mode if self._spiking else "values"] / self.n_samples

    def begun(self, mode: Mode, share: float) -> int:
        """The first step at which this share of the samples that ever put out a spike have done so."""
        if mode != "cumulative" or not self._spiking or not self._begun.any():
            return 1
        return int((self._begun < share * self._begun[-1]).sum()) + 1

    def accuracy(self) -> tuple[float, ...] | None:
        """Share of right answers after t steps; None unless every batch has labels."""
        return tuple((self._correct.double() / self.n_samples).tolist()) if self._labelled else None


def _distribution(values: Tensor, spiking: bool) -> Tensor:
    """[..., K] → smoothed distributions over the last axis."""
    classes = values.shape[-1]
    if spiking:
        total = values.sum(-1, keepdim=True)
        p = torch.where(total > 0, values / total.clamp_min(_EPSILON), 1 / classes)
    else:
        p = values.softmax(-1)
    return (p + _EPSILON) / (1 + classes * _EPSILON)


def _kl(p: Tensor) -> Tensor:
    """KL(p_t ‖ p_{t+1}) of every sample: [T, N, K] → [T-1, N]."""
    return (p[:-1] * (p[:-1].log() - p[1:].log())).sum(-1).clamp_min(0)


def _over_time(output: Any, feed: Feed, batch: Batch | None = None) -> Tensor:
    """The output of every step, [T, N, K], in float64 on the CPU."""
    found = main_tensor(output)
    if found is None or found.dim() != 3 or found.shape[2] < 2:
        what = type(output).__name__ if found is None else f"shape {list(found.shape)}"
        raise DataError(
            f"An analysis over time needs the output of every timestep, [T, N, K] with K > 1 classes; this model "
            f"returned {what}. Likely cause: it averages over time itself, or runs one step where timesteps=T is "
            f"missing. Let it return the spikes of every step, or pass forward=lambda model, batch: ... that does."
        )
    samples = None if batch is None else batch.samples
    values: Tensor = found.detach().cpu().double()
    if samples_axis(found, samples, batch_first=feed.batch_first) == 0:
        values = values.transpose(0, 1)
    if not bool(values.isfinite().all()):
        raise DataError("The model's output holds NaN or infinite values. Check its weights and the scale of the data.")
    return values


def _classes(y: Tensor, output: Tensor) -> Tensor:
    """Class indices [N] of labels [N] or probabilities [N, K]."""
    _, samples, classes = output.shape
    if y.shape == (samples, classes):
        y = y.argmax(1)
    if y.shape != (samples,) or y.is_floating_point():
        raise DataError(
            f"Labels must be class indices [{samples}] or probabilities [{samples}, {classes}] for an output of shape "
            f"{list(output.shape)}, not {list(y.shape)} of {y.dtype}. Outputs are [T, N, K], time first."
        )
    return y.cpu()
