"""dbrx_q: quantized, low-memory inference for DBRX.

    from dbrx_q import DbrxForCausalLM, DbrxTokenizer, generate_text

    model = DbrxForCausalLM.from_pretrained("dbrx-int4")
    tokenizer = DbrxTokenizer.from_pretrained("dbrx-int4")
    print(generate_text(model, tokenizer, ["A mixture of experts is"])[0])

Importing this package imports nothing heavy; a name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbrx_q.generation.generate import Generation, generate, generate_text, stream_text
    from dbrx_q.generation.sampling import SamplingParams
    from dbrx_q.model.kv_cache import KVCache
    from dbrx_q.model.modeling import DbrxForCausalLM, DbrxModel
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    from .config import DbrxAttentionConfig, DbrxConfig, DbrxFFNConfig
    from .errors import DbrxError

__version__ = "0.1.0"

_HOME = {
    "DbrxAttentionConfig": "config",
    "DbrxConfig": "config",
    "DbrxError": "errors",
    "DbrxFFNConfig": "config",
    "DbrxForCausalLM": "model.modeling",
    "DbrxModel": "model.modeling",
    "DbrxTokenizer": "tokenizer.tokenizer",
    "Generation": "generation.generate",
    "KVCache": "model.kv_cache",
    "SamplingParams": "generation.sampling",
    "generate": "generation.generate",
    "generate_text": "generation.generate",
    "stream_text": "generation.generate",
}

__all__ = [
    "DbrxAttentionConfig",
    "DbrxConfig",
    "DbrxError",
    "DbrxFFNConfig",
    "DbrxForCausalLM",
    "DbrxModel",
    "DbrxTokenizer",
    "Generation",
    "KVCache",
    "SamplingParams",
    "generate",
    "generate_text",
    "stream_text",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
