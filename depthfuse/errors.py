"""Every error that depthfuse raises on purpose has one base class; `except DepthfuseError` catches them all.

Each also is the built-in error that fits it best, for callers who expect that one.
"""


class DepthfuseError(Exception):
    """Something that was given to depthfuse, or found by it, cannot be used; the message says what to do."""


class AccelerationError(DepthfuseError, RuntimeError):
    """A model that cannot be accelerated as it was given, or a plan whose outputs differ from the model's."""


class BackendError(DepthfuseError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class BudgetError(DepthfuseError, ValueError):
    """A budget that no subnet meets, or that is not stated once; or blocks that cannot be forced or excluded."""


class CheckpointError(DepthfuseError, RuntimeError):
    """A file that cannot be written, or cannot be trusted; the message names it and says what to do."""


class ConfigError(DepthfuseError, ValueError):
    """A configuration that is malformed or contradicts itself."""


class CostError(DepthfuseError, ValueError):
    """A cost table that does not fit the model, the machine or the settings it is used for."""


class DataError(DepthfuseError, ValueError):
    """Data that cannot be used; the message names the file, folder, split or option at fault."""


class ExportError(DepthfuseError, RuntimeError):
    """A model that cannot be exported as asked, or an exported file that does not compute the same."""


class FitError(DepthfuseError, ValueError):
    """Merged blocks cannot be fitted to what the original ones give; the message names the block."""


class MergeError(DepthfuseError, ValueError):
    """The subnet cannot be merged, or the merged model failed its check."""


class MethodError(DepthfuseError, ValueError):
    """An unknown method, or one that cannot do what it is asked to."""


class SpecError(DepthfuseError, ValueError):
    """A spec that is malformed or does not fit the model it is applied to."""


class TaskError(DepthfuseError, ValueError):
    """A task that is not known, or that does not fit the model or the data."""


class TrainingDiverged(DepthfuseError, RuntimeError):
    """A loss or gradient that is no finite number; the message names the iteration and the layer."""


class UsageError(ConfigError):
    """A command line that cannot be understood, or contradicts itself."""
