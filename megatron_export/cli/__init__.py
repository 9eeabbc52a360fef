"""The commands, their flags and their output."""

from .export_command import main

__all__ = ["main"]
