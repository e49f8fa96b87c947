"""What a method is: it gets a split and the features that all methods share, and answers the queries.

Axes: S support examples, Q queries, C classes, L layers, N heads per layer, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sav_jax.classifier import SparseAttentionVectors
from sav_jax.task_vectors import Recipe

if TYPE_CHECKING:
    from sav_jax.eval.features import Features
    from sav_jax.eval.tasks.base import Split


@dataclass(frozen=True)
class Settings:
    """What a method is run with.

    Attributes:
      shots: labelled examples per class, or in all in a generative task.
      seed: of the draws and of random weights.
      num_heads: heads that vote.
      demonstrations: labelled examples in the prompt of in-context learning.
      max_new_tokens: longest answer that a model may write.
      batch_size: examples per forward pass.
      cache: path of the feature cache, or None.
      clip, siglip: checkpoints of the dual encoders, or None.
      aim: folder of AIM's projection, or None.
      mtv: how multimodal task vectors are made.
      lora_rank: of low-rank fine-tuning.
      lora_rates, lora_steps: peak learning rates and numbers of steps that are tried on the support.
    """

    shots: int = 20
    seed: int = 0
    num_heads: int = 20
    demonstrations: int = 4
    max_new_tokens: int = 32
    batch_size: int = 8
    cache: str | None = None
    clip: str | None = None
    siglip: str | None = None
    aim: str | None = None
    mtv: Recipe = field(default_factory=Recipe)
    lora_rank: int = 16
    lora_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lora_steps: tuple[int, ...] = (100,)


@dataclass(frozen=True)
class Outcome:
    """A method's answers.

    Attributes:
      predictions: a class name per query ("" for none), or in a generative task a text; None if the method only has an
        expected accuracy.
      scores: float [Q, C], any number that is larger for likelier classes; None if there is none. Probabilities are
        softmax(scores / T).
      support_scores: float [S, C], the same of each support example when it is left out of what it is compared with;
        T is fitted on them. None if the method cannot leave one out: T is 1 then.
      texts: what the model wrote about each query, of methods that let it write.
      accuracy: the expected accuracy, where there are no predictions.
      classifier: the selected heads, where there are some.
      facts: what else a reader of the results should know, such as the regularisation chosen; storable as JSON.
    """

    predictions: tuple[str, ...] | None
    scores: np.ndarray | None = None
    support_scores: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    accuracy: float | None = None
    classifier: SparseAttentionVectors | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to answer queries.

    Attributes:
      name: on the command line and in the results.
      description: one line, with its source.
      run: answers the queries.
      uses_support: whether it looks at the labelled examples.
      optional: why it may be impossible to run where others can ("needs --clip"), "" if it always runs.
      generates: whether it writes a text about each query, given the support, and returns
        ``sav_jax.eval.methods.asking.written(features, texts)``: such a method serves generative tasks, too.
    """

    name: str
    description: str
    run: Callable[[Features], Outcome]
    uses_support: bool = True
    optional: str = ""
    generates: bool = False


def named(split: Split, columns: np.ndarray) -> tuple[str, ...]:
    """Class names of columns, int [Q]; "" for -1."""
    return tuple(split.labels[column] if column >= 0 else "" for column in columns)
