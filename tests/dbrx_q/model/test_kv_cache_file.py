"""A prompt's keys and values in a file: restored bit for bit, and refused where they are another model's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import Budget, DbrxForCausalLM, Generation, KVCache, Machine, PromptCache, generate
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.kernels.formats.kv import KV_FORMATS
from dbrx_q.model.limits import Limits

STEP = 8
PROMPT = [(29 * i) % 4000 + 5 for i in range(3 * STEP + 3)]


@pytest.fixture(scope="module")
def model(small: Path) -> DbrxForCausalLM:
    loaded = DbrxForCausalLM.from_pretrained(small)
    loaded.transformer.limits = Limits(step_tokens=STEP)
    return loaded


def run(model: DbrxForCausalLM, prompt: list[int], saved: PromptCache | None = None, kv: str = "plain", **options: Any) -> Generation:
    [result] = generate(model, [prompt], max_new_tokens=4, eos_token_ids=(), kv_format=kv, prompt_cache=saved, **options)
    return result


def saved_in(path: Path, model: DbrxForCausalLM, prompt: list[int], kv: str = "plain") -> Generation:
    return run(model, prompt, kv=kv, on_prefilled=lambda _, cache: PromptCache.save(path, model, prompt, cache))


@pytest.fixture
def file(tmp_path: Path, model: DbrxForCausalLM) -> Path:
    saved_in(tmp_path / "prompt.safetensors", model, PROMPT)
    return tmp_path / "prompt.safetensors"


@pytest.mark.parametrize(
    ("kv", "prompt", "reused"),
    [
        ("plain", PROMPT, 24),
        ("plain", PROMPT[:-4], 16),
        ("plain", [*PROMPT[:19], *range(90, 99)], 16),
        ("plain", [9, *PROMPT], 0),
        ("int8", [*PROMPT, 7, 8, 9], 24),
        ("int4", [*PROMPT, 7, 8, 9], 24),
    ],
    ids=["the same", "shorter", "branching", "another", "longer in int8", "longer in int4"],
)
def test_results_have_the_bits_of_those_without_the_file(
    tmp_path: Path, model: DbrxForCausalLM, kv: str, prompt: list[int], reused: int
) -> None:
    path, held = tmp_path / "prompt.safetensors", {}

    def keep(name: str) -> Callable[[int, KVCache], None]:
        return lambda _, cache: held.update({name: cache.forked([0], cache.lengths[0])})

    saved_in(path, model, PROMPT, kv)
    saved = PromptCache.open(path, model, kv_format=kv)
    assert (saved.tokens, saved.format) == (tuple(PROMPT), kv)
    with_file, without = (
        run(model, prompt, saved, kv, on_prefilled=keep("with")),
        run(model, prompt, None, kv, on_prefilled=keep("without")),
    )
    assert with_file.token_ids == without.token_ids
    assert with_file.prefilled_tokens == len(prompt) - reused
    assert held["with"].lengths == held["without"].lengths == [len(prompt)]
    for restored, computed in zip(held["with"].layers, held["without"].layers, strict=True):
        for part in ("keys", "values", "key_scales", "value_scales"):
            if getattr(computed, part) is not None:
                assert torch.equal(getattr(restored, part), getattr(computed, part))


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_a_restored_cache_continues_a_forward_pass(tmp_path: Path, model: DbrxForCausalLM, kv: str) -> None:
    cache = KVCache(model.config, 1, 64, dtype=model.dtype, format=kv)
    for first in range(0, len(PROMPT), STEP):
        model(torch.tensor([PROMPT[first : first + STEP]]), past_key_values=cache)
    PromptCache.save(tmp_path / "p", model, PROMPT, cache)
    restored = PromptCache.open(tmp_path / "p", model).restore(model)
    assert restored.get_seq_length() == len(PROMPT)
    more = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(more, past_key_values=restored).logits, model(more, past_key_values=cache).logits)


def test_only_stored_tokens_are_written(tmp_path: Path, model: DbrxForCausalLM) -> None:
    sizes = []
    for capacity in (len(PROMPT), 64):
        cache = KVCache(model.config, 1, capacity, dtype=model.dtype)
        for first in range(0, len(PROMPT), STEP):
            model(torch.tensor([PROMPT[first : first + STEP]]), past_key_values=cache)
        PromptCache.save(tmp_path / "p", model, PROMPT, cache)
        sizes.append((tmp_path / "p").stat().st_size)
    token_bytes = KVCache(model.config, 1, 1, dtype=model.dtype).nbytes
    assert sizes[0] == sizes[1] < len(PROMPT) * token_bytes + 4096
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_budget_reads_the_file_into_the_memory_of_its_cache(file: Path, small: Path, model: DbrxForCausalLM) -> None:
    expected = run(model, PROMPT).token_ids
    with_budget = DbrxForCausalLM.from_pretrained(small, budget=Budget(Machine(24_000_000), context=40, step_tokens=STEP))
    saved = PromptCache.open(file, with_budget)
    result = run(with_budget, PROMPT, saved)
    assert (result.token_ids, result.prefilled_tokens) == (expected, len(PROMPT) - 24)
    assert saved.restore(with_budget).max_cache_len == 40
    with_budget.close()


def test_steps_of_another_size_are_computed_again(file: Path, small: Path) -> None:
    other = DbrxForCausalLM.from_pretrained(small)
    assert PromptCache.open(file, other).shared(other, [*PROMPT, *PROMPT]) == 0
    other.transformer.limits = Limits(step_tokens=6)
    assert PromptCache.open(file, other).shared(other, PROMPT) == 0
    other.transformer.limits = Limits(step_tokens=STEP)
    assert PromptCache.open(file, other).shared(other, PROMPT) == 24


def test_a_file_of_another_model_is_refused(file: Path, nano: Path, small: Path, tmp_path: Path) -> None:
    other = DbrxForCausalLM.from_pretrained(nano, dtype=torch.bfloat16)
    with pytest.raises(RequestError, match="must come from the model that uses it"):
        PromptCache.open(file, other)
    copied = tmp_path / "copied"
    shutil.copytree(small, copied)
    PromptCache.open(file, DbrxForCausalLM.from_pretrained(copied))  # the same weights in another folder
    with pytest.raises(RequestError, match="must come from the model that uses it"):
        PromptCache.open(file, DbrxForCausalLM.from_pretrained(copied, rope_theta=1e5))
    wider = DbrxForCausalLM.from_pretrained(copied, dtype=torch.float32)
    with pytest.raises(RequestError, match=r"the same dtype, torch\.float32; found torch\.bfloat16"):
        PromptCache.open(file, wider)


def test_a_file_of_another_format_is_refused(file: Path, model: DbrxForCausalLM) -> None:
    with pytest.raises(RequestError, match="the same KV format, int8; found plain"):
        PromptCache.open(file, model, kv_format="int8")
    saved = PromptCache.open(file, model)
    with pytest.raises(RequestError, match="must have the KV format int4; found plain"):
        run(model, PROMPT, saved, "int4")
    with pytest.raises(RequestError, match="one sequence in the format plain"):
        saved.copy_into(KVCache(model.config, 1, 40, dtype=model.dtype, format="int8"), 5)


@pytest.mark.parametrize("at", [20, 3000, -1, -2000])
def test_a_damaged_file_is_refused(file: Path, model: DbrxForCausalLM, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises((CheckpointError, RequestError), match=r"prompt\.safetensors: a prompt's cache must"):
        PromptCache.open(file, model)


@pytest.mark.parametrize("kept", [0, 7, 400, -1])
def test_a_truncated_file_is_refused(file: Path, model: DbrxForCausalLM, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"must be a whole file that dbrx_q wrote.*Remove it and make it again"):
        PromptCache.open(file, model)


def test_other_files_are_refused(model: DbrxForCausalLM, small: Path, tmp_path: Path) -> None:
    shard = next(small.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="kv_cache = 1; found None"):
        PromptCache.open(shard, model)
    with pytest.raises(CheckpointError, match="missing"):
        PromptCache.open(tmp_path / "missing", model)


def test_what_is_no_prompt_cannot_be_saved(tmp_path: Path, model: DbrxForCausalLM) -> None:
    batch = KVCache(model.config, 2, 8, dtype=model.dtype)
    with pytest.raises(RequestError, match="one sequence without padding; found 2"):
        PromptCache.save(tmp_path / "p", model, [1], batch)
    padded = KVCache(model.config, 1, 8, dtype=model.dtype)
    model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1]]), past_key_values=padded)
    with pytest.raises(RequestError, match="1 columns of padding"):
        PromptCache.save(tmp_path / "p", model, [2, 3], padded)
    short = KVCache(model.config, 1, 8, dtype=model.dtype)
    model(torch.tensor([[1, 2, 3]]), past_key_values=short)
    with pytest.raises(RequestError, match="found 3 of 4 tokens"):
        PromptCache.save(tmp_path / "p", model, [1, 2, 3, 4], short)
    with pytest.raises(RequestError, match="must be writable"):
        PromptCache.save(tmp_path / "none" / "p", model, [1, 2], short)
    with pytest.raises(RequestError, match="not loaded from a folder"):
        PromptCache.save(
            tmp_path / "p", DbrxForCausalLM(model.config.__class__.from_pretrained(Path(model.config.name_or_path))), [1], short
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_saves_a_prompt_and_reuses_it(cli: Callable[..., Any], nano: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "p.safetensors", "the river flows through the valley and " * 70
    generated = ["generate", nano, "--max-new-tokens", 2, "--prompt", prompt]
    plain, first, second = (cli(*generated, *options) for options in ((), ("--prompt-cache", path), ("--prompt-cache", path)))
    assert plain.out == first.out == second.out
    with SafetensorsFile(path) as opened:
        tokens = opened.tensors["tokens"].shape[0]
    assert tokens > 512
    assert f"saved {tokens:,} tokens" in first.err
    assert f"holds {tokens:,} tokens; 512 of the prompt's {tokens:,} are reused" in second.err
    chat = cli(*generated, "--chat", "--prompt-cache", path)
    assert "; 0 of the prompt's" in chat.err
    assert "whole step of 512" in chat.err
    wrong = cli(*generated, "--prompt-cache", path, "--kv", "int8")
    assert (wrong.code, "the same KV format, int8; found plain" in wrong.err) == (2, True)
    missing = cli(*generated, "--prompt-cache", tmp_path / "none" / "p")
    assert "must name a file in a folder that exists" in missing.err
