"""The models of transformers' DBRX with packed weights: `as_packed` turns transformers' models into them."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
from transformers.generation.utils import GenerationMixin
from transformers.models.dbrx import modeling_dbrx as reference
from transformers.utils import output_capturing

from dbrx_q.checkpoint.layout import kind_of
from dbrx_q.errors import UnsupportedError
from dbrx_q.model.saving import Origin

from .availability import check_transformers
from .config import set_dtype
from .packed import packed_weights
from .saving import save_packed

__all__ = ["DbrxForCausalLM", "DbrxModel", "as_packed"]

check_transformers()


class _Packed:
    """What the two models share."""

    origin: Origin | None = None
    """The files that the model was loaded from; None for a model that was made in memory."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers'. With trust_remote_code=True a config comes from before this module was imported, and keeps out others."""
        if hasattr(config, "transformers_weights"):
            config = deepcopy(config)
            del config.transformers_weights
            set_dtype(config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint that transformers and `dbrx_q.DbrxForCausalLM` load; packed weights keep their bits.

        Args:
            save_directory: a folder; created if it does not exist.
            *args, **kwargs: transformers' arguments, of which `max_shard_size` and `is_main_process` have an effect.

        Raises:
            UnsupportedError: an argument that this model cannot honour.
            RequestError: the folder is the one that the model was loaded from, or the model has packed weights and was loaded from none.
        """
        if self.origin is None and not packed_weights(self):  # type: ignore[arg-type]
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return
        save_packed(self, Path(save_directory), *args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers'; packed weights count as those that they stand for, and those on disk are left out."""
        plain = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if only_trainable:
            return plain
        packed = [weight.tensor for weight in packed_weights(self).values()]  # type: ignore[arg-type]
        return plain + sum(math.prod(tensor.shape) for tensor in packed if not (exclude_embeddings and tensor.role == "embedding"))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' where the embedding is plain.

        Raises:
            UnsupportedError: the embedding or the head is packed.
        """
        kinds = {kind_of(name) for name in packed_weights(self)} & {"embedding", "head"}  # type: ignore[arg-type]
        if new_num_tokens is not None and kinds:
            raise UnsupportedError(
                f"resize_token_embeddings needs plain embeddings; found a packed {' and '.join(sorted(kinds))}. Load the original "
                "checkpoint, resize it, save it with save_pretrained, and quantize the result with `dbrx-q quantize`"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: `save_pretrained` writes the file that transformers imports with trust_remote_code=True."""


class DbrxForCausalLM(_Packed, reference.DbrxForCausalLM, GenerationMixin):
    """transformers' `DbrxForCausalLM` with packed weights."""


class DbrxModel(_Packed, reference.DbrxModel):
    """transformers' `DbrxModel` with packed weights."""


def as_packed(model: Any, origin: Origin) -> None:
    """Make a model of transformers' classes, whose layers hold packed weights, one of the classes here.

    Args:
        model: a subclass that a user defined stays what it is.
        origin: the files that the model is loaded from.
    """
    classes = {transformers.DbrxForCausalLM: DbrxForCausalLM, transformers.DbrxModel: DbrxModel}
    for part in {model, model.base_model}:  # the transformer can be saved alone
        theirs = type(part)
        if theirs in classes:
            part.__class__ = classes[theirs]
            # transformers finds what a model can record, such as hidden states, by its class.
            recorded: Any = output_capturing._CAN_RECORD_REGISTRY
            dict.__setitem__(recorded, str(classes[theirs]), dict.get(recorded, str(theirs)))
        part.origin = origin
