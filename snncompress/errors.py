"""Every error that snncompress raises on purpose.

    SNNCompressError
    ├── ModelError       the model can't be compressed as it stands
    ├── DataError        the calibration data don't fit the model
    ├── OptionError      an argument has a wrong value: ratio, bits, skip, order ...
    │   └── UnknownNameError   no plugin of that name
    ├── PluginError      a plugin broke its contract, or two plugins claim one name
    ├── PlanError        a plan can't be replayed on this model
    └── StorageError     a file can't be written or read

Each message says what is wrong, where (layer, shape or plugin), the likely cause and what to do.
"""

from __future__ import annotations


class SNNCompressError(Exception):
    """Base of all errors below: ``except SNNCompressError`` catches whatever snncompress raises on purpose."""


class ModelError(SNNCompressError):
    """The model can't be compressed as it stands: no spiking neuron, two frameworks, an uninitialised layer."""


class DataError(SNNCompressError):
    """The data don't fit: wrong shape, dtype or device, empty, NaN, or no labels where labels are needed."""


class OptionError(SNNCompressError, ValueError):
    """An argument of ``apply`` or ``profile`` has a value that can't work."""


class UnknownNameError(OptionError, LookupError):
    """No plugin offers that name; the message lists the names there are and the nearest one."""


class PluginError(SNNCompressError):
    """A plugin returned what its interface forbids, failed, or claims a name that another one holds."""


class PlanError(SNNCompressError):
    """A plan doesn't fit the model it is replayed on, or isn't a plan."""


class StorageError(SNNCompressError):
    """A file or folder can't be written or read: no permission, no space, damaged, or another run's."""


class SyntheticDataWarning(UserWarning):
    """No calibration data were given, so scores come from a synthetic batch."""


class NothingToDoWarning(UserWarning):
    """Something asked for was left out: a layer that ``ratio`` or ``bits`` names and ``skip`` protects, or all."""


class DefaultSkipWarning(UserWarning):
    """Without ``skip=`` a large part of what could be pruned is left alone."""


class SilentNeuronsWarning(UserWarning):
    """A neuron population never fired in calibration, so spike-based scores of its layer mean nothing."""


class EmptyLayerWarning(UserWarning):
    """Pruning of single weights left a layer without any, so the network is cut in two there."""


class UnknownNeuronsWarning(UserWarning):
    """Modules put out spikes that no adapter knows as neurons, so they aren't counted or pruned as such."""


class NonlinearWarning(UserWarning):
    """A CNN has something between its activations that firing rates can't stand for, such as a clamp or a product."""


class KeptStateWarning(UserWarning):
    """A model keeps state of its own from batch to batch, so what is measured depends on their order."""
