"""The base of every error of the project, and the one that formats raise; the tree is drawn in `dbrx_q.errors`."""

__all__ = ["DbrxError", "FormatError"]


class DbrxError(Exception):
    """Base of every error that dbrx_q raises on purpose."""


class FormatError(DbrxError, ValueError):
    """A tensor that a packed format cannot hold."""
