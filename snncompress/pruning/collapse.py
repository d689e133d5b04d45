"""collapse(): channels that died with their single weights go for good, and the network computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from snncompress.base.distributed import no_sync
from snncompress.contract.detection import find_adapter
from snncompress.errors import ModelError, PlanError
from snncompress.interfaces import Adapter, Forward
from snncompress.model.cells import layer_at
from snncompress.model.copying import plain_copy, private_copy
from snncompress.model.edits import Edit, RemoveChannels
from snncompress.model.network import NORMS, WEIGHT_LAYERS, ChannelGroup, Member, weight_layers, without
from snncompress.model.parametrizations import weight_bits
from snncompress.model.plan import Plan, attach, plan_of, refuse_frozen
from snncompress.running.bench import bench
from snncompress.running.data import Feed
from snncompress.running.sameness import Channels, all_same, wired_outputs
from snncompress.structure.tracing import trace
from snncompress.version import __version__

M = TypeVar("M", bound=nn.Module)


def collapse(
    model: M,
    data: Any = None,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    adapter: Adapter | str | None = None,
) -> M:
    """Remove the channels that removing single weights has left without any use; the outputs stay what they are.

    Of coupled channels those go (a) that nothing reads: every weight on the way to another channel is 0; or (b) that
    never fire: every weight that leads to them from another channel is 0, and what bias and batch norm give them all
    the same is too little to fire. Removing one may leave others without use, so this is repeated until none is left;
    of every layer one channel stays. Weights count as they are computed with: masked, quantized.

    (a) holds for any input and any number of timesteps. (b) holds for any input in eval mode, for as many timesteps
    as were run to see it, from reset neurons: those of the first batch. Without data noise shows the structure, and
    (b) is left out where the number of timesteps isn't known: give ``timesteps``.

    Left alone: layers that :func:`snncompress.apply` leaves whole too; channels that only keep one another alive; and
    channels whose removal would move the grid of a quantized layer, which is a statistic of its weights.

    Args:
        model: a SpikingJelly or snnTorch network, as :func:`snncompress.apply` returns it or as it was trained.
        data: as in :func:`snncompress.apply`; only the first batch is run.
        timesteps: T feeds static samples [N, ...] as constant current for T steps; None feeds a batch as it is.
        forward: ``forward(model, batch)`` runs a model that takes anything else.
        adapter: settles the framework by hand.

    Returns:
        A new model whose plan continues; where nothing is dead, an equal copy. The given model stays as it was.

    Raises:
        SNNCompressError: ModelError, DataError, OptionError or PluginError, as :func:`snncompress.apply`.

    Example:
        Nothing reads the second channel, and nothing leads to the third, whose bias is too small to fire in 4 steps:

        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Linear(5, 3), neuron.IFNode(), layer.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[2].weight[:, 1].zero_(), model[0].weight[2].zero_(), model[0].bias[2].fill_(0.2)
        >>> collapse(model, torch.rand(8, 5), timesteps=4)[0]
        Linear(in_features=5, out_features=1, bias=True)
        >>> collapse(model, torch.rand(8, 5), timesteps=8)[0]  # the bias adds up to the threshold
        Linear(in_features=5, out_features=2, bias=True)
    """
    found = find_adapter(model, adapter)
    if not weight_layers(model):
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer, so no channels to remove.")
    refuse_frozen(model, "compressed")
    edits: list[Edit] = []
    with no_sync(), bench(model, data, timesteps, forward, adapter=found, noise="structure") as table:
        work, feed = table.model, table.feed
        network = trace(work, found, feed.example(), timesteps=feed.telling_timesteps)
        guessed = data is None and feed.timesteps != timesteps
        groups = network.groups
        while step := _step(work, groups, feed, silence=not guessed):
            work, groups, new = step
            edits += new
    found.adopt(work)
    settings = {"function": "collapse", "timesteps": feed.timesteps, "data": "synthetic" if data is None else "given"}
    versions = {"snncompress": __version__, "torch": torch.__version__, "framework": found.framework}
    attach(work, _continued(model, Plan(tuple(edits), network.skipped, {**versions, **settings})))
    return work


def _step(
    model: M, groups: list[ChannelGroup], feed: Feed, *, silence: bool
) -> tuple[M, list[ChannelGroup], list[Edit]] | None:
    """Remove what is dead now, group by group: smaller model, groups, edits; None where nothing can go."""
    uses = [_use(model, group) for group in groups]
    watch = silence and any(bool((use.undriven & ~use.unread).any()) for use in uses)
    silent = _silent(model, feed, groups) if watch else {}
    edits: list[Edit] = []
    for number, use in enumerate(uses):
        group = groups[number]
        dead = use.unread | (use.undriven & _in_all_neurons(group, silent))
        for candidates in (dead, dead & use.gridless):
            removed = _removable(group, candidates)
            if len(removed) == 0:
                break
            edit = RemoveChannels.of(model, group, removed)
            smaller = _tried(model, edit, _columns(group, removed[~use.unread[removed]]), feed)
            if smaller is not None:
                model, groups = smaller, without(groups, number, removed)
                edits.append(edit)
                break
    return (model, groups, edits) if edits else None


class _Use(NamedTuple):
    """What the weights say of a group's channels, each bool [size].

    A weight from a channel to itself doesn't count: it keeps a silent channel silent, and an unread one unread.
    """

    unread: Tensor  # no weight leads from it to another channel
    undriven: Tensor  # no weight leads to it from another channel
    gridless: Tensor  # no weight of it, its own included, exists in a quantized layer


def _use(model: nn.Module, group: ChannelGroup) -> _Use:
    use = _Use(*(torch.ones(group.size, dtype=torch.bool) for _ in range(3)))
    for name in dict.fromkeys(member.module for member in group.members):
        module = layer_at(model, name)
        neuron, target, source = (group.member(name, side) for side in ("neuron", "out", "in"))
        if not (neuron or isinstance(module, (*WEIGHT_LAYERS, *NORMS, nn.PReLU))):
            use.unread.fill_(False)  # whatever it does with its channels
            use.undriven.fill_(False)
            continue
        for layer in (part for part in module.modules() if isinstance(part, WEIGHT_LAYERS)):
            if neuron:  # recurrent weights, from its spikes to its input
                target = source = neuron
            elif target and _depthwise(layer):
                source = target
            links = _links(layer)
            if weight_bits(layer) is not None:
                _strike(use.gridless, links, target, source)
            if target and source:
                links[target.index[:, :, None], source.index[:, None, :]] = False
            _strike(use.undriven, links, target, None)
            _strike(use.unread, links, None, source)
    return use


def _strike(holds: Tensor, links: Tensor, target: Member | None, source: Member | None) -> None:
    """It doesn't hold of channels with a link to their rows ``target`` or from their columns ``source``."""
    for member, linked in ((target, links.any(1)), (source, links.any(0))):
        if member is not None:
            holds &= ~linked[member.index].any(1)


def _links(layer: nn.Module) -> Tensor:
    """From which input channels weights ≠ 0 lead to which output channels, bool [out, in], whatever the groups."""
    weight: Any = layer.weight
    groups = int(getattr(layer, "groups", 1))
    blocks = (weight != 0).reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).any(3).cpu()
    if isinstance(layer, _ConvTransposeNd):
        blocks = blocks.transpose(1, 2)
    links = torch.zeros(groups, blocks.shape[1], groups, blocks.shape[2], dtype=torch.bool)
    each = torch.arange(groups)
    links[each, :, each] = blocks
    return links.flatten(2).flatten(0, 1)


def _depthwise(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == getattr(layer, "in_channels", None) == getattr(layer, "out_channels", None)


def _silent(model: nn.Module, feed: Feed, groups: list[ChannelGroup]) -> dict[str, Tensor]:
    """neuron → which channels never fire in the first batch, and have one membrane potential in all its samples.

    The second is what the weights promise of a channel that nothing drives; it is tested because data may come in on
    a way without weights.
    """
    silent: dict[str, Tensor] = {}

    def listen(member: Member) -> Callable[[Tensor, Tensor | None], None]:
        name = member.module

        def observe(spikes: Tensor, membrane: Tensor | None) -> None:
            if membrane is not None:
                spikes, membrane = member.observed(spikes), member.observed(membrane)
                alike = (membrane - membrane[:, :1]).abs() <= _tolerance(membrane) * membrane.abs()
                now = ((spikes == 0) & alike).transpose(0, 2).flatten(1).all(1).cpu()
                silent[name] = silent[name] & now if name in silent else now

        return observe

    copy = private_copy(model, feed.adapter).eval()
    with ExitStack() as stack:
        for member in {m.module: m for group in groups for m in group.members if m.side == "neuron"}.values():
            stack.callback(feed.adapter.observe(copy.get_submodule(member.module), listen(member), membrane=True))
        feed(copy, feed.first())
    return silent


def _in_all_neurons(group: ChannelGroup, silent: dict[str, Tensor]) -> Tensor:
    result = torch.full((group.size,), bool(group.names("neuron")))  # what no neuron closes speaks by its bias
    for member in group.members:
        if member.side == "neuron":
            result &= silent[member.module][member.index].all(1) if member.module in silent else False
    return result


def _removable(group: ChannelGroup, dead: Tensor) -> Tensor:
    """Positions to remove, the same in each run, a multiple of the group's step; some stay where all are dead."""
    in_all = dead.view(group.runs, -1).all(0)
    in_all[0] &= not in_all.all()
    in_all[in_all.nonzero()[: int(in_all.sum()) % group.step]] = False
    return in_all.repeat(group.runs).nonzero().flatten()


def _columns(group: ChannelGroup, positions: Tensor) -> dict[str, Channels]:
    return {m.module: (m.index[positions].flatten(), m.axis) for m in group.members if m.side == "neuron"}


def _tried(model: M, edit: RemoveChannels, muted: dict[str, Channels], feed: Feed) -> M | None:
    """A smaller copy; None where the weights that are left, or what passes the network, wouldn't stay the same.

    With every neuron an identity, no threshold hides that something reads a channel, as a sum over channels may.
    ``muted`` are the columns of each neuron that are silent, and may be read.
    """
    adapter = feed.adapter
    plain, smaller = plain_copy(model, adapter), private_copy(model, adapter)
    for stored, computed in zip(_weights(plain), _weights(model), strict=True):
        stored.copy_(computed)
    silent = {plain.get_submodule(name): channels for name, channels in muted.items()}
    before = wired_outputs(plain, adapter, feed.example(), silent)
    edit.apply(plain, adapter)
    edit.apply(smaller, adapter)
    after = wired_outputs(plain, adapter, feed.example())
    return smaller if all_same(before, after) and all_same(_weights(plain), _weights(smaller)) else None


def _weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]


def _tolerance(x: Tensor) -> float:
    """Of rounding in sums of other lengths: 2e-5 in float32, 4e-11 in float64."""
    return float(torch.finfo(x.dtype).eps ** (2 / 3))


def _continued(original: nn.Module, plan: Plan) -> Plan:
    try:
        before = plan_of(original)
    except PlanError:
        return plan
    if not plan.edits:
        return before
    gone = plan.removed_channels()
    skipped = {layer: why for layer, why in before.skipped.items() if layer not in gone}
    return Plan(before.edits + plan.edits, skipped, {**plan.origin, "before": dict(before.origin)})
