"""The version of the package, for parts of it that the package itself imports."""

__version__ = "0.1.0"
