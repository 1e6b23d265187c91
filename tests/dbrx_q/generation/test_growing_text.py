"""Stop strings that spell special tokens match these tokens by id, and a chat ends where its template ends a turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxForCausalLM, DbrxTokenizer, generate
from dbrx_q.generation.generate import end_token_ids
from dbrx_q.generation.growing_text import GrowingText

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
TOKENIZER = DbrxTokenizer.from_pretrained(NANO)
END, START, EOS = (TOKENIZER.special_tokens[f"<|{name}|>"] for name in ("im_end", "im_start", "endoftext"))


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "stopped"),
    [
        (["<|im_end|>"], [*ids("Mars is"), END, *ids(" red")], "Mars is", True),
        (["<|im_end|>\n"], [*ids("Mars is"), END, *ids("\nred")], "Mars is", True),
        (["<|im_end|>\n"], [*ids("Mars"), END, *ids(" is red")], "Mars is red", False),
        (["is<|im_end|>"], [*ids("Mars is"), END], "Mars ", True),
        (["<|im_end|><|im_start|>"], [*ids("Mars"), END, START, *ids("user")], "Mars", True),
        (["<|im_end|>"], ids("Mars <|im_end|> red"), "Mars ", True),  # ordinary tokens that spell it
        (["<|im_end|>"], [*ids("Mars"), START, *ids(" is")], "Mars is", False),
        (["|"], [*ids("Mars"), END, *ids(" is")], "Mars is", False),  # the stop string spells no special token
        (["never", "<|im_end|>"], [END], "", True),
        (["<|im_end|>"], [*ids("é")[:1], END], "\ufffd" if len(ids("é")) > 1 else "é", True),
    ],
)
def test_stop_strings_that_spell_special_tokens(stop: list[str], tokens: list[int], text: str, stopped: bool) -> None:
    growing = GrowingText(TOKENIZER, stop)
    pieces = []
    for token in tokens:
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    pieces.append(growing.flush())
    assert ("".join(pieces), growing.stopped) == (text, stopped)
    assert all("<|im_" not in piece for piece in pieces)


def test_end_tokens_are_those_of_generation_config_of_the_tokenizer_and_in_chats_of_the_template() -> None:
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    model.eos_token_ids = ()
    assert end_token_ids(model, None) == ()
    assert end_token_ids(model, TOKENIZER) == (EOS,)
    assert end_token_ids(model, TOKENIZER, chat=True) == (EOS, END)
    [result] = generate(model, [ids("Mars is")], max_new_tokens=40, tokenizer=TOKENIZER)
    model.eos_token_ids = (result.token_ids[5], EOS)
    assert end_token_ids(model, TOKENIZER) == (result.token_ids[5], EOS)
    [ended] = generate(model, [ids("Mars is")], max_new_tokens=40, tokenizer=TOKENIZER)
    assert (ended.finish_reason, ended.token_ids) == ("eos", result.token_ids[:5])


TURN_ENDS = {
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}": (END,),
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}": (
        EOS,
    ),
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}": (),
    "{{ raise_exception('one message only') }}": (),
    "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}": (),
}


@pytest.mark.parametrize("template", TURN_ENDS)
def test_the_token_that_ends_a_turn_is_read_from_the_template(template: str) -> None:
    assert TOKENIZER.turn_end_ids(template) == TURN_ENDS[template]
    assert TOKENIZER.turn_end_ids() == (END,)
