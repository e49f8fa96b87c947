"""The table of docs/pods.md: every slice is there, and what can be known without compiling agrees with it."""

from __future__ import annotations

import math
import re
from types import ModuleType

import jax
import pytest
from jax.sharding import AbstractMesh
from scripts_loaded import SCRIPTS, loaded

from sav_jax.lmm import is_lm_head
from sav_jax.models.multimodal import init_params
from sav_jax.models.registry import architecture
from sav_jax.sharding import data_size, parameter_sharding

GIB = 2**30
MEMORY = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
"""GiB of a chip, as the compiler knows them."""


@pytest.fixture(scope="module")
def table() -> ModuleType:
    with loaded("plan_table") as module:
        return module


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    """Cells of the table's rows."""
    lines = (SCRIPTS.parent / "docs" / "pods.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [\d.]+B \|", line)]


def mesh_of(axes: str) -> AbstractMesh:
    names, sizes = zip(*(part.split("=") for part in axes.split(",")), strict=True)
    return AbstractMesh(tuple(map(int, sizes)), names)


def test_every_slice_has_its_row(table: ModuleType, rows: list[list[str]]) -> None:
    assert [tuple(cells[:3]) for cells in rows] == list(table.SLICES)
    assert {name for name, *_ in table.SLICES} == {"0.5B", "7B", "72B"}
    assert {topology.split(":")[0] for _, topology, _ in table.SLICES} == {"v5e", "v5p", "v6e"}
    assert max(math.prod(mesh_of(mesh).axis_sizes) for _, _, mesh in table.SLICES) == 256


@pytest.mark.parametrize(("name", "published"), [("0.5B", 894e6), ("7B", 8.03e9), ("72B", 73.2e9)])
def test_weights_of_a_chip(table: ModuleType, rows: list[list[str]], name: str, published: float) -> None:
    """Of shapes and the sharding rules alone, in bfloat16."""
    module = architecture(table.config(name)).module
    shapes = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    leaves = [
        ("/".join(str(key.key) for key in path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    ]
    assert sum(leaf.size for _, leaf in leaves) == pytest.approx(published, rel=0.005)
    assert any(cells[0] == name for cells in rows)
    for _, topology, mesh, batch, memory, largest, products, *_ in (cells for cells in rows if cells[0] == name):
        of = parameter_sharding(mesh_of(mesh))  # type: ignore[arg-type]
        held = sum(
            2 * math.prod(of(path, leaf.shape).shard_shape(leaf.shape)) for path, leaf in leaves if not is_lm_head(path)
        )
        found = re.fullmatch(r"([\d.]+) \+ ([\d.]+) of ([\d.]+)", memory)
        assert found is not None
        weights, temporaries, whole = map(float, found.groups())
        # Two digits; the compiler rounds buffers up to tiles of its memory.
        assert weights == pytest.approx(held / GIB, rel=0.01, abs=0.02)
        assert whole == MEMORY[topology.split(":")[0]]
        assert weights + temporaries <= whole
        ways = data_size(mesh_of(mesh))  # type: ignore[arg-type]
        assert int(batch) == ways
        assert int(largest) >= ways
        assert int(largest) % ways == 0
        assert int(products) > 0


def test_unknown_sizes_are_refused(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["8B"]) == 2
    assert capsys.readouterr().err == "error: no size 8B (there are 0.5B, 7B, 72B)\n"
