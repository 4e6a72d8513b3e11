import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from veneer.errors import DataError
from veneer.evaluation import metrics


def test_a_report_by_hand() -> None:
    #             true 0: right, right, as 1;  true 1: right;  true 2: as 0;  class 3 does not occur
    labels, predictions = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0])
    report = metrics.classification_report(labels, predictions, 4)
    assert report.confusion == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert report.support == [3, 1, 1, 0]
    assert report.accuracy == pytest.approx(3 / 5)
    assert report.precision == pytest.approx([2 / 3, 1 / 2, 0, 0])
    assert report.recall == pytest.approx([2 / 3, 1, 0, 0])
    assert report.f1 == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert report.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)  # over the classes that occur


def test_a_report_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="held-out set is empty"):
        metrics.classification_report(np.array([]), np.array([]), 2)


def test_classification_figures_by_hand() -> None:
    logits = np.array([[0.0, math.log(3)], [math.log(4), 0.0], [1000.0, 0.0]], dtype=np.float32)
    figures = metrics.classification(EvalPrediction((logits, "hidden states"), np.array([1, 1, 0])))
    assert figures["loss"] == pytest.approx((math.log(4 / 3) + math.log(5) + 0) / 3, rel=1e-6)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["macro_f1"] == pytest.approx(2 / 3)


def peaked(tokens: list[list[int]], vocabulary: int, odds: float) -> torch.Tensor:
    """Logits under which each place gives `odds` to its token and 1 to every other."""
    logits = torch.zeros(len(tokens), len(tokens[0]), vocabulary)
    return logits.scatter_(2, torch.tensor(tokens)[..., None], math.log(odds))


def test_token_scores_by_hand() -> None:
    # Place t predicts label t + 1: the last place predicts nothing, the first label is predicted by nothing.
    labels = torch.tensor([[7, 5, -100, 6]])
    scores = metrics.token_scores(peaked([[5, 5, 0, 6]], 8, odds=9.0), labels)
    assert scores.shape == (1, 4, 2)
    assert scores[0, 0].tolist() == scores[0, 2].tolist() == [0, 0]
    assert scores[0, 1].tolist() == pytest.approx([math.log(16 / 9), 1])
    assert scores[0, 3].tolist() == pytest.approx([math.log(16), 0])


def test_token_scores_do_not_depend_on_pieces_nor_on_virtual_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 9, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (3, 7))
    labels[1, 2:4] = -100
    whole = metrics.token_scores((logits, "cache"), labels)
    monkeypatch.setattr(metrics, "_PIECE", 22)
    torch.testing.assert_close(metrics.token_scores(logits, labels), whole)
    torch.testing.assert_close(metrics.token_scores(logits[:, 2:], labels), whole)
    # 16-bit logits are compared in 32 bits.
    assert metrics.token_scores(logits.bfloat16(), labels).dtype == torch.float32


def test_the_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    labels = np.array([[9, 1, 1, 1], [9, -100, -100, 1]])
    scores = np.zeros((2, 4, 2), dtype=np.float32)
    scores[0, 1:] = [[1.0, 1], [2.0, 0], [3.0, 1]]
    scores[1, 3] = [6.0, 0]
    scores[:, 0] = scores[1, 1] = 99  # not labelled, or not predicted
    figures = metrics.language(EvalPrediction(scores, labels))
    assert figures == pytest.approx({"loss": 3.0, "perplexity": math.e**3, "token_accuracy": 0.5})


def test_without_labelled_tokens_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match=r"No token of the held-out set carries a label.*raise data.max_length"):
        metrics.language(EvalPrediction(np.zeros((1, 3, 2)), np.array([[5, -100, -100]])))
