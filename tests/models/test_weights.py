"""Checkpoints: strict in, exact out, every problem in one error."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import sav_jax
from sav_jax import lmm as lmm_module
from sav_jax.models import reading_weights
from sav_jax.models.registry import read_config
from sav_jax.models.weights import CheckpointError, read_headers, save_checkpoint


@pytest.fixture
def copy(reference: Reference, tmp_path: Path) -> Path:
    """A checkpoint of the test's own to spoil."""
    return Path(shutil.copytree(reference.directory, tmp_path / "model"))


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_same_params(ours: sav_jax.LMM, theirs: sav_jax.LMM) -> None:
    a: Any = jax.tree.structure(ours.params)
    assert a == jax.tree.structure(theirs.params)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    st.lists(st.sampled_from([1, 2, 5, 255, 256, 300]), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_copies_of_every_layout(shape: list[int], random: Any, stored: str, wanted: str) -> None:
    """Axes in any order, a part of one, any cast: what NumPy makes of it."""
    shape = [size if i < 2 else min(size, 5) for i, size in enumerate(shape)]
    numbers = np.arange(np.prod(shape)).reshape(shape) % 97 / 7
    source = numbers.astype(jnp.dtype(stored)).transpose(random.sample(range(len(shape)), len(shape)))
    source = source[random.randrange(source.shape[0]) :]
    target = np.empty(source.shape, jnp.dtype(wanted))
    reading_weights.copy(source, target)
    np.testing.assert_array_equal(target.astype(np.float32), source.astype(target.dtype).astype(np.float32))


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["one file", "sharded"])
def test_round_trip_is_exact(
    make_reference: Callable[..., Reference], tmp_path: Path, tie: bool, max_shard_bytes: int
) -> None:
    reference = make_reference(tie=tie)
    lmm = sav_jax.load(reference.directory)
    shutil.copytree(reference.directory, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors"))
    save_checkpoint(tmp_path / "saved", lmm.hf_config, lmm.params, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors*"))
    assert (files == ["model.safetensors"]) == (max_shard_bytes == 10**9), files
    assert_same_params(sav_jax.load(tmp_path / "saved"), lmm)
    stored = {tensor.key: np.asarray(tensor.read()) for tensor in read_headers(tmp_path / "saved")}
    theirs = {old_names(tensor.key): np.asarray(tensor.read()) for tensor in read_headers(reference.directory)}
    assert stored.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(stored[key], value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip(reference: Reference, copy: Path, dtype: str) -> None:
    """Stored in 16 bits, loaded in 16 bits: exact. Loaded as float32: the rounded values."""
    rounded = sav_jax.load(reference.directory, dtype=dtype)
    save_checkpoint(copy, rounded.hf_config, rounded.params, dtype=dtype)
    assert {str(tensor.dtype) for tensor in read_headers(copy)} == {dtype}
    assert_same_params(sav_jax.load(copy, dtype=dtype), rounded)
    wide = sav_jax.load(copy)
    for a, b in zip(jax.tree.leaves(wide.params), jax.tree.leaves(rounded.params), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b, np.float32))


def new_names(key: str) -> str:
    """What transformers calls the same weights in memory since version 4.52."""
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    if key.startswith("language_model.model."):
        return "model.language_model." + key.removeprefix("language_model.model.")
    return "model." + key.replace("vision_tower.vision_model.", "vision_tower.")


def old_names(key: str) -> str:
    """As the hub's llava-hf files have them."""
    return key if "vision_tower.vision_model." in key else key.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("rename", [new_names, old_names])
def test_older_and_newer_key_names(lmm: sav_jax.LMM, copy: Path, rename: Callable[[str], str]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        renamed = {rename(key): value for key, value in tensors.items()}
        assert renamed.keys() != tensors.keys() or rename is old_names
        tensors.clear()
        tensors.update(renamed)

    edit(copy, change)
    assert_same_params(sav_jax.load(copy), lmm)


def test_in_memory_names_of_the_reference(reference: Reference, lmm: sav_jax.LMM, copy: Path) -> None:
    state = {key: value.numpy() for key, value in reference.model.state_dict().items()}
    save_file(state, copy / "model.safetensors")
    assert_same_params(sav_jax.load(copy), lmm)


def test_every_problem_in_one_error(copy: Path) -> None:
    layers = "language_model.model.layers"

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{layers}.1.mlp.up_proj.weight"]
        del tensors["image_newline"]
        tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)
        tensors["surprise"] = np.zeros(1, np.float32)
        tensors[f"{layers}.2.self_attn.k_proj.weight"] = np.zeros((7, 40), np.float32)
        tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].copy()

    edit(copy, change)
    with pytest.raises(CheckpointError) as caught:
        sav_jax.load(copy)
    error = caught.value
    assert set(error.missing) == {f"{layers}.1.mlp.up_proj.weight", "image_newline"}
    assert set(error.unknown) == {"language_model.model.layers.0.self_attn.q_norm.weight", "surprise"}
    assert error.misshapen == [f"{layers}.2.self_attn.k_proj.weight is [7, 40], not [8, 40]"]
    assert len(error.duplicated) == 1
    assert "norm.weight" in error.duplicated[0]
    text = str(error)
    assert "\n" not in text
    assert str(copy) in text
    for key in [*error.missing, *error.unknown, *error.misshapen, *error.duplicated]:
        assert key in text


def test_stored_copy_of_tied_embeddings_must_be_equal(make_reference: Callable[..., Reference], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_reference(tie=True).directory, tmp_path / "model"))
    lmm = sav_jax.load(directory)
    head = "language_model.lm_head.weight"
    edit(directory, lambda t: t.update({head: t["language_model.model.embed_tokens.weight"].copy()}))
    assert_same_params(sav_jax.load(directory), lmm)
    edit(directory, lambda t: t.update({head: t[head] + 1}))
    with pytest.raises(sav_jax.UserError, match="ties them"):
        sav_jax.load(directory)


def spoil_truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")


def spoil_stub(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10\0")


def spoil_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def spoil_pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def spoil_missing_shard(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_integer_weights(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.update(image_newline=np.zeros(40, np.int8)))


def spoil_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def spoil_config_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def spoil_model_type(directory: Path) -> None:
    change_config(directory, model_type="llama")


def spoil_model_type_list(directory: Path) -> None:
    change_config(directory, model_type=["llava"])


def spoil_patch_size(directory: Path) -> None:
    change_config(directory, vision_config=read_config(directory)["vision_config"] | {"patch_size": 0})


def spoil_rope_theta(directory: Path) -> None:
    text = read_config(directory)["text_config"]
    change_config(directory, text_config=text | {"rope_parameters": {**text["rope_parameters"], "rope_theta": None}})


def spoil_aspect(directory: Path) -> None:
    change_config(directory, vision_aspect_ratio="square")


def spoil_rope(directory: Path) -> None:
    config = read_config(directory)
    config["text_config"]["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (directory / "config.json").write_text(json.dumps(config))


def spoil_window(directory: Path) -> None:
    config = read_config(directory)
    config["text_config"] |= {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "layer_types": None,
    }
    (directory / "config.json").write_text(json.dumps(config))


def spoil_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def spoil_image_processor(directory: Path) -> None:
    (directory / "preprocessor_config.json").unlink()


def spoil_chat_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def change_config(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps(read_config(directory) | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "model.safetensors: truncated"),
        (spoil_header, "model.safetensors: not a safetensors file"),
        (spoil_stub, "model.safetensors: truncated"),
        (spoil_no_weights, "no *.safetensors file"),
        (spoil_pickle_only, "never pickled"),
        (spoil_missing_shard, "model-00001-of-00002.safetensors: missing"),
        (spoil_integer_weights, "image_newline is stored as I8"),
        (spoil_no_config, "no config.json"),
        (spoil_config_json, "config.json: unreadable"),
        (spoil_model_type, "model_type 'llama' is not known (known: llava, llava_next, llava_onevision"),
        (spoil_model_type_list, "model_type ['llava'] is not known (known: llava, llava_next"),
        (spoil_patch_size, "a llava_onevision with an impossible or missing value (ZeroDivisionError"),
        (spoil_rope_theta, "a llava_onevision with an impossible or missing value (TypeError"),
        (spoil_aspect, "vision_aspect_ratio 'square'"),
        (spoil_rope, "rope_type 'linear'"),
        (spoil_window, "sliding-window"),
        (spoil_tokenizer, "cannot load its tokenizer"),
        (spoil_image_processor, "cannot load its image processor"),
        (spoil_chat_template, "no chat template"),
    ],
)
def test_damaged_checkpoints_get_one_clear_line(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(sav_jax.UserError) as caught:
        sav_jax.load(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/model", "./nowhere", "nobody/nothing", "tinny"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(sav_jax.UserError, match="no such model"):
        sav_jax.load(name)


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"num_layers": 5}, {"dtype": "int8"}, {"dtype": "float17"}])
def test_bad_options(reference: Reference, options: dict[str, Any]) -> None:
    with pytest.raises(sav_jax.UserError):
        sav_jax.load(reference.directory, **options)


def test_features_are_read_without_the_head_for_logits(reference: Reference) -> None:
    whole = sav_jax.load(reference.directory)
    less = sav_jax.load(reference.directory, lm_head=False)
    assert "lm_head" in whole.params["language_model"]
    assert "lm_head" not in less.params["language_model"]
    assert len(jax.tree.leaves(less.params)) == len(jax.tree.leaves(whole.params)) - 1
    assert less.fingerprint == whole.fingerprint
    example = sav_jax.Example("What is it?", label="a")
    expected, heads = (sav_jax.extract_heads(lmm, [example], progress=False) for lmm in (whole, less))
    np.testing.assert_array_equal(heads, expected)


def test_of_many_weights_samples_of_every_tensor_are_in_the_fingerprint(
    reference: Reference, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier outlives versions of this library: of 4 KiB at each quarter of a tensor, in the order of keys."""
    monkeypatch.setattr(lmm_module, "_WHOLE_FILE_BYTES", 0)
    expected = hashlib.sha256()
    for tensor in sorted(read_headers(copy), key=lambda t: t.key):
        numbers = np.array(tensor.read()).reshape(-1)
        expected.update(f"{tensor.key} {tensor.dtype} {tensor.shape}".encode())
        for start in range(0, numbers.size, max(1, numbers.size // 4)):
            expected.update(numbers[start:].tobytes()[:4096])
    assert lmm_module.weights_digest(copy) == expected.hexdigest() == lmm_module.weights_digest(reference.directory)
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset)
        byte = stream.read(1)
        stream.seek(tensor.offset)
        stream.write(bytes([byte[0] ^ 1]))
    assert lmm_module.weights_digest(copy) != expected.hexdigest()


def test_fingerprint_knows_weights_from_weights(reference: Reference, copy: Path) -> None:
    original = sav_jax.load(reference.directory).fingerprint
    assert sav_jax.load(copy, num_layers=2).fingerprint == original, "depth changes no feature"
    edit(copy, lambda tensors: tensors["image_newline"].__setitem__(3, 9.0))
    assert sav_jax.load(copy).fingerprint != original
