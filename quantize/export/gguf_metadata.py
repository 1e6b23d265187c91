"""The metadata that llama.cpp's converter writes for DBRX: dimensions, tokenizer, and what is known of the model's origin."""

from __future__ import annotations

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import NORM_EPS, DbrxConfig
from dbrx_q.errors import TokenizerError, UnsupportedError
from dbrx_q.tokenizer.bpe_file import DBRX_PATTERN, TokenizerWarning, pattern_notice, read_json, read_tokenizer_json

from .small_files import write_tokenizer

__all__ = ["add_metadata"]

_ARCHITECTURE = "dbrx"  # in keys, and the name of the pattern that splits a text
_TOKENIZER = "tokenizer.json"


def add_metadata(writer: Any, weights: StoredWeights, name: str, card: Path | None, file_type: str) -> None:
    """Add all metadata to a `gguf.GGUFWriter` that knows its tensors already.

    Args:
        writer: of the gguf package.
        weights: to export.
        name: of the model, for `general.name`.
        card: the folder with the model card; None where there is none.
        file_type: a name in `gguf.LlamaFileType`.

    Raises:
        TokenizerError: the checkpoint has no tokenizer, or one that llama.cpp cannot have.
        UnsupportedError: a scaling of the rotary embedding that llama.cpp does not have.
    """
    import gguf

    _add_origin(writer, name, card)
    _add_dimensions(writer, weights.config)
    _add_rope_scaling(writer, weights.config)
    with tempfile.TemporaryDirectory() as folder:
        _add_tokenizer(writer, weights, Path(folder))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[file_type])


def _add_origin(writer: Any, name: str, card: Path | None) -> None:
    """The keys `general.*`: what the model card says of licence, authors and languages, and the size."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    parameters = writer.get_total_parameter_count()
    metadata = gguf.Metadata.load(None, card, name, parameters[0])
    metadata.size_label = gguf.size_label(*parameters)
    metadata.set_gguf_meta_model(writer)


def _add_dimensions(writer: Any, config: DbrxConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.ffn_config.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.attn_config.kv_n_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_clamp_kqv(config.attn_config.clip_qkv or 0.0)  # 0 is no limit in llama.cpp
    writer.add_expert_count(config.ffn_config.moe_num_experts)
    writer.add_expert_used_count(config.ffn_config.moe_top_k)
    writer.add_layer_norm_eps(NORM_EPS)


def _add_rope_scaling(writer: Any, config: DbrxConfig) -> None:
    """The inverse of `sources.gguf_keys.rope_scaling_of`."""
    import gguf

    settings = config.rope_parameters or {}
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"a GGUF file must have rope_type 'default', 'linear' or 'yarn', which llama.cpp computes; found {kind!r}. Set another in "
            "config.json"
        )
    factor = settings["factor"]
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(settings.get("original_max_position_embeddings") or config.max_seq_len)
    if settings.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(settings["beta_fast"])
    if settings.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(settings["beta_slow"])
    if settings.get("attention_factor") is not None:  # llama.cpp multiplies YaRN's own factor by its key
        writer.add_rope_scaling_attn_factors(settings["attention_factor"] / (1 + 0.1 * math.log(max(factor, 1.0))))


def _add_tokenizer(writer: Any, weights: StoredWeights, folder: Path) -> None:
    import gguf

    write_tokenizer(weights, folder)
    path = folder / _TOKENIZER
    if not path.is_file():
        raise TokenizerError(
            f"{weights.folder}: a GGUF file must hold the tokenizer; found no {_TOKENIZER} that llama.cpp could use. Put the published "
            "tokenizer files beside config.json"
        )
    pattern = read_tokenizer_json(path).pattern
    if pattern != DBRX_PATTERN:
        notice = pattern_notice(weights.small_files or weights.folder, pattern)
        warnings.warn(f"{notice}. llama.cpp splits texts by DBRX's pattern", TokenizerWarning, stacklevel=2)
    tokens, types = _tokens(path, weights.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_ARCHITECTURE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens))
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token  # DBRX adds no token to a text
    special.add_to_gguf(writer, quiet=True)


def _tokens(path: Path, count: int) -> tuple[list[str], list[int]]:
    """(spelling, type) of every token of a tokenizer.json; rows of the embedding without a token are unused.

    Raises:
        TokenizerError: an id beyond the rows of the embedding.
    """
    import gguf

    data = read_json(path)
    tokens = [f"[PAD{token_id}]" for token_id in range(count)]
    types = [int(gguf.TokenType.UNUSED)] * count
    kinds = {token["content"]: bool(token.get("special", True)) for token in data.get("added_tokens") or []}
    ids: dict[str, int] = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data.get("added_tokens") or []}}
    for token, token_id in ids.items():
        if token_id >= count:
            raise TokenizerError(
                f"{path.name}: token ids must be below {count}, the rows of the embedding; found {token_id} ({token!r}). Use the tokenizer "
                "of this model"
            )
        tokens[token_id] = token
        kind = gguf.TokenType.NORMAL
        if token in kinds:
            kind = gguf.TokenType.CONTROL if kinds[token] else gguf.TokenType.USER_DEFINED
        types[token_id] = int(kind)
    return tokens, types
