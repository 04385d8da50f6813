"""Take a model elsewhere: files for the runtimes that it is deployed with, each checked there."""

from depthfuse.errors import ExportError
from depthfuse.exporting.api import ExportedFile, export
from depthfuse.exporting.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "ExportError", "ExportedFile", "export"]
