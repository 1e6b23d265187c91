"""The embedding and the head of a model: read, replaced and resized, under the names that transformers has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from .modeling import DbrxModel

__all__ = ["EmbeddingMethods"]


class EmbeddingMethods(nn.Module):
    """The part of `DbrxPreTrainedModel` that is about embeddings.

    Dimension letters: `V` vocabulary, `D` d_model.
    """

    config: DbrxConfig

    @property
    def base_model(self) -> DbrxModel:
        """See `DbrxPreTrainedModel.base_model`."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.base_model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding's weights by those of another module, such as an `nn.Embedding` [V, D].

        Raises:
            RequestError: weights of another width.
        """
        self.base_model.wte.weight = self._matrix_of("set_input_embeddings", value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None for a model without one."""
        return cast("nn.Module | None", getattr(self, "lm_head", None))

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head's weights by those of another module, such as an `nn.Linear` [D -> V] without bias.

        Raises:
            RequestError: weights of another width, a bias, or a model without a head.
        """
        head = self.get_output_embeddings()
        if head is None:
            raise RequestError(f"set_output_embeddings needs a model with a head; found {type(self).__name__}. Use DbrxForCausalLM")
        head.weight = self._matrix_of("set_output_embeddings", new_embeddings)

    def _matrix_of(self, name: str, module: nn.Module) -> nn.Parameter:
        weight, D = getattr(module, "weight", None), self.config.d_model
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != D or getattr(module, "bias", None) is not None:
            shape = list(weight.shape) if isinstance(weight, torch.Tensor) else type(module).__name__
            raise RequestError(f"{name} needs a module with a weight [V, {D}] and no bias; found {shape}")
        norm = self.base_model.norm_f.weight
        return nn.Parameter(weight.detach().to(norm.device, norm.dtype), requires_grad=False)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Does nothing: the head of DBRX has weights of its own."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the number of tokens of a plain model; the configuration follows. Returns the embedding.

        Args:
            new_num_tokens: rows of the embedding and of the head; None for the present number.
            pad_to_multiple_of: the number is raised to a multiple of this.
            mean_resizing: whether new rows are the mean of the old ones; else they are random with the deviation `initializer_range`.

        Raises:
            UnsupportedError: packed weights.
            ConfigError: an impossible number of tokens.
            RequestError: an impossible multiple.
        """
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise RequestError(f"pad_to_multiple_of must be a whole number of at least 1; found {pad_to_multiple_of!r}")
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows == self.config.vocab_size:
            return self.base_model.wte
        tables = [table for table in (self.base_model.wte, self.get_output_embeddings()) if table is not None]
        if any(not isinstance(table.weight, nn.Parameter) for table in tables):
            raise UnsupportedError(
                "resize_token_embeddings needs plain embeddings; found packed ones. Load the original checkpoint, resize it, save it with "
                "save_pretrained, and quantize the result with `dbrx-q quantize`"
            )
        self.config.vocab_size = rows
        for table in tables:
            old = cast(torch.Tensor, table.weight).detach()
            new = old.new_empty(rows, old.shape[1]).normal_(std=self.config.initializer_range)
            if mean_resizing:
                new[:] = old.float().mean(0)
            new[: len(old)] = old[:rows]
            table.weight = nn.Parameter(new, requires_grad=False)
        return self.base_model.wte
