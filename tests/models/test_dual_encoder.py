"""CLIP and SigLIP against transformers' PyTorch models, in float32, on the same safetensors file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer
from checkpoints_dual import BUILDERS, LENGTH, TEXTS, DualReference, build_siglip, images
from families import mesh_of
from safetensors.numpy import load_file, save_file

import sav_jax
from sav_jax.models.dual_encoder import checkpoint_table
from sav_jax.models.weights import CheckpointError, read_headers, save_checkpoint

# Embeddings are unit vectors; the promised bounds. Logits are twenty times as large.
EMBEDDING, LOGIT = 1e-5, 1e-4


@pytest.fixture(scope="module", params=BUILDERS)
def dual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DualReference:
    return BUILDERS[request.param](tmp_path_factory.mktemp("dual"))


@pytest.fixture(scope="module")
def encoder(dual: DualReference) -> sav_jax.DualEncoder:
    return sav_jax.load_dual_encoder(dual.directory)


def test_embeddings_and_logits(dual: DualReference, encoder: sav_jax.DualEncoder) -> None:
    image_embeddings, text_embeddings, logits = dual.run(images(), TEXTS)
    ours = encoder.embed_images(images(), batch_size=4), encoder.embed_texts(TEXTS, batch_size=2)
    for mine, theirs in zip(ours, (image_embeddings, text_embeddings), strict=True):
        assert mine.dtype == np.float32
        assert np.linalg.norm(theirs[0] - theirs[1]) > 0.1, "equal embeddings would hide an error"
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=EMBEDDING)
    np.testing.assert_allclose(encoder.logits(*ours), logits, rtol=0, atol=LOGIT)
    assert encoder.logit_scale == pytest.approx(dual.model.logit_scale.exp().item())
    assert encoder.logit_bias == (dual.model.logit_bias.item() if encoder.config.sigmoid else 0)


def test_batches_do_not_matter(encoder: sav_jax.DualEncoder) -> None:
    mixed = encoder.embed_images(images())
    for row, image in zip(mixed, images(), strict=True):
        np.testing.assert_allclose(encoder.embed_images([image])[0], row, rtol=0, atol=EMBEDDING)
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, encoder.config.embedding_size)


def test_paths_are_images_and_one_thing_is_no_list(encoder: sav_jax.DualEncoder, tmp_path: Path) -> None:
    pictures = images()[:2]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, pictures, strict=True):
        image.save(path)
    expected = encoder.embed_images(pictures)
    np.testing.assert_array_equal(encoder.embed_images([paths[0], str(paths[1])]), expected)
    with pytest.raises(sav_jax.UserError, match=r"nowhere\.png does not exist"):
        encoder.embed_images([paths[0], tmp_path / "nowhere.png"])
    for one in (paths[0], str(paths[0]), pictures[0]):
        with pytest.raises(sav_jax.UserError, match="images must be a list of pictures or paths"):
            encoder.embed_images(one)  # type: ignore[arg-type]
    with pytest.raises(sav_jax.UserError, match="texts must be a list of strings, not the one string 'abc'"):
        encoder.embed_texts("abc")


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "model": 4}], ids=str)
def test_any_mesh_gives_the_same_embeddings(
    dual: DualReference, encoder: sav_jax.DualEncoder, axes: dict[str, int]
) -> None:
    sharded = sav_jax.load_dual_encoder(dual.directory, mesh=mesh_of(axes))
    ours, theirs = (e.embed_images(images()[:3], batch_size=2) for e in (sharded, encoder))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=EMBEDDING)
    ours, theirs = (e.embed_texts(TEXTS) for e in (sharded, encoder))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=EMBEDDING)


def test_round_trip_is_exact_and_transformers_reads_it(
    dual: DualReference, encoder: sav_jax.DualEncoder, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(dual.directory, tmp_path / "saved"))
    save_checkpoint(directory, encoder.hf_config, encoder.params, table=checkpoint_table(encoder.config))
    again = sav_jax.load_dual_encoder(directory)
    jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)
    stored, original = ({tensor.key: tensor.read() for tensor in read_headers(d)} for d in (directory, dual.directory))
    assert stored.keys() == original.keys()
    for key, value in original.items():
        assert stored[key].shape == value.shape, key
        np.testing.assert_array_equal(stored[key], value)
    model, info = type(dual.model).from_pretrained(directory, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    theirs = dual.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


def test_keys_of_older_files(dual: DualReference, encoder: sav_jax.DualEncoder, tmp_path: Path) -> None:
    """Integer buffers that transformers once stored; anything else that is not known is an error."""
    directory = Path(shutil.copytree(dual.directory, tmp_path / "old"))
    tensors = load_file(directory / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(LENGTH)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(50)[None]
    save_file(tensors, directory / "model.safetensors")
    again = sav_jax.load_dual_encoder(directory)
    jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)
    assert again.fingerprint != encoder.fingerprint
    scale = tensors.pop("logit_scale")
    save_file({**tensors, "logit_scala": scale}, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        sav_jax.load_dual_encoder(directory)
    assert (caught.value.missing, caught.value.unknown) == (["logit_scale"], ["logit_scala"])


def test_bfloat16_stays_close(dual: DualReference, encoder: sav_jax.DualEncoder) -> None:
    half = sav_jax.load_dual_encoder(dual.directory, dtype="bfloat16")
    for ours, theirs in (
        (half.embed_images(images()), encoder.embed_images(images())),
        (half.embed_texts(TEXTS), encoder.embed_texts(TEXTS)),
    ):
        assert ours.dtype == np.float32
        # As for LMMs: some thirty operations at 2^-8 each, with a margin of ten.
        assert np.median(1 - (ours * theirs).sum(1)) < 2e-3


def test_errors(dual: DualReference, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dual.directory, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(sav_jax.UserError, match=r"not a known dual encoder \(known: clip, siglip\)"):
        sav_jax.load_dual_encoder(directory)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(sav_jax.UserError, match="cannot load its image processor"):
        sav_jax.load_dual_encoder(directory)
    for file in [*directory.glob("tokenizer*"), *directory.glob("spiece.model")]:
        file.unlink()
    with pytest.raises(sav_jax.UserError, match="cannot load its tokenizer"):
        sav_jax.load_dual_encoder(directory)
    with pytest.raises(sav_jax.UserError, match=r"model_type 'clip|siglip' is not known"):
        sav_jax.load(dual.directory)


def test_token_ids_are_those_of_transformers(dual: DualReference, encoder: sav_jax.DualEncoder) -> None:
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    theirs = dual.tokenizer(TEXTS, **options)["input_ids"]
    assert type(encoder.tokenizer) is type(dual.tokenizer)
    assert encoder.tokenizer(TEXTS, **options)["input_ids"] == theirs
    assert len({tuple(ids) for ids in theirs}) == len(TEXTS)
    # None of the families knows capitals; SigLIP knows no punctuation either, nor how much space there is.
    same = ["A photo of a dog!", "a PHOTO of a dog!"]
    if type(encoder.tokenizer).__name__ == "SiglipTokenizer":
        same += ["a photo of a dog", "  a photo, (of) a  dog?\n"]
    assert len({tuple(ids) for ids in encoder.tokenizer(same)["input_ids"]}) == 1


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a tokenizer.json"])
def test_siglip_tokenizer_as_the_hub_stores_it(tmp_path: Path, beside: bool) -> None:
    """The config as it was written years ago; and a tokenizer.json, which knows nothing of capitals, is not read."""
    dual = build_siglip(tmp_path)
    unknown, end = (
        {"content": token, "lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
        for token in ("<unk>", "</s>")
    )
    hub = {
        "added_tokens_decoder": {"1": end, "2": unknown},
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "</s>",
        "model_input_names": ["input_ids"],
        "model_max_length": LENGTH,
        "pad_token": "</s>",
        "processor_class": "SiglipProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hub))
    if beside:
        byte_tokenizer([], eos="</s>", pad="</s>").backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = sav_jax.load_dual_encoder(tmp_path).embed_texts(TEXTS)
    np.testing.assert_allclose(ours, dual.run(images()[:1], TEXTS)[1], rtol=0, atol=EMBEDDING)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(sav_jax.UserError, match="cannot load its tokenizer"):
        sav_jax.load_dual_encoder(tmp_path)
