"""CLIP and SigLIP as methods, against PyTorch's embeddings and the rules written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from checkpoints import picture
from checkpoints_dual import DualReference, build_clip, build_siglip
from eval_made import grey_split, grey_task, no_model, read_features

from sav_jax import Example, UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods import METHODS, Settings
from sav_jax.eval.tasks import Data, Item, Split, Task, split_task

# Embeddings agree within 1e-5 (tests/models/test_dual_encoder.py); logits are twenty times their cosines.
COSINE, LOGIT = 1e-5, 1e-4


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DualReference]:
    build = {"clip": build_clip, "siglip": build_siglip}[request.param]
    return request.param, build(tmp_path_factory.mktemp(request.param))


def features_of(
    dual: tuple[str, DualReference], split: Split, task: Task | None = None, cache: str | None = None
) -> Features:
    settings = Settings(shots=2, num_heads=4, **{dual[0]: str(dual[1].directory)})  # type: ignore[arg-type]
    return read_features(no_model, split, task=task, settings=settings, cache=cache)


def paired_split() -> tuple[Task, Split]:
    """Two images, one that several examples share, and a question of its own for every example but two."""
    shared = picture(20, 20, seed=99)
    items = tuple(
        Item(
            Example(
                f"Is <image> like <image>, variant {i % 5}?",
                (picture(20 + i, 30, seed=i), shared),
                label="ab"[i % 2],
                id=str(i),
                source=f"pairs[{i}]",
            )
        )
        for i in range(12)
    )
    task = Task("pairs", "", lambda _: Data(items), class_prompt="letter {label}")
    return task, split_task(task, Data(items), 3, 0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def reference_vectors(reference: DualReference, items: tuple[Item, ...], questions: bool) -> np.ndarray:
    """Mean image directions, and questions behind them, from PyTorch."""
    rows = []
    for item in items:
        text = item.example.question.replace("<image> ", "")
        images, texts, _ = reference.run(item.example.load_images(), [text])
        image = unit(images.astype(np.float64).mean(axis=0))
        rows.append(np.concatenate([image, texts[0]]) if questions else image)
    return np.stack(rows)


def test_zero_shot_is_the_model_itself(dual: tuple[str, DualReference]) -> None:
    split = grey_split()
    outcome = METHODS[f"{dual[0]}-zero-shot"].run(features_of(dual, split))
    texts = [f"a photo of a {label}." for label in split.labels]
    images = [image for item in split.queries for image in item.example.load_images()]
    expected = dual[1].run(images, texts)[2]
    assert outcome.scores is not None
    np.testing.assert_allclose(outcome.scores, expected, rtol=0, atol=LOGIT)
    assert outcome.predictions == tuple(split.labels[column] for column in expected.argmax(axis=1))
    assert not METHODS[f"{dual[0]}-zero-shot"].uses_support


def test_zero_shot_of_several_images(dual: tuple[str, DualReference]) -> None:
    task, split = paired_split()
    outcome = METHODS[f"{dual[0]}-zero-shot"].run(features_of(dual, split, task))
    texts = dual[1].run([picture(5, 5)], ["letter a", "letter b"])[1]
    cosines = reference_vectors(dual[1], split.queries, questions=False) @ texts.T
    assert outcome.scores is not None
    bias = 0 if dual[0] == "clip" else -3
    np.testing.assert_allclose(outcome.scores, 20 * cosines + bias, rtol=0, atol=LOGIT)


def test_zero_shot_takes_the_likeliest_that_is_offered(dual: tuple[str, DualReference]) -> None:
    split = grey_split()
    queries = tuple(dataclasses.replace(item, offered=("middle", "bright")) for item in split.queries)
    outcome = METHODS[f"{dual[0]}-zero-shot"].run(features_of(dual, dataclasses.replace(split, queries=queries)))
    assert outcome.scores is not None
    columns = [split.labels.index("middle"), split.labels.index("bright")]
    best = outcome.scores[:, columns].argmax(axis=1)
    assert outcome.predictions == tuple(split.labels[columns[i]] for i in best)


@pytest.mark.parametrize("questions", [False, True])
def test_few_shot_is_the_nearest_mean(dual: tuple[str, DualReference], questions: bool) -> None:
    task, split = paired_split() if questions else (grey_task(), grey_split())
    outcome = METHODS[f"{dual[0]}-few-shot"].run(features_of(dual, split, task))
    support, queries = (reference_vectors(dual[1], items, questions) for items in (split.support, split.queries))
    of = np.array([split.labels.index(item.label) for item in split.support])

    def cosines(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        means = np.stack([support[rows & (of == column)].mean(axis=0) for column in range(len(split.labels))])
        return unit(vectors) @ unit(means).T

    everyone = np.ones(len(support), bool)
    expected = cosines(queries, everyone)
    left_out = np.stack([cosines(support[i], everyone & (np.arange(len(support)) != i)) for i in range(len(support))])
    assert outcome.scores is not None
    assert outcome.support_scores is not None
    # Scores are cosines divided by one temperature.
    scale = np.vdot(outcome.scores, expected) / np.vdot(expected, expected)
    assert scale > 1
    np.testing.assert_allclose(outcome.scores / scale, expected, rtol=0, atol=COSINE)
    np.testing.assert_allclose(outcome.support_scores / scale, left_out, rtol=0, atol=COSINE)
    assert outcome.predictions == tuple(split.labels[column] for column in expected.argmax(axis=1))


def test_every_image_and_text_is_embedded_once(dual: tuple[str, DualReference], tmp_path: Path) -> None:
    task, split = paired_split()
    outcomes, computed = [], []
    for cache in (str(tmp_path), str(tmp_path), None):
        features = features_of(dual, split, task, cache)
        runs = [METHODS[f"{dual[0]}-{kind}"].run(features) for kind in ("zero-shot", "few-shot", "few-shot")]
        outcomes.append(runs)
        computed.append(features.reader.embeddings(str(dual[1].directory)).computed)
    # 12 own images and the shared one; two class texts and five questions.
    assert computed == [13 + 7, 0, 13 + 7]
    for i in range(3):
        np.testing.assert_array_equal(outcomes[0][i].scores, outcomes[1][i].scores)


def test_a_killed_run_keeps_what_it_has(
    dual: tuple[str, DualReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sav_jax.eval import embeddings

    monkeypatch.setattr(embeddings, "_BATCH", 4)
    _, split = paired_split()
    examples = [item.example for item in (*split.support, *split.queries)]
    features = features_of(dual, split, cache=str(tmp_path))
    broken = dataclasses.replace(examples[-1], images=(tmp_path / "gone.png", examples[0].images[1]))
    first = features.reader.embeddings(str(dual[1].directory))
    monkeypatch.setattr(Example, "image_digests", lambda example: [str(id(image)) for image in example.images])
    with pytest.raises(UserError, match=r"gone.png does not exist"):
        first.images([*examples[:-1], broken])
    done = first.computed
    assert 4 <= done < 13
    second = features_of(dual, split, cache=str(tmp_path)).reader.embeddings(str(dual[1].directory))
    vectors = second.images(examples)
    assert second.computed == 13 - done
    assert [len(rows) for rows in vectors] == [2] * 12


def test_no_checkpoint() -> None:
    for name in ("clip-zero-shot", "clip-few-shot", "siglip-zero-shot", "siglip-few-shot"):
        family = name.partition("-")[0]
        assert METHODS[name].optional == f"needs --{family} PATH"
        with pytest.raises(UserError, match=rf"^methods {family}-zero-shot and .* need a checkpoint: --{family} PATH$"):
            METHODS[name].run(read_features(no_model, grey_split()))


def test_the_other_family_s_checkpoint(dual: tuple[str, DualReference]) -> None:
    family, reference = dual
    other = "siglip" if family == "clip" else "clip"
    features = features_of((other, reference), grey_split())
    with pytest.raises(UserError, match=rf"--{other} .*: the checkpoint is a {family} \(model_type"):
        METHODS[f"{other}-few-shot"].run(features)


@pytest.mark.parametrize("kind", ["zero-shot", "few-shot"])
def test_text_alone_has_no_image(dual: tuple[str, DualReference], kind: str) -> None:
    items = tuple(Item(Example(f"{i}{name}?", label=name, source=f"rows.jsonl:{i}")) for i in range(2) for name in "ab")
    task = Task("texts", "", lambda _: Data(items))
    method = f"{dual[0]}-{kind}"
    with pytest.raises(UserError, match=rf"^rows.jsonl:.: method {method} needs an image, and there is none$"):
        METHODS[method].run(features_of(dual, split_task(task, Data(items), 1, 0), task))
