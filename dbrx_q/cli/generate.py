"""`dbrx-q generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dbrx_q.planning.policy_names import DEFAULT_POLICY, MissPolicy
from dbrx_q.planning.sizes import format_size

from . import memory_budget, options, terminal
from .help import example
from .measurement import named_dtype
from .options import MEMORY, MODEL, SAMPLING, TEXT, option
from .running import load_to_run

if TYPE_CHECKING:
    from dbrx_q.config import DbrxConfig
    from dbrx_q.generation.generate import Generation
    from dbrx_q.model.kv_cache import KVCache
    from dbrx_q.model.kv_cache_file import PromptCache
    from dbrx_q.model.modeling import DbrxForCausalLM
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example('dbrx-q generate dbrx-int4 --chat --prompt "What is a mixture of experts?" --max-new-tokens 200')

_Context = Annotated[
    int | None,
    option(MEMORY, "With --ram or --gpu, tokens that the KV cache holds.", metavar="N", default="the prompt and --max-new-tokens"),
]


def command(
    path: options.Checkpoint,
    prompt: Annotated[str, option(TEXT, "Text to continue; with --chat, the user's message.", metavar="TEXT", default=False)],
    chat: Annotated[bool, option(TEXT, "Put the prompt into the checkpoint's chat template.", "--chat")] = False,
    system: Annotated[str | None, option(TEXT, "With --chat, the system message.", metavar="TEXT")] = None,
    max_new_tokens: Annotated[int, option(TEXT, "Most tokens to generate.", metavar="N")] = 128,
    stop: Annotated[list[str] | None, option(TEXT, "Stop at this text; may be given several times.", metavar="TEXT")] = None,
    temperature: Annotated[float, option(SAMPLING, "Randomness of the choice; 0 takes the most probable token.", metavar="T")] = 0.0,
    top_k: Annotated[int, option(SAMPLING, "Sample from the k most probable tokens; 0 from all.", metavar="K")] = 0,
    top_p: Annotated[float, option(SAMPLING, "Sample from the most probable tokens up to this total probability.", metavar="P")] = 1.0,
    min_p: Annotated[float, option(SAMPLING, "Drop tokens below this share of the most probable one.", metavar="P")] = 0.0,
    repetition_penalty: Annotated[float, option(SAMPLING, "Above 1, make repeated tokens less probable.", metavar="X")] = 1.0,
    seed: Annotated[int | None, option(SAMPLING, "Make sampling repeatable.", metavar="N")] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    kv: options.Kv = "plain",
    prompt_cache: Annotated[
        Path | None,
        option(
            MODEL, "Read what the prompt shares with the one saved here; save this prompt's keys and values if missing.", metavar="FILE"
        ),
    ] = None,
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    mmap: options.Mmap = True,
    context: _Context = None,
    policy: options.Policy = DEFAULT_POLICY.value,
    profile: options.Profile = None,
    prefetch: options.Prefetch = True,
    miss_policy: options.MissPolicy = MissPolicy.hybrid.value,
    fallback: options.Fallback = False,
    stats: Annotated[bool, option(options.OUTPUT, "Print what the expert cache served, loaded and evicted.", "--stats")] = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt and stream the text to stdout."""
    from dbrx_q.errors import RequestError
    from dbrx_q.generation.generate import check_request, end_token_ids, generate
    from dbrx_q.generation.sampling import SamplingParams
    from dbrx_q.model.devices import check_device
    from dbrx_q.planning.footprint import PREFILL_TOKENS
    from dbrx_q.sources.open import open_runnable
    from dbrx_q.sources.streamed import ConvertedSource

    _check_text(prompt, system, chat=chat)
    if prompt_cache is not None:
        _check_prompt_cache(prompt_cache)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    torch_device = check_device(device)
    source = open_runnable(path, fallback=fallback)
    if prompt_cache is not None and isinstance(source, ConvertedSource):
        raise RequestError(
            f"--prompt-cache belongs to a checkpoint of the published layout, plain or quantized by dbrx-q; {path} is {source.format}. "
            "Leave it out, or make a copy with dbrx-q quantize"
        )
    tokenizer = source.tokenizer()
    ids = _prompt_ids(tokenizer, prompt, system, chat=chat)
    config = source.config
    check_request(config, [ids], max_new_tokens, stop or (), tokenizer)  # before minutes of loading
    if context is not None:
        _check_context(context, len(ids), config, has_budget=ram is not None or bool(gpu))
    budget = memory_budget.budget_of(
        ram,
        gpu,
        context=min(len(ids) + max_new_tokens, config.max_seq_len) if context is None else context,
        kv_format=kv,
        step_tokens=min(len(ids), PREFILL_TOKENS["cuda" if gpu else "cpu"]),
        policy=policy,
        profile=profile,
        prefetch=prefetch,
        miss_policy=miss_policy,
        fallback=fallback,
    )
    source.budget, source.use_mmap = budget, mmap
    model = load_to_run(source, dtype=named_dtype(dtype), device=torch_device)
    loaded = model.expert_store.stats()
    saved = _saved_prompt(prompt_cache, model, ids, kv)
    [result] = generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=end_token_ids(model, tokenizer, chat=chat),
        stop=stop or (),
        tokenizer=tokenizer,
        kv_format=kv,
        on_text=None if json else _stream,
        prompt_cache=saved,
        on_prefilled=lambda _, cache: _save_prompt(prompt_cache, saved, model, ids, cache),
    )
    cache_stats = model.expert_store.stats() - loaded
    if json:
        terminal.print_json(_as_dict(result) | ({"experts": cache_stats.as_dict()} if stats else {}))
        return
    print(flush=True)
    _print_speed(result)
    streamed = ["experts: none kept in memory; those of one layer are read at a time"]
    for line in (streamed if model.expert_store.reloads_each_step else cache_stats.lines()) if stats else ():
        terminal.say(line)


def _check_text(prompt: str, system: str | None, *, chat: bool) -> None:
    """Refuse an empty prompt, and a system message without a chat."""
    from dbrx_q.errors import RequestError

    if not prompt:
        raise RequestError("--prompt must hold text; found an empty string")
    if system is not None and not chat:
        raise RequestError("--system needs --chat; add it, or put the text into --prompt")


def _check_context(context: int, prompt_tokens: int, config: DbrxConfig, *, has_budget: bool) -> None:
    """Refuse a --context without a budget, and one that the prompt or the model does not allow."""
    from dbrx_q.errors import RequestError

    if not has_budget:
        raise RequestError(f"--context needs a budget that keys and values are part of; found {context}. Add --ram or --gpu")
    if not prompt_tokens < context <= config.max_seq_len:
        raise RequestError(
            f"--context must hold the prompt's {prompt_tokens:,} tokens and one more, and be at most the model's {config.max_seq_len:,}; "
            f"found {context:,}"
        )


def _prompt_ids(tokenizer: DbrxTokenizer, prompt: str, system: str | None, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer.encode(prompt, split_special_tokens=True))
    messages = [{"role": "system", "content": system}] if system is not None else []
    conversation = [*messages, {"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False))


def _check_prompt_cache(path: Path) -> None:
    """Refuse a file that cannot be made, before minutes of loading."""
    from dbrx_q.errors import RequestError

    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(f"--prompt-cache must name a file in a folder that exists; found {path}. Make the folder or give another name")


def _saved_prompt(path: Path | None, model: DbrxForCausalLM, ids: list[int], kv: str) -> PromptCache | None:
    """The keys and values in the file of --prompt-cache, if it exists; says what of them is used."""
    from dbrx_q.model.kv_cache_file import PromptCache, prefill_step

    if path is None or not path.exists():
        return None
    saved = PromptCache.open(path, model, kv_format=kv)
    shared = saved.shared(model, ids)
    rest = "" if shared else f"; reuse begins with a whole step of {prefill_step(model)} tokens, computed under the same budget"
    terminal.say(f"{path}: holds {len(saved.tokens):,} tokens; {shared:,} of the prompt's {len(ids):,} are reused{rest}")
    return saved


def _save_prompt(path: Path | None, saved: PromptCache | None, model: DbrxForCausalLM, ids: list[int], cache: KVCache) -> None:
    """Make the file of --prompt-cache, unless it exists."""
    from dbrx_q.model.kv_cache_file import PromptCache

    if path is None or saved is not None:
        return
    PromptCache.save(path, model, ids, cache)
    terminal.say(f"{path}: saved {len(ids):,} tokens, {format_size(path.stat().st_size)}")


def _stream(_: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _speeds(result: Generation) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding; prefill yields the first new token, decode steps the others."""
    decode = result.decode_steps / result.decode_seconds if result.decode_steps else 0.0
    return result.prompt_tokens / result.prefill_seconds, decode


def _as_dict(result: Generation) -> dict[str, object]:
    from dbrx_q.planning.host_memory import peak_memory_bytes

    prefill, decode = _speeds(result)
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _print_speed(result: Generation) -> None:
    from dbrx_q.planning.host_memory import peak_memory_bytes

    prefill, decode = _speeds(result)
    terminal.say(
        f"{result.prompt_tokens} prompt tokens at {prefill:.1f} tokens/s, {len(result.token_ids)} new tokens at "
        f"{decode:.1f} tokens/s ({result.finish_reason}), peak memory {format_size(peak_memory_bytes())}"
    )
    if result.finish_reason == "memory":
        terminal.say("the KV cache that the budget allows is full; give --context or more memory to continue")
