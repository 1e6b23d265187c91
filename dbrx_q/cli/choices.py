"""The values that an option accepts, read from the registry that defines them.

Most registries are in modules that import torch, which takes seconds, and `--help` must not wait for it. So `--help` shows the names
that are listed here, and a value that is not among them is looked up in the registry when the option is parsed: a format or method that
is added to its registry alone is accepted. A test holds every list to its registry.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import typer

from dbrx_q.planning.policy_names import CachePolicyName, MissPolicy

__all__ = [
    "ACTIVATIONS",
    "ALL",
    "CACHE_POLICIES",
    "DTYPES",
    "GGUF_TYPES",
    "KV_FORMATS",
    "LAYOUTS",
    "METHODS",
    "MISS_POLICIES",
    "PARTS",
    "PROTOCOLS",
    "WEIGHT_FORMATS",
    "Choice",
]


@dataclass(frozen=True)
class Choice:
    """The values of one option."""

    names: tuple[str, ...]
    """What `--help` shows, in the order of the registry."""
    registry: str
    """`module:name` of an enumeration, a dictionary or a tuple, which has the names; it is imported for other values than `names`."""
    also: str | None = None
    """A value that the option has besides, as `auto`; None for none."""
    variants: tuple[str, ...] = ()
    """Names of the registry that `--help` leaves out, since they differ from others by a suffix."""

    def registered(self) -> tuple[str, ...]:
        """The names as the registry has them now; imports it."""
        module, _, name = self.registry.partition(":")
        values = getattr(importlib.import_module(module), name)
        return (*((self.also,) if self.also else ()), *(str(getattr(value, "value", value)) for value in values))

    def parse(self, text: str) -> str:
        """The value of an option.

        Raises:
            typer.BadParameter: a value that is not registered.
        """
        for spelling in (text, text.lower()):  # llama.cpp's users spell Q4_0
            if spelling in self.names + self.variants or spelling in self.registered():
                return str(getattr(spelling, "value", spelling))
        raise typer.BadParameter(f"must be {_or(self.registered())}; found {text!r}")

    def __str__(self) -> str:
        return _or(self.names)


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


WEIGHT_FORMATS = Choice(
    (
        *("int4", "int8", "nf4", "nf4-double", "affine4", "affine8", "affine4-bf16", "affine8-bf16", "q4_0", "int3", "int2"),
        *("trellis2", "trellis3", "trellis4"),
    ),
    "dbrx_q.kernels.formats.registry:FORMATS",
    variants=("trellis2-fast", "trellis3-fast", "trellis4-fast"),
)
METHODS = Choice(("rtn", "clip", "hqq", "awq", "gptq", "best"), "dbrx_q.quantize.methods.choose:METHODS")
ACTIVATIONS = Choice(("quantized", "original"), "dbrx_q.quantize.calibration.calibrated:ACTIVATIONS")
DTYPES = Choice(("auto", "float32", "float16", "bfloat16"), "dbrx_q.config:DTYPES", also="auto")
KV_FORMATS = Choice(("plain", "int8", "int4"), "dbrx_q.kernels.formats.kv:KV_FORMATS")
CACHE_POLICIES = Choice(tuple(policy.value for policy in CachePolicyName), "dbrx_q.planning.policy_names:CachePolicyName")
MISS_POLICIES = Choice(tuple(policy.value for policy in MissPolicy), "dbrx_q.planning.policy_names:MissPolicy")
PROTOCOLS = Choice(("non-overlapping", "half-window", "strided"), "dbrx_q.eval.windows:PROTOCOLS")
PARTS = Choice(("kind", "layer", "tensor"), "dbrx_q.eval.sensitivity.measure:BY")
GGUF_TYPES = Choice(("q4_0", "q4_1", "q8_0", "f32", "f16", "bf16"), "dbrx_q.quantize.export.gguf_types:GGUF_TYPES")
LAYOUTS = Choice(("gguf", "mlx", "transformers"), "dbrx_q.quantize.export.record:LAYOUTS")
ALL = (WEIGHT_FORMATS, METHODS, ACTIVATIONS, DTYPES, KV_FORMATS, CACHE_POLICIES, MISS_POLICIES, PROTOCOLS, PARTS, GGUF_TYPES, LAYOUTS)
