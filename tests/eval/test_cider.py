"""CIDEr-D against cases worked out by hand, the authors' code, and the definition written down another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sav_jax.eval.cider import cider_d, document_frequencies, words
from sav_jax.eval.metrics import Answers, Units
from sav_jax.eval.tasks import Item
from sav_jax.eval.tasks.scoring import CIDER
from sav_jax.examples import Example

# Sums and products of some hundred numbers of order one in another order.
ROUNDING = 1e-12


@pytest.mark.parametrize(
    ("text", "expected"),
    # As pycocoevalcap 1.2 cuts them, with Stanford's tokenizer 3.4.1.
    [
        ("A man in a blue shirt is standing.", "a man in a blue shirt is standing"),
        ("The man's dog doesn't like boys' balls; it's red.", "the man 's dog does n't like boys balls it 's red"),
        ("A black-and-white dog (a collie) can't stop!", "a black-and-white dog -lrb- a collie -rrb- ca n't stop"),
        ('She\'s wearing a t-shirt that says "I\'m #1" in the U.S.',
         "she 's wearing a t-shirt that says i 'm # 1 in the u.s."),
        ("3.5 kg of apples & 10,000 pears for $5 at 9:30 a.m.", "3.5 kg of apples & 10,000 pears for $ 5 at 9:30 a.m."),
        ("A boy cannot reach; he's gonna fall. Won't he?", "a boy can not reach he 's gon na fall wo n't he"),
        ("Mr. Smith lives on St. James street", "mr. smith lives on st. james street"),
        ("A girl -- about 5-years-old -- plays...", "a girl about 5-years-old plays"),
        ("A black/white photo of a 50% off sale sign", "a black/white photo of a 50 % off sale sign"),
        ("they'd we've you'll I'd he'll", "they 'd we 've you 'll i 'd he 'll"),
        ("the 2nd floor at O'Hare", "the 2nd floor at o'hare"),
        ("the teens\u2019 jackets don\u2019t match", "the teens jackets do n't match"),
        ("", ""),
    ],
)  # fmt: skip
def test_words(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


# Two items that share no word: every n-gram is in one of two, and weighs log 2, which cancels in a cosine.
APART = document_frequencies((("a b",), ("c d",)))


@pytest.mark.parametrize(
    ("caption", "references", "score"),
    [
        ("a b", ["a b"], 10 / 4 * 2),  # n = 1 and 2 agree wholly; there are no three words
        ("A b.", ["a b"], 10 / 4 * 2),
        ("c d", ["a b"], 0),
        ("", ["a b"], 0),
        # One of two words, and a word too few.
        ("a", ["a b"], 10 / 4 * math.exp(-1 / 72) / math.sqrt(2)),
        # "a a" counts one a at most: log2^2 / (2 log2 * sqrt(2) log2); its pair is not in the reference.
        ("a a", ["a b"], 10 / 4 / (2 * math.sqrt(2))),
        # The mean over the references.
        ("a b", ["a b", "c d"], 10 / 4 * 2 / 2),
        ("a b", ["a b", "a"], 10 / 4 * (2 + math.exp(-1 / 72) / math.sqrt(2)) / 2),
        # Words of no reference are as rare as those of one item: log 2, too.
        ("a x", ["a b"], 10 / 4 / 2),
    ],
)
def test_cases_worked_out_by_hand(caption: str, references: list[str], score: float) -> None:
    assert cider_d(caption, references, APART) == pytest.approx(score, rel=ROUNDING)


def test_what_all_items_have_weighs_nothing() -> None:
    frequencies = document_frequencies((("a red b",), ("a blue c", "blue")))
    assert frequencies.counts["a",] == 2
    assert frequencies.counts["blue",] == 1, "an item counts once, however many of its references have it"
    assert frequencies.weight(("a",)) == 0
    assert cider_d("a", ["a red b"], frequencies) == 0


def test_a_copy_of_the_only_reference_scores_ten() -> None:
    text = "one two three four five"
    assert cider_d(text, [text], document_frequencies(((text,), ("six",)))) == pytest.approx(10, rel=ROUNDING)


CORPUS = (
    ("a man rides a horse", "a man is riding a brown horse on the beach", "a person on a horse"),
    ("two dogs play with a red ball", "dogs playing in the grass", "two brown dogs and a ball"),
    ("a red bus on the street", "a bus drives down a street in the city", "the red bus stops"),
)
CAPTIONS = ("a man riding a horse on the beach", "two dogs play with a red ball", "a bus")
RELEASED = (2.664447500087401, 4.064660393566558, 1.3261340640849841)  # by pycocoevalcap 1.2


def test_the_authors_code() -> None:
    frequencies = document_frequencies(CORPUS)
    found = [cider_d(caption, references, frequencies) for caption, references in zip(CAPTIONS, CORPUS, strict=True)]
    np.testing.assert_allclose(found, RELEASED, rtol=ROUNDING)


sentences = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=0, max_size=7).map(" ".join)


@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_the_definition_in_numpy(items: list[tuple[str, list[str]]]) -> None:
    """Dense vectors over all n-grams that occur, order by order."""
    corpus = tuple(tuple(references) for _, references in items)
    frequencies = document_frequencies(corpus)
    for caption, references in items:
        total = 0.0
        for n in (1, 2, 3, 4):

            def grams(text: str, n: int = n) -> list[str]:
                split = text.split()
                return [" ".join(split[i : i + n]) for i in range(len(split) - n + 1)]

            everything = [caption, *(text for of in corpus for text in of)]
            vocabulary = sorted({gram for text in everything for gram in grams(text)})
            if not vocabulary:
                continue
            present = np.array([[any(gram in grams(text) for text in of) for gram in vocabulary] for of in corpus])
            idf = np.log(len(corpus)) - np.log(np.maximum(present.sum(0), 1))
            vector = {text: np.array([grams(text).count(g) for g in vocabulary]) * idf for text in everything}
            for reference in references:
                c, s = vector[caption], vector[reference]
                norm = np.linalg.norm(c) * np.linalg.norm(s)
                gap = len(caption.split()) - len(reference.split())
                cosine = np.minimum(c, s) @ s / norm if norm else 0
                total += 10 / 4 / len(references) * np.exp(-(gap**2) / 72) * cosine
        assert cider_d(caption, references, frequencies) == pytest.approx(total, rel=1e-9, abs=ROUNDING)


def test_resampling_leaves_document_frequencies_alone() -> None:
    items = tuple(Item(Example(f"{i}?", label=of[0]), references=of) for i, of in enumerate(CORPUS))
    whole = Answers(items, (), CAPTIONS)
    found = CIDER.compute(whole)
    assert isinstance(found, Units)
    np.testing.assert_allclose(found.values, RELEASED, rtol=ROUNDING)
    assert found.clusters == ("", "", "")
    # Of a part of the queries, and of some that are drawn twice, each scores the same if the corpus is told.
    part = Answers(items, (), CAPTIONS, corpus=CORPUS).take(np.array([2, 0, 2]))
    again = CIDER.compute(part)
    assert isinstance(again, Units)
    np.testing.assert_array_equal(again.values, found.values[[2, 0, 2]])
    alone = CIDER.compute(whole.take(np.array([0])))
    assert isinstance(alone, Units)
    assert alone.values == [0], "of one item alone nothing is rare"
