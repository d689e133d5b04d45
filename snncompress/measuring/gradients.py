"""How gradients reach the layers: measured and drawn, and a loss that keeps them from vanishing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from snncompress.base.display import new_axes
from snncompress.base.distributed import gathered, summed, together
from snncompress.base.tables import Column, Shown, Table
from snncompress.errors import DataError, ModelError, OptionError
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.model.cells import layer_at
from snncompress.model.modules import in_mode
from snncompress.model.network import weight_layers
from snncompress.model.parametrizations import computed_weight, stored_weight
from snncompress.running.bench import bench
from snncompress.running.scores import count_samples, cross_entropy, loss_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class GradientAwareLoss:
    """Cross-entropy, and a penalty on layers that the gradient doesn't reach.

        L = L_CE + λ Σ_l (1 − ‖g_l‖₂ / (‖g_l‖₂ + ε)),   g_l = ∂L_CE / ∂W_l

    Each convolution and linear layer adds λ where its gradient is zero, and next to nothing where it is far above ε.
    The norms depend on the weights through the surrogate gradients, so the backward pass differentiates twice: a
    training step takes about three times as long, and surrogates must be smooth. Called where no gradients are
    recorded, as in an evaluation, it is cross-entropy.

    Args:
        model: the network that is trained; not a copy of it. Its layers are looked up at every call, so it may be
            compressed in between, and frozen layers don't count.
        weight: λ ≥ 0. The paper gives neither λ nor ε.
        eps: ε > 0, the norm at which half of the penalty is gone.
        loss: ``loss(output, y)`` in the place of cross-entropy.

    Raises:
        OptionError: no model, or λ or ε out of range.
        ModelError: the model has no weight layer that is trained.
        DataError: the output doesn't depend on the model's weights, or the loss is no scalar.

    Source: "SNN SqueezeNet-P", gradient-aware loss.

    Example:
        The loss for ``finetune``, or in a loop of one's own:

        >>> from spikingjelly.activation_based import functional, neuron
        >>> model = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2))
        >>> loss = GradientAwareLoss(model, weight=0.1)
        >>> x, y = torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> float(loss(model(x), y).detach()) > float(nn.functional.cross_entropy(model(x), y).detach())
        True
    """

    def __init__(self, model: nn.Module, weight: float = 0.01, eps: float = 1e-3, loss: Loss | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"GradientAwareLoss takes the model that is trained, not {model!r}.")
        for name, value, least in (("weight", weight, "at least 0"), ("eps", eps, "more than 0")):
            number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
            if not (0 < number < math.inf or (number == 0 and name == "weight")):
                raise OptionError(f"GradientAwareLoss: {name} must be a number of {least}, not {value!r}.")
        self.model, self.weight, self.eps = model, weight, eps
        self.loss: Loss = cross_entropy if loss is None else loss

    def __call__(self, output: Any, y: Tensor) -> Tensor:
        """The loss, a scalar, of an output [T, N, K] or [N, K] and labels [N] or [N, K]."""
        loss = self.loss(output, y)
        if loss.numel() != 1:
            raise DataError(
                f"loss(output, y) must return a scalar, not shape {list(loss.shape)}: average over samples."
            )
        if not loss.requires_grad:
            return loss
        weights = list(_trained(self.model).values())
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
        if not norms:
            raise DataError(
                f"The loss doesn't depend on the weights of this {type(self.model).__name__}. Likely cause: it is "
                f"another model than the one that made the output, such as the one that was copied."
            )
        penalty = sum((self.eps / (norm + self.eps) for norm in norms), loss.new_zeros(()))
        return loss + self.weight * (penalty + (len(weights) - len(norms)))


@dataclass(frozen=True)
class GradientFlow(Shown):
    """The norm of each layer's gradient. ``print`` shows a table.

    Fields:
        norms: layer → ‖g_l‖₂, in order of definition.
        title: what the picture's legend calls it; the model's class.

    Example:
        >>> print(GradientFlow({"conv": 0.25, "fc": 0.5}))
        model: gradient of the loss with respect to the weights
         layer   norm
         ────────────
         conv    0.25
         fc       0.5
    """

    norms: Mapping[str, float]
    title: str = "model"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """A line over the layers, on a logarithmic scale that has room for 0.

        Draws on ``ax``, or on a new figure, and returns the axes: hand them on to draw another flow beside it, before
        and after. Raises OptionError where matplotlib isn't installed.
        """
        ax = new_axes() if ax is None else ax
        ax.plot(list(self.norms), list(self.norms.values()), marker="o", label=label or self.title)
        drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()])
        ax.set_yscale("symlog", linthresh=min(drawn[drawn > 0], default=1.0))
        ax.set_ylim(bottom=0)
        ax.set(xlabel="layer", ylabel="norm of the gradient")
        ax.tick_params("x", rotation=90)
        ax.legend()
        return ax

    def _parts(self) -> Iterator[str | Table]:
        yield f"{self.title}: gradient of the loss with respect to the weights"
        yield Table((Column("layer"), Column("norm")), list(self.norms.items()))


def gradient_flow(
    model: nn.Module,
    data: Any,
    *,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    seed: int = 0,
) -> GradientFlow:
    """‖g_l‖₂ of each convolution and linear layer, g_l being the gradient of the mean loss over ``data``.

    One forward and backward pass, batch by batch, on a private copy in training mode, as training sees it: batch norms
    use the batch's statistics, dropout drops (``seed`` decides what). The model stays bitwise as it is.

    Args:
        model: a network, spiking or not.
        data: labelled data: an (x, y) batch, a DataLoader, or an iterable of batches.
        timesteps: T feeds samples [N, ...] as constant current for T steps; None feeds batches as they are.
        forward: ``forward(model, batch)`` for models with a signature of their own.
        loss: ``loss(output, y)``; None: cross-entropy of the time-averaged output.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        seed: seed of what is random in the model.

    Raises:
        DataError: no labels, or data that don't fit the model.
        ModelError: no layer with a weight that requires a gradient.

    Source: "SNN SqueezeNet-P", gradient-flow plot.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(net.weight)
        >>> data = torch.ones(1, 1), torch.tensor([0])
        >>> {name: round(norm, 4) for name, norm in gradient_flow(net, data).norms.items()}  # of (-1/2, 1/2)
        {'': 0.7071}
    """
    samples = 0
    with bench(
        model, data, timesteps, forward, loss, adapter, plain=True, seed=seed, gradients=True, mixed=True
    ) as table:
        weights, feed = _trained(table.model), table.feed
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with together(), in_mode(table.model, training=True):
            for batch in feed:
                output = feed(table.model, batch)
                value, count = loss_of(feed, output, batch), count_samples(feed, output, batch)
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.add_(gradient, alpha=count)
                samples += count
        samples = sum(gathered(samples))
        summed(list(sums.values()))
    norms = {name: float(torch.linalg.vector_norm(total)) / samples for name, total in sums.items()}
    return GradientFlow(norms, type(model).__name__)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained: of convolutions and linear layers, as they are stored."""
    found = {name: weight for name, weight in _weights(model) if weight.requires_grad}
    if not found:
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer whose weight requires a gradient.")
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name in weight_layers(model):
        module = layer_at(model, name)
        if not computed_weight(module):
            yield name, stored_weight(module)
