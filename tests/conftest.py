"""A stricter process than a user's: what JAX would quietly convert, broadcast or warn about is an error here.

The settings are environment variables, set before JAX is first imported, so that command lines which a test starts are
as strict.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could configure it (a pytest plugin?)")

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",  # sharding is exercised without an accelerator
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="agg",
)

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from checkpoints import Reference

    import sav_jax

# The same examples on every run, and no deadline: the first example of a property pays for compiling.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Build a tiny random checkpoint of a family (default: LLaVA-OneVision) with options of its own."""
    from families import FAMILIES

    def make(family: str = "llava_onevision", **options: Any) -> Reference:
        return FAMILIES[family](tmp_path_factory.mktemp(family), **options)

    return make


@pytest.fixture(scope="session")
def reference(make_reference: Callable[..., Reference]) -> Reference:
    """The checkpoint most tests share."""
    return make_reference()


@pytest.fixture(scope="session")
def lmm(reference: Reference) -> sav_jax.LMM:
    """The same checkpoint, loaded by this library in float32."""
    import sav_jax

    return sav_jax.load(reference.directory)
