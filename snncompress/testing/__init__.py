"""For plugin authors: does a plugin keep the contract of :mod:`snncompress.interfaces`?

Each check raises a PluginError that says what is broken, and returns nothing otherwise; ``check_adapter`` returns what
it could check, and what the adapter doesn't offer. One line makes a test::

    from snncompress.testing import check_criterion

    def test_peak():
        check_criterion(Peak())

What a check can't know is whether the mathematics is right. The global random state is left as it was.
"""

from .adapters import check_adapter
from .criteria import check_criterion
from .numbers import check_energy_model, check_scheduler
from .quantizers import check_quantizer
from .targets import check_target
from .trials import AdapterReport

__all__ = [
    "AdapterReport",
    "check_adapter",
    "check_criterion",
    "check_energy_model",
    "check_quantizer",
    "check_scheduler",
    "check_target",
]
