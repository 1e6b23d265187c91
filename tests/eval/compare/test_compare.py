"""Comparisons are checked against transformers and float64 numpy, and a saved reference against the model that it was saved from."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.eval import divergence, observe
from dbrx_q.eval.compare import measure as compare
from dbrx_q.eval.compare.measure import Pair
from dbrx_q.eval.compare.reference import ModelReference
from dbrx_q.eval.compare.reference_file import ReferenceFile
from dbrx_q.eval.compare.reference_writer import save_reference
from dbrx_q.eval.compare.result import Comparison
from dbrx_q.eval.compare.run import compare_checkpoints, groups, open_reference
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.texts import Text, load_text
from dbrx_q.eval.windows import Protocol
from dbrx_q.sources.base import Source
from dbrx_q.sources.folder import NativeFolder
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource

CONTEXT = 256
PROTOCOL = Protocol.of(CONTEXT)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    book = (nano.parent / "war-of-the-worlds.txt").read_text(encoding="utf-8")
    file.write_text(book[20000:26000], encoding="utf-8")
    return load_text(str(file))


@pytest.fixture(scope="module")
def comparison(nano: Path, quantized_nano: Path, text: Text) -> Comparison:
    return compare_checkpoints(open_source(nano), [open_source(quantized_nano), open_source(nano)], text, PROTOCOL)


@pytest.fixture(scope="module")
def reference(nano: Path) -> ModelReference:
    source = open_source(nano)
    return ModelReference(source, source.load(dtype=torch.float32, device=CPU))


def saved(reference: ModelReference, text: Text, path: Path, **options: object) -> tuple[int, int]:
    about = {"text": text.name, "text_sha256": text.sha256, "provenance": {}}
    ids = DbrxTokenizer.from_pretrained(open_source(reference.name).path).encode(text.text)
    return save_reference(reference, ids, PROTOCOL, path, about=about, **options)  # type: ignore[arg-type]


def logits_of(model: torch.nn.Module, window: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([window])).logits[0].numpy().astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    raised = logits - logits.max(-1, keepdims=True)
    return raised - np.log(np.exp(raised).sum(-1, keepdims=True))


def test_every_figure_equals_numpys(nano: Path, quantized_nano: Path, text: Text, comparison: Comparison) -> None:
    """Transformers computes the reference's logits, this package the checkpoint's, and numpy all figures from them in float64."""
    config = transformers.DbrxConfig.from_pretrained(nano)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    oracle = transformers.DbrxForCausalLM.from_pretrained(nano, config=config, dtype=torch.float32).eval()
    quantized = DbrxForCausalLM.from_pretrained(quantized_nano, dtype="float32")
    ids = DbrxTokenizer.from_pretrained(nano).encode(text.text)
    kl, nll_p, nll_q, same, five = [], [], [], [], []
    for first in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = ids[first : first + CONTEXT]
        log_p, log_q = (log_softmax(logits_of(model, window)[:-1]) for model in (oracle, quantized))
        rows, targets = np.arange(CONTEXT - 1), np.array(window[1:])
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        nll_p.append(-log_p[rows, targets])
        nll_q.append(-log_q[rows, targets])
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        five += [len(set(np.argsort(-a)[:5]) & set(np.argsort(-b)[:5])) / 5 for a, b in zip(log_p, log_q, strict=True)]
    kls, p, q = np.concatenate(kl), np.concatenate(nll_p), np.concatenate(nll_q)
    row = comparison.results[0]
    assert row.tokens == comparison.tokens == comparison.total_tokens == len(kls) == len(ids) // CONTEXT * (CONTEXT - 1)
    close = {
        "mean_kl": kls.mean(),
        "mean_kl_stderr": kls.std(ddof=1) / len(kls) ** 0.5,
        "median_kl": np.median(kls),
        "p90_kl": np.percentile(kls, 90),
        "p99_kl": np.percentile(kls, 99),
        "p999_kl": np.percentile(kls, 99.9),
        "max_kl": kls.max(),
        "perplexity": np.exp(q.mean()),
        "delta_ln_ppl": (q - p).mean(),
        "delta_ln_ppl_stderr": (q - p).std(ddof=1) / len(p) ** 0.5,
        "rms_dp": np.sqrt(((np.exp(-q) - np.exp(-p)) ** 2).mean()),
    }
    for name, value in close.items():
        assert np.isclose(getattr(row, name), value, rtol=1e-3, atol=0), f"{name}: {getattr(row, name)} and {value}"
    assert np.isclose(comparison.reference_perplexity, np.exp(p.mean()), rtol=1e-5)
    # A token whose two likeliest are within the two programs' rounding of each other may fall either way.
    assert abs(row.top1_agreement - np.concatenate(same).mean()) <= 2 / len(kls)
    assert abs(row.top5_agreement - np.mean(five)) <= 2 / len(kls)
    assert 0.5 < row.top1_agreement < 1


def test_experts_and_hidden_states_equal_those_of_forward_passes(
    nano: Path, quantized_nano: Path, text: Text, comparison: Comparison
) -> None:
    models = [DbrxForCausalLM.from_pretrained(path, dtype="float32") for path in (nano, quantized_nano)]
    ids = DbrxTokenizer.from_pretrained(nano).encode(text.text)
    layers = models[0].config.n_layers
    same, jaccard, error, norm, tokens = np.zeros(layers), np.zeros(layers), np.zeros(layers), np.zeros(layers), 0
    for first in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = torch.tensor([ids[first : first + CONTEXT]])
        states: list[list[torch.Tensor]] = [[], []]
        chosen: list[list[list[set[int]]]] = []
        for model, kept in zip(models, states, strict=True):
            handles = [
                block.norm_attn_norm.norm_1.register_forward_hook(lambda m, inputs, out, kept=kept: kept.append(inputs[0]))
                for block in model.transformer.blocks[1:]
            ]
            handles.append(model.transformer.norm_f.register_forward_hook(lambda m, inputs, out, kept=kept: kept.append(inputs[0])))
            logits = model(window, output_router_logits=True).router_logits
            chosen.append([[set(row.topk(4).indices.tolist()) for row in layer[:-1]] for layer in logits])
            for handle in handles:
                handle.remove()
        for layer in range(layers):
            for a, b in zip(chosen[0][layer], chosen[1][layer], strict=True):
                same[layer] += a == b
                jaccard[layer] += len(a & b) / len(a | b)
            a, b = (kept[layer][:-1].double() for kept in states)
            error[layer] += float((a - b).square().sum())
            norm[layer] += float(a.square().sum())
        tokens += CONTEXT - 1
    row = comparison.results[0]
    np.testing.assert_allclose(row.router_agreement, same / tokens, atol=2 / tokens)
    np.testing.assert_allclose(row.router_jaccard, jaccard / tokens, atol=2 / tokens)
    np.testing.assert_allclose(row.hidden_error, np.sqrt(error / norm), rtol=0.1)  # of a sample of the tokens
    assert all(0 < share < 1 for share in row.router_agreement)


def test_a_checkpoint_does_not_diverge_from_itself(comparison: Comparison) -> None:
    row = comparison.results[1]
    assert (row.mean_kl, row.max_kl, row.delta_ln_ppl, row.rms_dp) == (0, 0, 0, 0)
    assert (row.top1_agreement, row.top5_agreement) == (1, 1)
    assert row.router_agreement == row.router_jaccard == [1.0] * 4
    assert row.hidden_error == [0.0] * 4
    assert row.perplexity == comparison.reference_perplexity


def test_perplexity_equals_that_of_the_perplexity_command(quantized_nano: Path, text: Text, comparison: Comparison) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, dtype="float32")
    alone = perplexity(model, DbrxTokenizer.from_pretrained(quantized_nano).encode(text.text), PROTOCOL)
    assert (alone.perplexity, alone.stderr) == (comparison.results[0].perplexity, comparison.results[0].perplexity_stderr)


def test_the_worst_tokens_are_shown_with_the_text_before_them(text: Text, comparison: Comparison) -> None:
    worst = comparison.results[0].worst_tokens
    assert len(worst) == 10
    assert [token.kl for token in worst] == sorted((token.kl for token in worst), reverse=True)
    assert worst[0].kl == comparison.results[0].max_kl
    for token in worst:
        assert token.before + token.token in text.text
        assert 0 < token.reference_probability < 1


def test_json_round_trip(comparison: Comparison) -> None:
    again = Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert again == comparison
    wanted = {
        "path",
        "format",
        "bits_per_weight",
        "bytes",
        "perplexity",
        "mean_kl",
        "median_kl",
        "p99_kl",
        "p999_kl",
        "max_kl",
        "delta_ln_ppl",
    }
    wanted |= {"delta_ln_ppl_stderr", "top1_agreement", "top5_agreement", "rms_dp", "router_agreement"}
    assert wanted <= set(comparison.to_dict()["results"][0])
    assert {"reference", "text", "context", "results"} <= set(comparison.to_dict())


def test_figures_are_reproducible(nano: Path, quantized_nano: Path, text: Text, comparison: Comparison) -> None:
    again = compare_checkpoints(open_source(nano), [open_source(quantized_nano)], text, PROTOCOL)
    assert again.results[0] == comparison.results[0]


def test_a_resumed_comparison_gives_the_same_figures(
    nano: Path, quantized_nano: Path, text: Text, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "STEP_TOKENS", 2 * CONTEXT)
    sources = [open_source(quantized_nano)]
    expected = compare_checkpoints(open_source(nano), sources, text, PROTOCOL)
    interrupted: list[int] = []

    def interrupt(done: int, total: int) -> None:
        if done >= 4 and not interrupted:
            interrupted.append(done)
            raise KeyboardInterrupt

    def run(**options: object) -> Comparison:
        return compare_checkpoints(open_source(nano), sources, text, PROTOCOL, **options)  # type: ignore[arg-type]

    partial = run(on_window=interrupt)
    assert not partial.complete
    assert 0 < partial.tokens < partial.total_tokens == expected.tokens
    assert partial.results[0].tokens == partial.tokens
    reported: list[int] = []
    assert run(resume=True, on_window=lambda done, total: reported.append(done)) == expected
    assert reported[0] == interrupted[0]
    assert run(resume=True, on_window=lambda done, total: reported.append(done)) == expected  # a complete run leaves no state


@pytest.mark.parametrize("place", ["scores", "layers", "reserve"])
def test_ctrl_c_at_any_moment_leaves_consistent_figures(
    nano: Path, quantized_nano: Path, text: Text, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the middle of a batch, between its scores and its layers, and while a resumed run allocates its scores."""
    monkeypatch.setattr(observe, "STEP_TOKENS", 2 * CONTEXT)

    def run(**options: object) -> Comparison:
        return compare_checkpoints(open_source(nano), [open_source(quantized_nano)], text, PROTOCOL, **options)  # type: ignore[arg-type]

    expected = run()
    holder, name = (divergence.TokenScores, "put") if place != "layers" else (compare._LayerSums, "plus")
    real, calls = getattr(holder, name), []

    def broken(self: object, *arguments: object) -> object:
        calls.append(name)
        if len(calls) == interrupted_call:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(holder, name, broken)
    interrupted_call = 3 if place == "layers" else 5
    partial = run()
    assert not partial.complete
    if place == "reserve":
        calls.clear()
        interrupted_call = 1  # a resumed run first copies its scores into a new allocation
        resumed = run(resume=True)
        assert resumed.results[0].perplexity == partial.results[0].perplexity
    tokens = partial.results[0].tokens
    assert tokens % (2 * (CONTEXT - 1)) == 0
    interrupted_call = 0
    assert run(resume=True) == expected


def test_samples_of_hidden_states_cover_all_positions_of_a_window() -> None:
    for count in (30, 68, 136, 1022):
        windows = Protocol.of(2048).windows(2048 * count)
        interval = observe.sample_interval(windows, 40, 6144)
        offsets = {token % 2047 for token in range(0, 2047 * count, interval)}
        assert len(offsets) >= min(60, 2047 * count // interval)


@pytest.mark.parametrize("top_k", [None, 32])
def test_a_saved_reference_gives_the_figures_of_its_model(
    reference: ModelReference, quantized_nano: Path, text: Text, comparison: Comparison, tmp_path: Path, top_k: int | None
) -> None:
    path = tmp_path / "reference.safetensors"
    assert saved(reference, text, path, top_k=top_k) == (comparison.tokens, comparison.tokens)
    with_file = compare_checkpoints(open_reference(str(path)), [open_source(quantized_nano)], text, PROTOCOL)
    from_file, from_model = with_file.results[0], comparison.results[0]
    exact = ("perplexity", "delta_ln_ppl", "delta_ln_ppl_stderr", "rms_dp", "top1_agreement", "top5_agreement")
    for name in (*exact, "router_agreement", "router_jaccard", "hidden_error"):
        assert getattr(from_file, name) == getattr(from_model, name), name
    assert with_file.reference_perplexity == comparison.reference_perplexity
    if top_k is None:
        assert np.isclose(from_file.mean_kl, from_model.mean_kl, rtol=1e-3)
        assert np.isclose(from_file.max_kl, from_model.max_kl, rtol=5e-3)
        assert "float16" in with_file.approximation
    else:
        assert 0.5 * from_model.mean_kl < from_file.mean_kl < from_model.mean_kl
        assert "32 likeliest tokens" in with_file.approximation
        assert path.stat().st_size < 0.2 * 2 * 4096 * comparison.tokens


def test_saving_resumes_where_it_was_interrupted(
    reference: ModelReference, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "STEP_TOKENS", 2 * CONTEXT)
    complete, path = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    total = saved(reference, text, complete, top_k=16)[1]

    def interrupt_at_once(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved(reference, text, path, top_k=16, on_window=interrupt_at_once)
    assert list(tmp_path.iterdir()) == [complete]

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    assert saved(reference, text, path, top_k=16, on_window=interrupt) == (4 * (CONTEXT - 1), total)
    assert not path.exists()
    with pytest.raises(RequestError, match="must continue the same run"):
        saved(reference, text, path, top_k=17, resume=True)
    partial = path.with_name(path.name + ".partial")
    data = bytearray(partial.read_bytes())
    with SafetensorsFile(complete) as file:
        data[file.tensors["nll"].offset + 8 * 3 * (CONTEXT - 1)] ^= 1  # of the fourth window
    partial.write_bytes(data)
    seen: list[int] = []
    saved(reference, text, path, top_k=16, resume=True, on_window=lambda done, total: seen.append(done))
    assert seen[0] == 3
    assert path.read_bytes() == complete.read_bytes()
    with pytest.raises(RequestError, match="must not exist; it does"):
        saved(reference, text, path)


def test_a_reference_of_another_text_protocol_or_model_is_refused(
    reference: ModelReference, nano: Path, quantized_nano: Path, small: Path, text: Text, tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    saved(reference, text, path, top_k=16)
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.text[::-1], encoding="utf-8")

    def run(source: Source, words: Text = text, protocol: Protocol = PROTOCOL) -> None:
        compare_checkpoints(open_reference(str(path)), [source], words, protocol)

    with pytest.raises(RequestError, match=r"other\.txt: a saved reference must be used on its own text"):
        run(open_source(quantized_nano), load_text(str(other_text)))
    with pytest.raises(RequestError, match="the options ask for half-window, context 256"):
        run(open_source(quantized_nano), protocol=Protocol.of(CONTEXT, half_window=True))
    with pytest.raises(RequestError, match="n_layers is 1, the reference's 4"):
        run(open_source(small))
    data = bytearray(path.read_bytes())
    with ReferenceFile(path) as file:
        offset = file._file.tensors["top_log_probs"].offset
    data[offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="window 0 differs"):
        run(open_source(quantized_nano))
    data[200] ^= 1  # in the header's metadata
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"reference\.safetensors: "):
        open_reference(str(path))
    with pytest.raises(CheckpointError, match="this file is none of these"):
        open_reference(str(nano / "model.safetensors"))
    path.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_reference(str(path))


def test_models_are_grouped_by_memory(nano: Path) -> None:
    pairs = [Pair(open_source(nano)) for _ in range(4)]
    assert [len(group) for group in groups(pairs, [10, 10, 10, 10], 25)] == [2, 2]
    assert [len(group) for group in groups(pairs, [30, 10, 10, 30], 25)] == [1, 2, 1]
    assert groups([], [], 25) == []
    assert [pair for group in groups(pairs, [1, 2, 3, 4], 100) for pair in group] == pairs


def test_a_budget_is_that_of_the_whole_command(
    cli: Callable[..., Any], nano: Path, quantized_nano: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: weakref.WeakSet[DbrxForCausalLM] = weakref.WeakSet()
    loads: list[tuple[int, int]] = []
    for kind in (NativeFolder, ConvertedSource):
        load = kind.load

        def recorded(source: Source, load: Callable[..., DbrxForCausalLM] = load, **options: object) -> DbrxForCausalLM:
            model = load(source, **options)
            models.add(model)
            assert source.budget is not None
            loads.append((source.budget.machine.ram or 0, len(models)))
            return model

        monkeypatch.setattr(kind, "load", recorded)
    options = ["--text", text.name, "--context", CONTEXT, "--json"]
    quants = [quantized_nano] * 3
    outcome = cli("compare", nano, *quants, *options, "--ram", "300MB")
    assert outcome.code == 0, outcome.err
    assert loads == [(150_000_000, 1)] + 3 * [(150_000_000, 2)]
    loads.clear()
    path = tmp_path / "reference.safetensors"
    assert cli("reference", nano, path, "--text", text.name, "--context", CONTEXT, "--ram", "150MB").code == 0
    assert cli("compare", path, *quants, *options, "--ram", "150MB").code == 0
    assert loads == 4 * [(150_000_000, 1)]


def test_a_budget_that_is_too_small_is_named_as_the_limit(cli: Callable[..., Any], nano: Path, quantized_nano: Path, text: Text) -> None:
    options = ["--text", text.name, "--context", CONTEXT, "--ram"]
    outcome = cli("compare", nano, quantized_nano, *options, "20MB")
    assert outcome.code == 2
    assert "the budget is 10.00 MB, which is 1/2 of the limit, since 2 models are in memory together" in outcome.err
    assert "Free some" not in outcome.err
    least = re.search(r"Give at least ([\d,]+) bytes", outcome.err)
    assert least is not None
    streamed = int(least[1].replace(",", ""))
    assert streamed > 20_000_000
    outcome = cli("compare", nano, quantized_nano, *options, streamed + 2)
    assert outcome.code == 2
    assert f"{quantized_nano}: the host must hold" in outcome.err  # REF fits, and QUANT lacks memory
    assert f"the budget is {(streamed + 2) // 2:,} bytes, which is 1/2 of the limit" in outcome.err
    outcome = cli("perplexity", nano, *options, "10MB")
    assert "the budget is 10.00 MB. Give at least" in outcome.err


def test_the_command(
    cli: Callable[..., object], nano: Path, quantized_nano: Path, text: Text, comparison: Comparison, tmp_path: Path
) -> None:
    outcome = cli("compare", nano, quantized_nano, "--text", text.name, "--context", CONTEXT, "--json")
    assert outcome.code == 0
    shown = json.loads(outcome.out)
    assert shown["results"][0]["mean_kl"] == comparison.results[0].mean_kl
    assert (shown["reference"], shown["context"]) == (str(nano), CONTEXT)
    assert shown["provenance"]["versions"]["torch"] == torch.__version__
    path = tmp_path / "reference.safetensors"
    assert cli("reference", nano, path, "--text", text.name, "--context", CONTEXT, "--top-k", 64).code == 0
    outcome = cli("compare", path, quantized_nano, "--text", text.name)
    assert outcome.code == 0
    assert f"perplexity              {comparison.results[0].perplexity:.4f}" in outcome.out
    outcome = cli("compare", path, quantized_nano, "--text", text.name, "--context", 128)
    assert outcome.code == 2
    assert "Leave the options out" in outcome.err
    outcome = cli("compare", nano, quantized_nano, "--text", text.name, "--context", CONTEXT, "--protocol", "strided")
    assert outcome.code == 2
    assert "Give --stride" in outcome.err
    for options, message in (
        (["--protocol", "strided", "--stride", CONTEXT], "strided windows must overlap"),
        (["--section", "divergence"], "Give --document"),
        (["--document", tmp_path / "absent" / "x.md"], "folder that exists"),
        (["--document", path], "must be UTF-8"),
    ):
        outcome = cli("compare", nano, quantized_nano, "--text", text.name, "--context", CONTEXT, *options)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
