"""SQ-LLaVA's prototype extractor in PyTorch, from the formulas of the released code and of the paper, and weights for
it under the published names.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
from torch.nn import functional

State = dict[str, torch.Tensor]


def released_state(channels: int, width: int, seed: int = 0) -> State:
    """Random weights under the published projector's bare names, of torch's default size but for small biases; the
    similarity is neither scaled by one nor offset by zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5

    state = {"sim_alpha": torch.full((1, 1, 1), 1.5), "sim_beta": torch.full((1, 1, 1), -0.25)}
    sizes = dict.fromkeys("cvf", (channels, channels)) | {"mlp.0": (width, channels), "mlp.2": (width, width)}
    for name, (outputs, inputs) in sizes.items():
        state[f"{name}.weight"] = uniform(outputs, inputs, fan_in=inputs)
        state[f"{name}.bias"] = uniform(outputs, fan_in=inputs) / 50
    # A norm that is there and not called.
    return state | {"ln_1.weight": torch.full((channels,), 3.0), "ln_1.bias": torch.full((channels,), 2.0)}


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def quick_gelu_mlp(state: State, x: torch.Tensor) -> torch.Tensor:
    hidden = linear(state, "mlp.0", x)
    return linear(state, "mlp.2", hidden * torch.sigmoid(1.702 * hidden))


def released_similarity(state: State, x: torch.Tensor, num_prototypes: int, num_iterations: int) -> torch.Tensor:
    """Of every prototype with every token, ``[X, K, n]``."""
    features = linear(state, "f", x)
    keys = functional.normalize(linear(state, "v", x).transpose(1, 2), dim=-1)
    centers = functional.adaptive_avg_pool1d(x.transpose(1, 2), num_prototypes).transpose(1, 2)
    for _ in range(num_iterations):
        query = functional.normalize(linear(state, "c", centers), dim=-1)
        centers = torch.softmax(query @ keys, dim=1) @ features
    cosine = functional.normalize(centers, dim=-1) @ functional.normalize(x, dim=-1).transpose(1, 2)
    return torch.sigmoid(state["sim_beta"] + state["sim_alpha"] * cosine)


def released_extractor(state: State, x: torch.Tensor, num_prototypes: int, num_iterations: int) -> torch.Tensor:
    """``[X, n, C] -> [X, n, D]``."""
    features = linear(state, "f", x)
    pooled = functional.adaptive_avg_pool1d(features.transpose(1, 2), num_prototypes).transpose(1, 2)
    similarity = released_similarity(state, x, num_prototypes, num_iterations)
    chosen = torch.zeros_like(similarity).scatter(1, similarity.max(dim=1, keepdim=True).indices, 1.0)
    weights = similarity * chosen
    means = (weights @ features + pooled) / (chosen.sum(dim=2, keepdim=True) + 1)
    return quick_gelu_mlp(state, x + weights.transpose(1, 2) @ means)


def paper_clusters(state: State, x: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """The paper's equations up to the MLP: ``[X, n, C]`` -> ``[X, n, C]``; ``z`` is the residual's layer and
    ``centers`` the first prototypes.
    """
    keys, values = linear(state, "v", x), linear(state, "f", x)
    centers = state["centers"][None].expand(len(x), -1, -1)
    for _ in range(num_iterations):
        centers = torch.softmax(linear(state, "c", centers) @ keys.transpose(1, 2), dim=1) @ values
    cosine = functional.cosine_similarity(x[:, :, None], centers[:, None], dim=-1)
    mean = (cosine[..., None] * centers[:, None]).sum(dim=2) / len(state["centers"])
    return x + linear(state, "z", mean)


def paper_extractor(state: State, x: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """The whole extractor by the paper's equations."""
    return quick_gelu_mlp(state, paper_clusters(state, x, num_iterations))


def paper_state(channels: int, width: int, num_prototypes: int, seed: int = 3) -> State:
    """Random weights of it."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: v for k, v in released_state(channels, width).items() if not k.startswith(("sim_", "ln_1"))}
    state |= {f"z.{kind}": released_state(channels, width, 1)[f"c.{kind}"] for kind in ("weight", "bias")}
    return state | {"centers": 0.3 * torch.randn((num_prototypes, channels), generator=generator)}


PAPER_LAYERS = {"c": "to_centers", "v": "to_keys", "f": "to_features", "z": "to_residual"}
"""Its linear layers in front of the MLP -> this project's names."""


def paper_params(state: State) -> dict[str, Any]:
    """What of a state (or of its gradients) belongs in front of the MLP, as parameters."""
    kinds = {"kernel": "weight", "bias": "bias"}
    layers = {
        ours: {kind: jnp.asarray(state[f"{theirs}.{name}"].numpy()) for kind, name in kinds.items()}
        for theirs, ours in PAPER_LAYERS.items()
    }
    return {"centers": jnp.asarray(state["centers"].numpy())} | layers
