"""The rotary embedding of a configuration: the base of its angles and how they are scaled, from every key where transformers reads them.

`attn_config.rope_theta` is DBRX's own place of the base; transformers reads a top-level `rope_theta`, `rope_parameters` and their older
name `rope_scaling`. All places that give a value must give the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_values import MOST_POSITIONS, any_number, positive_float, positive_int, shortened
from .errors import ConfigError

__all__ = ["DBRX_THETA", "DEFAULT_THETA", "ROPE_TYPES", "merged_rope", "one_theta", "rope_settings", "without_default_theta"]

DEFAULT_THETA = 10000.0
"""The base where no key gives one, as in transformers."""
DBRX_THETA = 500000.0
"""The base that DBRX was trained with."""

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""The scalings that transformers defines for DBRX and that `model/rope.py` computes, with the settings that each reads."""
_COMMON = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")


def rope_settings(name: str, given: Any, max_seq_len: int) -> dict[str, Any]:
    """`rope_parameters` or `rope_scaling` as one dictionary: `rope_type`, the settings of this type and, if it was given, `rope_theta`.

    Args:
        name: of the key, for errors.
        given: its value.
        max_seq_len: the model's, for which yarn's `original_max_position_embeddings` stands where it is absent.

    Raises:
        ConfigError: an unknown type, a setting that this type does not have, or a value out of range.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be an object; found {shortened(given)}")
    kinds = {key: given[key] for key in ("rope_type", "type") if given.get(key) is not None}
    if len(set(map(str, kinds.values()))) > 1:
        raise ConfigError(f"{name}.rope_type and {name}.type must agree; found {shortened(kinds)}. Remove the wrong one")
    kind = next(iter(kinds.values()), "default")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(
            f"{name}.rope_type must be one of {', '.join(ROPE_TYPES)}, the rotary embeddings that are defined for DBRX; found "
            f"{shortened(kind)}. Remove {name} where the weights were trained without it"
        )
    settings: dict[str, Any] = {"rope_type": kind}
    for key, value in given.items():
        if value is None or key in ("rope_type", "type"):
            continue
        if key not in ROPE_TYPES[kind] and key not in _COMMON:
            readers = [other for other, keys in ROPE_TYPES.items() if key in keys]
            hint = f"; it belongs to rope_type {' or '.join(readers)}" if readers else ""
            raise ConfigError(
                f"{name} of rope_type {kind!r} must not have the key {shortened(key)}{hint}. Name the type, or remove the key"
            )
        settings[str(key)] = _checked(f"{name}.{key}", str(key), value)
    if kind in ("linear", "dynamic") and "factor" not in settings:
        raise ConfigError(f"{name} of rope_type {kind!r} must have a factor, a number above 0; found {shortened(dict(given))}")
    if kind == "yarn":
        settings.setdefault("original_max_position_embeddings", max_seq_len)
        settings.setdefault("factor", max_seq_len / settings["original_max_position_embeddings"])
    return settings


def _checked(name: str, key: str, value: Any) -> Any:
    if key == "truncate":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false; found {shortened(value)}")
        return value
    if key == "original_max_position_embeddings":
        return positive_int(name, value, MOST_POSITIONS)
    if key == "partial_rotary_factor":
        if value != 1.0:
            raise ConfigError(f"{name} must be 1, because DBRX rotates all channels of a head; found {shortened(value)}")
        return 1.0
    return any_number(name, value) if key in ("mscale", "mscale_all_dim") else positive_float(name, value)


def merged_rope(places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of `rope_parameters` and `rope_scaling` as one, without `rope_theta`.

    Args:
        places: what `rope_settings` returned for each key that is present.

    Raises:
        ConfigError: two keys scale differently.
    """
    scalings = {name: {key: value for key, value in settings.items() if key != "rope_theta"} for name, settings in places.items()}
    first, *others = scalings.values() or [{"rope_type": "default"}]
    if any(other != first for other in others):
        raise ConfigError(f"rope_parameters and rope_scaling must scale alike; found {shortened(scalings)}. Remove the wrong one")
    return first


def one_theta(places: Mapping[str, float | None]) -> tuple[float, bool]:
    """(the base, whether some key gave it).

    Args:
        places: the value at each key; None where it is absent.

    Raises:
        ConfigError: two keys give different values.
    """
    given = {name: positive_float(name, value) for name, value in places.items() if value is not None}
    if len(set(given.values())) > 1:
        values = " and ".join(map(str, given.values()))
        raise ConfigError(
            f"{' and '.join(given)} must agree; found {values}. DBRX was trained with {DBRX_THETA:.0f}; transformers 5 writes "
            f"{DEFAULT_THETA:.0f} into rope_parameters by mistake: remove the wrong one"
        )
    return next(iter(given.values()), DEFAULT_THETA), bool(given)


def without_default_theta(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary of a configuration that transformers 5 made, without the base 10000 that it puts beside DBRX's own.

    transformers 5 ignores `attn_config.rope_theta` and gives `rope_parameters` its default of 10000. Where `attn_config` has a base, this
    default is not the model's.
    """
    config, attention, rope = dict(raw), raw.get("attn_config"), raw.get("rope_parameters")
    if (
        isinstance(attention, Mapping)
        and attention.get("rope_theta")
        and isinstance(rope, Mapping)
        and rope.get("rope_theta") == DEFAULT_THETA
    ):
        config["rope_parameters"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config
