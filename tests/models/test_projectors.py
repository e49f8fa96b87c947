"""SQ-LLaVA's prototype extractor against the same computation in PyTorch, and the published key names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints_sq_llava import (
    State,
    paper_clusters,
    paper_extractor,
    paper_params,
    paper_state,
    released_extractor,
    released_similarity,
    released_state,
)
from flax import traverse_util
from torch.nn import functional

import sav_jax
from sav_jax.models.projectors import (
    PackedPrototypes,
    PrototypeConfig,
    PrototypeExtractor,
    adaptive_pooling,
    normalized,
    prototype_extractor_from_torch,
)

C, D = 24, 20
PARITY = 1e-5  # sums of at most 576 float32 products of values of order one, each rounded to 6e-8
GRADIENT = 2e-5  # relative to a gradient's largest entry: the same, summed over tokens and backwards
ROUNDING = 5e-7  # what sums of a thousand float32 terms of order 0.1 leave where they cancel
CLEAR = 1e-6
"""By how much (in float64) the best prototype of a token must lead the second, where float32 results are compared.
The cosines of the two are each off by 2e-7 or less, their sigmoids by a third of that and half a unit of 6e-8: two
right implementations may choose differently below 2e-7. A token in 200 of Gaussian images is that close."""


def image_tokens(seed: int, n: int) -> torch.Tensor:
    """One image's tokens, of very different lengths up to a few units: prototypes of a Gaussian would hardly differ."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(2 * torch.randn((1, n, 1), generator=generator))
    return 0.01 * lengths * torch.randn((1, n, C), generator=generator)


def clear_images(state: State, n: int, num_prototypes: int, num_iterations: int) -> torch.Tensor:
    """The first two images in which every token's choice is clear."""
    double = {key: value.double() for key, value in state.items()}
    found: list[torch.Tensor] = []
    for seed in range(100):
        x = image_tokens(seed, n)
        best = released_similarity(double, x.double(), num_prototypes, num_iterations)
        best = best.topk(min(2, num_prototypes), dim=1).values
        if num_prototypes == 1 or float((best[:, 0] - best[:, 1]).min()) > CLEAR:
            found.append(x)
        if len(found) == 2:
            return torch.cat(found)
    raise AssertionError("no clear images")


def compare(
    theirs: Callable[[State, torch.Tensor], torch.Tensor],
    state: State,
    module: PrototypeExtractor,
    params: dict[str, Any],
    paths: dict[str, str],
    x: torch.Tensor,
) -> None:
    """Output, and the gradient of a random weighting of it in every weight and in ``x``, which PyTorch computes in
    float64: some are mathematically zero (a bias that adds one number to all of a softmax).
    """
    cotangent = torch.randn((*x.shape[:2], D), generator=torch.Generator().manual_seed(9))
    double = {key: value.double().requires_grad_(key in paths) for key, value in state.items()}
    tokens = x.double().requires_grad_(True)
    theirs(double, tokens).backward(cotangent.double())

    @jax.jit
    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        output, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        return output, *pull(cotangent)

    output, of_params, of_x = both(params, x.numpy(), cotangent.numpy())
    np.testing.assert_allclose(output, theirs(state, x), rtol=0, atol=PARITY)
    mine = traverse_util.flatten_dict(of_params, sep="/") | {"x": of_x}
    expected = {path: double[key].grad for key, path in paths.items()} | {"x": tokens.grad}
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None
        value = value if name.endswith("kernel") else value.reshape(mine[name].shape)
        tolerance = GRADIENT * float(value.abs().max()) + ROUNDING
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=tolerance, err_msg=name)


def of_layers(names: dict[str, str]) -> dict[str, str]:
    kinds = {"weight": "kernel", "bias": "bias"}
    return {f"{k}.{kind}": f"{v}/{ours}" for k, v in names.items() for kind, ours in kinds.items()}


LAYERS = of_layers({"c": "to_centers", "v": "to_keys", "f": "to_features", "mlp.0": "linear_1", "mlp.2": "linear_2"})
RELEASED = LAYERS | {"sim_alpha": "similarity_scale", "sim_beta": "similarity_offset"}


@pytest.mark.parametrize(
    ("n", "num_prototypes", "num_iterations"),
    [
        pytest.param(576, 256, 2, id="as released"),
        pytest.param(576, 256, 1, id="one iteration"),
        pytest.param(577, 256, 2, id="odd"),
        pytest.param(36, 7, 3, id="not a multiple"),
        pytest.param(5, 8, 2, id="fewer tokens than prototypes"),
        pytest.param(6, 1, 2, id="one prototype"),
    ],
)
def test_released(n: int, num_prototypes: int, num_iterations: int) -> None:
    state = released_state(C, D)
    x = clear_images(state, n, num_prototypes, num_iterations)
    module, params = prototype_extractor_from_torch(state, num_prototypes=num_prototypes, num_iterations=num_iterations)

    def theirs(state: State, x: torch.Tensor) -> torch.Tensor:
        return released_extractor(state, x, num_prototypes, num_iterations)

    compare(theirs, state, module, params, RELEASED, x)


def test_at_the_width_of_a_tower() -> None:
    """C = 1024 with Gaussian tokens, where prototypes hardly differ: what is compared are the tokens of groups that no
    unclear choice touches.
    """
    state, x = released_state(1024, D), torch.randn((1, 576, 1024), generator=torch.Generator().manual_seed(0))
    best = released_similarity({k: v.double() for k, v in state.items()}, x.double(), 256, 2).topk(2, dim=1)
    clear = best.values[0, 0] - best.values[0, 1] > CLEAR
    # Both groups an unclear token may be in have a mean that is not compared.
    touched = torch.isin(best.indices[0, 0], best.indices[0][:, ~clear])
    compared = (clear & ~touched).numpy()
    assert 100 < compared.sum() < 576
    module, params = prototype_extractor_from_torch(state, num_prototypes=256, num_iterations=2)
    output = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x.numpy())
    expected = released_extractor(state, x, 256, 2).numpy()
    np.testing.assert_allclose(output[0][compared], expected[0][compared], rtol=0, atol=PARITY)


@pytest.mark.parametrize("n", [1, 9])
def test_ties_and_tokens_of_zeros(n: int) -> None:
    """Tokens of zeros are like every prototype alike: the first takes them all, and their direction has a gradient of
    10 ** 12 times that of the cosine, not of infinity.
    """
    state, x = released_state(C, D), torch.zeros((1, n, C))

    def theirs(state: State, x: torch.Tensor) -> torch.Tensor:
        return released_extractor(state, x, 4, 2)

    module, params = prototype_extractor_from_torch(state, num_prototypes=4, num_iterations=2)
    x.requires_grad_(True)
    expected = theirs(state, x)
    expected.sum().backward()
    assert x.grad is not None

    @jax.jit
    def both(x: jax.Array) -> Any:
        output, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x)
        return output, *pull(jnp.ones((1, n, D)))

    output, gradient = both(jnp.zeros((1, n, C)))
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=0, atol=PARITY)
    largest = float(x.grad.abs().max())
    assert 1e7 < largest < 1e12
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=0, atol=GRADIENT * largest)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_gradients_are_finite_without_weights(form: str) -> None:
    """Prototypes of zeros have no direction either."""
    module = PrototypeExtractor(PrototypeConfig(4, 2, form), C, D)
    x = jnp.zeros((1, 6, C))
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), abstract)
    loss = jax.grad(lambda p, x: jnp.asarray(module.apply({"params": p}, x)).sum(), argnums=(0, 1))
    gradients = jax.jit(loss)(params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_normalized_as_torch() -> None:
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32) * np.array(
        [[1], [1e-13], [0], [1e-5]], np.float32
    )
    theirs = functional.normalize(torch.tensor(x), dim=-1).numpy()
    np.testing.assert_allclose(normalized(jnp.asarray(x), axis=1), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_paper(num_iterations: int) -> None:
    """The equations; without a choice between prototypes any tokens do."""
    n, count = 37, 5
    x = torch.randn((2, n, C), generator=torch.Generator().manual_seed(3))
    state = paper_state(C, D, count)
    module = PrototypeExtractor(PrototypeConfig(count, num_iterations, "paper"), C, D)
    paths = LAYERS | of_layers({"z": "to_residual"}) | {"centers": "centers"}
    params: dict[str, Any] = paper_params(state)
    for key, path in of_layers({"mlp.0": "linear_1", "mlp.2": "linear_2"}).items():
        where, kind = path.split("/")
        params.setdefault(where, {})[kind] = jnp.asarray(state[key].numpy())

    def theirs(state: State, x: torch.Tensor) -> torch.Tensor:
        return paper_extractor(state, x, num_iterations)

    compare(theirs, state, module, params, paths, x)


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_paper_for_images_of_any_size_in_a_row(num_iterations: int) -> None:
    """Every image has the prototypes that it has alone, whatever stands beside it; output and gradients of all weights
    against PyTorch's, image by image, which computes them in float64. Three hundred patches are two blocks.
    """
    sizes, padding, count = (36, 1, 253), 10, 5
    generator = torch.Generator().manual_seed(5)
    x, cotangent = (torch.randn((2, sum(sizes) + padding, C), generator=generator) for _ in range(2))
    first = np.cumsum((0, *sizes[:-1]))
    segments = np.repeat(np.array([*(1 + first), 0], np.int32), (*sizes, padding))
    segments = np.stack([segments, np.roll(segments, 4)])  # in the second row the padding is at both ends
    state = paper_state(C, D, count)
    module = PackedPrototypes(PrototypeConfig(count, num_iterations, "paper"), C)
    params = paper_params(state)

    double = {key: value.double().requires_grad_(True) for key, value in state.items()}
    tokens = x.double().requires_grad_(True)
    expected = tokens.clone()
    for row in range(2):
        for segment in np.unique(segments):
            where = torch.tensor(segments[row] == segment)
            expected[row, where] = paper_clusters(double, tokens[row, where][None], num_iterations)[0]
    expected.backward(cotangent.double())

    @jax.jit
    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        output, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x, segments), params, x)
        return output, *pull(cotangent)

    output, of_params, of_x = both(params, x.numpy(), cotangent.numpy())
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=0, atol=PARITY)
    assert tokens.grad is not None
    theirs = paper_params({key: value.grad.float() for key, value in double.items() if value.grad is not None})
    mine = traverse_util.flatten_dict(of_params | {"x": of_x}, sep="/")
    expected_of = traverse_util.flatten_dict(theirs | {"x": tokens.grad.numpy()}, sep="/")
    for name, value in expected_of.items():
        # A bias's gradient sums what its kernel's does, there times inputs of order one. That of q's is zero, because
        # its terms cancel: it is as exact as they are large.
        largest = max(float(np.abs(expected_of[other]).max()) for other in (name, name.replace("bias", "kernel")))
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=GRADIENT * largest, err_msg=name)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_dtype_and_images_of_a_batch(form: str) -> None:
    """An image's tokens depend on that image alone. In bfloat16 so is the output, and nothing is promoted."""
    module = PrototypeExtractor(PrototypeConfig(7, 2, form), C, D)
    state = released_state(C, D)
    x = clear_images(state, 36, 7, 2).numpy()
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x))
    if form == "released":
        _, params = prototype_extractor_from_torch(state, num_prototypes=7, num_iterations=2)
    else:
        params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(apply(params, x), apply(params, x[::-1])[::-1], rtol=0, atol=PARITY)
    half = apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # Choices may change, so only most values are near: by a hundredth of the largest, a few of bfloat16's steps.
    near = np.abs(np.asarray(half, np.float32) - np.asarray(apply(params, x))) < 0.01 * np.abs(x).max()
    assert near.mean() > 0.9


PREFIXES = ["", "mm_projector.", "model.mm_projector.", "base_model.model.model.mm_projector."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.bfloat16], ids=["NumPy", "bfloat16"])
def test_published_names(prefix: str, convert: Callable[[torch.Tensor], Any]) -> None:
    state = {key: value.bfloat16().float() for key, value in released_state(C, D).items()}
    module, expected = prototype_extractor_from_torch(state, num_prototypes=7, num_iterations=2)
    published = {prefix + key: convert(value) for key, value in state.items()}
    same, params = prototype_extractor_from_torch(published, num_prototypes=7, num_iterations=2)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 3, C)))["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    without_norm = {key: value for key, value in published.items() if "ln_1" not in key}
    jax.tree.map(
        np.testing.assert_array_equal,
        prototype_extractor_from_torch(without_norm, num_prototypes=7, num_iterations=2)[1],
        expected,
    )


def test_every_problem_of_a_state_is_named() -> None:
    state = {f"model.mm_projector.{key}": value for key, value in released_state(C, D).items()}
    del state["model.mm_projector.c.bias"], state["model.mm_projector.sim_beta"]
    state |= {
        "model.mm_projector.v.weight": torch.zeros(C, C + 1),
        "model.mm_projector.ln_1.bias": torch.zeros(1),
        "mm_projector.f.bias": torch.zeros(C),
        "model.mm_projector.mlp.3.weight": torch.zeros(1),
        "lm_head.weight": torch.zeros(1),
    }
    with pytest.raises(sav_jax.UserError) as caught:
        prototype_extractor_from_torch(state, num_prototypes=7, num_iterations=2)
    assert str(caught.value) == (
        "not the weights of a prototype extractor: 2 missing: sim_beta, c.bias; 2 unknown: mlp.3.weight, "
        f"lm_head.weight; 2 wrong shape: v.weight is [{C}, {C + 1}], not [{C}, {C}], ln_1.bias is [1], not [{C}]; "
        "1 duplicated: mm_projector.f.bias"
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "12 missing"),
        ({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}, "2 unknown: 0.weight, 0.bias"),
        (released_state(C, D) | {"c.bias": np.full(C, "x")}, "c.bias holds no numbers"),
        (released_state(C, D) | {"c.bias": 3.0}, "c.bias is \\[\\], not \\[24\\]"),
    ],
    ids=["empty", "a plain projector", "strings", "a number"],
)
def test_states_of_something_else(state: dict[str, Any], message: str) -> None:
    with pytest.raises(sav_jax.UserError, match=message):
        prototype_extractor_from_torch(state, num_prototypes=7, num_iterations=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "prototype_extractor \\[\\] is not an object"),
        ({"prototypes": 3}, "prototype_extractor.prototypes is not known"),
        ({"num_prototypes": 0}, "num_prototypes 0 is not a whole number"),
        ({"num_iterations": True}, "num_iterations True is not a whole number"),
        ({"form": "other"}, "form 'other' is not known \\(known: released, paper\\)"),
        ({"form": ["released"]}, "form \\['released'\\] is not known"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not known"),
    ],
    ids=str,
)
def test_configs_that_are_none(config: Any, message: str) -> None:
    with pytest.raises(sav_jax.UserError, match=message):
        PrototypeConfig.from_hf(config)


def test_config_round_trip() -> None:
    assert PrototypeConfig.from_hf({}) == PrototypeConfig(256, 2, "released", "quick_gelu")
    config = PrototypeConfig(5, 1, "paper", "gelu")
    assert PrototypeConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 576, 577, 729])
@pytest.mark.parametrize("count", [1, 3, 256])
def test_adaptive_pooling(n: int, count: int) -> None:
    expected = functional.adaptive_avg_pool1d(torch.eye(n)[None], count)[0].T
    np.testing.assert_allclose(adaptive_pooling(n, count), expected, rtol=1e-6, atol=0)
