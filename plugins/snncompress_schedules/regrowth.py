"""Pruning that takes back some of what it did, as training shows what was missed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

from snncompress.extend import Granularity, OptionError

from .schedules import Gradual, check_step

Decay = Literal["cosine", "constant"]


@dataclass(frozen=True)
class PruneRegrow(Gradual):
    """Prune and regrow: channels or weights are masked while training goes on, and some come back where it pulls most.

    The share that is masked follows the cubic ramp of ``gradual``, exactly in every step t = 1 … k, each with its
    fine-tuning. Of n channels (weights), m(t) of which must be masked after the step, e(t) are exchanged::

        e(t) = ⌊r(t) · min(m(t), n − m(t))⌋,    r(t) = regrow/2 · (1 + cos(π t/k)),  or regrow itself ("constant")

    what was masked before and the lowest by the criterion, m(t) + e(t) in all, are masked; then the e(t) of them with
    the largest gradient come back, which may be ones that went just now. So it is a share of the masked ones that comes
    back, or, where fewer are left than are masked, the same share of these, as no more can be exchanged. In the last
    step nothing comes back: what is masked then is removed for good, before the last fine-tuning.

    Channels are brought back by |∂L/∂γ|, the gradient of the batch norm's scale over the calibration data
    (``bn_scale_gradient``, which says what stands in where there is no batch norm). A masked channel is silent: its
    neurons charge and fire, but what reads them gets 0, and so does a layer that reads a residual stream without a
    neuron between; coupled layers are silenced, and brought back, as one. In training no gradient reaches it (weight
    decay does), so it comes back with the weights that it had. The plan holds what was removed in the end, and replays
    like any other.

    Single weights are brought back by |∂L/∂w| (RigL), each layer getting as many as it had lost for them; those that
    were masked by an earlier step start from 0. Weights that were removed by an earlier call stay away.

    With ``repair=`` every step is repaired, though what is masked may come back: the weights with which a silent
    channel is read stay as they are (the data say nothing about them; rows that are stretched are so as a whole), and
    its own are fitted like any others, so that its neurons go on integrating what they did. Of what comes back, all
    that read it make use in the same fit.

    Args:
        steps: k, at least 1; with 1 it is ``one_shot``.
        regrow: the share in [0, 1] that comes back; 0 only delays the cut.
        decay: "cosine" lets it fall to 0 with the steps, as RigL does; "constant" keeps it.

    Raises:
        OptionError: an option that can't be, or ``ratio`` or ``regrown`` is asked for a step outside 1 … steps. From
            ``apply``: there is no ``finetune=``, between whose runs alone regrowth can tell anything, or the criterion
            removes blocks.
        DataError: from ``apply``, where data have no labels, since gradients decide.

    Source: Li et al., "Towards efficient deep spiking neural networks construction with spiking activity based
    pruning", ICML 2024 (channels, by SCA); Evci et al., "Rigging the lottery", ICML 2020 (weights, and the cosine).

    Example:
        >>> prune_regrow = PruneRegrow(steps=4, regrow=0.4)
        >>> [round(prune_regrow.ratio(0.64, step, 4), 2) for step in (1, 2, 3, 4)]
        [0.37, 0.56, 0.63, 0.64]
        >>> [round(prune_regrow.regrown(step, 4), 4) for step in (1, 2, 3, 4)]
        [0.3414, 0.2, 0.0586, 0.0]
    """

    name: ClassVar[str] = "prune_regrow"
    grows: ClassVar[Mapping[Granularity, str]] = MappingProxyType(
        {"channel": "bn_scale_gradient", "weight": "weight_gradient"}
    )

    regrow: float = 0.3
    decay: Decay = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.regrow
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise OptionError(f"{self.name}: regrow must be a share from 0 to 1, not {share!r}.")
        if self.decay not in get_args(Decay):
            raise OptionError(f"{self.name}: decay must be 'cosine' or 'constant', not {self.decay!r}.")

    def regrown(self, step: int, steps: int) -> float:
        """The share of what is masked that comes back in ``step`` = 1 … ``steps``; nothing in the last."""
        check_step(self.name, step, steps)
        if step == steps:
            return 0.0
        return self.regrow * (1.0 if self.decay == "constant" else (1.0 + math.cos(math.pi * step / steps)) / 2)
