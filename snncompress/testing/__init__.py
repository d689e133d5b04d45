"""For plugin authors: does a plugin keep the contract of :mod:`snncompress.interfaces`?

Each check raises a PluginError that says what is broken, and returns nothing otherwise. One line makes a
test::

    from snncompress.testing import check_criterion

    def test_peak():
        check_criterion(Peak())

What a check can't know is whether the mathematics is right. The global random state is left as it was.
"""

from .adapters import check_adapter
from .criteria import check_criterion
from .numbers import check_energy_model, check_scheduler
from .quantizers import check_quantizer

__all__ = ["check_adapter", "check_criterion", "check_energy_model", "check_quantizer", "check_scheduler"]
