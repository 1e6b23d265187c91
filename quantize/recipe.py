"""Which tensor gets which format."""

from __future__ import annotations

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError
from dbrx_q.kernels.groups import check_group_size
from dbrx_q.layout import GROUP_SIZES, TensorFormat, dense_tensors, kind_of

__all__ = ["default_recipe"]

_INT8_KINDS = ("embedding", "attention", "head")


def default_recipe(config: DbrxConfig, experts: TensorFormat) -> dict[str, TensorFormat]:
    """Experts in the given format; embedding, attention and head int8, in groups of at most 64; router and norms as they are.

    Raises:
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis.
    """
    others = TensorFormat("int8", min(experts.group_size, 64))
    recipe = {}
    for tensor in dense_tensors(config):
        kind = kind_of(tensor.name)
        if kind == "experts" or kind in _INT8_KINDS:
            fmt = experts if kind == "experts" else others
            recipe[tensor.name] = fmt
            try:
                check_group_size(tensor.matrix[1], fmt.group_size, GROUP_SIZES[fmt.format])
            except FormatError as error:
                raise FormatError(f"{tensor.name}: {error}. Choose another --group-size") from None
    return recipe
