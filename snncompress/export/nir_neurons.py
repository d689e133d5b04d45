"""A neuron's equation as NIR nodes: one where NIR has it, else a loop of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from snncompress.interfaces import Dynamics

DT = 1e-4  # seconds per timestep: what snnTorch, SpikingJelly and others assume


class RefusedError(Exception):
    """Why a module or an operation can't be expressed."""


@dataclass
class Part:
    """Nodes and the edges between them: currents go in at ``entry``, spikes come out of the node named as the neuron.

    What comes after that one in ``nodes`` takes spikes back: its output is met in the next timestep.
    """

    entry: str
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)


def neuron_part(name: str, d: Dynamics, shape: tuple[int, ...], back: Any, *, plain: bool) -> Part:
    """The nodes of a neuron of this ``shape``; ``back`` is the node that hands on its own last spikes, if any.

    A reset by subtraction is a leaky integrator, a threshold, and a factor that takes spikes back to the integrator:

        u[t] = (1 - leak) · u[t-1] + leak · rest + gain · (x[t] - off / gain · s[t-1]),   s[t] = u[t] > θ

    with off = θ, or (1 - leak) · θ where θ is taken off before the leak. With ``plain`` it is a neuron that is reset to
    its rest in one node, which isn't the same.
    """
    import nir

    leak, gain, threshold = (_full(t, shape) for t in (d.leak, d.gain, d.threshold))
    if leak.any() and not leak.all():
        raise RefusedError("some of its neurons leak and others don't (a decay of 1), and NIR has either LIF or IF")
    rest, held = np.full(shape, d.rest), None if d.synapse is None else _full(d.synapse, shape)
    part = Part(name)
    if d.reset is None and not plain:
        part.entry = f"{name}_membrane"
        membrane = nir.LI(DT / leak, gain / leak, rest) if leak.any() else nir.I(gain / DT)
        off = threshold if d.late else (1 - leak) * threshold
        part.nodes = {part.entry: membrane, name: nir.Threshold(threshold), f"{name}_reset": nir.Scale(-off / gain)}
        part.edges = [(part.entry, name), (name, f"{name}_reset"), (f"{name}_reset", part.entry)]
    else:
        reset = rest if d.reset is None else np.full(shape, d.reset)
        if not leak.any():
            part.nodes[name] = nir.IF(gain / DT, threshold, reset)
        elif held is not None and (held < 1).all():
            part.nodes[name] = nir.CubaLIF(
                DT / (1 - held), DT / leak, gain / leak, rest, threshold, reset, w_in=1 / (1 - held)
            )
            held = None
        else:
            part.nodes[name] = nir.LIF(DT / leak, gain / leak, rest, threshold, reset)
    if held is not None:
        _put_before(part, f"{name}_synapse", held)
    if back is not None:
        part.nodes[f"{name}_recurrent"] = back
        part.edges += [(name, f"{name}_recurrent"), (f"{name}_recurrent", part.entry)]
    return part


def _put_before(part: Part, name: str, held: NDArray[np.float64]) -> None:
    """A synaptic current i ← α · i + x, of which α is ``held``."""
    import nir

    if (held < 1).any() and not (held < 1).all():
        raise RefusedError("some of its synapses leak and others don't (a decay of 1), and NIR has either LI or I")
    leak = 1 - held
    synapse = nir.LI(DT / leak, 1 / leak, np.zeros_like(held)) if leak.any() else nir.I(np.ones_like(held) / DT)
    part.nodes = {name: synapse, **part.nodes}
    part.edges.insert(0, (name, part.entry))
    part.entry = name


def factor(recurrent: Tensor, shape: tuple[int, ...]) -> Any:
    """The node of a recurrent weight for each neuron alone."""
    import nir

    return nir.Scale(_full(recurrent.detach().double(), shape))


def _full(value: Tensor, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A value per neuron, of one that broadcasts against a batch of one sample."""
    try:
        result: NDArray[np.float64] = value.double().broadcast_to((1, *shape))[0].contiguous().numpy()
    except RuntimeError as error:
        raise RefusedError(
            f"a decay or threshold of shape {list(value.shape)} doesn't fit neurons {list(shape)}"
        ) from error
    return result
