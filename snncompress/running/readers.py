"""Who reads what of whom: a run is followed, operation by operation, from what modules put out to what others take."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from snncompress.model.chance import cuda_devices
from snncompress.model.modules import patched, tensors_in

_BY_VALUE = frozenset(
    {
        "_local_scalar_dense", "is_nonzero", "item", "equal", "allclose", "nonzero", "nonzero_static", "masked_select",
        "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount",
    }
)  # fmt: skip
_BY_SHAPE = frozenset(
    {
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_empty", "new_full", "new_empty_strided",
    }
)  # fmt: skip
_OUT_OF_SIGHT = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"})

_MOST = 2**30
"""Bytes of tensors on the way, which are all held, at most."""

_Key = tuple[str, int, int]
"""Which tensor of which call of whom."""
_DATA: _Key = ("", 0, 0)
_INNER: _Key = ("", 0, 1)
"""What a module keeps to itself: its state, or numbers on the way."""


Aside = Callable[[], AbstractContextManager[None]]


class NotFollowedError(Exception):
    """What happens next may depend on numbers in a way that isn't seen."""


@dataclass(frozen=True)
class Readers:
    """What came of a run."""

    readers: Mapping[str, list[list[set[str]]]]
    """Of each module: call by call, and tensor by tensor, who takes it in."""
    last: Mapping[str, int]
    """When each was called for the last time; those that weren't are missing."""

    def behind(self, name: str, found: set[str]) -> None:
        """Add this one to ``found``, and all that depends on it."""
        left = [name]
        while left:
            if (one := left.pop()) not in found:
                found.add(one)
                left.extend(reader for call in self.readers[one] for readers in call for reader in readers)


def readers_in(model: nn.Module, sites: Mapping[str, nn.Module], data: Any, run: Callable[[Aside], object]) -> Readers:
    """Follow what ``run`` does with a model that is in nobody else's hands, but for what it does inside an ``Aside``.

    Raises NotFollowedError where code outside of the ``sites`` decides by a number, takes one out of torch, reads what
    a site keeps to itself, its weights, or where the model remembers anything but in the sites, or a site draws random
    numbers: then who reads what isn't all that counts.
    """
    watch = _Watch(sites, data)
    before = _remembered(model, sites)
    chance = _Chance(model)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name, module in sites.items():
            stack.enter_context(patched(module, "forward", watch.site(name, module, chance)))
        stack.enter_context(_Leaving(watch))
        stack.enter_context(watch)
        run(watch.inside)
    if _remembered(model, sites) != before:
        raise NotFollowedError
    return Readers(watch.readers, watch.last)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, each tensor's storage is known by what it was made of."""

    def __init__(self, sites: Mapping[str, nn.Module], data: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers: dict[str, list[list[set[str]]]] = {name: [] for name in sites}
        self.last: dict[str, int] = {}
        self.busy = False
        self._clock = itertools.count()
        self._made_of: dict[int, set[_Key]] = {}
        self._states: set[int] = set()
        self._alive: list[Any] = []  # so that no storage takes another's place
        self._held = 0
        for x in tensors_in(data):
            self._add(x, {_DATA})
        own = (x for module in sites.values() for x in (*module.parameters(), *module.buffers()))
        for x in own:
            self._add(x, {_INNER})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        taken = [*tensors_in(args), *tensors_in(kwargs)]
        written = list(tensors_in(_written(func, args, kwargs)))
        if self.busy:
            new = [x for x in tensors_in(output) if _storage(x) not in self._made_of]
            for x in (*new, *written):
                self._add(x, {_INNER})
            return output
        name = func.overloadpacket.__name__
        found = set() if name in _BY_SHAPE else self.made_of(taken)
        if any(_storage(x) in self._states for x in written):
            raise NotFollowedError  # what a neuron put out and remembers
        if name in _BY_VALUE or _chosen_by_mask(func, args):
            self.refuse(found)
        for x in (*tensors_in(output), *written):
            self._add(x, found)
        return output

    def made_of(self, tensors: list[Tensor]) -> set[_Key]:
        """All of what these were made of."""
        found: set[_Key] = set().union(*(self._made_of.get(_storage(x), set()) for x in tensors))
        if _INNER in found and not self.busy:
            raise NotFollowedError
        return found

    def refuse(self, found: set[_Key]) -> None:
        """Numbers that aren't always the same aren't to be looked at."""
        if found:
            raise NotFollowedError

    def _add(self, x: Tensor, found: set[_Key]) -> None:
        if (storage := _storage(x)) not in self._made_of:
            self._held += x.untyped_storage().nbytes()
            if self._held > _MOST:
                raise NotFollowedError
        self._alive.append(x)
        self._made_of.setdefault(storage, set()).update(found)

    def site(self, name: str, module: nn.Module, chance: _Chance) -> Callable[..., Any]:
        """Stands in for its forward."""
        forward = module.forward

        def call(*args: Any, **named: Any) -> Any:
            if self.busy:  # within another
                return forward(*args, **named)
            self.last[name] = next(self._clock)
            for key in self.made_of([*tensors_in(args), *tensors_in(named)]) - {_DATA}:
                self.readers[key[0]][key[1]][key[2]].add(name)
            with self.inside(), chance.left_alone():
                output = forward(*args, **named)
            calls = self.readers[name]
            calls.append([])
            self._states.update(map(_storage, _held(module)))
            for index, x in enumerate(tensors_in(output)):
                calls[-1].append(set())
                self._alive.append(x)
                self._made_of[_storage(x)] = {(name, len(calls) - 1, index)}
            return output

        return call

    @contextmanager
    def inside(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False


class _Leaving(TorchFunctionMode):
    """Inside, numbers that leave torch are seen."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _OUT_OF_SIGHT and not self._watch.busy:
            self._watch.refuse(self._watch.made_of(list(tensors_in(args))))
        return func(*args, **(kwargs or {}))


class _Chance:
    """The generators of torch, numpy and Python."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = cuda_devices(model)

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Raise NotFollowedError where one was used inside."""
        before = self._state()
        yield
        if self._state() != before:
            raise NotFollowedError

    def _state(self) -> tuple[Any, ...]:
        drawn = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        return (*(bytes(state.numpy()) for state in drawn), str(np.random.get_state(legacy=False)), random.getstate())


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    return [given[name] for name in names if name in given]


def _chosen_by_mask(func: Any, args: Any) -> bool:
    """Does how much there is depend on numbers?"""
    return func.overloadpacket.__name__ == "index" and any(
        x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1:])
    )


def _held(module: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that are attributes."""
    for part in module.modules():
        yield from tensors_in([part._buffers, vars(part)])


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _remembered(model: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, list[tuple[str, int, int]]]:
    """Tensors that modules outside of the sites hold, and how often each was written to."""
    inside = {m for site in sites.values() for m in site.modules()}
    return {
        name: [
            (key, id(x), x._version)
            for home in (module._parameters, module._buffers, vars(module))
            for key, value in home.items()
            for x in tensors_in(value)
        ]
        for name, module in model.named_modules()
        if module not in inside
    }
