"""Outputs are dataclasses and dictionaries, as those of transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast as Reference

from dbrx_q.model.outputs import ModelOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast

LOGITS, ROUTER = torch.ones(1, 2), (torch.zeros(2),)


def test_access_equals_that_of_transformers() -> None:
    ours, theirs = (kind(logits=LOGITS, router_logits=ROUTER) for kind in (MoeCausalLMOutputWithPast, Reference))
    assert isinstance(ours, (ModelOutput, dict))
    for out in (ours, theirs):
        assert out.logits is out["logits"] is out[0] is out.get("logits")
        assert out[:2] == out[0:] == out.to_tuple() == (LOGITS, ROUTER)
        assert (len(out), out.loss, out.get("loss"), out.get("loss", 3)) == (2, None, None, 3)
        assert "router_logits" in out
        assert "loss" not in out
        logits, router = out.values()
        assert (logits is LOGITS, router is ROUTER) == (True, True)
        with pytest.raises(KeyError):
            out["loss"]
        out.loss = LOGITS
        out["aux_loss"] = LOGITS
        assert (out["loss"] is LOGITS, out.aux_loss is LOGITS) == (True, True)
    assert list(ours) == list(theirs) == list(ours.keys())
    assert dict(**ours) == dict(ours.items())


def test_past_key_values_is_another_name_of_the_cache() -> None:
    out = MoeModelOutputWithPast(LOGITS)
    assert (out.cache, out.past_key_values, "past_key_values" in out) == (None, None, False)
    out.past_key_values = "cache"
    assert (out.cache, out["cache"], out["past_key_values"], out.get("past_key_values")) == ("cache",) * 4
    assert "past_key_values" in out
    assert list(out) == ["last_hidden_state", "cache"]
    out["past_key_values"] = None
    assert (out.cache, len(out)) == (None, 1)


def test_copies_and_construction_from_a_mapping() -> None:
    out = MoeCausalLMOutputWithPast(logits=LOGITS, router_logits=ROUTER)
    for again in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out)), type(out)(dict(out))):
        assert type(again) is type(out)
        assert list(again) == ["logits", "router_logits"]
        assert torch.equal(again.logits, LOGITS)
        assert again.loss is None


def test_fields_can_be_neither_removed_nor_added() -> None:
    out = MoeCausalLMOutputWithPast(logits=LOGITS)
    for remove in (lambda: out.pop("logits"), lambda: out.popitem(), out.clear, lambda: out.__delitem__("logits")):
        with pytest.raises(TypeError, match=r"a field of MoeCausalLMOutputWithPast cannot be removed; .*Set it to None"):
            remove()
    for change in (lambda: out.update(logits=None), lambda: out.setdefault("loss", 1)):
        with pytest.raises(TypeError, match="a field of MoeCausalLMOutputWithPast is set by name"):
            change()
    with pytest.raises(KeyError, match=r"must be given one of loss, aux_loss, logits, .*; found 'score'"):
        out["score"] = 1
