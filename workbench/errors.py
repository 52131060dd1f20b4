"""Every error a user can cause.

Each message is one line that names the argument or file, what was expected and what came; the CLI prints it
without a traceback.
"""

from __future__ import annotations

from pathlib import Path


class WorkbenchError(Exception):
    """Base of all errors that the workbench raises on purpose."""


class InputError(WorkbenchError, ValueError):
    """An argument does not fit: wrong dtype, shape, layout, device or value."""


class UnsupportedError(WorkbenchError):
    """A variant was asked for a problem that its `supports` refuses."""


class UnknownVariantError(WorkbenchError, LookupError):
    """No variant of that name is registered."""


class CompileError(WorkbenchError):
    """A kernel did not compile; the message carries the compiler's log."""


class RecordError(WorkbenchError):
    """A trace, table or configuration file is malformed, truncated or from another version."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def one_line(error: BaseException) -> str:
    """The error's kind and the first line of what it says, as records and reports show it."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
