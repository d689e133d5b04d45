"""``scores`` and ``robustness``: what criteria say of a network's channels, and whether batches agree on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered
from snncompress.base.progress import Progress
from snncompress.contract.detection import find_adapter
from snncompress.errors import DataError, ModelError
from snncompress.interfaces import Adapter, Criterion, Forward, Loss
from snncompress.model.cells import layer_at
from snncompress.model.network import Member, Network, outputs_first, weight_layers
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.model.plan import refuse_frozen
from snncompress.pruning.recording import Recording, calibrate
from snncompress.pruning.scorer import Groups
from snncompress.pruning.selection import check_ratio
from snncompress.pruning.steps import LayerPruning
from snncompress.running.bench import bench
from snncompress.structure.tracing import trace

from .heat_maps import Robustness, Scores, average_cosine, common_share
from .units import criterion_of, fully, label, labelled, pruning, scored, units


def scores(
    model: nn.Module,
    criterion: str | Criterion,
    data: Any,
    *,
    layers: str | Iterable[str] | None = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """What a criterion says of every channel, of each batch alone: the numbers behind the papers' heat maps.

    A batch's scores are those by which ``apply(model, criterion, ..., data=[batch])`` chooses what goes in its first
    step. One pass over ``data``, on a private copy: the model and torch's random state stay as they are. Criteria that
    look at weights alone say the same of every batch.

    Args:
        model: the network.
        criterion: name or instance (:func:`snncompress.criteria` lists the names), of channels or of single weights.
        data: calibration data: a tensor, an (x, y) batch, a DataLoader, or any iterable of either. Ten batches or so
            show what there is to see.
        layers: names or globs; None: all that can lose channels, the one that feeds the classifier included, or all
            whose weights can be masked. Coupled layers come along.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        loss: ``loss(output, y)`` for criteria that need gradients; None: cross-entropy.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        neurons: the class of spiking neurons of your own, or several (:class:`snncompress.OwnNeurons`).
        time_dim: the axis of time in what they take, None where they take one timestep.
        seed: seed of everything random.
        progress: a bar on a terminal, a callable, or False for nothing.

    Returns:
        layer → [batches, channels], or [batches, *weight] where single weights are scored.

    Raises:
        OptionError: a criterion of blocks, or a layer that isn't there or can't be pruned.
        UnknownNameError: no criterion has this name.
        DataError: data that don't fit the model, or no labels where the criterion needs them.
        ModelError: no spiking neuron that an adapter knows, or no weight layer.
        PluginError: the criterion can't score one of the layers.

    Source: QP-SNN (ICLR 2025), Figures 3 and 13 to 18.

    Example:
        Two neurons, each driven by one input; of three batches the first drives the first, the last the second:

        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(), nn.Linear(2, 2))
        >>> _ = nn.init.eye_(net[0].weight)
        >>> batches = [torch.tensor([x]) for x in ([1.0, 0.0], [1.0, 0.5], [0.0, 1.0])]
        >>> scores(net, "firing_rate", batches, timesteps=4).values["0"]
        tensor([[1.0000, 0.0000],
                [1.0000, 0.5000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    chosen = criterion_of(criterion, seed)
    options = _Options(timesteps, forward, loss, adapter, neurons, time_dim, seed)
    (found,), skipped = _judged(model, data, [chosen], layers, options, progress)
    values = {name: torch.stack(rows) for name, rows in found.rows.items()}
    return Scores(values, label(chosen), skipped, type(model).__name__)


def robustness(
    model: nn.Module,
    criteria: str | Criterion | Sequence[str | Criterion],
    data: Any,
    *,
    ratio: float = 0.6,
    layers: str | Iterable[str] | None = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Robustness:
    """Whether criteria judge a network alike whatever batch they see: AvgCosS, and what two batches would both remove.

    With the scores s_i of a layer from batch i = 1 … B, all channels (or single weights) as one vector,

        AvgCosS = 2 / (B (B − 1)) · Σ_{i<j} s_i · s_j / (‖s_i‖ ‖s_j‖)

    A cosine near 1 says little by itself: vectors of positive numbers are never far apart, and the lowest scores
    decide. So there is also the share of what would go that two batches have in common, mean over pairs,
    2|A_i ∩ A_j| / (|A_i| + |A_j|), where A_i is what ``apply(model, criterion, ratio, data=[batch i], skip=[])``
    removes in one step. Chosen at random it is about ``ratio``.

    One pass over ``data`` for all criteria, on a private copy. Of criteria that score single weights, all scores of all
    batches are kept until the end.

    Args:
        criteria: a name or an instance, or several.
        data: as in :func:`scores`, two batches or more; ten are enough.
        ratio: share to remove, in [0, 1).
        model, layers, timesteps, forward, loss, adapter, neurons, time_dim, seed, progress: as in :func:`scores`.

    Raises:
        OptionError: a ratio out of range, no criterion, one twice or one of blocks, or a layer that isn't there or
            can't be pruned.
        UnknownNameError: no criterion has this name.
        DataError: a single batch, data that don't fit the model, or no labels where a criterion needs them.
        ModelError: no spiking neuron that an adapter knows, or no weight layer.
        PluginError: a criterion can't score one of the layers.

    Source: AvgCosS: QP-SNN (ICLR 2025), Eq. 15, where the minimum over layers is 0.87 to 0.95 for SCA and 0.993 to
    1.000 for SVS.

    Example:
        The network and the batches of :func:`scores`; (1, 0), (1, 1/2) and (0, 1) have cosines 2/√5, 0 and 1/√5:

        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(), nn.Linear(2, 2))
        >>> _ = nn.init.eye_(net[0].weight)
        >>> batches = [torch.tensor([x]) for x in ([1.0, 0.0], [1.0, 0.5], [0.0, 1.0])]
        >>> result = robustness(net, ["firing_rate", "magnitude"], batches, ratio=0.5, timesteps=4)
        >>> {name: round(cosine, 4) for name, cosine in result.minimum.items()}  # 1/√5 = 0.4472
        {'firing_rate': 0.4472, 'magnitude': 1.0}
        >>> round(result.agreement["firing_rate"]["0"], 4)  # the first two would remove channel 1, the third channel 0
        0.3333
    """
    chosen = labelled("criterion", criteria, lambda criterion: criterion_of(criterion, seed))
    share = check_ratio(ratio, "ratio")
    options = _Options(timesteps, forward, loss, adapter, neurons, time_dim, seed)
    found, skipped = _judged(model, data, list(chosen.values()), layers, options, progress, share)
    batches = found[0].batches
    if batches < 2:
        raise DataError(
            "AvgCosS compares batches, and these data are a single one. Pass several: a DataLoader, or a list such as "
            "list(x.split(64)) or [(x1, y1), (x2, y2)]."
        )
    cosine = {
        title: {name: average_cosine(_vectors(rows)) for name, rows in judge.rows.items()}
        for title, judge in zip(chosen, found, strict=True)
    }
    agreement = {
        title: {
            name: None if alike is None or name not in judge.gone else common_share(_vectors(judge.gone[name]))
            for name, alike in cosine[title].items()
        }
        for title, judge in zip(chosen, found, strict=True)
    }
    return Robustness(cosine, agreement, share, batches, skipped, type(model).__name__)


@dataclass(frozen=True)
class _Options:
    timesteps: int | None
    forward: Forward | None
    loss: Loss | None
    adapter: Adapter | str | None
    neurons: Neurons | None
    time_dim: int | None
    seed: int


@dataclass
class _Judge:
    """A criterion on its layers: after each batch ``add`` notes what it says, and what would go."""

    model: nn.Module
    recording: Recording
    pruning: LayerPruning | None
    """None where nobody asks what would go."""
    layers: Mapping[str, Groups]
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    gone: dict[str, list[Tensor]] = field(default_factory=dict)
    batches: int = 0

    def add(self) -> None:
        self.batches += 1
        found = self.recording.scores()
        for name, values in found.items():
            if self.recording.criterion.granularity == "weight":
                values = outputs_first(values, layer_at(self.model, name)).cpu()
            else:
                values = _only(values, [group.member(name, "out") for group in self.layers[name]])
            self.rows.setdefault(name, []).append(values)
        if self.pruning is not None:
            for name, mask in self.pruning.going(found, fully).items():
                self.gone.setdefault(name, []).append(mask.cpu())

    def reduce(self) -> None:
        """The batches of all processes, those of rank 0 first."""
        self.rows, self.gone = _joined(gathered(self.rows)), _joined(gathered(self.gone))
        self.batches = sum(gathered(self.batches))


def _joined(parts: Sequence[Mapping[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Process by process."""
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def _judged(
    model: nn.Module, data: Any, criteria: Sequence[Criterion], layers: str | Iterable[str] | None, options: _Options,
    progress: Progress | None, ratio: float | None = None,
) -> tuple[list[_Judge], dict[str, str]]:  # fmt: skip
    """All batches through all criteria in one pass; and the layers that none of them judges, with the reason."""
    adapter = find_adapter(model, named_neurons(options.adapter, options.neurons, options.time_dim))
    if not weight_layers(model):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer: nothing to score.")
    refuse_frozen(model, "scored")
    needing = next((c.name for c in criteria if "gradients" in c.needs), None)
    needs: dict[str, Any] = {"labels": f"criterion {needing!r} needs labels" if needing else "", "seed": options.seed}
    how = options.timesteps, options.forward, options.loss, adapter
    with bench(model, data, *how, **needs, gradients=True, unknown=True) as table:
        channels = any(criterion.granularity == "channel" for criterion in criteria)
        feed = table.feed
        network = trace(table.model, adapter, feed.example(), timesteps=feed.telling_timesteps, groups=channels)
        judges: list[_Judge] = []
        skipped: dict[str, str] = {}
        for criterion in criteria:
            judge, whys = _judge(table.model, adapter, network, criterion, layers, options.seed, ratio)
            judges.append(judge)
            skipped.update(whys)

        def each() -> None:
            for judge in judges:
                judge.add()

        calibrate(table.model, network, feed, [judge.recording for judge in judges], progress, each=each)
        for judge in judges:
            judge.reduce()
    judged = {name for judge in judges for name in judge.rows}
    return judges, {name: why for name, why in skipped.items() if name not in judged}


def _judge(
    model: nn.Module, adapter: Adapter, network: Network, criterion: Criterion, layers: str | Iterable[str] | None,
    seed: int, ratio: float | None,
) -> tuple[_Judge, dict[str, str]]:  # fmt: skip
    found, skipped = units(model, network, criterion, layers, [])
    asked = scored(found)
    recording = Recording(model, network, criterion, asked, seed + 1)  # as apply's first step
    bearing = [] if ratio is None else [unit for unit in found if unit.bears(ratio)]
    going = None if ratio is None else pruning(bearing, model, adapter, network, criterion, ratio)
    return _Judge(model, recording, going, asked), skipped


def _only(values: Tensor, members: Iterable[Member | None]) -> Tensor:
    """[C], NaN but for the channels of these members."""
    found = torch.full_like(values, torch.nan)
    for member in members:
        if member is not None:
            at = member.index.flatten()
            found[at] = values[at]
    return found


def _vectors(rows: Sequence[Tensor]) -> Tensor:
    """[batches, n]."""
    return torch.stack(list(rows)).flatten(1)
