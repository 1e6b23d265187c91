"""`DbrxPreTrainedModel`: loading under the names and with the arguments that transformers has."""

from __future__ import annotations

from pathlib import Path

import torch

from dbrx_q import DbrxForCausalLM, DbrxModel

NANO = Path(__file__).parent.parent.parent / "data" / "dbrx-nano"


class OwnModel(DbrxForCausalLM):
    """A class of user code."""


def test_the_transformer_loads_without_its_head_and_subclasses_load_themselves() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    whole, body, own = (cls.from_pretrained(NANO) for cls in (DbrxForCausalLM, DbrxModel, OwnModel))
    assert [type(model) for model in (whole, body, own)] == [DbrxForCausalLM, DbrxModel, OwnModel]
    assert whole.base_model is whole.transformer
    assert body.base_model is body
    assert body.state_dict().keys() == {name.removeprefix("transformer.") for name in whole.state_dict() if "lm_head" not in name}
    hidden = body(ids).last_hidden_state
    assert hidden.equal(whole.transformer(ids).last_hidden_state)
    assert own(ids).logits.equal(whole(ids).logits)
