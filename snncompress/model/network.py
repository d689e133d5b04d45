"""The uniform view of a spiking network: weight layers, the neurons they drive, and channels that go together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch_pruning import ops
from torch_pruning.pruner.function import BasePruningFunc, PrunerBox

from .cells import cell_weights, input_weights, layer_at
from .channel_map import ChannelMap
from .parametrizations import computed_weight, stored_weight

Side = Literal["out", "in", "neuron"]
WEIGHT_LAYERS = (_ConvNd, nn.Linear)
NORMS = (_NormBase, nn.GroupNorm)
POOLS = (_MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd)


@dataclass(frozen=True)
class Member:
    """One tensor dimension of a coupled group: row c of ``index`` [size, k] lists what channel c occupies there.

    k is 1 but for a linear layer behind a flatten (h·w columns per channel) and the like. For a neuron, ``width`` is
    its number of channels and ``axis`` where they stand, counted from the end: -1 in [N, C], -3 in [N, C, H, W]; for
    a layer, whose type tells, both are 0.
    """

    module: str
    side: Side
    index: Tensor
    width: int = 0
    axis: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", self.index.contiguous())  # torch.isin takes no other

    def observed(self, activity: Tensor) -> Tensor:
        """[T', N, C, ...] of what an observer got of a neuron whose channels stand on ``axis``."""
        if activity.dim() + self.axis == 1:  # a single sample without an axis for it
            activity = activity.unsqueeze(1)
        return activity.movedim(self.axis, 2)

    def shifted(self, gone: Tensor) -> Member:
        """The member after the module lost indices ``gone`` (sorted), none of them its own: indices renumbered."""
        index = self.index - torch.searchsorted(gone, self.index)
        return replace(self, index=index, width=max(0, self.width - len(gone)))

    def without(self, removed: Tensor) -> Member:
        """The member after the group's channels ``removed`` are gone."""
        keep = torch.ones(len(self.index), dtype=torch.bool)
        keep[removed] = False
        kept = replace(self, index=self.index[keep])
        return kept.shifted(self.index[removed].flatten().sort().values)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together: ``size`` of them, in ``runs`` equal runs (grouped convolutions).

    From each run the same positions are removed, a multiple of ``step`` of them. ``widths`` are the whole numbers,
    (module, attribute), from which forward reads how many there are: they shrink in proportion; and tensors with an
    entry for each of them, which lose those of the first layer's channels that go. ``shifted`` are ways
    (modules, reader) from what is silenced, through batch norms and depthwise convolutions, to a layer that silent
    channels reach as constants so. With ``part`` they are some, not all of the channels of a layer, as where zeros pad
    a narrower layer to its width; the others stand in groups of their own, or stay.
    """

    members: tuple[Member, ...]
    size: int
    runs: int = 1
    widths: tuple[tuple[str, str], ...] = ()
    shifted: tuple[tuple[tuple[str, ...], str], ...] = ()
    part: bool = False
    step: int = 1

    @property
    def portion(self) -> int:
        """How many channels go at a time."""
        return self.runs * self.step

    def names(self, side: Side) -> tuple[str, ...]:
        """Modules in the group on this side."""
        return tuple(m.module for m in self.members if m.side == side)

    def member(self, module: str, side: Side) -> Member | None:
        """The member for one module, or None."""
        return next((m for m in self.members if m.module == module and m.side == side), None)


def portions(groups: Sequence[ChannelGroup]) -> dict[int, int]:
    """Of groups of each size how many channels go at a time, so that all stay in proportion, and fit their portions.

    >>> stream, heads, hidden = (ChannelGroup((), size, runs) for size, runs in ((240, 1), (240, 8), (960, 1)))
    >>> portions([stream, heads, hidden])
    {240: 8, 960: 32}
    """
    base = gcd(*(group.size for group in groups))
    times = {group.size: group.size // base for group in groups}
    least = lcm(*(group.portion // gcd(group.portion, times[group.size]) for group in groups))
    return {size: least * number for size, number in times.items()}


def by_layer(groups: Iterable[ChannelGroup], layers: Collection[str]) -> dict[str, tuple[ChannelGroup, ...]]:
    """The groups that hold output channels of each of ``layers`` that is in any; where one has several, each a part."""
    found: dict[str, tuple[ChannelGroup, ...]] = {}
    for group in groups:
        for name in group.names("out"):
            if name in layers:
                found[name] = (*found.get(name, ()), group)
    return found


def without(groups: list[ChannelGroup], which: int, removed: Tensor) -> list[ChannelGroup]:
    """All groups after positions ``removed`` of group number ``which`` are gone.

    Other groups may share a module with it, as the inputs of a concatenation do: their indices move up.
    """
    shrunk = groups[which]
    gone = {(m.module, m.side): m.index[removed].flatten().sort().values for m in shrunk.members}
    result = []
    for number, group in enumerate(groups):
        if number == which:
            members = tuple(m.without(removed) for m in group.members)
            result.append(replace(group, members=members, size=group.size - len(removed)))
        elif any((m.module, m.side) in gone for m in group.members):
            members = tuple(
                m.shifted(gone[m.module, m.side]) if (m.module, m.side) in gone else m for m in group.members
            )
            result.append(replace(group, members=members))
        else:
            result.append(group)
    return result


@dataclass
class Network:
    """What tracing found. ``layers`` are the weight layers in order of execution.

    ``drives`` binds each weight layer to the neurons that its output reaches before any other weight layer;
    ``producers`` to the weight layers that feed it, ``direct`` to those among them that do so without a neuron between,
    as into a residual stream; it tells so of maps of channels too. ``groups`` can be pruned; ``skipped`` says why
    others can't. ``tied`` are groups that must stay in proportion: forward shapes what one puts out by the width of
    another. ``shared`` are neurons behind layers of several widths, on the way to what reads these layers as any
    function is: ``drives`` and ``direct`` look through them. ``modes`` are those of training in which the network takes
    ways of its own: [False], or [False, True].
    """

    layers: tuple[str, ...]
    neurons: tuple[str, ...]
    drives: dict[str, tuple[str, ...]]
    producers: dict[str, tuple[str, ...]]
    norms: dict[str, str]
    classifiers: tuple[str, ...]
    direct: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: list[ChannelGroup] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    tied: list[list[ChannelGroup]] = field(default_factory=list)
    modes: list[bool] = field(default_factory=lambda: [False])
    shared: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        """The first weight layer; "" where all are inside neurons."""
        return next(iter(self.layers), "")

    @property
    def classifier_inputs(self) -> tuple[str, ...]:
        """The weight layers that feed a classifier, channel by channel as far as their groups are known."""
        feeding = {p for c in self.classifiers for p in self.producers[c] if p not in self.classifiers}
        known = {name for group in self.groups for name in group.names("out")}
        ends = {*self.classifiers, *(name.rpartition(".")[0] for name in self.classifiers)}  # a cell holds its weights
        reaching = {n for g in self.groups if set(g.names("in")) & ends for n in g.names("out")}
        return tuple(name for name in self.layers if name in feeding and (name in reaching or name not in known))

    @property
    def streams(self) -> set[str]:
        """The weight layers that write into a residual stream: of their channels none goes without all others'."""
        found: set[str] = set()
        for group in self.groups:
            outs = [name for name in group.names("out") if name in self.layers]
            # a depthwise convolution only passes on what it takes in
            writers = [n for n in outs if group.member(n, "in") or not set(self.producers[n]) & set(outs)]
            found.update(writers if len(writers) > 1 else ())
        return found


def weight_layers(model: nn.Module) -> list[str]:
    """Names of all convolutions and linear layers, recurrent ones inside neurons included, and of cells' weights."""
    names: list[str] = []
    for name, module in model.named_modules():
        names += [name] if isinstance(module, WEIGHT_LAYERS) else cell_weights(name, module)
    return names


def width(module: nn.Module, side: Side) -> int:
    """Channels of a layer, or of a map of channels, on one side."""
    if isinstance(module, ChannelMap):
        return module.width(side)
    if input_weights(module):
        return int(cast(int, module.input_size))
    pruner = pruner_of(module)
    return int(pruner.get_out_channels(module) if side == "out" else pruner.get_in_channels(module))


def channel_axis(module: nn.Module) -> int:
    """Where the output channels of a weight layer stand, counted from the end: -1 in [N, C], -3 in [N, C, H, W]."""
    if isinstance(module, ChannelMap):
        return module.axis
    return 1 - int(cast(Tensor, module.weight).dim())


def depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution, not transposed, of every channel by itself into one."""
    return multiplier(module) == 1


def multiplier(module: nn.Module) -> int:
    """Into how many a convolution, not transposed, makes every channel by itself; 0 where it isn't one."""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return 0
    return module.out_channels // module.in_channels if 1 < module.groups == module.in_channels else 0


def made_of_one(module: nn.Module, index: Tensor) -> bool:
    """Whether output channels ``index`` [..., k] are all that come, one by one, of some input channels."""
    times = multiplier(module)
    if times < 2 or index.shape[-1] % times:
        return False
    each = index.reshape(-1, times)
    return torch.equal(each, each[:, :1] // times * times + torch.arange(times))


def pruner_of(module: nn.Module) -> BasePruningFunc:
    """torch-pruning's pruner for modules of its type."""
    kind: Any = ops.module2type(module)
    return PrunerBox[kind]


def outputs_first(weight: Tensor, module: nn.Module) -> Tensor:
    """A tensor shaped like a layer's weight with the output channels first, and back: transposed convolutions differ.

    It holds [in, out/groups, ...]; the same exchange within each group leads there and back.
    """
    if not isinstance(module, _ConvTransposeNd):
        return weight
    return weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def silent_members(group: ChannelGroup, model: nn.Module, direct: Mapping[str, Collection[str]]) -> Iterator[Member]:
    """What is 0 where channels of the group are silent: on side "neuron" spikes, on side "in" what a layer reads.

    The latter is said of a layer that the group's layers feed without a neuron between (:attr:`Network.direct`), as
    from a residual stream.
    """
    writers = {n for n in group.names("out") if not multiplier(layer_at(model, n))}  # which pass on
    for member in group.members:
        module = layer_at(model, member.module)
        reads = member.side == "in" and isinstance(module, (*WEIGHT_LAYERS, ChannelMap))
        if member.side == "neuron" or (reads and writers & set(direct.get(member.module, ()))):
            yield member


def computed_or_shared(model: nn.Module, computed: Callable[[nn.Module], str] = computed_weight) -> dict[str, str]:
    """Layers whose weight isn't theirs alone, or isn't a parameter, with the reason."""
    found: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHT_LAYERS):
            continue
        if why := computed(module):
            found[name] = why
            continue
        first = owners.setdefault(id(stored_weight(module)), name)
        if first != name:
            found[name] = found[first] = f"{first} and {name} share their weight"
    return found
