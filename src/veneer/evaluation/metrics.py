"""Figures of merit, in the form that transformers' `Trainer` asks for and as plain functions.

Losses are means over what carries a label (examples, tokens), never means over batches: batches of unequal size would
weigh their members unequally. For language models the logits are reduced to two numbers a token before they are
collected, so a whole set's logits (tokens x vocabulary) are never held.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from veneer.data.batches import IGNORED
from veneer.errors import DataError
from veneer.options import Task

# Logits are turned into losses in pieces of about this many numbers (64 MB in float32).
_PIECE = 1 << 24


@dataclass(frozen=True)
class ClassificationReport:
    """How predictions agree with labels.

    Args:
        accuracy: Share of examples that are right.
        macro_f1: Mean F1 over the classes that occur among the labels or the predictions.
        precision: For each class, the share of its predictions that are right; 0 where it is never predicted.
        recall: For each class, the share of its examples that are found; 0 where it has none.
        f1: For each class, the harmonic mean of the two.
        support: For each class, the number of its examples.
        confusion: `confusion[i][j]` counts examples of class i that were taken for class j.
    """

    accuracy: float
    macro_f1: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    support: list[int]
    confusion: list[list[int]]


def classification_report(labels: NDArray[Any], predictions: NDArray[Any], classes: int) -> ClassificationReport:
    """Compares predicted with true classes.

        >>> classification_report(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).confusion
        [[1, 1], [0, 1]]

    Args:
        labels: True classes (n,).
        predictions: Predicted classes (n,).
        classes: Number of classes.

    Raises:
        DataError: There are no examples.
    """
    if len(labels) == 0:
        raise DataError("There is no example to evaluate: the held-out set is empty. Give it at least one example.")
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels.astype(np.int64), predictions.astype(np.int64)), 1)
    right = np.diag(confusion).astype(np.float64)
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(predicted + support, 1)
    occurring = (predicted + support) > 0
    return ClassificationReport(
        accuracy=float(right.sum() / confusion.sum()),
        macro_f1=float(f1[occurring].mean()),
        precision=precision.tolist(),
        recall=recall.tolist(),
        f1=f1.tolist(),
        support=support.tolist(),
        confusion=confusion.tolist(),
    )


def majority(labels: NDArray[Any]) -> float:
    """The accuracy of always naming the most frequent class.

    >>> majority(np.array([1, 1, 0, 1]))
    0.75
    """
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def classification(prediction: Any) -> dict[str, float]:
    """`compute_metrics` for classification: loss, accuracy and macro F1.

    Args:
        prediction: An `EvalPrediction` with logits (n, classes) and labels (n,).
    """
    logits, labels = first(prediction.predictions), first(prediction.label_ids)
    report = classification_report(labels, logits.argmax(axis=-1), logits.shape[-1])
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1, keepdims=True)
    normaliser = peak[:, 0] + np.log(np.exp(wide - peak).sum(axis=-1))
    loss = normaliser - wide[np.arange(len(labels)), labels.astype(np.int64)]
    return {"loss": float(loss.mean()), "accuracy": report.accuracy, "macro_f1": report.macro_f1}


def token_scores(logits: Any, labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` for language models: each label's loss and whether it was the best guess.

    Args:
        logits: Logits (batch, length, vocabulary), or a tuple that begins with them.
        labels: Labels (batch, length); those that carry no loss are -100.

    Returns:
        (batch, length, 2) in float32, in the order of the labels; zero where there is no label. The first label of
        a row has no token before it to be predicted from, so it never counts.
    """
    logits = first(logits)
    # Virtual tokens, which some methods put before the real ones, have logits but no labels.
    logits = logits[:, -labels.shape[1] :]
    scores = logits.new_zeros((*labels.shape, 2), dtype=torch.float32)
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    piece = max(1, _PIECE // logits.shape[-1])
    for row, column in zip(rows.split(piece), columns.split(piece), strict=True):
        guesses = logits[row, column].float()  # (piece, vocabulary)
        wanted = labels[row, column + 1].to(guesses.device)
        scores[row, column + 1, 0] = F.cross_entropy(guesses, wanted, reduction="none")
        scores[row, column + 1, 1] = (guesses.argmax(dim=-1) == wanted).float()
    return scores


def language(prediction: Any) -> dict[str, float]:
    """`compute_metrics` for language models: loss and accuracy over all labelled tokens, and perplexity.

    Args:
        prediction: An `EvalPrediction` with `token_scores` and labels (n, length).

    Raises:
        DataError: No token carries a label.
    """
    scores, labels = first(prediction.predictions), first(prediction.label_ids)
    labelled = labels != IGNORED
    labelled[:, 0] = False
    if not labelled.any():
        raise DataError(
            "No token of the held-out set carries a label, so there is nothing to evaluate. Its completions may have "
            "been cut off: raise data.max_length, or train on all tokens (data.train_on: all)."
        )
    loss, right = scores[labelled].astype(np.float64).mean(axis=0)
    return {"loss": float(loss), "perplexity": perplexity(float(loss)), "token_accuracy": float(right)}


def functions(task: Task) -> dict[str, Any]:
    """The arguments of a `Trainer` that have it compute a task's figures."""
    if task == "classification":
        return {"compute_metrics": classification}
    return {"compute_metrics": language, "preprocess_logits_for_metrics": token_scores}


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is beyond the range of numbers.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def first(output: Any) -> Any:
    """The logits of a model's output, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, tuple | list) else output
