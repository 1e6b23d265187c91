"""Sequences that advance together on the CPU, each with the bits that it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q import Budget, DbrxForCausalLM, Machine
from dbrx_q.errors import RequestError
from dbrx_q.generation.decoding import Decoder, decoder_for
from dbrx_q.generation.generate import generate

PROMPTS = [list(range(7, 7 + length)) for length in (3, 270, 1, 40, 9, 270, 33, 2, 5, 64, 12, 7, 21, 3, 90, 6, 11, 17)]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def packed(request: pytest.FixtureRequest, quantized_nano: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(quantized_nano, dtype=request.param)


def steps(decoder: Decoder, indices: list[int], names: list[int]) -> list[dict[int, torch.Tensor]]:
    """Three steps of some sequences; the tokens depend on the name of a sequence alone."""
    return [decoder.step({i: (31 * step + 7 * name) % 4000 for i, name in zip(indices, names, strict=True)}) for step in range(3)]


@pytest.mark.parametrize("kv_format", ["plain", "int8"])
def test_a_sequence_has_the_same_bits_alone_and_beside_others(packed: DbrxForCausalLM, kv_format: str) -> None:
    names = list(range(len(PROMPTS)))  # more than advance in one step
    with decoder_for(packed, [300] * len(PROMPTS), kv_format) as decoder:
        assert type(decoder).__name__ == "_Shared"
        for i, prompt in enumerate(PROMPTS):
            decoder.prefill(i, prompt)
        together = steps(decoder, names, names)
        some = steps(decoder, [4, 1, 11], [4, 1, 11])
    for i in (0, 1, 5, 11, 17):
        with decoder_for(packed, [300], kv_format) as decoder:
            decoder.prefill(0, PROMPTS[i])
            alone = steps(decoder, [0], [i])
            later = steps(decoder, [0], [i])
        for step in range(3):
            assert torch.equal(together[step][i], alone[step][0])
            if i in (1, 11):
                assert torch.equal(some[step][i], later[step][0])


def test_sequences_may_be_cropped_forked_and_reordered(packed: DbrxForCausalLM) -> None:
    def logits(count: int) -> list[torch.Tensor]:
        with decoder_for(packed, [60] * count, "plain") as decoder:
            decoder.prefill(0, PROMPTS[3])
            for i in range(1, count):
                decoder.fork(0, i)
            others = list(range(1, count))
            decoder.step({0: 5} | dict.fromkeys(others, 9))
            decoder.reorder([0] * count)
            decoder.step({0: 6} | dict.fromkeys(others, 8))
            decoder.crop(0, len(PROMPTS[3]) + 1)
            return [decoder.step({0: 4})[0], decoder.extend(0, [1, 2, 3], 2)]

    for several, one in zip(logits(3), logits(1), strict=True):
        assert torch.equal(several, one)


def test_generated_tokens_are_those_of_each_prompt_alone(packed: DbrxForCausalLM) -> None:
    prompts = [PROMPTS[0], PROMPTS[4], PROMPTS[3]]
    together = generate(packed, prompts, max_new_tokens=8, eos_token_ids=[])
    alone = [generate(packed, [prompt], max_new_tokens=8, eos_token_ids=[])[0] for prompt in prompts]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_no_sequence_grows_beyond_its_cache(packed: DbrxForCausalLM) -> None:
    with decoder_for(packed, [4, 4], "plain") as decoder:
        decoder.prefill(0, [1, 2, 3, 4])
        decoder.prefill(1, [1])
        with pytest.raises(RequestError, match="must fit 4 tokens"):
            decoder.step({0: 1, 1: 1})


def test_sequences_advance_alone_where_that_would_not_hold(packed: DbrxForCausalLM, nano: Path, quantized_nano: Path) -> None:
    plain = DbrxForCausalLM.from_pretrained(nano)
    offloaded = DbrxForCausalLM.from_pretrained(quantized_nano, budget=Budget(Machine(4_000_000), context=64, step_tokens=8))
    for model, capacities in ((plain, [20, 20]), (offloaded, [20, 20]), (packed, [2000, 3, 3, 3, 3, 3])):
        with decoder_for(model, capacities, "plain") as decoder:
            assert type(decoder).__name__ == "_Separate"


def test_a_budget_limits_how_many_advance_together(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens_of_passes(step_tokens: int) -> tuple[list[int], list[list[int]]]:
        budget = Budget(Machine(1 << 30), context=64, batch=5, step_tokens=step_tokens)
        model, sizes = DbrxForCausalLM.from_pretrained(quantized_nano, budget=budget), []
        run = type(model.transformer).run
        monkeypatch.setattr(type(model.transformer), "run", lambda *args, **names: (sizes.append(len(args[1])), run(*args, **names))[1])
        prompts = [[*range(20 + i)] for i in range(5)]  # prompts share whole steps of two tokens
        results = generate(model, prompts, max_new_tokens=3, eos_token_ids=[])
        return sizes, [result.token_ids for result in results]

    sizes, tokens = tokens_of_passes(2)
    assert set(sizes) == {2, 1}
    monkeypatch.undo()
    assert tokens == tokens_of_passes(64)[1]


def test_hooks_see_each_sequence(packed: DbrxForCausalLM) -> None:
    seen: list[int] = []
    handle = packed.transformer.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    try:
        generate(packed, [[1, 2], [3]], max_new_tokens=3, eos_token_ids=[])
    finally:
        handle.remove()
    assert seen == [2, 1, 1, 1, 1, 1]
