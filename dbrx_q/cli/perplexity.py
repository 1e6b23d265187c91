"""`dbrx-q perplexity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import measurement, memory_budget, options, terminal
from .help import example

if TYPE_CHECKING:
    from dbrx_q.eval.perplexity import PerplexityResult

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q perplexity dbrx-int4 --text wiki.test.txt --context 2048")


def command(
    path: options.Checkpoint,
    text: options.Text,
    context: options.Window = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    limit: options.Limit = None,
    device: options.Device = "cpu",
    dtype: options.MeasuredDtype = None,
    kv: options.Kv = "plain",
    ram: options.Ram = None,
    gpu: options.GpuSizes = None,
    mmap: options.Mmap = True,
    fallback: options.Fallback = False,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Measure the perplexity of a text: exp(total negative log-likelihood / predicted tokens)."""
    from dataclasses import asdict

    from dbrx_q.eval.perplexity import perplexity
    from dbrx_q.eval.provenance import command_line, provenance, run_key
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.texts import load_text
    from dbrx_q.model.devices import check_device
    from dbrx_q.sources.open import open_source

    torch_device = check_device(device)
    loaded_text = load_text(text)
    source = open_source(path, fallback=fallback)
    ids = source.tokenizer().encode(loaded_text.text, split_special_tokens=True)
    windowing = measurement.protocol_of(protocol, context, stride, limit, source.config)
    windowing.check(len(ids), source.config, source=text)
    torch_dtype = measurement.dtype_of(dtype, torch_device)
    checkpoint = source.sha256()
    memory_budget.give_budget(source, ram, gpu, context=windowing.context, kv_format=kv, fallback=fallback)
    key = run_key("perplexity", {}, source, checkpoint, ids, windowing, dtype=torch_dtype, kv_format=kv, device=torch_device)
    state = RunState(key)
    if not resume:
        state.clear()
    source.use_mmap = mmap
    model = source.load(dtype=torch_dtype, device=torch_device)
    with terminal.progress("windows") as on_window:
        result = perplexity(model, ids, windowing, kv_format=kv, state=state, on_window=on_window)
    if json:
        shown = {"checkpoint": path, "checkpoint_sha256": checkpoint, "format": source.format, "bits_per_weight": source.bits_per_weight}
        shown |= {"text": text, "text_sha256": loaded_text.sha256, "dtype": str(model.dtype).removeprefix("torch."), "kv": kv}
        terminal.print_json(asdict(result) | shown | {"provenance": provenance(torch_device, command_line())})
    else:
        _print(result, fallback=fallback)
    if not result.complete:
        raise measurement.interrupted(result.tokens, result.total_tokens, kept=state.path.exists())


def _print(result: PerplexityResult, *, fallback: bool) -> None:
    tokens = f"{result.tokens:,} tokens predicted" if result.complete else f"the first {result.tokens:,} of {result.total_tokens:,} tokens"
    stride = f", stride {result.stride}" if result.protocol == "strided" else ""
    print(f"perplexity {result.perplexity:.4f} +- {result.stderr:.4f}  ({tokens}, {result.protocol}, context {result.context}{stride})")
    if fallback:
        print(f"the fallback copy answered {result.fallback_share:.1%} of the requests for experts")
