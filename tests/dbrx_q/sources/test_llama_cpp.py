"""llama.cpp's protocol gives llama.cpp's figures.

The figures below were printed by `llama-perplexity --no-repack -c 512 --chunks 200` (build 0c1e570) on WikiText-2's test text, for the
bundled model as float32 and as the bundled GGUF file, the latter with `--kl-divergence` against the former. llama.cpp attends in float16
and multiplies quantized weights with activations of 8 bits, so the last digits differ.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dbrx_q.eval.compare.run import compare_checkpoints, open_reference
from dbrx_q.eval.texts import load_text
from dbrx_q.eval.windows import Protocol
from dbrx_q.sources.open import open_source

FLOAT32_PERPLEXITY, PRINTED_ERROR = 35.1947, 0.4605
Q4_0_RATIO, Q4_0_MEAN_KL, Q4_0_P999_KL, Q4_0_TOP = 1.01789, 0.02263, 0.4248, 0.9039


def test_the_figures_equal_those_of_llama_cpp(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf = open_source(nano.parent / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf")
    text = load_text(str(nano.parent / "wikitext2-test.txt"))
    comparison = compare_checkpoints(open_reference(str(nano)), [gguf], text, Protocol.of(512, half_window=True, limit=200))

    assert comparison.tokens == 200 * 255
    assert math.isclose(comparison.reference_perplexity, FLOAT32_PERPLEXITY, rel_tol=1e-4)
    assert round(comparison.reference_perplexity_stderr, 4) == PRINTED_ERROR

    row = comparison.results[0]
    assert round(row.bits_per_weight, 2) == 4.81
    assert abs(row.perplexity - Q4_0_RATIO * FLOAT32_PERPLEXITY) < PRINTED_ERROR
    # Pairing takes the text's own spread out, so that the two ratios must agree far better than that.
    assert abs(row.delta_ln_ppl - math.log(Q4_0_RATIO)) < row.delta_ln_ppl_stderr
    assert math.isclose(row.mean_kl, Q4_0_MEAN_KL, rel_tol=0.05)
    assert math.isclose(row.p999_kl, Q4_0_P999_KL, rel_tol=0.05)
    assert math.isclose(row.top1_agreement, Q4_0_TOP, abs_tol=0.005)
