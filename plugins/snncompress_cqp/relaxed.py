"""The convex relaxation of CQP: a comparison, not a tool. It misses the sparsity that it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from snncompress.extend import Layer, OptionError

from .cqp import CQP, Slopes

FLOOR = 0.85  # of a critical weight's mask


@dataclass(frozen=True)
class CQPRelaxed(CQP):
    """CQP with masks between 0 and 1, solved by OSQP and cut at 0.5: the trap that ``cqp`` avoids.

    min Σ (v (1 - m))²  subject to  0 ≤ m ≤ 1,  Σ (1 - m) = k,  m ≥ 0.85 where criticality > τ.  Its solution spreads
    the removal over many weights, 1 - m being proportional to 1/v² up to 1, so that how many masks fall below 0.5
    isn't k: the sparsity is missed.

    Needs the extra ``snncompress[relaxed]`` (OSQP). Options, shapes and errors as in :class:`CQP`.

    Source: the CQP author's published code; Stellato et al., "OSQP: an operator splitting solver for quadratic
    programs", Math. Prog. Comp. 2020.
    """

    name: ClassVar[str] = "cqp_relaxed"

    def score(self, layer: Layer, state: Slopes) -> Tensor:
        """v / (1 + v), from which ``select`` reads v, and 2 more where critical, [C, ...]."""
        importance = self.importance(layer, state).double()
        return importance / (1 + importance) + 2 * (self.criticality(layer, state) > self.tau)

    def select(self, scores: Tensor, count: int) -> Tensor:
        """What OSQP's mask, cut at 0.5, leaves out: not exactly ``count`` weights."""
        left = scores.isfinite()
        critical = scores[left] >= 2
        squashed = scores[left].double() - 2 * critical
        importance = squashed / (1 - squashed).clamp_min(1e-12)
        gone = ~left
        gone[left] = self._removed(importance, critical, count - int(gone.sum())) > 0.5
        return gone

    def _removed(self, importance: Tensor, critical: Tensor, count: int) -> Tensor:
        """1 - m of every weight, float64."""
        try:
            import numpy as np
            import osqp
            from scipy import sparse
        except ImportError as error:
            raise OptionError(f"cqp_relaxed needs OSQP: pip install 'snncompress[relaxed]' ({error}).") from error
        most = torch.where(critical, 1 - FLOOR, 1.0).double()
        if float(most.sum()) < count:
            raise OptionError(
                f"{self.name}: no mask removes {count} of {len(most)} weights and keeps {FLOOR} of each of the "
                f"{int(critical.sum())} critical ones. Raise tau, or lower the ratio."
            )
        n = len(importance)
        curvature = 2 * (importance / importance.max().clamp_min(1e-300)) ** 2  # the scale doesn't move the minimum
        objective = sparse.diags(curvature.cpu().numpy(), format="csc")
        limits: Any = sparse.vstack([np.ones((1, n)), sparse.eye(n)], format="csc")
        low, high = np.zeros(n + 1), np.concatenate([[count], most.cpu().numpy()])
        low[0] = count
        solver = osqp.OSQP()
        solver.setup(objective, np.zeros(n), limits, low, high, verbose=False)
        return torch.from_numpy(np.asarray(solver.solve(raise_error=False).x)).to(importance.device)
