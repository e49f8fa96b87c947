"""AIM: virtual tokens stand in a prompt as in a forward pass made by hand, demonstrations are read once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax import Example, UserError
from sav_jax.aim import (
    Aim,
    DemonstrationBank,
    Layout,
    after_demonstrations,
    load_aim,
    plan_demonstration,
)
from sav_jax.batching import plan_batches
from sav_jax.examples import VirtualTokens
from sav_jax.extract import content_key, plan_prompts, run_batches
from sav_jax.models.fusion import Fusion, FusionConfig, initial_params

# Logits of order one in another program and other company, as in test_families.py.
PARITY = 1e-4
SHOWN = (
    Example("What is it?", (picture(30, 30, 1),), label="a cat", id="a"),
    Example("Is <image> like <image>?", (picture(20, 40, 2), picture(30, 30, 3)), label="no", id="b"),
)
QUERY = Example("Which one?", (picture(37, 53, 4),), id="q")


def made_aim(lmm: sav_jax.LMM, layout: Layout | None = None, kind: str = "linear", seed: int = 0) -> Aim:
    """A projection with random weights."""
    config = FusionConfig(lmm.config.text.hidden_size, kind)
    params = initial_params(config, seed, "random", 0.5)
    rng = np.random.default_rng(seed)
    params = {path: value + rng.normal(size=value.shape).astype(np.float32) * 0.1 for path, value in params.items()}
    return Aim(layout or Layout(answer_lead=" "), config, params, lmm.fingerprint, lmm.name)


@pytest.fixture(scope="module")
def qwen(make_reference: Callable[..., Reference]) -> sav_jax.LMM:
    """A model whose positions have three axes."""
    return sav_jax.load(make_reference("qwen2_vl").directory)


def projected(aim: Aim, hidden: np.ndarray) -> np.ndarray:
    """The projection in NumPy."""
    y = hidden @ aim.params["linear_1/kernel"] + aim.params["linear_1/bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * aim.params["norm/scale"] + aim.params["norm/bias"]


def hidden_states(lmm: sav_jax.LMM, example: Example, answer: str) -> np.ndarray:
    """``[T, D]`` of the prompt with the answer behind it, the library's own plan of a prompt extended."""
    prompt = plan_prompts(lmm, [example])[0].extended(lmm.processor.encode(answer))

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        output: Any = lmm.module.apply({"params": params}, batch)
        return output.hidden

    plans = plan_batches([prompt], 1)
    _, values = next(iter(run_batches(lmm, step, plans, [prompt], [example], progress=False, what="")))
    return values[0, : len(prompt.token_ids)]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_a_prompt_with_virtual_tokens_is_the_forward_pass_put_together_by_hand(
    family: str, lmm: sav_jax.LMM, qwen: sav_jax.LMM
) -> None:
    model = lmm if family == "llava_onevision" else qwen
    aim = made_aim(model)
    tokens = DemonstrationBank(model, aim).get(SHOWN)
    by_hand = []
    for example in SHOWN:
        hidden = hidden_states(model, dataclasses.replace(example, label=None), f" {example.label}")
        # Byte tokenizers: a token per character, the answer last, the question before the end of the user's turn.
        text = model.processor.text(example.question, len(example.images))
        behind = len(text) - text.index("?") - 1
        answer = len(f" {example.label}")
        ids = plan_prompts(model, [example])[0].token_ids
        end = len(model.processor.encode(text[len(text) - behind :]))
        question = ["What is it?"] if "<image>" not in example.question else ["Is", "like", "?"]
        places: list[int] = []
        whole = model.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
        at = len(ids) - end
        for piece in reversed(question):
            encoded = model.processor.tokenizer.convert_ids_to_tokens(model.processor.encode(piece))
            while whole[at - len(encoded) : at] != encoded:
                at -= 1
            at -= len(encoded)
            places = [*range(at, at + len(encoded)), *places]
        places += range(len(ids) + 1, len(ids) + answer)
        by_hand.append(projected(aim, hidden[places]))
    assert [len(t.values) for t in tokens] == [len("What is it?a cat"), len("Islike?no")]
    for made, expected in zip(tokens, by_hand, strict=True):
        np.testing.assert_allclose(made.values, expected, rtol=0, atol=PARITY)

    asked = after_demonstrations(QUERY, tokens, aim.layout)
    processor = model.processor
    text = processor.text("<image>\nWhich one?", 1)
    start = text.index(processor.image_mark)
    head, separator = processor.encode(text[:start]), processor.encode("\n")
    tail = processor.expand(processor.encode(text[start:]), QUERY.image_sizes())
    (prompt,) = plan_prompts(model, [asked])
    first = len(head)
    second = first + len(tokens[0].values) + len(separator)
    expected_places = [
        *range(first, first + len(tokens[0].values)),
        *range(second, second + len(tokens[1].values)),
    ]
    length = second + len(tokens[1].values) + len(separator)
    assert prompt.virtual_index is not None
    assert np.flatnonzero(prompt.virtual_index >= 0).tolist() == expected_places
    real = [*range(first), second - 1, *range(length - 1, len(prompt.token_ids))]
    assert prompt.token_ids[real].tolist() == [*head, *separator, *separator, *tail.token_ids.tolist()]
    np.testing.assert_array_equal(prompt.visual_index[length:], tail.visual_index)
    if prompt.positions is not None:
        np.testing.assert_array_equal(prompt.positions[:length], np.repeat(np.arange(length)[:, None], 3, axis=1))
        assert tail.positions is not None
        np.testing.assert_array_equal(prompt.positions[length:], tail.positions + length)

    # The same with the vectors put among the embeddings here.
    plain = dataclasses.replace(prompt, virtual_index=None)
    values = np.concatenate(by_hand)

    def forward(params: Any, batch: Any) -> Any:
        def run(module: Any) -> Any:
            x, deepstack = module.embed(batch)
            x = x.at[0, np.array(expected_places)].set(values)
            hidden, _ = module.language_model(
                x, batch.lengths, batch.read_positions, batch.positions, deepstack=deepstack
            )
            return module.language_model.logits(hidden[:, len(prompt.token_ids) - 1][:, None])

        return model.module.apply({"params": params}, method=run)

    step = jax.jit(forward)
    plans = plan_batches([plain], 1)
    _, logits = next(iter(run_batches(model, step, plans, [plain], [QUERY], progress=False, what="")))
    ours = sav_jax.next_token_logits(model, [asked], progress=False)
    np.testing.assert_allclose(ours[0], logits[0, 0], rtol=0, atol=PARITY)
    alone = sav_jax.next_token_logits(model, [QUERY], progress=False)
    assert np.abs(ours - alone).max() > 100 * PARITY, "demonstrations would not matter"


def test_every_way_of_asking_takes_virtual_tokens(lmm: sav_jax.LMM) -> None:
    """Prompts with and without, of several lengths, in one batch and alone."""
    aim = made_aim(lmm)
    one, two = DemonstrationBank(lmm, aim).get(SHOWN)
    queries = [
        QUERY,
        after_demonstrations(QUERY, (one,), aim.layout),
        after_demonstrations(QUERY, (one, two), aim.layout),
        after_demonstrations(QUERY, (two, one), aim.layout),
        after_demonstrations(Example("And in words?"), (two, one), aim.layout),
    ]
    heads = sav_jax.extract_heads(lmm, queries, progress=False)
    scores = sav_jax.score_options(lmm, queries, ["yes", "no"], progress=False)
    texts = sav_jax.generate(lmm, queries, 5, progress=False)
    for i, query in enumerate(queries):
        alone = sav_jax.extract_heads(lmm, [query], 1, progress=False)
        np.testing.assert_allclose(heads[i], alone[0], rtol=0, atol=PARITY)
        np.testing.assert_allclose(
            scores[i], sav_jax.score_options(lmm, [query], ["yes", "no"], progress=False)[0], rtol=0, atol=PARITY
        )
        assert texts[i] == sav_jax.generate(lmm, [query], 5, progress=False)[0]
    distances = [np.abs(heads[i] - heads[j]).max() for i in range(5) for j in range(i)]
    assert min(distances) > 100 * PARITY, "what is shown, and in which order, matters"
    keys = {content_key(lmm, p, e) for p, e in zip(plan_prompts(lmm, queries), queries, strict=True)}
    assert len(keys) == len(queries)


def test_virtual_tokens_of_equal_number_have_keys_of_their_own(lmm: sav_jax.LMM) -> None:
    width = lmm.config.text.hidden_size
    rng = np.random.default_rng(0)
    asked = [
        after_demonstrations(QUERY, (VirtualTokens(rng.normal(size=(4, width)).astype(np.float32), key),), Layout())
        for key in "ab"
    ]
    first, second = (content_key(lmm, p, e) for p, e in zip(plan_prompts(lmm, asked), asked, strict=True))
    assert first != second


def test_no_demonstrations_change_nothing() -> None:
    assert after_demonstrations(QUERY, (), Layout()) is QUERY


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [("answer", "no"), ("text", "Islike?no"), ("all", None)],
)
def test_which_tokens_are_taken(lmm: sav_jax.LMM, tokens: str, expected: str | None) -> None:
    processor = lmm.processor
    prompt, places = plan_demonstration(processor, SHOWN[1], Layout(tokens=tokens, answer_lead=" "))
    taken = processor.tokenizer.decode(prompt.token_ids[places].tolist())
    if expected is None:
        text = processor.text(SHOWN[1].question, 2).replace("<image>", "") + " no"
        assert taken == text
    else:
        assert taken == expected
    assert len(prompt.token_ids) == places[-1] + 1, "nothing behind what is taken is read"
    assert (prompt.visual_index[places] < 0).all()


def test_another_layer_is_the_model_cut_there(lmm: sav_jax.LMM, reference: Reference) -> None:
    cut = sav_jax.load(reference.directory, num_layers=1)
    aim = made_aim(lmm, Layout(answer_lead=" ", layer=1))
    (ours,) = DemonstrationBank(lmm, aim).get(SHOWN[:1])
    whole = dataclasses.replace(made_aim(lmm), model=cut.fingerprint)
    (theirs,) = DemonstrationBank(cut, whole).get(SHOWN[:1])
    np.testing.assert_allclose(ours.values, theirs.values, rtol=0, atol=PARITY)
    (last,) = DemonstrationBank(lmm, made_aim(lmm)).get(SHOWN[:1])
    assert np.abs(last.values - ours.values).max() > 100 * PARITY


def test_a_bank_reads_each_demonstration_once(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    aim = made_aim(lmm)
    aim.save(tmp_path / "aim")
    bank = DemonstrationBank(lmm, aim)
    one, two = bank.get(SHOWN)
    assert (bank.passes, len(bank)) == (2, 2)
    again = bank.get([SHOWN[1], SHOWN[0], dataclasses.replace(SHOWN[1], id="same content")])
    assert bank.passes == 2
    assert [t.key for t in again] == [two.key, one.key, two.key]
    other = dataclasses.replace(SHOWN[0], label="a dog")
    assert bank.get([other])[0].key != one.key
    assert bank.passes == 3, "another answer is another demonstration"
    assert bank.nbytes == sum(len(t.values) for t in (one, two, *bank.get([other]))) * aim.config.width * 4
    bank.save(tmp_path / "bank")
    stored = DemonstrationBank(lmm, load_aim(tmp_path / "aim"))
    stored.load(tmp_path / "bank")
    for made, kept in zip((one, two), stored.get(SHOWN), strict=True):
        np.testing.assert_array_equal(made.values, kept.values)
        assert made.key == kept.key
    assert stored.passes == 0
    with pytest.raises(UserError, match="made by another projection or model"):
        DemonstrationBank(lmm, made_aim(lmm, seed=1)).load(tmp_path / "bank")
    with pytest.raises(UserError, match="whose weights or settings"):
        DemonstrationBank(lmm, dataclasses.replace(aim, model="another"))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_projection_is_what_was_saved(lmm: sav_jax.LMM, tmp_path: Path, kind: str) -> None:
    aim = made_aim(lmm, Layout("answer", 1, "\n\n", " "), kind)
    aim.save(tmp_path / "run" / "projection")
    for folder in (tmp_path / "run", tmp_path / "run" / "projection"):
        found = load_aim(folder)
        assert (found.layout, found.config, found.model, found.digest) == (
            aim.layout,
            aim.config,
            aim.model,
            aim.digest,
        )


def test_the_projection_starts_as_documented() -> None:
    config = FusionConfig(8)
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    params = initial_params(config, 0, "identity", 0.25)
    made: Any = Fusion(config).apply(
        {
            "params": {
                "linear_1": {"kernel": params["linear_1/kernel"], "bias": params["linear_1/bias"]},
                "norm": {"scale": params["norm/scale"], "bias": params["norm/bias"]},
            }
        },
        jnp.asarray(x),
    )
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(made, 0.25 * normed, atol=1e-6)  # a handful of float32 roundings of numbers near 1
    with pytest.raises(UserError, match="'identity' is for a linear projection"):
        initial_params(FusionConfig(8, "mlp"), 0, "identity", 1.0)


def test_parameters_at_width_4096() -> None:
    """SelfCP, of the same group, states about 17M for a linear layer and a norm at this width."""
    shapes = jax.eval_shape(
        lambda: Fusion(FusionConfig(4096)).init(jax.random.key(0), jnp.zeros((1, 1, 4096), jnp.float32))
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4096**2 + 3 * 4096 == 16_789_504


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "aim.json").unlink(), r"aim\.json: missing \('sav-jax train aim' writes such folders\)"),
        (lambda d: (d / "aim.json").write_text("{"), r"aim\.json: unreadable"),
        (lambda d: (d / "aim.json").write_text('{"version": 99}'), r"aim\.json: not of version 1"),
        (lambda d: (d / "aim.json").write_text('{"version": 1}'), r"aim\.json: a field is missing"),
        (lambda d: (d / "projection.safetensors").write_bytes(b"x"), r"projection\.safetensors: unreadable"),
        (lambda d: _wider(d / "aim.json"), r"projection\.safetensors: the arrays are not those"),
    ],
)
def test_damaged_folders(lmm: sav_jax.LMM, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    made_aim(lmm).save(tmp_path / "aim")
    spoil(tmp_path / "aim")
    with pytest.raises(UserError, match=message) as caught:
        load_aim(tmp_path / "aim")
    assert "\n" not in str(caught.value)


def _wider(file: Path) -> None:
    settings = json.loads(file.read_text())
    settings["projection"]["width"] += 1
    file.write_text(json.dumps(settings))


def test_bad_demonstrations_and_questions(lmm: sav_jax.LMM) -> None:
    bank = DemonstrationBank(lmm, made_aim(lmm))
    with pytest.raises(UserError, match='row 3: field "label" is missing'):
        bank.get([Example("What?", source="row 3")])
    short = DemonstrationBank(dataclasses.replace(lmm, max_tokens=10), made_aim(lmm))
    with pytest.raises(UserError, match=r"row 4: \d+ tokens; .* reads at most 10"):
        short.get([dataclasses.replace(SHOWN[0], source="row 4")])
    assert bank.passes == short.passes == 0
    token = VirtualTokens(np.zeros((1, 4), np.float32), "")
    with pytest.raises(UserError, match="holds 1 <demonstration> marks for 2"):
        Example("<demonstration> so?", virtual=(token, token))
    with pytest.raises(UserError, match="must hold <image> marks, too"):
        Example("<demonstration> so?", (picture(8, 8),), virtual=(token,))
    for options, message in (({"tokens": "none"}, "tokens 'none' is not known"), ({"layer": -1}, "at least 0")):
        with pytest.raises(UserError, match=message):
            Layout(**options)


def test_a_mark_without_virtual_tokens_is_text(lmm: sav_jax.LMM) -> None:
    (prompt,) = plan_prompts(lmm, [Example("What does <demonstration> mean?")])
    assert prompt.virtual_index is None
    assert "<demonstration>" in lmm.processor.tokenizer.decode(prompt.token_ids.tolist())
