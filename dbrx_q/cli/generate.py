"""`dbrx-q generate`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dbrx_q.planning.policy_names import DEFAULT_POLICY, CachePolicyName, MissPolicy
from dbrx_q.planning.sizes import format_size

from . import budgets, output
from .budgets import Fallback, GpuSizes, Ram

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example('dbrx-q generate dbrx-int4 --chat --prompt "What is a mixture of experts?" --max-new-tokens 200')


class Dtype(str, Enum):
    """Dtypes of activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KvFormat(str, Enum):
    """How keys and values are kept."""

    plain = "plain"
    int8 = "int8"
    int4 = "int4"


DEVICE_HELP = "cpu, or cuda or cuda:N for a GPU that holds the whole model."
CONTEXT_HELP = "With --ram or --gpu, tokens that keys and values are kept room for; the prompt's and --max-new-tokens unless given."
KV_HELP = "Format of the KV cache; plain is the activations' dtype."


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue; with --chat, the user's message.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the checkpoint's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat, the system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the most probable one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that have occurred less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of activations; auto takes the checkpoint's.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    kv: Annotated[KvFormat, typer.Option(help=KV_HELP)] = KvFormat.plain,
    ram: Ram = None,
    gpu: GpuSizes = None,
    context: Annotated[int | None, typer.Option(help=CONTEXT_HELP, show_default=False)] = None,
    policy: Annotated[CachePolicyName, typer.Option(help=budgets.POLICY_HELP)] = DEFAULT_POLICY,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help=budgets.PROFILE_HELP, show_default=False)] = None,
    prefetch: Annotated[bool, typer.Option(help=budgets.PREFETCH_HELP)] = True,
    miss_policy: Annotated[MissPolicy, typer.Option(help=budgets.MISS_HELP)] = MissPolicy.hybrid,
    fallback: Fallback = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say what the cache of experts was asked for and what it took.")] = False,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Continue a prompt and stream the text to stdout."""
    import torch

    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import RequestError
    from dbrx_q.generation.generate import check_request, generate
    from dbrx_q.generation.sampling import SamplingParams
    from dbrx_q.model.devices import check_device
    from dbrx_q.model.loading import load_pretrained
    from dbrx_q.planning.footprint import PREFILL_TOKENS
    from dbrx_q.planning.host_memory import peak_memory_bytes
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    if not prompt:
        raise RequestError("--prompt must hold text; found an empty string")
    if system is not None and not chat:
        raise RequestError("--system needs --chat; add it, or put the text into --prompt")
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    place = check_device(device)
    folder = resolve_folder(path, fallback=fallback)
    tokenizer = DbrxTokenizer.from_pretrained(folder)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids = tokenizer.apply_chat_template([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = tokenizer.encode(prompt)
    config = DbrxConfig.from_pretrained(folder)
    check_request(config, [ids], max_new_tokens, stop or (), tokenizer)  # before minutes of loading
    if context is not None and ram is None and not gpu:
        raise RequestError(f"--context needs a budget that keys and values are part of; found {context}. Add --ram or --gpu")
    if context is not None and not len(ids) < context <= config.max_seq_len:
        raise RequestError(
            f"--context must hold the prompt's {len(ids):,} tokens and one more, and be at most the model's {config.max_seq_len:,}; found "
            f"{context:,}"
        )
    room = min(len(ids) + max_new_tokens, config.max_seq_len) if context is None else context
    budget = budgets.budget_of(
        ram,
        gpu,
        context=room,
        kv_format=kv.value,
        step_tokens=min(len(ids), PREFILL_TOKENS["cuda" if gpu else "cpu"]),
        policy=policy,
        profile=profile,
        prefetch=prefetch,
        miss_policy=miss_policy,
        fallback=fallback,
    )
    chosen = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    model = load_pretrained(folder, budget=budget, device=place, dtype=chosen)
    loaded = model.expert_store.stats()

    def show(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    [result] = generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        tokenizer=tokenizer,
        kv_format=kv.value,
        on_text=None if json else show,
    )
    # The first token comes out of the prefill; decoding gives the others.
    decoded = result.decode_steps
    prefill_speed = result.prompt_tokens / result.prefill_seconds
    decode_speed = decoded / result.decode_seconds if decoded else 0.0
    did = model.expert_store.stats() - loaded
    if json:
        output.print_json(
            {
                "text": result.text,
                "prompt_tokens": result.prompt_tokens,
                "new_tokens": len(result.token_ids),
                "finish_reason": result.finish_reason,
                "prefill_tokens_per_s": prefill_speed,
                "decode_tokens_per_s": decode_speed,
                "peak_memory_bytes": peak_memory_bytes(),
                **({"experts": did.as_dict()} if stats else {}),
            }
        )
        return
    print(flush=True)
    print(
        f"{result.prompt_tokens} prompt tokens at {prefill_speed:.1f} tokens/s, {len(result.token_ids)} new tokens at "
        f"{decode_speed:.1f} tokens/s ({result.finish_reason}), peak memory {format_size(peak_memory_bytes())}",
        file=sys.stderr,
    )
    if result.finish_reason == "memory":
        print("the KV cache that the budget holds is full; give --context or more memory to go on", file=sys.stderr)
    if stats:
        for line in did.lines():
            print(line, file=sys.stderr)
