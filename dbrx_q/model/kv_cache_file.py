"""The keys and values of a prompt in a file, so that a later process does not compute them again.

A safetensors file: `tokens` int64 [T]; for every layer and every block of 1,024 tokens the parts of the cache with the token axis first,
such as `layers.0.keys.0` [1024, G, C]; and last `sha256` uint8 [32], of all bytes before it. The metadata say what the keys and values
were computed by.

Dimension letters: `T` tokens of the prompt, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import dbrx_q
from dbrx_q.checkpoint.manifest import Manifest
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from dbrx_q.checkpoint.weights_hash import file_sha256
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.kernels.formats.kv import KVLayer
from dbrx_q.planning.footprint import PREFILL_TOKENS

from .kv_cache import KVCache
from .modeling import DbrxForCausalLM

__all__ = ["PromptCache", "model_fingerprint", "prefill_step"]

_VERSION = "1"
_BLOCK_TOKENS = 1024
_DIGEST_BYTES = 32
_PARTS = ("keys", "values", "key_scales", "value_scales")
# What of the configuration decides keys and values, beside the weights.
_CONFIG_KEYS = ["d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "attn_config", "ffn_config", "rope_parameters"]
_CONFIG_KEYS += ["rope_scaling", "rope_theta"]


@dataclass(frozen=True)
class PromptCache:
    """The keys and values of a prompt in a file, checked against a model.

        results = generate(model, [ids], on_prefilled=lambda i, cache: PromptCache.save("system.safetensors", model, ids, cache))
        prompt_cache = PromptCache.open("system.safetensors", model)  # in another process
        results = generate(model, [ids + question], prompt_cache=prompt_cache)

    Results equal those without the file: on the CPU bit for bit, since only whole prefill steps of a model that computes in the same way
    are reused.
    """

    path: Path
    """The file."""
    tokens: tuple[int, ...]
    """The tokens of the prompt."""
    format: str
    """The format of keys and values: "plain", "int8" or "int4"."""
    computed_by: str
    """What decides the last bits of keys and values: kind of device, implementation of attention, tokens of a prefill step."""

    @staticmethod
    def save(path: str | os.PathLike[str], model: DbrxForCausalLM, tokens: Sequence[int], cache: KVCache) -> None:
        """Write the keys and values of a prompt into a file, which appears when it is complete and replaces one of its name.

        Args:
            path: the file.
            model: computed the cache; it was loaded from a folder that has not changed since.
            tokens: the prompt, from its first token.
            cache: of one sequence without padding, which begins with `tokens`; more tokens of it are not written.

        Raises:
            RequestError: the cache holds fewer tokens, several sequences or padding, the model was not loaded from a folder, or the file
                cannot be written.
        """
        path = Path(path)
        if cache.batch_size != 1 or cache.padding[0]:
            raise RequestError(
                f"a prompt's cache must hold one sequence without padding; found {cache.batch_size} and {len(cache.padding[0])} columns of "
                "padding. Save cache.sequence(i), or run the prompt alone"
            )
        if not 0 < len(tokens) <= cache.lengths[0]:
            raise RequestError(f"the cache must hold the prompt, at least one token; found {cache.lengths[0]} of {len(tokens)} tokens")
        metadata = {"kv_cache": _VERSION, "format": cache.format, "dtype": str(model.dtype), "computed_by": _computed_by(model)}
        metadata |= {"model": model_fingerprint(model), "dbrx_q": dbrx_q.__version__, "torch": torch.__version__}
        blocks = [(name, part[0, :, first:end].transpose(0, 1)) for name, part, first, end in _blocks(cache.layers, len(tokens))]
        described = [(name, block.dtype, tuple(block.shape)) for name, block in blocks]
        contents = [("tokens", torch.int64, (len(tokens),)), *described, ("sha256", torch.uint8, (_DIGEST_BYTES,))]
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            writer = SafetensorsWriter(partial, contents, metadata=metadata)
            try:
                writer.write("tokens", torch.tensor(tokens, dtype=torch.int64))
                for name, block in blocks:
                    writer.write(name, block.cpu().contiguous())
                writer.write("sha256", torch.frombuffer(bytearray.fromhex(writer.digest), dtype=torch.uint8))
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            os.replace(partial, path)
        except OSError as error:
            raise RequestError(
                f"{path}: a prompt's cache must be writable; {error.strerror or error}. Nothing was left behind. Give another name"
            ) from None
        finally:
            with suppress(OSError):
                partial.unlink()

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: DbrxForCausalLM, *, kv_format: str | None = None) -> PromptCache:
        """The prompt's cache in a file, once all of it is checked.

        Args:
            path: the file.
            model: will use it.
            kv_format: the format that the keys and values must have; None for any.

        Raises:
            CheckpointError: the file is missing, damaged or of another kind.
            RequestError: it was made by another model, in another dtype or in another format.
        """
        path = Path(path)
        try:
            with SafetensorsFile(path) as file:
                metadata = file.metadata
                if metadata.get("kv_cache") != _VERSION:
                    raise CheckpointError(f"its metadata must have kv_cache = {_VERSION}; found {metadata.get('kv_cache')!r}")
                _check_digest(file)
                tokens = tuple(file.read("tokens").tolist())
        except (CheckpointError, KeyError) as error:
            raise CheckpointError(
                f"{path}: a prompt's cache must be a whole file that dbrx_q wrote; {error}. Remove it and make it again"
            ) from None
        expected = {"model": model_fingerprint(model), "dtype": str(model.dtype), "format": kv_format or metadata["format"]}
        for key, meaning in (("model", "the model that uses it"), ("dtype", "the same dtype"), ("format", "the same KV format")):
            if metadata.get(key) != expected[key]:
                raise RequestError(
                    f"{path}: a prompt's cache must come from {meaning}, {expected[key][:19]}; found {str(metadata.get(key))[:19]}. Give "
                    "another file, or remove this one and make it again"
                )
        return cls(path, tokens, metadata["format"], metadata["computed_by"])

    def shared(self, model: DbrxForCausalLM, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt's beginning need not be computed; at least the last one must be.

        On a CPU these are whole prefill steps, and none if the file was computed in another way: products of another number of rows can
        differ in their last bits.
        """
        pairs = enumerate(zip(self.tokens, prompt, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(prompt)))
        common = min(common, len(prompt) - 1)
        if model.device.type != "cpu":
            return common
        return common // prefill_step(model) * prefill_step(model) if self.computed_by == _computed_by(model) else 0

    def copy_into(self, cache: KVCache, tokens: int) -> None:
        """Replace the sequence of a cache of one sequence by the first `tokens` tokens of the file.

        Args:
            cache: in the file's format; on any devices.
            tokens: at most those of the file.

        Raises:
            RequestError: the cache has another format or no room, or the file has fewer tokens.
            CheckpointError: the file cannot be read any more.
        """
        if cache.format != self.format or cache.batch_size != 1:
            raise RequestError(
                f"{self.path}: a cache must have one sequence in the format {self.format} of the file; found {cache.batch_size} in "
                f"{cache.format}. Make a cache of that format"
            )
        if not 0 <= tokens <= len(self.tokens):
            raise RequestError(f"{self.path}: the file holds {len(self.tokens)} tokens; {tokens} are asked for. Ask for fewer")
        cache.reserve(tokens)
        with SafetensorsFile(self.path) as file:
            for name, part, first, end in _blocks(cache.layers, tokens):
                part[0, :, first:end] = file.read_rows(name, 0, end - first).transpose(0, 1)
        cache.lengths, cache.padding = [tokens], [()]

    def restore(self, model: DbrxForCausalLM, tokens: int | None = None) -> KVCache:
        """A cache that grows, with the first `tokens` tokens of the file; None for all. Errors as for `copy_into`."""
        count = len(self.tokens) if tokens is None else tokens
        devices = model.transformer.devices
        room = None
        if model.limits.kv_bytes is not None:
            room = model.limits.kv_bytes // KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=self.format).nbytes
        size = max(1, count if room is None else min(count, room))
        cache = KVCache(model.config, 1, size, dtype=model.dtype, device=devices, format=self.format, grows=True, limit=room)
        self.copy_into(cache, count)
        return cache


def prefill_step(model: DbrxForCausalLM) -> int:
    """Tokens of a prefill step."""
    limit, preferred = model.limits.step_tokens, PREFILL_TOKENS[model.device.type]
    return preferred if limit is None else min(limit, preferred)


def model_fingerprint(model: DbrxForCausalLM) -> str:
    """A SHA-256, in hexadecimal, of what decides a model's keys and values: its weights, their configuration, and a fallback copy.

    The manifest has the hashes of a quantized checkpoint's shards. Those of a plain one are computed once and kept in the user's cache.

    Raises:
        RequestError: the model was not loaded from a folder, or the folder has changed since.
    """
    origin = model.origin
    if origin is None or not origin.unchanged:
        problem = "this one was not loaded from a folder" if origin is None else f"the files in {origin.folder} have changed since"
        raise RequestError(f"a prompt's cache belongs to the files of a model; {problem}. Load the model again, or save it first")
    manifest = Manifest.read(origin.folder)
    listed = {} if manifest is None else manifest.shards
    hashes = []
    for name, (size, _) in sorted(origin.stamps.items()):
        entry = listed.get(name, {})
        hashes.append(entry["sha256"] if entry.get("bytes") == size else file_sha256(origin.folder / name))
    config = model.config.to_dict()
    fallback = getattr(model.expert_store, "fallback", None) is not None
    identity = {"shards": hashes, "config": {key: config.get(key) for key in _CONFIG_KEYS}, "fallback": fallback}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _computed_by(model: DbrxForCausalLM) -> str:
    implementation = model.transformer.layers()[0].norm_attn_norm.attn.implementation
    computed_by = f"{model.device.type}, {implementation}, steps of {prefill_step(model)}"
    if model.device.type != "cpu":
        return computed_by
    from dbrx_q.kernels.cpu.linear import arithmetic

    return f"{computed_by}, {arithmetic()}"


def _blocks(layers: Sequence[KVLayer], tokens: int) -> Iterator[tuple[str, torch.Tensor, int, int]]:
    """(name in the file, part of a layer's cache, first token, end) of every block of the first `tokens` tokens."""
    for i, layer in enumerate(layers):
        for part_name in _PARTS:
            part = getattr(layer, part_name)
            for first in range(0, tokens if part is not None else 0, _BLOCK_TOKENS):
                yield f"layers.{i}.{part_name}.{first // _BLOCK_TOKENS}", part, first, min(first + _BLOCK_TOKENS, tokens)


def _check_digest(file: SafetensorsFile) -> None:
    """Refuse a file whose last tensor is not the SHA-256 of all bytes before it."""
    digest, left = hashlib.sha256(), file.size - _DIGEST_BYTES
    with open(file.path, "rb") as stream:
        while left and (piece := stream.read(min(left, 1 << 22))):
            digest.update(piece)
            left -= len(piece)
    stored = bytes(file.read("sha256").tolist()).hex()
    if stored != digest.hexdigest():
        raise CheckpointError(f"its SHA-256 must be {stored}; found {digest.hexdigest()}")
