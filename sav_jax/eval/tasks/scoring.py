"""Metrics of free answers: each has one unit per query, in the order of the queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sav_jax.eval.cider import cider_d, document_frequencies
from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks.base import Item
from sav_jax.eval.tasks.vqa import normalise_vqa, vizwiz_accuracy, vqa_accuracy


def per_answer(name: str, description: str, score: Callable[[str, Item], float]) -> Metric:
    """A metric that is the mean of what single answers score.

    Args:
      name, description: of the metric.
      score: of an answer to an item.
    """

    def compute(answers: Answers) -> Units:
        pairs = zip(answers.predictions, answers.items, strict=True)
        return Units(np.array([score(text, item) for text, item in pairs], np.float64), answers.clusters)

    return Metric(name, description, compute)


def _cider(answers: Answers) -> Units:
    frequencies = document_frequencies(answers.corpus or tuple(item.references for item in answers.items))
    pairs = zip(answers.predictions, answers.items, strict=True)
    values = [cider_d(text, item.references, frequencies) for text, item in pairs]
    return Units(np.array(values, np.float64), answers.clusters)


CIDER = Metric(
    "cider",
    "CIDEr-D (Vedantam et al., CVPR 2015): agreement with the references in rare n-grams, n = 1 to 4, sigma 6, from 0 "
    "to 10 (papers print 100 times that); document frequencies are of the references of all queries, asked or not",
    _cider,
)
EXACT_MATCH = per_answer(
    "exact_match",
    "share of the answers that equal a reference, both normalised as VQA does (case, articles, punctuation, numbers)",
    lambda text, item: float(normalise_vqa(text) in {normalise_vqa(reference) for reference in item.references}),
)
VQA_ACCURACY = per_answer(
    "vqa_acc",
    "VQA accuracy (Antol et al., ICCV 2015): min(n / 3, 1) with n of nine people agreeing, mean over leaving out each "
    "of ten; all answers normalised",
    lambda text, item: vqa_accuracy(text, item.references),
)
VIZWIZ_ACCURACY = per_answer(
    "vqa_acc",
    "VizWiz' accuracy: VQA's, min(n / 3, 1) with n of nine people agreeing, mean over leaving out each of ten, where "
    "the written answer is normalised and people's are taken as published",
    lambda text, item: vizwiz_accuracy(text, item.references),
)


def commonest(answers: Sequence[str]) -> str:
    """What most people answered, of equally common ones the first: the answer that a demonstration shows."""
    return Counter(answers).most_common(1)[0][0]
