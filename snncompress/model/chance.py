"""Random numbers: which generators a model may draw from, and how they are left as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def cuda_devices(model: nn.Module) -> list[int]:
    """Devices whose random number generators running the model may use."""
    found = {t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    return sorted(found)


def set_seed(seed: int, devices: list[int]) -> None:
    """Seed the generators of torch's CPU and of these CUDA devices, of numpy and of Python."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach CUDA generators that aren't restored
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, anything may be drawn; afterwards torch's, numpy's and Python's generators are where they were.

    So are those that the model, or its class, holds.

    >>> model = nn.Linear(1, 1)
    >>> before = torch.get_rng_state()
    >>> with undisturbed(model):
    ...     _ = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    with torch.random.fork_rng(cuda_devices(model)), held([*PLAIN, *generators_in(model)]):
        yield


@contextmanager
def held(generators: Iterable[Any]) -> Iterator[None]:
    """The same for generators of the user's own, of torch, numpy or Python."""
    before = [(generator, copy.deepcopy(state_of(generator))) for generator in generators]
    try:
        yield
    finally:
        for generator, state in before:
            set_state(generator, state)


def state_of(generator: Any) -> Any:
    """Where a generator stands: of torch a tensor, of numpy a dict, of Python a tuple."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Let a generator stand where :func:`state_of` has it; lists will do for arrays, and for tuples."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        version, numbers, spare = state
        generator.setstate((version, tuple(numbers), spare))
    else:
        generator.set_state(state)


PLAIN: tuple[Any, ...] = (random.getstate.__self__, np.random.get_state.__self__)  # type: ignore[attr-defined]
"""The generators behind Python's and numpy's own functions."""
_KINDS = {torch.Generator, np.random.Generator, np.random.RandomState, random.Random}


def generators_in(model: nn.Module) -> list[Any]:
    """Random generators among the attributes of modules, and of their classes."""
    modules = list(model.modules())
    classes = {cls for kind in {type(module) for module in modules} for cls in kind.__mro__}
    return among(*modules, *classes)


def among(*holders: Any) -> list[Any]:
    """Random generators among the attributes of these objects."""
    found = {id(v): v for holder in holders for v in getattr(holder, "__dict__", {}).values() if type(v) in _KINDS}
    return list(found.values())


@contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """:func:`undisturbed`, beginning at ``seed``: what is random inside a model is the same in every such run."""
    with undisturbed(model):
        set_seed(seed, cuda_devices(model))
        yield


_DRAWS = {"rand", "randn", "rand_like", "randn_like", "normal"}
_FILLS = {"uniform_", "normal_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_SPIKES = {"bernoulli", "poisson"}
_DROPS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"}


class Steady(TorchFunctionMode):
    """Inside, whatever torch draws is the same number for every element: a probability or rate itself, else 0.5.

    Two networks of different widths then agree on their noise and dropout, which seeds alone can't bring about.

    >>> with Steady():
    ...     torch.rand(2), torch.randn_like(torch.ones(1)), torch.bernoulli(torch.tensor([0.25]))
    (tensor([0.5000, 0.5000]), tensor([0.5000]), tensor([0.2500]))
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of torch comes by here."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DROPS or (name in _SPIKES and len(args) == 1):
            return next(iter((*args, *kwargs.values()))).clone()
        result = func(*args, **kwargs)
        if (name in _DRAWS or name in _FILLS or name in _SPIKES) and result.is_floating_point():
            result.fill_(0.5)
        return result
