"""What a model returns: dataclasses that are dictionaries as well, as in transformers.

Dimension letters: `B` sequences, `S` columns of a padded batch, `L` tokens that attention reads, `D` d_model, `V` vocabulary, `H` query
heads, `E` experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from dbrx_q.errors import RequestError

from .kv_cache import KVCache

__all__ = ["ModelOutput", "MoeCausalLMOutputWithPast", "MoeModelOutputWithPast", "transition_scores"]

_ALIASES = {"past_key_values": "cache"}


class ModelOutput(dict[str, Any]):
    """The base of all outputs. A subclass is a dataclass whose fields default to None.

    A field is read as an attribute, by its name as a key, or by its index; a slice gives a tuple. Keys, indices and `len` leave out the
    fields that are None. As in a dictionary, iteration gives the names and `**output` unpacks names and values; `to_tuple` gives the
    values. `past_key_values` is another name for the field `cache`.

        out = model(ids)
        out.logits, out["logits"], out[0]
        logits, cache = out[:2]

    An output can be built from one mapping of names to values in place of its fields.
    """

    def __post_init__(self) -> None:
        name = next(iter(self.__dataclass_fields__))  # type: ignore[attr-defined] # every subclass is a dataclass
        first = getattr(self, name)
        if isinstance(first, Mapping) and len(self) == 1:
            setattr(self, name, None)
            for key, value in first.items():
                self[key] = value

    @property
    def past_key_values(self) -> Any:
        """Another name for `cache`."""
        return self.cache

    @past_key_values.setter
    def past_key_values(self, value: Any) -> None:
        self.cache = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of all fields that are not None."""
        return tuple(self.values())

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_ALIASES.get(key, key), default)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(_ALIASES.get(key, key))
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        name = _ALIASES.get(key, key)
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined] # every subclass is a dataclass
            raise KeyError(f"{type(self).__name__} must be given one of {', '.join(self.__dataclass_fields__)}; found {key!r}")  # type: ignore[attr-defined]
        setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in self.__dataclass_fields__:  # type: ignore[attr-defined] # every subclass is a dataclass
            if value is not None:
                super().__setitem__(name, value)
            elif super().__contains__(name):
                super().__delitem__(name)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_ALIASES.get(key, key) if isinstance(key, str) else key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type] # a dataclass

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"a field of {type(self).__name__} cannot be removed; found {key!r}. Set it to None")

    def pop(self, *args: Any) -> Any:
        raise TypeError(f"a field of {type(self).__name__} cannot be removed; found pop{args}. Set it to None")

    def popitem(self) -> Any:
        raise TypeError(f"a field of {type(self).__name__} cannot be removed; found popitem(). Set it to None")

    def clear(self) -> None:
        raise TypeError(f"a field of {type(self).__name__} cannot be removed; found clear(). Set it to None")

    def setdefault(self, *args: Any) -> Any:
        raise TypeError(f"a field of {type(self).__name__} is set by name; found setdefault{args}. Assign to the attribute")

    def update(self, *args: Any, **values: Any) -> None:
        raise TypeError(f"a field of {type(self).__name__} is set by name; found update(). Assign to the attributes")


@dataclass(eq=False)
class MoeModelOutputWithPast(ModelOutput):
    """What `DbrxModel` returns."""

    last_hidden_state: torch.Tensor | None = None
    """[B, S, D] after the last norm, in the dtype of activations; zeros where the mask is 0."""
    cache: KVCache | None = None
    """The cache, which now holds these tokens as well; None without one."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """The input of every block and `last_hidden_state`, each [B, S, D]; None unless asked for."""
    attentions: tuple[torch.Tensor, ...] | None = None
    """Attention weights [B, H, S, L] of every layer; None unless asked for."""
    router_logits: tuple[torch.Tensor, ...] | None = None
    """float32 [B * S, E] for each layer, zeros in rows of padding; None unless asked for."""


@dataclass(eq=False)
class MoeCausalLMOutputWithPast(ModelOutput):
    """What `DbrxForCausalLM` returns."""

    loss: torch.Tensor | None = None
    """Mean cross entropy of the labels, a float32 scalar, with the weighted `aux_loss` added where there is one; None without labels."""
    aux_loss: torch.Tensor | None = None
    """How unevenly the routers load the experts, a float32 scalar; None without router logits."""
    logits: torch.Tensor | None = None
    """[B, S, V], or [B, kept columns, V], in the dtype of activations; zeros where the mask is 0."""
    cache: KVCache | None = None
    """The cache, which now holds these tokens as well; None without one."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """The input of every block and the output of the last norm, each [B, S, D]; None unless asked for."""
    attentions: tuple[torch.Tensor, ...] | None = None
    """Attention weights [B, H, S, L] of every layer; None unless asked for."""
    router_logits: tuple[torch.Tensor, ...] | None = None
    """float32 [B * S, E] for each layer, zeros in rows of padding; None unless asked for."""


def transition_scores(
    sequences: torch.Tensor, scores: Sequence[torch.Tensor] | None, beam_indices: torch.Tensor | None, normalize_logits: bool
) -> torch.Tensor:
    """What `DbrxForCausalLM.compute_transition_scores` returns and documents."""
    if not scores:
        raise RequestError(
            f"compute_transition_scores needs the scores of every new token; found {scores!r}. Generate with "
            "return_dict_in_generate=True and output_scores=True"
        )
    if beam_indices is None:
        beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
    ended = beam_indices < 0
    steps = int((~ended).sum(1).max())
    rows, tokens = beam_indices[:, :steps].long().clamp(min=0), sequences[:, sequences.shape[1] - steps :]
    columns = []
    for step, step_scores in enumerate(scores[:steps]):
        values = step_scores.log_softmax(-1) if normalize_logits else step_scores
        columns.append(values[rows[:, step], tokens[:, step]])
    return torch.stack(columns, 1).masked_fill(ended[:, :steps], 0.0)
