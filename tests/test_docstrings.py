"""The examples in docstrings are run, and the reference in docs/api is what the docstrings say."""

from __future__ import annotations

import doctest
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts_loaded import loaded

import sav_jax

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "sav_jax").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PRINCIPAL = {
    "sav_jax.aim.DemonstrationBank",
    "sav_jax.classifier.SparseAttentionVectors.fit",
    "sav_jax.classifier.SparseAttentionVectors.predict",
    "sav_jax.classifier.SparseAttentionVectors.save",
    "sav_jax.eval.tasks.base.Task",
    "sav_jax.examples.Example",
    "sav_jax.examples.read_examples",
    "sav_jax.extract.extract_heads",
    "sav_jax.extract.next_token_logits",
    "sav_jax.generation.generate",
    "sav_jax.generation.score_options",
    "sav_jax.headstore.HeadStore",
    "sav_jax.lmm.load",
}


FINDER = doctest.DocTestFinder()
EXAMPLES = [test for name in MODULES for test in FINDER.find(importlib.import_module(name), name) if test.examples]


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """Every example loads the model for itself, as its reader would; here all are given the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sav_jax, "load", functools.cache(sav_jax.load))
        yield


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.removeprefix("sav_jax."))
def test_examples_print_what_they_say(
    example: doctest.DocTest, load_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert "".join(said) == ""


def test_the_principal_functions_have_examples() -> None:
    assert {test.name for test in EXAMPLES} >= PRINCIPAL


def test_the_reference_is_what_the_docstrings_say() -> None:
    with loaded("api_reference") as script:
        made = script.pages()
        for name in sav_jax.__all__:
            assert name == "__version__" or f"### `sav_jax.{name}`" in made[script.OUTPUT / "sav_jax.md"]
    written = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
    stale = [path.name for path in {*made, *written} if made.get(path) != written.get(path)]
    assert stale == [], "run: python scripts/api_reference.py"
