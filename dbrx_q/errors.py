"""The exceptions that dbrx_q raises for wrong input or a wrong file.

    DbrxError
    ├── ConfigError        a value, in config.json or in a constructor, that no DBRX model can have
    ├── CheckpointError    a file of a checkpoint is missing, damaged or of another model
    ├── FormatError        a tensor that a packed format cannot hold
    ├── TokenizerError     a tokenizer file, a chat template or a token id that cannot be used
    ├── RequestError       an argument or a prompt that cannot be served
    └── UnsupportedError   a value that this version knows and does not support

Every message states the rule, the offending value and the next step. The command line prints it and exits with code 2.
"""

from dbrx_q.kernels.formats.errors import DbrxError, FormatError

__all__ = [
    "OF_ANOTHER_PROGRAM",
    "CheckpointError",
    "ConfigError",
    "DbrxError",
    "FormatError",
    "RequestError",
    "TokenizerError",
    "UnsupportedError",
]

OF_ANOTHER_PROGRAM = "Load a checkpoint of another program with dbrx_q.load, or make a copy with `dbrx-q quantize SRC DST --keep`"
"""What to do about a checkpoint that is not of the published layout and not dbrx_q's."""


class ConfigError(DbrxError, ValueError):
    """A configuration value that no DBRX model can have."""


class CheckpointError(DbrxError):
    """A file of a checkpoint that is missing, damaged, or of another model."""


class TokenizerError(DbrxError, ValueError):
    """A tokenizer file, a chat template or a token id that cannot be used."""


class RequestError(DbrxError, ValueError):
    """An argument or a prompt that cannot be served."""


class UnsupportedError(DbrxError):
    """A value that this version knows and does not support."""
