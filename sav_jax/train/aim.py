"""Training of AIM's projection (arXiv 2406.07588): the frozen model reads demonstrations, the projection learns to make
virtual tokens of them, by the likelihood of what the frozen model says next.

A document is some pairs of images and text. Each step takes the first n of every document's pairs as demonstrations and
asks for the text of the next; n is drawn for the step. The loss is the mean cross-entropy of that text's tokens (and of
the end of the answer); its gradient passes through the frozen model and ends in the projection.

Axes: B documents, K demonstrations of each, T tokens, M virtual tokens of one prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from sav_jax._processes import by_the_first
from sav_jax._storage import BucketPath
from sav_jax.aim import Aim, Layout, after_demonstrations, encoded, fused, plan_demonstration
from sav_jax.batching import BatchPlan, Bucket, assemble, round_rows, round_tokens
from sav_jax.errors import UserError
from sav_jax.examples import VIRTUAL_MARK, Example, VirtualTokens
from sav_jax.lmm import LMM
from sav_jax.models.batch import Array, Batch
from sav_jax.models.fusion import FusionConfig, check_initial, initial_params
from sav_jax.models.multimodal import MultimodalModel, rematerialized
from sav_jax.models.processor import Prompt, virtual_places
from sav_jax.sharding import own_rows
from sav_jax.train import loop
from sav_jax.train.chats import ChatFormat, Lesson, chat_format
from sav_jax.train.data import LessonBatch, Sizes, padding_of, plan_steps, round_targets, supervised, with_image
from sav_jax.train.optimizer import Group, Optimization, check, trainable_groups
from sav_jax.train.supervised import next_token_loss

Document = tuple[Example, ...]
"""Pairs of images (in ``images``) and text (the ``label``, answering ``question``), at least two."""

_DEFAULT = Optimization(batch_size=64, remat="full")
_SHOTS = 11  # distinguishes the draws of numbers of demonstrations from those of the order


@dataclass(frozen=True)
class AimRecipe:
    """How a projection is trained. The paper's published text gives neither data, loss nor numbers; see docs/aim.md.

    Attributes:
        tokens, layer, separator: see :class:`sav_jax.aim.Layout`.
        projection: "linear" or "mlp", see :class:`sav_jax.models.fusion.FusionConfig`.
        norm: a layer norm behind it.
        initial: "identity" or "random".
        shots: numbers of demonstrations; one is drawn for each step. A document that is too short gives all it has.
        pairs: of a document that is made of single rows.
        learning_rate, weight_decay: of the projection.
        epochs: passes over the documents; ``steps``, if not 0, counts instead.
        optimization: everything else.
    """

    tokens: str = "text"
    layer: int = 0
    separator: str = "\n"
    projection: str = "linear"
    norm: bool = True
    initial: str = "identity"
    shots: tuple[int, ...] = (1, 2, 4, 8)
    pairs: int = 9
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    epochs: float = 1.0
    steps: int = 0
    optimization: Optimization = _DEFAULT

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1:
            raise UserError("shots must name numbers of demonstrations of at least 1")
        if self.pairs < 2:
            raise UserError(f"pairs must be at least 2, not {self.pairs}: demonstrations and a query")
        check(self, ("learning_rate", "epochs"), "above 0", lambda x: x > 0)
        check(self, ("layer", "weight_decay", "steps"), "at least 0", lambda x: x >= 0)
        check_initial(FusionConfig(1, self.projection, self.norm), self.initial)
        _ = self.layout("")

    def layout(self, answer_lead: str) -> Layout:
        """How demonstrations are read, with what the model writes before an answer's own text."""
        return Layout(self.tokens, self.layer, self.separator, answer_lead)

    def resolved(self, documents: int) -> AimRecipe:
        """With the number of steps that the epochs over so many documents come to."""
        steps = self.steps or math.ceil(self.epochs * documents / self.optimization.batch_size)
        return replace(self, steps=steps, optimization=replace(self.optimization, steps=max(steps, 1)))

    def facts(self) -> dict[str, Any]:
        """For the run's file: everything but how often it is written and looked at."""
        facts = dataclasses.asdict(self)
        for name in ("checkpoint_every", "keep", "log_every"):
            del facts["optimization"][name]
        return facts


AIM_PRESETS: Mapping[str, AimRecipe] = {
    "default": AimRecipe(),
    "tiny": AimRecipe(
        layer=8,
        learning_rate=5e-3,
        steps=900,
        optimization=Optimization(batch_size=8, warmup=0.05, checkpoint_every=200, log_every=20),
    ),
    "debug": AimRecipe(
        shots=(1, 2),
        pairs=3,
        learning_rate=1e-2,
        steps=6,
        optimization=Optimization(steps=6, batch_size=8, checkpoint_every=2, log_every=1, warmup=0.0),
    ),
}
"""``default``: with the learning rate of the same group's SelfCP (arXiv 2405.17052). ``tiny``: for the bundled model.
``debug``: six steps."""


@struct.dataclass
class AimBatch:
    """One step's input.

    Attributes:
        demonstrations: a :class:`Batch` whose arrays have axes ``[B, K, ...]``.
        places: int32 ``[B, M]``, which of a row's ``K * T`` tokens become virtual tokens; 0 at padding.
        lesson: prompts and targets; their virtual tokens are still to be made.
    """

    demonstrations: Batch
    places: Array
    lesson: LessonBatch


@functools.lru_cache(maxsize=8)
def aim_loss(module: MultimodalModel, fusion: FusionConfig, layer: int, remat: str) -> loop.Loss:
    """The loss of documents; what trains are the projection's arrays, by path."""
    reader = module if remat == "none" else rematerialized(module, remat)

    def loss(
        trainable: Mapping[str, jax.Array], frozen: Mapping[str, Any], data: AimBatch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        demonstrations = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data.demonstrations)
        per_row = demonstrations.token_ids.shape[0] // data.places.shape[0]
        places = jnp.asarray(data.places)
        # No gradient: what the model reads does not depend on the projection.
        virtual = fused(module, frozen, fusion, trainable, layer, demonstrations, places, per_row)
        batch = replace(data.lesson.batch, virtual_tokens=virtual)
        return next_token_loss(reader, {"params": frozen}, replace(data.lesson, batch=batch), None)

    return loss


def query_lesson(lmm: LMM, query: Example, lengths: Sequence[int], form: ChatFormat, layout: Layout) -> Lesson:
    """The prompt of a document's last pair after its demonstrations, and its text as targets.

    Args:
        lmm: the frozen model.
        query: the pair; its label is what is learned.
        lengths: virtual tokens of each demonstration.
        form: how the chat template ends an answer.
        layout: what separates demonstrations.

    Raises:
        UserError: the prompt is longer than the model reads.
    """
    processor = lmm.processor
    asked = after_demonstrations(query, [VirtualTokens(np.zeros((n, 0), np.float32), "") for n in lengths], layout)
    text = processor.text(asked.question, len(query.images)).replace(VIRTUAL_MARK, processor.image_token)
    start = len(text)
    text += f"{form.answer_lead}{query.label}{form.assistant_end}"
    ids, offsets = encoded(processor, text)
    prompt = processor.expand(ids, query.image_sizes(), virtual=virtual_places(asked.question, lengths))
    if lmm.max_tokens is not None and len(prompt.token_ids) > lmm.max_tokens:
        raise UserError(f"{asked.source}: {len(prompt.token_ids)} tokens; {lmm.name} reads at most {lmm.max_tokens}")
    learned = np.array([start < b and b > a for a, b in offsets])
    targets = np.full(len(prompt.token_ids), -1, np.int32)
    written = prompt.visual_index[:, 0] < 0
    if prompt.virtual_index is not None:
        written &= prompt.virtual_index < 0
    targets[written] = np.where(learned, ids, -1)[~processor.is_media(ids)]
    return Lesson(prompt, targets)


@dataclass(frozen=True)
class AimPlan:
    """Rows of one step (document and epoch) and the static shapes of its arrays.

    Attributes:
        bucket: of the prompts.
        reading: of the demonstrations.
        shots: K.
        virtual: M.
        targets: of a prompt.
        tokens: of all demonstrations and prompts, without padding.
    """

    bucket: Bucket
    reading: Bucket
    shots: int
    targets: int
    tokens: int
    rows: tuple[tuple[int, int], ...]


class AimData:
    """Documents as batches.

    Attributes:
        plans: one for each step of the run.
    """

    def __init__(self, lmm: LMM, documents: Sequence[Document], recipe: AimRecipe, form: ChatFormat) -> None:
        """Plan a run.

        Args:
            lmm: the frozen model.
            documents: what it learns from.
            recipe: with its number of steps.
            form: of the model's chat template.

        Raises:
            UserError: there are no documents, one has a single pair, or a row is bad.
        """
        if not documents:
            raise UserError("there is nothing to train on")
        short = next((document for document in documents if len(document) < 2), None)
        if short is not None:
            source = short[0].source if short else "a document"
            raise UserError(f"{source}: a document needs at least two pairs of images and text")
        self.lmm, self.documents, self.form = lmm, documents, form
        self.layout = recipe.layout(form.answer_lead)
        self._planned = functools.lru_cache(maxsize=1 << 16)(self._plan)
        settings = recipe.optimization
        most, longest = max(recipe.shots), max(map(len, documents))
        if most >= longest:
            raise UserError(
                f"{most} demonstrations are asked for (--shots); no document has more than {longest - 1} before a query"
            )
        sizes = [self._size(row, most) for row in range(len(documents))]
        self.plans = []
        for step, plan in enumerate(plan_steps(sizes, settings.batch_size, settings.steps, settings.seed)):
            rng = np.random.default_rng([settings.seed, step, _SHOTS])
            self.plans.append(self._step(plan.rows, recipe.shots[int(rng.integers(len(recipe.shots)))]))

    def __len__(self) -> int:
        return len(self.plans)

    def names(self, step: int) -> str:
        """The documents of a step, for error messages."""
        return "; ".join(self.documents[row][0].source or str(row) for row, _ in self.plans[step].rows)

    def tokens(self, step: int) -> tuple[int, int]:
        """Of demonstrations and prompts."""
        plan = self.plans[step]
        return plan.tokens, len(plan.rows) * (plan.shots * plan.reading.tokens + plan.bucket.tokens)

    def _plan(self, row: int, pair: int) -> tuple[Prompt, np.ndarray]:
        return plan_demonstration(self.lmm.processor, self.documents[row][pair], self.layout)

    def _lesson(self, row: int, shots: int) -> Lesson:
        """The pair behind the first ``shots``, or the last."""
        shots = min(shots, len(self.documents[row]) - 1)
        lengths = [len(self._planned(row, pair)[1]) for pair in range(shots)]
        return query_lesson(self.lmm, self.documents[row][shots], lengths, self.form, self.layout)

    def _size(self, row: int, shots: int) -> Sizes:
        prompt = self._lesson(row, shots).prompt
        return Sizes(len(prompt.token_ids), prompt.num_rows, prompt.visual_index.shape[1], 1)

    def _step(self, rows: Sequence[tuple[int, int]], shots: int) -> AimPlan:
        shots = min(shots, max(len(self.documents[row]) for row, _ in rows) - 1)
        lessons = [self._lesson(row, shots) for row, _ in rows]
        read = [
            self._planned(row, pair)[0] for row, _ in rows for pair in range(min(shots, len(self.documents[row]) - 1))
        ]
        most = max(lesson.prompt.num_virtual for lesson in lessons)
        return AimPlan(
            _bucket([lesson.prompt for lesson in lessons], round_tokens(most)),
            _bucket(read, 0),
            shots,
            round_targets(max(int((lesson.targets >= 0).sum()) for lesson in lessons)),
            sum(len(prompt.token_ids) for prompt in (*read, *(lesson.prompt for lesson in lessons))),
            tuple(rows),
        )

    def __getitem__(self, step: int) -> AimBatch:
        """This process's rows of a step, as host arrays."""
        plan = self.plans[step]
        rows = [row for row, _ in plan.rows[own_rows(self.lmm.mesh, len(plan.rows))]]
        lessons, queries, shown = [], [], []
        prompts: list[Prompt] = []
        places = np.zeros((len(rows), plan.bucket.virtual), np.int32)
        for i, row in enumerate(rows):
            number = min(plan.shots, len(self.documents[row]) - 1)
            lessons.append(self._lesson(row, plan.shots))
            queries.append(self.documents[row][number])
            taken: list[int] = []
            for k in range(plan.shots):
                pair = k if k < number else 0  # what a short document lacks is read and not looked at
                prompt, where = self._planned(row, pair)
                prompts.append(prompt)
                shown.append(self.documents[row][pair])
                taken += (where + k * plan.reading.tokens).tolist() if k < number else []
            places[i, : len(taken)] = taken
        pixels = self.lmm.processor.pixels
        every = [(row, pair) for row, _ in plan.rows for pair in range(min(plan.shots, len(self.documents[row]) - 1))]
        demonstrations = (self._planned(row, pair)[0] for row, pair in every)
        asking = (self._lesson(row, plan.shots).prompt for row, _ in plan.rows)
        read = assemble(
            BatchPlan(plan.reading, tuple(range(len(prompts))), len(prompts)),
            with_image(prompts, plan.reading, demonstrations),
            [pixels(example.load_images()) for example in shown],
        )
        asked = assemble(
            BatchPlan(plan.bucket, tuple(range(len(rows))), len(rows)),
            with_image([lesson.prompt for lesson in lessons], plan.bucket, asking),
            [pixels(example.load_images()) for example in queries],
        )
        return AimBatch(
            jax.tree.map(lambda x: x.reshape(len(rows), plan.shots, *x.shape[1:]), read),
            places,
            supervised(asked, [lesson.targets for lesson in lessons], plan.targets),
        )


def _bucket(prompts: Sequence[Prompt], virtual: int) -> Bucket:
    return Bucket(
        round_tokens(max(len(prompt.token_ids) for prompt in prompts)),
        round_rows(max(prompt.num_rows for prompt in prompts)),
        max(prompt.visual_index.shape[1] for prompt in prompts),
        virtual,
    )


def digest(documents: Sequence[Document]) -> str:
    """sha256 of what the documents say and show (of files: their paths), in hexadecimal."""
    whole = hashlib.sha256()
    for document in documents:
        for pair in document:
            paths = [str(image) for image in pair.images if isinstance(image, Path | BucketPath)]
            shown = paths if len(paths) == len(pair.images) else pair.image_digests()
            whole.update(repr((pair.question, pair.label, shown)).encode())
        whole.update(b"|")
    return whole.hexdigest()


def train_aim(lmm: LMM, documents: Sequence[Document], recipe: AimRecipe, output: Path, progress: bool = True) -> Aim:
    """Train a projection; a run that was killed goes on.

    Args:
        lmm: the frozen model.
        documents: what it learns from.
        recipe: how.
        output: folder of the run (log, checkpoints); the result is written to its folder ``projection``.
        progress: show a bar on stderr.

    Returns:
        The projection.

    Raises:
        UserError: bad rows, a recipe that does not fit the model, or a folder of another run.
    """
    recipe = recipe.resolved(len(documents))
    settings = recipe.optimization
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    layout = recipe.layout(form.answer_lead)
    if layout.layer > lmm.num_layers:
        raise UserError(f"layer is {layout.layer}; {lmm.name} has {lmm.num_layers}")
    config = FusionConfig(lmm.config.text.hidden_size, recipe.projection, recipe.norm)
    embeddings = lmm.params["language_model"]["embed_tokens"]
    length = float(jnp.sqrt(jnp.mean(jnp.square(embeddings.astype(jnp.float32)))))
    initial = initial_params(config, settings.seed, recipe.initial, length)
    facts = {"recipe": recipe.facts(), "model": lmm.fingerprint, "dtype": str(lmm.dtype), "data": digest(documents)}
    mesh = lmm.mesh
    problem = loop.Problem(
        loss=aim_loss(lmm.module, config, layout.layer, settings.remat),
        initial=initial,
        groups=trainable_groups(initial, [Group(".*", recipe.learning_rate, recipe.weight_decay)]),
        frozen=lmm.params,
        mesh=mesh,
        shardings=None if mesh is None else dict.fromkeys(initial, NamedSharding(mesh, PartitionSpec())),
        facts=facts,
    )
    loop.check(problem, settings, output)
    data = AimData(lmm, documents, recipe, form)
    if progress and jax.process_index() == 0:
        number = sum(value.size for value in initial.values())
        print(
            f"{len(documents)} documents; {settings.steps} steps of {settings.batch_size}, padding "
            f"{padding_of(data):.1%} of the tokens; {number:,} parameters train",
            file=sys.stderr,
        )
    trained = jax.device_get(loop.train(problem, data, settings, output, progress))
    aim = Aim(layout, config, {path: np.asarray(value) for path, value in trained.items()}, lmm.fingerprint, lmm.name)
    by_the_first(lambda: aim.save(output / "projection"))
    return aim
