"""The error that `depthfuse.accelerate` raises."""


class AccelerationError(RuntimeError):
    """A model that cannot be accelerated as it was given, or a plan whose outputs differ from the model's."""
