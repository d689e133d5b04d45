"""What every edit is: a change to a model that checks, replays, packs and describes itself.

A new kind of edit is a file of its own in this folder, with a subclass of :class:`Edit` (and a line in ``__init__`` for
those who import it): plans, checkpoints, saved files and ``snncompress info`` know it from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from snncompress.errors import PlanError
from snncompress.interfaces import Adapter
from snncompress.model.cells import layer_at

KINDS: dict[str, type[Edit]] = {}
"""Every kind of edit by its name."""


@dataclass(frozen=True)
class Edit:
    """One change to a model.

    A subclass has a ``kind``, the name that it goes by in JSON. It must :meth:`check` and :meth:`apply` itself; where
    its fields aren't plain JSON values, it reads them :meth:`from_dict`; where files can hold it in less, it is
    :meth:`packed`. Everything is refused with PlanError before anything is changed.
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if cls.kind:
            KINDS[cls.kind] = cls

    def check(self, model: nn.Module) -> None:
        """Raise PlanError unless the edit fits the model."""
        raise PlanError(f"This version of snncompress can't replay {self.kind!r} edits. Upgrade snncompress.")

    def check_growth(self, model: nn.Module, largest: int) -> None:
        """Raise PlanError where a layer would get more than ``largest`` weights; most edits make nothing larger."""

    def apply(self, model: nn.Module, adapter: Adapter) -> None:
        """Change the model, in place."""
        self.check(model)

    def supersedes(self, earlier: Edit) -> bool:
        """Does this edit say all that an earlier one of the plan says, so that the earlier one can go?"""
        return False

    def describe(self) -> str:
        """The edit in a line of text."""
        return ", ".join(f"{key}={value}" for key, value in self.to_dict().items())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"edit": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Edit:
        """The edit with these fields; raises KeyError, TypeError or ValueError for anything else."""
        return cls(**data)

    def packed(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The edit as a file holds it: JSON values, and what goes into ``tensors`` under ``name``."""
        return self.to_dict()

    @staticmethod
    def merged(before: dict[str, Any], data: dict[str, Any]) -> bool:
        """Put packed ``data`` into the packed edit of the same kind ``before`` it, if one entry can say both."""
        return False

    @classmethod
    def unpacked(cls, data: dict[str, Any], tensors: dict[str, Tensor], budget: Budget) -> Iterable[Edit]:
        """The edits of a packed entry, whose tensors are taken out.

        A file may be a stranger's: what is unfolded is first spent from ``budget``. Raises PlanError, or any error of
        damaged JSON.
        """
        return [edit_from_dict(data)]

    @classmethod
    def summary(cls, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """A packed entry in a line of text, without unfolding it."""
        return f"{data['edit']}: " + ", ".join(f"{key}={value}" for key, value in data.items() if key != "edit")


class Budget:
    """How much a plan may unfold to; raises PlanError where it is more."""

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, count: int) -> None:
        """Take something off."""
        self._left -= count
        if self._left < 0:
            raise PlanError(
                "The file's plan unfolds to far more than the network has weights. It is damaged, or hostile."
            )


def edit_from_dict(data: Any) -> Edit:
    """The edit a JSON object describes; raises PlanError for anything else."""
    if not isinstance(data, dict) or "edit" not in data:
        raise PlanError(f"Not an edit: {str(data)[:80]!r}.")
    try:
        return KINDS[data["edit"]].from_dict({key: value for key, value in data.items() if key != "edit"})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"Damaged edit {str(data)[:80]!r}: {type(error).__name__} {str(error)[:200]}") from error


MOST = 2**31
"""No layer has more channels, and no weight a longer side."""


def integers(values: Any) -> tuple[int, ...]:
    """Whole numbers from JSON, none of them absurd; raises ValueError for anything else."""
    if not all(isinstance(v, int) and not isinstance(v, bool) and -MOST <= v <= MOST for v in values):
        raise ValueError(f"whole numbers up to {MOST} expected")
    return tuple(values)


def find(model: nn.Module, name: str, why: str) -> nn.Module:
    """The module that an edit is about; raises PlanError where there is none."""
    try:
        return layer_at(model, name)
    except AttributeError as error:
        raise PlanError(
            f"{type(model).__name__} has no module {name[:80]!r}; {why}. Is it another architecture?"
        ) from error
