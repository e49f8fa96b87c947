"""Fixtures shared by the parity tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checkpoints import Reference, build_reference

import sav_jax


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Build a checkpoint with options of its own."""
    return lambda **options: build_reference(tmp_path_factory.mktemp("checkpoint"), **options)


@pytest.fixture(scope="session")
def reference(make_reference: Callable[..., Reference]) -> Reference:
    """The checkpoint most tests share."""
    return make_reference()


@pytest.fixture(scope="session")
def lmm(reference: Reference) -> sav_jax.LMM:
    """The same checkpoint, loaded by this library in float32."""
    return sav_jax.load(reference.directory)
