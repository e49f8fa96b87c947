"""Multimodal task vectors (arXiv 2406.15334): which heads to replace by what they put out after demonstrations.

The values are means over prompts with demonstrations, read at the last token. Where they go is found by REINFORCE
(Williams 1992): one Bernoulli variable per head, its logit moved against the loss of the right answers. Heads are
changed where they are when the answer is written: at the last token of the prompt and at every token behind it. What
stands before is read once, so that every mask costs one token (and those of the answer) on its cache, where the
published code reads the whole prompt for each.

The loss has the end of the answer in it: a model that gives the right answer and does not stop is of no use to one who
reads what it writes.

Axes: L layers, N heads, H head width, M masks, B prompts, W tokens of the longest answer.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sav_jax._processes import gathered
from sav_jax.batching import BatchPlan, Bucket, assemble, round_rows, round_tokens
from sav_jax.examples import Example
from sav_jax.extract import plan_prompts
from sav_jax.generation import extend, option_table, prefill
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.sharding import data_size, own_rows, put_own_rows

_MASKS_AT_ONCE = 8  # caches that are in memory together
_SPREAD = 1e-3  # added to the standard deviation of losses

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """How a task vector is made. The published code's number is given where it is another.

    Attributes:
        prompts: prompts with demonstrations whose heads are averaged.
        steps: of the search (600, of one example each).
        examples: labelled examples per step; a mask's loss is the mean over them (1).
        masks: drawn per step and judged on the same examples.
        learning_rate: of Adam on the logits.
        initial: logit of every head at the start: -1 replaces 27 % of them.
        floor: probabilities stay between it and one minus it.
        draws: masks drawn at the end, of which the one with the lowest loss is kept.
        validation: labelled examples, at most, that the draws are judged on.
    """

    prompts: int = 100
    steps: int = 150
    examples: int = 4
    masks: int = 32
    learning_rate: float = 0.1
    initial: float = -1.0
    floor: float = 1e-3
    draws: int = 10
    validation: int = 50


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Attributes:
        mask: bool ``[L, N]``, the heads to replace.
        loss: mean negative log-likelihood of the right answers, stop included, on the validation examples with these
            heads replaced.
        loss_before: the same with none replaced.
        passes: prompts that were read, each for all masks of its step.
    """

    mask: np.ndarray
    loss: float
    loss_before: float
    passes: int


def find_heads(
    lmm: LMM,
    examples: Sequence[Example],
    answers: Sequence[str],
    targets: np.ndarray,
    values: np.ndarray,
    recipe: Recipe,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """Search the heads that, replaced, make the right answers likeliest, and that the model stops behind them.

    Args:
        lmm: the frozen model. Without ``stop_token_ids`` the loss is that of the answers alone.
        examples: S labelled examples, asked without demonstrations.
        answers: what the model has to answer for each class.
        targets: int [S], the class of each example.
        values: float32 ``[L, N, H]`` to put in place of what the heads put out.
        recipe: the search.
        seed: of all draws.
        progress: show a bar on stderr.

    Raises:
        UserError: an image cannot be read, or an answer is empty or given twice.
    """
    import optax

    rng = np.random.default_rng(seed)
    evaluate = _Evaluation(lmm, examples, answers, targets, values, recipe.examples)
    optimiser = optax.adam(recipe.learning_rate)
    logits = jnp.full(lmm.heads_shape[:2], recipe.initial, jnp.float32)
    state = optimiser.init(logits)

    def probabilities() -> np.ndarray:
        p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
        return np.clip(p, recipe.floor, 1 - recipe.floor)

    number = min(recipe.examples, len(examples))
    shown = [rng.choice(len(examples), number, replace=False) for _ in range(recipe.steps)]
    for batch in tqdm(
        evaluate.batches(shown),
        total=recipe.steps,
        desc="search",
        unit=" steps",
        file=sys.stderr,
        disable=not progress or jax.process_index() != 0,
        mininterval=0.5,
    ):
        p = probabilities()
        masks = rng.random((recipe.masks, *p.shape)) < p
        gradient = policy_gradient(evaluate(batch, masks).mean(axis=1), masks, p)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimiser.update(jnp.asarray(gradient, jnp.float32), state)
        logits = logits + updates

    draws = rng.random((recipe.draws, *lmm.heads_shape[:2])) < probabilities()
    candidates = np.concatenate([np.zeros_like(draws[:1]), draws])
    judged = np.sort(rng.permutation(len(examples))[: recipe.validation])
    parts = [judged[i : i + number] for i in range(0, len(judged), number)]
    losses = np.concatenate([evaluate(batch, candidates) for batch in evaluate.batches(parts)], axis=1).mean(axis=1)
    best = 1 + int(losses[1:].argmin())
    return Search(candidates[best], float(losses[best]), float(losses[0]), evaluate.passes)


def policy_gradient(losses: np.ndarray, masks: np.ndarray, p: np.ndarray) -> np.ndarray:
    """REINFORCE's estimate of the gradient of the expected loss by the logits.

    Losses are first brought to mean 0 and standard deviation 1 over the masks, which takes out how hard the examples
    are.

    Args:
        losses: float [M].
        masks: bool [M, L, N], drawn with ``p``.
        p: float [L, N].

    Returns:
        float [L, N]: the mean over masks of the loss times the derivative of log p(mask), which is mask - p.
    """
    spread = losses.std(ddof=1) if len(losses) > 1 else 0.0
    scaled = (losses - losses.mean()) / (spread + _SPREAD)
    return np.einsum("m,mln->ln", scaled, masks - p) / len(losses)


class _Evaluation:
    """Losses of masks on batches of one shape, so that two programs are compiled in all."""

    def __init__(
        self,
        lmm: LMM,
        examples: Sequence[Example],
        answers: Sequence[str],
        targets: np.ndarray,
        values: np.ndarray,
        size: int,
    ) -> None:
        self.lmm, self.examples, self.passes = lmm, examples, 0
        self.prompts = plan_prompts(lmm, examples)
        table, lengths = option_table(lmm, answers)
        self.answers, self.lengths = table[targets], lengths[targets]
        self.values = np.asarray(values, np.float32)
        # Each once, and none that the model has no logit for: some checkpoints name tokens of other vocabularies.
        self.stops = tuple(s for s in dict.fromkeys(lmm.stop_token_ids) if 0 <= s < lmm.config.text.vocab_size)
        multiple = data_size(lmm.mesh)
        self.size = -(-size // multiple) * multiple
        self.bucket = Bucket(
            round_tokens(max(len(prompt.token_ids) for prompt in self.prompts)),
            round_rows(max(prompt.num_rows for prompt in self.prompts)),
            max(prompt.visual_index.shape[1] for prompt in self.prompts),
        )

    def batches(self, parts: Iterable[np.ndarray]) -> Iterator[tuple[tuple[int, ...], Batch, np.ndarray]]:
        """Rows, and of those of them that this process's devices hold the prompts without the last token, and the last
        tokens; prepared by a thread while others run.
        """

        def prepare(part: np.ndarray) -> tuple[tuple[int, ...], Batch, np.ndarray]:
            rows = tuple(int(row) for row in part)
            own = self._own(rows)
            chosen = {row: self.examples[row] for row in own}
            pixels = {r: self.lmm.processor.pixels(one.load_images(), one.load_videos()) for r, one in chosen.items()}
            plan = BatchPlan(self.bucket, own, len(own))
            return rows, *without_last(assemble(plan, self.prompts, [pixels[row] for row in own]))

        return _ahead(prepare, parts)

    def __call__(self, batch: tuple[tuple[int, ...], Batch, np.ndarray], masks: np.ndarray) -> np.ndarray:
        """float64 [M, rows]."""
        rows, prompts, last = batch
        own = list(self._own(rows))
        arrays = put_own_rows((prompts, last, self.answers[own], self.lengths[own]), self.lmm.mesh)
        with self.lmm.running():
            losses = _loss_step(self.lmm.module, self.stops)(self.lmm.params, *arrays, self.values, masks)
        self.passes += len(rows)
        return gathered(losses).astype(np.float64)[:, : len(rows)]

    def _own(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Those that this process's devices hold, of the rows filled up with copies of the first."""
        return (*rows, *[rows[0]] * (self.size - len(rows)))[own_rows(self.lmm.mesh, self.size)]


def without_last(batch: Batch) -> tuple[Batch, np.ndarray]:
    """Prompts ``[B, T]`` less their last tokens, and these, int32 ``[B]``."""
    rows, places = np.arange(len(batch.lengths)), np.asarray(batch.lengths) - 1
    positions = batch.positions
    if positions is not None:
        positions = np.array(positions)
        positions[rows, places] = 0  # padding, which the next position must not count
    shorter = replace(
        batch,
        lengths=places.astype(np.int32),
        read_positions=np.asarray(batch.read_positions) - 1,
        positions=positions,
    )
    return shorter, np.asarray(batch.token_ids)[rows, places]


@functools.lru_cache(maxsize=8)
def _loss_step(module: MultimodalModel, stops: tuple[int, ...]) -> Callable[..., jax.Array]:
    """``(params, prompts, last [B], answers [B, W], lengths [B], values [L, N, H], masks [M, L, N]) -> [M, B]``.

    The loss is minus log p(answer) - log p(one of ``stops`` | answer), without the second term if there are none. The
    model is the one that :func:`sav_jax.reading.read` generates with: heads are changed at the last token of the prompt
    and at every token of the answer, the last included, behind which it stops or goes on.
    """

    @jax.jit
    def step(
        params: Any,
        prompts: Batch,
        last: jax.Array,
        answers: jax.Array,
        lengths: jax.Array,
        values: jax.Array,
        masks: jax.Array,
    ) -> jax.Array:
        width = answers.shape[1]
        # The last token of an answer is read only for what it says of the next.
        tokens = jnp.concatenate([last[:, None], answers if stops else answers[:, :-1]], axis=1)
        number = tokens.shape[1]
        prefix = prefill(module, params, prompts, number)

        def loss(mask: jax.Array) -> jax.Array:
            edit = HeadEdit.replacing(values, mask)
            logits, _ = extend(module, params, prefix, tokens, jnp.full(len(last), number, jnp.int32), edit)
            log_p = jax.nn.log_softmax(logits, axis=-1)
            of_answer = jnp.take_along_axis(log_p[:, :width], answers[:, :, None], axis=2)[:, :, 0]
            real = jnp.arange(width)[None, :] < lengths[:, None]
            total = jnp.sum(jnp.where(real, of_answer, 0.0), axis=1)
            if stops:
                # Token 0 is the prompt's last, so that an answer's last is at its length.
                behind = jnp.take_along_axis(log_p, lengths[:, None, None], axis=1)[:, 0]
                total = total + jax.nn.logsumexp(behind[:, jnp.array(stops)], axis=-1)
            return -total

        return jax.lax.map(loss, masks, batch_size=_MASKS_AT_ONCE)

    return step


def _ahead(make: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """``map``, two items ahead, in a thread."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
