"""Divergences against float64 numpy, written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbrx_q.eval.divergence import Distribution, TokenScores, mean_and_stderr, negative_log_likelihood, scores


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reference logits, logits, targets): float32 [40, 300], peaked as those of a model are."""
    generator = torch.Generator().manual_seed(5)
    reference = 4 * torch.randn(40, 300, generator=generator)
    logits = reference + 0.3 * torch.randn(40, 300, generator=generator)
    return reference, logits, torch.randint(0, 300, (40,), generator=generator)


def test_scores_follow_their_definitions(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, logits, targets = case
    p, q = softmax(reference.numpy().astype(np.float64)), softmax(logits.numpy().astype(np.float64))
    rows = np.arange(40)
    result = scores(Distribution.of(reference, targets), Distribution.of(logits, targets))
    np.testing.assert_allclose(result.kl, (p * np.log(p / q)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(result.nll, -np.log(q[rows, targets]), rtol=1e-12)
    np.testing.assert_allclose(result.nll_reference, -np.log(p[rows, targets]), rtol=1e-12)
    assert result.reference_top.tolist() == p.argmax(-1).tolist()
    assert result.top.tolist() == q.argmax(-1).tolist()
    common = [len(set(np.argsort(-p[i])[:5]) & set(np.argsort(-q[i])[:5])) / 5 for i in rows]
    np.testing.assert_allclose(result.top5, common, rtol=1e-6)
    assert 0 < result.top5.mean() < 1
    np.testing.assert_allclose(negative_log_likelihood(logits, targets).numpy(), result.nll, rtol=0)


def test_a_model_does_not_diverge_from_itself(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, _, targets = case
    result = scores(Distribution.of(reference, targets), Distribution.of(reference, targets))
    assert not result.kl.any()
    assert (result.top5 == 1).all()


def test_omitted_tokens_count_as_one_event(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, logits, targets = case
    full = Distribution.of(reference, targets)
    ids = full.likeliest(20)
    truncated = Distribution(full.log_probs.gather(-1, ids), ids, full.nll)
    result = scores(truncated, Distribution.of(logits, targets))
    p, q = softmax(reference.numpy().astype(np.float64)), softmax(logits.numpy().astype(np.float64))
    for row in range(40):
        order = np.argsort(-p[row])
        joined_p = np.append(p[row, order[:20]], p[row, order[20:]].sum())
        joined_q = np.append(q[row, order[:20]], q[row, order[20:]].sum())
        assert np.isclose(result.kl[row], (joined_p * np.log(joined_p / joined_q)).sum(), rtol=1e-9)
    exact = scores(full, Distribution.of(logits, targets))
    assert (result.kl <= exact.kl).all()
    assert (result.kl < exact.kl).any()
    np.testing.assert_array_equal(result.top5, exact.top5)
    np.testing.assert_array_equal(result.nll_reference, exact.nll_reference)


def test_the_lower_id_wins_a_tie() -> None:
    logits = torch.zeros(3, 50)
    logits[0, 40] = logits[0, 7] = 1.0
    logits[1, 30] = 2.0
    logits[2, [9, 8, 7, 6, 5, 4]] = 1.0  # the sixth is as likely as the fifth
    ids = Distribution.of(logits, torch.zeros(3, dtype=torch.int64)).likeliest(5)
    assert ids.tolist() == [[7, 40, 0, 1, 2], [30, 0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_certain_predictions_have_finite_scores() -> None:
    logits = torch.full((1, 10), -2000.0)
    logits[0, 3] = 2000.0
    negated = -logits
    result = scores(Distribution.of(logits, torch.tensor([3])), Distribution.of(negated, torch.tensor([3])))
    assert np.isfinite(result.kl).all()
    assert np.isclose(result.kl[0], 4000 + np.log(9), rtol=1e-9)


def test_parts_are_written_at_their_index() -> None:
    def part(first: int) -> TokenScores:
        values = np.arange(first, first + 3)
        return TokenScores(*(values.astype(kind) for kind in (np.float64, np.float64, np.float64, np.float32, np.int32, np.int32)))

    all_scores = TokenScores.zeros(8)
    all_scores.put(3, part(3))
    all_scores.put(0, part(0))
    assert all_scores.first(6).kl.tolist() == [0, 1, 2, 3, 4, 5]
    assert all_scores.first(6).top.tolist() == [0, 1, 2, 3, 4, 5]
    assert all_scores.top.dtype == np.int32
    assert len(all_scores.first(0).kl) == 0


def test_the_standard_error_follows_its_definition() -> None:
    values = np.array([1.0, 4.0, 4.0, 7.0])
    mean, error = mean_and_stderr(values)
    assert mean == 4.0
    assert np.isclose(error, np.sqrt((9 + 0 + 0 + 9) / 3) / 2)
    assert mean_and_stderr(values[:1]) == (1.0, 0.0)
