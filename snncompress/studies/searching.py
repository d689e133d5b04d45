"""Which sets of blocks to remove: every set measured, or the path that greedy removal takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from snncompress.base.display import new_axes
from snncompress.base.progress import Progress, tracked
from snncompress.base.tables import Column, Shown, Table, percent
from snncompress.contract.detection import find_adapter
from snncompress.contract.registry import registry
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, BlockCriterion, Criterion, EnergyModel, Forward, Loss
from snncompress.measuring.judging import judge
from snncompress.model.copying import private_copy
from snncompress.model.plan import refuse_frozen
from snncompress.pruning.block_pruning import BlockPruning
from snncompress.pruning.fitting import RepairKind
from snncompress.pruning.recipe import Recipe
from snncompress.pruning.repair import fit
from snncompress.pruning.settings import RepairChoice, fitting, resolve_repair
from snncompress.pruning.training import train
from snncompress.running.bench import bench
from snncompress.running.data import Feed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["exhaustive", "greedy"]
MOST_BLOCKS = 8
"""For an exhaustive search: 2⁸ = 256 sets."""


@dataclass(frozen=True)
class Candidate:
    """A network without some of its blocks.

    Fields:
        removed: the blocks that are gone, in order of execution.
        accuracy: share of samples classified right, 0 to 1.
        energy_pj: pJ per sample.
        n_params: parameters.
        n_ac, n_mac: accumulates and multiply-accumulates per sample.
    """

    removed: tuple[str, ...]
    accuracy: float
    energy_pj: float
    n_params: int
    n_ac: float
    n_mac: float


@dataclass(frozen=True)
class BlockSearch(Shown):
    """What :func:`block_search` measured. ``print`` shows a table: the Pareto front, or all where they are few.

    Fields:
        candidates: the networks that were measured.
        blocks: the blocks that may go, in order of execution.
        budget: what each candidate got, in words.
        title: the model's class.

    Example:
        >>> whole, less = Candidate((), 0.9, 200.0, 40, 222.2, 0.0), Candidate(("a",), 0.8, 100.0, 30, 111.1, 0.0)
        >>> worse = Candidate(("b",), 0.7, 150.0, 20, 166.7, 0.0)
        >>> result = BlockSearch((whole, less, worse), ("a", "b"), "no fine-tuning; 10 samples")
        >>> [candidate.removed for candidate in result.front]
        [('a',), ()]
        >>> print(result)
        model without some of its blocks a, b; each: no fine-tuning; 10 samples
         removed   accuracy (%)   energy (pJ)   parameters      AC   MAC   Pareto front
         ──────────────────────────────────────────────────────────────────────────────
         a                 80.0           100           30   111.1     0              *
         b                 70.0           150           20   166.7     0
         -                 90.0           200           40   222.2     0              *
    """

    candidates: tuple[Candidate, ...]
    blocks: tuple[str, ...]
    budget: str
    title: str = "model"

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The Pareto front: candidates that none beats in accuracy at no more energy, the cheapest first."""
        found: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda c: (c.energy_pj, -c.accuracy)):
            if not found or candidate.accuracy > found[-1].accuracy:
                found.append(candidate)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    def to_table(self) -> Table:
        """Every network that was measured, not the Pareto front alone."""
        return self._table(self.candidates)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy (%) against energy (nJ per sample), one point per candidate; a line marks the Pareto front.

        Draws on ``ax``, or on a new figure, and returns the axes; showing or saving them is left to you. Raises
        OptionError where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        gone = [len(c.removed) for c in self.candidates]
        points = ax.scatter(
            [c.energy_pj / 1e3 for c in self.candidates], [100 * c.accuracy for c in self.candidates],
            c=gone, cmap="viridis", vmin=0, vmax=len(self.blocks), s=18,
        )  # fmt: skip
        front = self.front
        ax.plot([c.energy_pj / 1e3 for c in front], [100 * c.accuracy for c in front], "k--o", mfc="none", ms=9)
        ax.get_lines()[-1].set_label("Pareto front")
        ax.figure.colorbar(points, ax=ax, label="blocks removed")
        ax.set(xlabel="energy (nJ per sample)", ylabel="accuracy (%)", title=f"{self.title}: {self.budget}")
        ax.legend()
        return ax

    def _parts(self) -> Iterator[str | Table]:
        few = len(self.candidates) <= 2 * MOST_BLOCKS
        yield f"{self.title} without some of its blocks {', '.join(self.blocks)}; each: {self.budget}"
        yield self._table(self.candidates if few else self.front)
        if not few:
            yield f"{len(self.candidates)} networks measured; shown: the Pareto front"

    def _table(self, candidates: Sequence[Candidate]) -> Table:
        columns = (
            Column("removed", show=lambda removed: removed or "-"), Column("accuracy", "accuracy (%)", percent),
            Column("energy_pj", "energy (pJ)"), Column("n_params", "parameters"), Column("n_ac", "AC"),
            Column("n_mac", "MAC"), Column("pareto", "Pareto front", lambda best: "*" if best else ""),
        )  # fmt: skip
        front = self.front
        rows = [
            (", ".join(c.removed), c.accuracy, c.energy_pj, c.n_params, c.n_ac, c.n_mac, c in front)
            for c in sorted(candidates, key=lambda c: (c.energy_pj, -c.accuracy))
        ]
        return Table(columns, rows)


def block_search(
    model: nn.Module,
    data: Any,
    criterion: str | BlockCriterion = "ablation",
    *,
    method: Method = "exhaustive",
    remove: int | Collection[int] | None = None,
    repair: RepairChoice = "auto",
    epochs: int = 0,
    lr: float = 1e-3,
    test: Any = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    energy_model: EnergyModel | str = "horowitz_45nm",
    seed: int = 0,
    progress: Progress | None = None,
) -> BlockSearch:
    """Accuracy and energy of a network without some of its blocks: which can go, and what each set costs.

    "exhaustive" measures every set of blocks, at most 8 of them. "greedy" removes the block that ``criterion`` scores
    lowest, scores what is left again, and so on: one network per number of blocks removed. Each candidate is repaired,
    fine-tuned for ``epochs`` with the built-in trainer, and measured in one pass over ``test``.

    ``apply(model, snncompress_fire.Ablation(blocks=candidate.removed), 1.0, None, data=data, repair=...)`` makes a
    candidate: exactly that one where nothing was repaired or fine-tuned. Repair is cheaper here: block after block,
    it fits the layers that read what was removed, while ``apply`` fits all that come after.

    Args:
        model: the network; it stays bitwise as it is, like torch's random state.
        data: calibration and training data (x, y): a batch, a DataLoader, or an iterable of batches.
        criterion: a block criterion: which blocks may go, and, where greedy, the scores.
        method: "exhaustive" or "greedy".
        remove: how many blocks to remove: a number, several, or None for all numbers from 0 on.
        repair: how the layers that read what was removed get their weights: as for ``apply``.
        epochs: fine-tuning of each candidate, the whole network included.
        lr: its learning rate.
        test: labelled data for accuracy and energy; None: ``data``.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        loss: ``loss(output, y)`` for scores and fine-tuning; None: cross-entropy.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        energy_model: what turns counts into pJ.
        seed: seed of everything random; each candidate starts from it.
        progress: a bar on a terminal, a callable, or False for nothing.

    Raises:
        OptionError: another kind of criterion, more than 8 blocks, or a number of blocks that aren't there.
        ModelError: no block that could go.
        DataError: data without labels, or that don't fit the model.

    Example:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> from snncompress_fire import Ablation
        >>> one, other = (nn.Sequential(nn.Linear(4, 4), neuron.LIFNode()) for _ in range(2))
        >>> net = nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(), one, other, nn.Linear(4, 2))
        >>> batch = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
        >>> result = block_search(net, batch, Ablation(blocks=("2", "3")), timesteps=2)
        >>> [candidate.removed for candidate in result.candidates]
        [(), ('2',), ('2', '3'), ('3',)]
    """
    chosen = registry().resolve("criterion", criterion, Criterion)
    if not isinstance(chosen, BlockCriterion):
        raise OptionError(f"Criterion {chosen.name!r} scores {chosen.granularity}s; block_search removes whole blocks.")
    if method not in get_args(Method):
        raise OptionError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}.")
    recipe = Recipe(epochs, lr)
    word = resolve_repair(repair, chosen)
    energy: EnergyModel = registry().resolve("energy model", energy_model, EnergyModel)
    found = find_adapter(model, adapter)
    refuse_frozen(model, "compressed")
    with bench(model, data, timesteps, forward, loss, found, test=test, seed=seed, gradients=True) as table:
        feed = table.feed
        pruning = BlockPruning(table.model, found, chosen, feed, 1.0, fresh=word == "reinit")
        blocks = tuple(pruning.blocks())
        if method == "exhaustive" and len(blocks) > MOST_BLOCKS:
            raise OptionError(
                f"{type(model).__name__} has {len(blocks)} blocks, {', '.join(blocks)}, so 2^{len(blocks)} sets of "
                f"them. Name at most {MOST_BLOCKS}, as in Ablation(blocks=(...)), or take method='greedy'."
            )
        nested = [(a, b) for a in blocks for b in blocks if b.startswith(f"{a}.")]
        if nested:
            raise OptionError(f"Block {nested[0][1]!r} is a part of block {nested[0][0]!r}: name one of them.")
        sizes = _sizes(remove, len(blocks))
        networks = _Networks(pruning, feed, fitting(word), seed)
        if method == "exhaustive":
            sets = [s for s in _subsets(blocks) if len(s) in sizes]
        else:
            path = networks.greedy(max(sizes), progress)
            sets = [tuple(name for name in blocks if name in path[:size]) for size in sizes]
        samples: list[int] = []

        def measured(removed: tuple[str, ...], network: nn.Module) -> Candidate:
            table.reseed()
            if epochs:
                network = private_copy(network, found)
                train(network, feed, recipe, progress=False)
            p, right = judge(network, table.test, energy)
            samples.append(p.n_samples)
            return Candidate(removed, right, p.energy_pj, p.n_params, p.n_ac, p.n_mac)

        candidates = tuple(
            measured(s, networks.without(s)) for s in tracked(sets, progress, "measuring sets of blocks")
        )
    tuning = f"{epochs} epochs of fine-tuning at {lr:g}" if epochs else "no fine-tuning"
    budget = f"repair={word!r}, {tuning}, {samples[0]:,} samples"
    return BlockSearch(candidates, blocks, budget, type(model).__name__)


class _Networks:
    """Networks without sets of blocks; one that begins as the last set did goes on from there."""

    def __init__(self, pruning: BlockPruning, feed: Feed, kind: RepairKind | None, seed: int) -> None:
        self._feed, self._kind, self._seed = feed, kind, seed
        self._path: list[tuple[tuple[str, ...], BlockPruning]] = [((), pruning)]

    def without(self, removed: tuple[str, ...]) -> nn.Module:
        """The network without these blocks, which are in order of execution."""
        while self._path[-1][0] != removed[: len(self._path[-1][0])]:
            self._path.pop()
        while len(gone := self._path[-1][0]) < len(removed):
            self._path.append((removed[: len(gone) + 1], self._less(self._path[-1][1], removed[len(gone)])))
        return self._path[-1][1].model

    def greedy(self, most: int, progress: Progress | None) -> list[str]:
        """The blocks in the order in which they go: each time the one that scores lowest in what is left."""
        path: list[str] = []
        pruning = self._path[0][1]
        while len(path) < most:
            scores = pruning.score(self._feed, self._seed, progress, f"block {len(path) + 1}/{most}: ")
            path.append(min(scores, key=lambda name: float(scores[name])))
            pruning = self._less(pruning, path[-1])
        return path

    def _less(self, pruning: BlockPruning, name: str) -> BlockPruning:
        """The same without one more block; what read it is fitted to what it gave in the whole network."""
        smaller = pruning.on(private_copy(pruning.model, pruning.adapter))
        readers = smaller.blocks()[name].consumers
        edit = smaller.remove(name)
        if self._kind:
            whole, network = self._path[0][1].model, smaller.network()
            fit(smaller.model, whole, network, self._feed, [edit], self._kind, self._seed, progress=False, only=readers)
        return smaller


def _subsets(blocks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All of them, each next to those that begin alike."""
    if not blocks:
        return [()]
    first, rest = blocks[:1], _subsets(blocks[1:])
    return [(), *(first + s for s in rest), *rest[1:]]


def _sizes(remove: Any, most: int) -> list[int]:
    if remove is None:
        return list(range(most + 1))
    sizes = list(remove) if isinstance(remove, Collection) and not isinstance(remove, str) else [remove]
    wrong = [n for n in sizes if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= most]
    if wrong or not sizes:
        raise OptionError(f"remove must be numbers of blocks from 0 to {most}, the blocks there are, not {remove!r}.")
    return sorted(set(sizes))
