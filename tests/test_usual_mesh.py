"""How devices are laid out when nobody says."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest
from checkpoints import Reference

from sav_jax import lmm
from sav_jax.sharding import mesh_of


@pytest.mark.parametrize(("limit", "mesh"), [(None, "data=8"), (12 * 10**6, "data=8"), (11 * 10**6, "fsdp=8")])
def test_weights_are_kept_in_parts_where_they_are_large(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, mesh: str
) -> None:
    """The bundled model, 5.75 million parameters of two bytes: half of the memory, or more than that."""
    stats = None if limit is None else {"bytes_limit": 2 * limit}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert lmm.usual_mesh("tiny", "bfloat16") == mesh


def test_random_weights_live_where_the_model_s_own_do(reference: Reference) -> None:
    model = lmm.load(reference.directory, mesh=mesh_of(jax.devices(), "data=2,fsdp=2,model=2"))
    make = lmm._random_params(model.module, model.dtype, model.mesh)
    made = make.eval_shape(jax.random.key_data(jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.sharding), made) == jax.tree.map(
        lambda x: (x.shape, x.sharding), model.params
    )
