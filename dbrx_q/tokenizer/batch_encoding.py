"""What a tokenizer returns: a mapping from names such as "input_ids" to lists, torch tensors or numpy arrays."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    import torch

__all__ = ["BatchEncoding", "as_lists"]

_TENSOR_TYPES = ("pt", "np")


class BatchEncoding(UserDict[str, Any]):
    """Encoded texts by name, as keyword arguments of a model.

        inputs = tokenizer(["One text", "and a longer one"], padding=True, return_tensors="pt").to("cuda")
        model(**inputs).logits, inputs.input_ids, inputs["attention_mask"]

    A slice gives a dictionary with these rows of every value.
    """

    def __init__(
        self, data: Mapping[str, Any] | None = None, *, tensor_type: str | None = None, tokens: Sequence[Sequence[str]] | None = None
    ) -> None:
        """
        Args:
            data: lists, tensors or arrays, by name.
            tensor_type: as for `convert_to_tensors`.
            tokens: the spelling of every token, padding included, for each text; for `tokens()`.
        """
        self._tokens = tokens
        super().__init__(dict(data or {}))
        self.convert_to_tensors(tensor_type)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        if not isinstance(key, str):
            raise KeyError(
                f"a key must be a name ({', '.join(self.data)}) or a slice; found {key!r}. Read tokens(i) for the tokens of a text"
            )
        return self.data[key]

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # absent while a copy is being made
        if name in data:
            return data[name]
        raise AttributeError(f"this encoding has no {name!r}; it has {', '.join(data) or 'nothing'}")

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of one text, as tokenizer.json spells them.

        Raises:
            TokenizerError: the encoding was not made by calling a tokenizer.
        """
        if self._tokens is None:
            raise TokenizerError("tokens() must be asked of what a call of the tokenizer returned. Use convert_ids_to_tokens on input_ids")
        return list(self._tokens[batch_index])

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchEncoding:
        """Make every value a tensor, in place.

        Args:
            tensor_type: "pt" for torch, "np" for numpy, None to leave lists.

        Raises:
            RequestError: another type.
            TokenizerError: the rows of a value differ in length.
        """
        if tensor_type is None:
            return self
        kind = getattr(tensor_type, "value", tensor_type)
        if kind not in _TENSOR_TYPES:
            raise RequestError(f"return_tensors must be 'pt', 'np' or None; found {tensor_type!r}. Ask for 'pt', torch's tensors")
        for name, value in self.data.items():
            self.data[name] = _as_tensor(name, value, kind)
        return self

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to `device`, in place, and return this encoding."""
        self.data = {
            name: value.to(device=device, non_blocking=non_blocking) if hasattr(value, "to") else value for name, value in self.data.items()
        }
        return self


def as_lists(value: Any) -> Any:
    """`value`, in which tensors and arrays are nested lists or numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: as_lists(item) for name, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _as_tensor(name: str, value: Any, kind: str) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor if kind == "pt" else np.ndarray):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(value) if kind == "pt" else np.asarray(value)
    if not _is_rectangular(value):
        lengths = sorted({len(row) for row in value})
        raise TokenizerError(
            f"the texts of a tensor must have one length; {name} has rows of {lengths[0]} to {lengths[-1]}. "
            "Add padding=True, or truncation=True with max_length"
        )
    dtype = np.int64 if not any(_leaves(value)) else None  # without numbers numpy takes float64
    array = np.asarray(value, dtype=dtype)
    return torch.from_numpy(array) if kind == "pt" else array


def _is_rectangular(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (list, tuple)):
        return True
    return len({len(row) for row in value}) == 1


def _leaves(value: Any) -> Iterator[bool]:
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from _leaves(item) if isinstance(item, (list, tuple)) else (True,)
