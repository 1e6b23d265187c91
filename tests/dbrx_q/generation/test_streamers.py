"""Streamers receive what transformers gives them, and their text is the generated text; stop strings end it."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, DbrxTokenizer, TextIteratorStreamer, TextStreamer
from dbrx_q.errors import RequestError

from .pairs import ENDS, make_pair, padded_prompts


@pytest.fixture(scope="module")
def model(nano: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(nano)


@pytest.fixture(scope="module")
def tokenizer(nano: Path) -> DbrxTokenizer:
    return DbrxTokenizer.from_pretrained(nano)


def test_streamer_receives_prompts_and_tokens_as_in_transformers() -> None:
    class Recorder(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.calls: list[object] = []

        def put(self, value: torch.Tensor) -> None:
            self.calls.append(value.tolist())

        def end(self) -> None:
            self.calls.append("end")

    recorders = Recorder(), Recorder()
    for recorder, model in zip(recorders, make_pair(), strict=True):
        model.generate(**padded_prompts(), max_new_tokens=5, streamer=recorder, **ENDS)
    assert recorders[0].calls == recorders[1].calls
    assert recorders[0].calls[-1] == "end"


def test_text_streamers_give_the_generated_text(
    model: DbrxForCausalLM, tokenizer: DbrxTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([tokenizer.encode("The old man looked at")])
    result = model.generate(ids, max_new_tokens=12, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(result[0].tolist()) + "\n"
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 12, "streamer": iterator})
    thread.start()
    pieces = list(iterator)
    thread.join()
    assert len(pieces) > 5
    assert "".join(pieces) == tokenizer.decode(result[0, ids.shape[1] :].tolist())
    with pytest.raises(RequestError, match="takes one sequence; found 2"):
        model.generate(ids.repeat(2, 1), max_new_tokens=2, streamer=TextStreamer(tokenizer))


def test_stop_strings_end_a_sequence_where_transformers_ends_it(model: DbrxForCausalLM, tokenizer: DbrxTokenizer, nano: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(nano)
    ids = torch.tensor([tokenizer.encode("The old man looked at"), tokenizer.encode("The old man looked at")])
    full = model.generate(ids[:1], max_new_tokens=20)
    text = tokenizer.decode(full[0, ids.shape[1] :].tolist())
    stop = text[9:13]
    result = model.generate(ids, max_new_tokens=20, stop_strings=["never there", stop], tokenizer=tokenizer)
    assert result.shape[1] < full.shape[1]
    assert torch.equal(result[:1], full[:, : result.shape[1]])
    assert stop in tokenizer.decode(result[0].tolist())
    assert stop not in tokenizer.decode(result[0, :-1].tolist())
    assert torch.equal(model.generate(ids, max_new_tokens=20, stop_strings=stop, tokenizer=theirs), result)
    criterion = transformers.StopStringCriteria(theirs, [stop])
    ends = [bool(criterion(full[:, :n], None)) for n in range(ids.shape[1], full.shape[1] + 1)]
    assert result.shape[1] == ids.shape[1] + ends.index(True)
