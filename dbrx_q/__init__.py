"""Quantized, low-memory inference for DBRX, a mixture-of-experts model of 132 billion parameters.

    from dbrx_q import DbrxForCausalLM, DbrxTokenizer, generate_text

    model = DbrxForCausalLM.from_pretrained("dbrx-int4")  # written by `dbrx-q quantize`
    tokenizer = DbrxTokenizer.from_pretrained("dbrx-int4")
    print(generate_text(model, tokenizer, ["A mixture of experts is"])[0])

The code, from the command line down to the kernels; a folder imports only folders below it:

    cli/         the commands of `dbrx-q`
    eval/        perplexity, divergence from a reference, downstream tasks, benchmarks
    quantize/    quantization methods, calibration, and the pipeline that writes a quantized checkpoint
    generation/  from prompts to tokens: prefill, decode steps, sampling
    sources/     checkpoints of other programs: GGUF, GPTQ, AWQ, MLX, bitsandbytes, transformers
    transformers/  packed checkpoints in transformers: `import dbrx_q.transformers`
    model/       the modules, the KV cache, and loading
    experts/     caches of experts that do not all fit into memory
    planning/    what each GPU and host memory hold
    tokenizer/   text to token ids and back, chat templates
    checkpoint/  safetensors shards, tensor names, manifest, the hub
    kernels/     packed weight formats, and the operations on them for CPU and GPU
    config.py    `DbrxConfig`; config_sections.py has its attention and ffn parts, config_methods.py the methods that transformers'
                 configurations have, config_keys.py what is read, ignored and refused, config_rope.py the rotary embedding,
                 config_values.py bounds. Used everywhere: errors.py, json_file.py; for plots: plots.py, plot_labels.py;
                 deferred_torch.py imports torch without what inference does not use

Importing this package is light: a name is imported from its folder when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .deferred_torch import defer, is_wanted

if TYPE_CHECKING:
    from dbrx_q.generation.generate import Generation, generate, generate_text, stream_text
    from dbrx_q.generation.sampling import SamplingParams
    from dbrx_q.generation.streamers import TextIteratorStreamer, TextStreamer
    from dbrx_q.model.generation_config import GenerationConfig
    from dbrx_q.model.kv_cache import KVCache
    from dbrx_q.model.kv_cache_file import PromptCache
    from dbrx_q.model.modeling import DbrxForCausalLM, DbrxModel
    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Gpu, Machine
    from dbrx_q.sources.open import load
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    from .config import DbrxAttentionConfig, DbrxConfig, DbrxFFNConfig
    from .errors import DbrxError

__version__ = "0.1.0"

_HOME = {
    "Budget": "planning.budget",
    "DbrxAttentionConfig": "config",
    "DbrxConfig": "config",
    "DbrxError": "errors",
    "DbrxFFNConfig": "config",
    "DbrxForCausalLM": "model.modeling",
    "DbrxModel": "model.modeling",
    "DbrxTokenizer": "tokenizer.tokenizer",
    "Generation": "generation.generate",
    "GenerationConfig": "model.generation_config",
    "Gpu": "planning.machine",
    "KVCache": "model.kv_cache",
    "Machine": "planning.machine",
    "PromptCache": "model.kv_cache_file",
    "SamplingParams": "generation.sampling",
    "TextIteratorStreamer": "generation.streamers",
    "TextStreamer": "generation.streamers",
    "generate": "generation.generate",
    "generate_text": "generation.generate",
    "load": "sources.open",
    "stream_text": "generation.generate",
}

__all__ = [
    "Budget",
    "DbrxAttentionConfig",
    "DbrxConfig",
    "DbrxError",
    "DbrxFFNConfig",
    "DbrxForCausalLM",
    "DbrxModel",
    "DbrxTokenizer",
    "Generation",
    "GenerationConfig",
    "Gpu",
    "KVCache",
    "Machine",
    "PromptCache",
    "SamplingParams",
    "TextIteratorStreamer",
    "TextStreamer",
    "generate",
    "generate_text",
    "load",
    "stream_text",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if is_wanted(default=False):
        defer()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
