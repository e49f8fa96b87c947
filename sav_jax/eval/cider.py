"""CIDEr-D: how much a caption agrees with several people's, in the words and phrases that are rare among all captions.

Vedantam, Zitnick and Parikh: CIDEr: Consensus-based Image Description Evaluation (CVPR 2015, arXiv 1411.5726), CIDEr-D
as the authors' released code computes it. Let h(s) be how often each n-gram of n words stands in the caption s, d in
the references of how many of N items, and g(s) = h(s) log(N / max(1, d)). With l the number of words and sigma = 6::

    CIDEr-D(c, S) = 10 / 4 sum_{n = 1..4} 1 / |S| sum_{s in S} exp(-(l(c) - l(s))^2 / (2 sigma^2))
                    min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)

(The paper divides h by the number of n-grams; the released code does not, which matters to the clipping alone.)

Words are told apart by :func:`words`, which needs no Java.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
_FACTOR = 10.0

# Penn Treebank's clitics are words of their own: do n't, man 's.
_CLITICS = re.compile(r"(?<=\w)(?=n't\b|'(?:s|m|d|re|ve|ll)\b)")
_PAIRS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
_BRACKETS = str.maketrans(
    {mark: f" -{name}b- " for mark, name in zip("()[]{}", ("lr", "rr", "ls", "rs", "lc", "rc"), strict=True)}
)
_WORD = re.compile(
    r"""
    n't\b | '(?:s|m|d|re|ve|ll)\b
    | \d+(?:[.,:]\d+)+                            # 3.5, 10,000, 9:30
    | (?:[^\W\d_]\.){2,} | (?:mrs?|ms|dr|st|vs)\. # u.s., st.
    | o'[^\W_]+                                   # o'clock
    | [^\W_]+(?:[-/][^\W_]+)*                     # t-shirt, black/white
    | -[lr][rsc]b- | [&$%\#@+=*]
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Frequencies:
    """How common n-grams are.

    Attributes:
      items: N, how many items have references.
      counts: n-gram -> how many items have it in one of their references.
    """

    items: int
    counts: Counter[tuple[str, ...]]

    def weight(self, gram: tuple[str, ...]) -> float:
        """log(N / d): rare ones weigh more, what all have weighs nothing."""
        return math.log(self.items) - math.log(max(1, self.counts[gram]))


def words(text: str) -> tuple[str, ...]:
    """The words of a caption: lower case, without punctuation, in the manner of the Penn Treebank.

    As Stanford's PTBTokenizer with pycocoevalcap's list of dropped marks: clitics are words ("do n't", "man 's"),
    hyphenated words and numbers stay whole, currency and percent signs are words, and so are brackets ("-lrb-": the
    list has them in capitals only). Different from it: few abbreviations keep their full stop, and emoticons and
    addresses are not known.
    """
    plain = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    plain = plain.translate(_BRACKETS)
    plain = _PAIRS.sub(lambda match: " ".join(part for part in match.groups() if part), plain)
    return tuple(_WORD.findall(_CLITICS.sub(" ", plain)))


@functools.lru_cache(maxsize=8)
def document_frequencies(corpus: tuple[tuple[str, ...], ...]) -> Frequencies:
    """Count in how many items' references each n-gram stands.

    Args:
      corpus: the references of each item.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for references in corpus:
        counts.update({gram for reference in references for gram in _grams(words(reference))})
    return Frequencies(len(corpus), counts)


def cider_d(caption: str, references: Sequence[str], frequencies: Frequencies) -> float:
    """Score a caption: 0 for no n-gram in common, 10 for a copy of every reference.

    Args:
      caption: what was written.
      references: at least one.
      frequencies: of the corpus that the item belongs to.
    """
    given = words(caption)
    own = _vectors(given, frequencies)
    total = 0.0
    for reference in references:
        wanted = words(reference)
        other = _vectors(wanted, frequencies)
        alike = sum(_clipped_cosine(a, b) for a, b in zip(own, other, strict=True))
        total += alike * math.exp(-((len(given) - len(wanted)) ** 2) / (2 * _SIGMA**2))
    return _FACTOR * total / len(_ORDERS) / len(references)


def _grams(of: Sequence[str]) -> Counter[tuple[str, ...]]:
    """All n-grams of a caption, with how often each stands in it."""
    return Counter(tuple(of[i : i + n]) for n in _ORDERS for i in range(len(of) - n + 1))


def _vectors(of: Sequence[str], frequencies: Frequencies) -> list[dict[tuple[str, ...], float]]:
    """g(s) for each n."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in _ORDERS]
    for gram, count in _grams(of).items():
        vectors[len(gram) - 1][gram] = count * frequencies.weight(gram)
    return vectors


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    """min(a, b) . b / (|a| |b|), 0 if either is zero."""
    size = math.sqrt(math.fsum(x * x for x in a.values())) * math.sqrt(math.fsum(x * x for x in b.values()))
    if not size:
        return 0.0
    return math.fsum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b) / size
