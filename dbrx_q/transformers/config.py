"""`DbrxQConfig`, the quantization config of a packed checkpoint in transformers, and the repair of the base of the rotary embedding.

transformers has three gaps that `install` fills when `dbrx_q.transformers` is imported:

- `DbrxConfig` ignores `attn_config.rope_theta`, by which DBRX was trained (500000), and computes with 10000. It is repaired for packed and
  plain checkpoints alike.
- A quantization config given to `from_pretrained` is dropped where the checkpoint has one; ours carries the memory budget.
- Packed weights that are loaded without a quantization config, as with `quantization_config=None` or the `config` of a plain checkpoint,
  would leave a model with random weights. They are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.dbrx import modeling_dbrx as reference
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from dbrx_q.checkpoint.layout import is_packed_part
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.config_values import positive_float
from dbrx_q.errors import CheckpointError, ConfigError, RequestError
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Machine

from .availability import check_transformers

__all__ = ["METHOD", "DbrxQConfig", "install", "set_dtype"]

check_transformers()

METHOD = "dbrx_q"
"""The `quant_method` of our checkpoints."""


@register_quantization_config(METHOD)
class DbrxQConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint, and the memory that its model may take.

    transformers makes one of config.json. Give one to `from_pretrained` to limit memory; experts that do not fit are read from the files
    when a token needs them:

        AutoModelForCausalLM.from_pretrained("dbrx-int4", quantization_config=DbrxQConfig(ram="24GiB"))

    Args:
        ram: host memory for weights, expert slots, one KV cache and workspace: bytes or a size such as "24GiB".
        gpus: the same of each GPU, by its index. With neither `ram` nor `gpus` everything is held by the device of the model.
        context: tokens that the KV cache is planned for; None for 4,096.
        budget: a `dbrx_q.Budget` in place of the three, which can say more, such as the cache policy.
        **stored: what config.json holds: `format_version`, `tensors` and how they were quantized.

    Raises:
        RequestError: a budget beside `ram`, `gpus` or `context`, an invalid size, or a GPU that torch does not see.
    """

    def __init__(
        self,
        *,
        ram: int | str | None = None,
        gpus: Mapping[int | str, int | str] | None = None,
        context: int | None = None,
        budget: Budget | None = None,
        **stored: Any,
    ) -> None:
        if budget is not None and (ram, gpus, context) != (None, None, None):
            raise RequestError(
                f"a budget says how much memory is taken; found ram {ram!r}, gpus {gpus!r} and context {context!r} beside it. "
                "Leave one of them out"
            )
        if stored.pop("quant_method", METHOD) != METHOD:
            raise RequestError(f"quant_method of a DbrxQConfig must be {METHOD!r}")
        self.quant_method: Any = METHOD
        self.stored = stored
        self.budget = budget
        if ram is not None or gpus is not None:
            limits: dict[int | str, int | str] = dict(gpus or {})
            if ram is not None:
                limits["cpu"] = ram
            self.budget = Budget(Machine.detect(limits), context=context)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json; the budget is of this process and is left out."""
        return {"quant_method": METHOD, **self.stored}

    def with_budget_of(self, other: DbrxQConfig | Mapping[str, Any]) -> DbrxQConfig:
        """This config with the budget of another, which `from_pretrained` was given."""
        given = other if isinstance(other, DbrxQConfig) else DbrxQConfig(**other)
        return DbrxQConfig(budget=given.budget, **self.stored)


def install() -> None:
    """Fill the three gaps; a second call changes nothing."""
    if not hasattr(transformers.DbrxConfig.__post_init__, "_dbrx_q"):
        _repair_rope_theta()
        _keep_given_budget()
        _refuse_random_weights()


def _repair_rope_theta() -> None:
    original = transformers.DbrxConfig.__post_init__

    @wraps(original)
    def repaired(self: Any, **kwargs: Any) -> None:
        packed = _is_packed(kwargs.get("quantization_config"))
        if packed:
            kwargs.pop("transformers_weights", None)  # what keeps out a transformers without this module
        if kwargs.get("rope_scaling"):  # the older name, which transformers prefers
            kwargs["rope_scaling"] = _rope_parameters(self.attn_config, kwargs["rope_scaling"])
        else:
            self.rope_parameters = _rope_parameters(self.attn_config, self.rope_parameters)
        original(self, **kwargs)  # type: ignore[no-untyped-call]
        if getattr(self.attn_config, "rope_theta", None) is None:  # transformers' attention reads it, and fails without
            self.attn_config.rope_theta = self.rope_parameters["rope_theta"]
        if packed:
            set_dtype(self)

    repaired._dbrx_q = True  # type: ignore[attr-defined]
    transformers.DbrxConfig.__post_init__ = repaired  # type: ignore[method-assign]


def set_dtype(config: Any) -> None:
    """Give the config of a packed checkpoint that names no dtype the one that `dbrx_q.DbrxForCausalLM` takes.

    transformers would take that of the first floating-point tensor in the files, which is a float16 scale of an int8 weight.
    """
    if getattr(config, "dtype", None) is None:
        config.dtype = torch.bfloat16


def _rope_parameters(attn_config: Any, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`rope_parameters` with the base that `attn_config` has; what was given where it has none.

    Raises:
        ConfigError: two different bases.
    """
    theta = attn_config.get("rope_theta") if isinstance(attn_config, Mapping) else getattr(attn_config, "rope_theta", None)
    if theta is None:
        return None if given is None else dict(given)
    theta, other = positive_float("attn_config.rope_theta", theta), (given or {}).get("rope_theta")
    if other is not None and other != theta:
        raise ConfigError(
            f"attn_config.rope_theta and rope_parameters.rope_theta must agree; found {theta} and {other}. DBRX was trained with 500000; "
            "transformers writes 10000 into rope_parameters by mistake: remove the wrong one"
        )
    return {"rope_type": (given or {}).get("type", "default"), **(given or {}), "rope_theta": theta}


def _keep_given_budget() -> None:
    original = AutoHfQuantizer.merge_quantization_configs

    def merged(stored: Any, given: Any) -> Any:
        ours = isinstance(given, DbrxQConfig) or (isinstance(given, Mapping) and given.get("quant_method") == METHOD)
        if not ours or not _is_packed(stored):
            return original(stored, given)
        config = stored if isinstance(stored, DbrxQConfig) else DbrxQConfig(**stored)
        return config.with_budget_of(given)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merged)  # type: ignore[method-assign, assignment]


def _refuse_random_weights() -> None:
    original: Any = reference.DbrxPreTrainedModel._load_pretrained_model

    def checked(model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(load_config, "hf_quantizer", None)
        if not _is_packed(getattr(quantizer, "quantization_config", None)):
            for path in map(Path, checkpoint_files or ()):
                packed = _packed_tensor_of(path)
                if packed is not None:
                    raise CheckpointError(
                        f"{path.parent}: packed weights must be loaded with the quantization_config of their config.json; found tensor "
                        f"{packed} and a config without it. Leave the arguments config and quantization_config out"
                    )
        return original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    reference.DbrxPreTrainedModel._load_pretrained_model = staticmethod(checked)  # type: ignore[method-assign]


def _packed_tensor_of(path: Path) -> str | None:
    """The name of a packed tensor in a file; None where it is no safetensors file or has none."""
    if path.suffix != ".safetensors":
        return None
    with SafetensorsFile(path) as file:
        return next((name for name in file.tensors if is_packed_part(name)), None)


def _is_packed(config: Any) -> bool:
    return isinstance(config, DbrxQConfig) or (isinstance(config, Mapping) and config.get("quant_method") == METHOD)
