"""The exceptions that dbrx_q raises for wrong input or a wrong file.

    DbrxError
    ├── ConfigError        a value in config.json or in a constructor that no DBRX can have
    ├── CheckpointError    a file of a checkpoint is missing, damaged or of another model
    ├── FormatError        a tensor that a packed format cannot hold
    ├── TokenizerError     tokenizer files, chat templates and ids out of range
    ├── RequestError       an argument or a prompt that cannot be served
    └── UnsupportedError   something that is named but not offered by this version

Every message states the rule, the offending value and the next step. The command line prints the message and exits with code 2.
"""

from dbrx_q.kernels.formats.errors import DbrxError, FormatError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DbrxError",
    "FormatError",
    "RequestError",
    "TokenizerError",
    "UnsupportedError",
]


class ConfigError(DbrxError, ValueError):
    """A configuration value that no DBRX can have."""


class CheckpointError(DbrxError):
    """A file of a checkpoint that is missing, damaged, or of another model."""


class TokenizerError(DbrxError, ValueError):
    """Tokenizer files, chat templates and token ids that cannot be used."""


class RequestError(DbrxError, ValueError):
    """An argument or a prompt that cannot be served."""


class UnsupportedError(DbrxError):
    """Something that is named but not offered by this version."""
