"""`DbrxError`, the base of every error of the project, and `FormatError`; `dbrx_q.errors` draws the tree."""

__all__ = ["DbrxError", "FormatError"]


class DbrxError(Exception):
    """Base of every error that dbrx_q raises on purpose."""


class FormatError(DbrxError, ValueError):
    """A tensor that a format cannot represent."""
