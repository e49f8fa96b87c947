"""The drawn world: the same from the same seed, right by construction, held-out looks held out."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import ImageFont

from sav_jax.world.checkpoint import SPECIAL_TOKENS, VOCAB_SIZE, write_skeleton
from sav_jax.world.glyphs import (
    DIGITS,
    HELD_OUT_FACES,
    LETTERS,
    STROKES,
    TRAIN_FACES,
    font_directory,
    glyph_mask,
)
from sav_jax.world.questions import ANSWERS, ask, ask_both, phrase
from sav_jax.world.scene import LARGE, SIZE, draw, sample_scene
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES, shape_mask, texture_pattern
from sav_jax.world.strokes import HELD_OUT_STYLE, styles

KINDS = ("scan", "glyph", "shape", "pair", "group")


def questions(kind: str, number: int = 150) -> list:
    """(scene, question) for every question of many scenes of a kind."""
    scenes = [sample_scene(seed, kind) for seed in range(number)]
    return [(scene, qa) for seed, scene in enumerate(scenes) for qa in ask(scene, seed, 9)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_scene_and_one_image(kind):
    for seed in range(10):
        first, second = (sample_scene(seed, kind, held_out=seed % 2 == 1) for _ in range(2))
        assert first == second
        assert np.array_equal(np.asarray(draw(first)), np.asarray(draw(second)))
        assert ask(first, seed, 3) == ask(second, seed, 3)
    assert sample_scene(0, kind) != sample_scene(1, kind)


@pytest.mark.parametrize("side", [SIZE, LARGE])
@pytest.mark.parametrize("kind", KINDS)
def test_images_have_their_size_and_things_lie_inside(kind, side):
    for seed in range(20):
        scene = sample_scene(seed, kind, side=side)
        image = draw(scene)
        assert image.size == (side, side)
        assert image.mode == "RGB"
        for thing in scene.things:
            left, top, width, height = thing.box
            assert 0 <= left <= left + width <= side
            assert 0 <= top <= top + height <= side


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_can_be_seen(kind):
    contrast = [np.ptp(np.asarray(draw(sample_scene(seed, kind)), dtype=int), axis=(0, 1)).max() for seed in range(40)]
    assert min(contrast) > 40


def test_a_thing_is_where_its_box_says():
    for seed in range(60):
        scene = sample_scene(seed, "group")
        ground = np.median(np.asarray(draw(scene), dtype=float), axis=(0, 1))
        for thing in scene.things:
            left, top, width, height = thing.box
            patch = np.asarray(draw(scene), dtype=float)[top : top + height, left : left + width]
            assert np.abs(patch - ground).max() > 30, (seed, thing)


@pytest.mark.parametrize("face", [*TRAIN_FACES, *HELD_OUT_FACES])
def test_every_face_has_every_character(face):
    font = ImageFont.truetype(str(font_directory() / f"{face}.ttf"), 24)
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    drawn = set()
    for character in DIGITS + LETTERS + LETTERS.upper():
        mask = font.getmask(character)
        assert mask.getbbox() is not None, character
        assert (mask.getbbox(), bytes(mask)) != missing, character
        drawn.add((mask.size, bytes(mask)))
    # Upper-case I and lower-case l, or O and 0, may look alike; most must not.
    assert len(drawn) >= 60


def test_glyph_masks_fill_their_size_and_no_more():
    for number, character in enumerate(DIGITS + LETTERS):
        for face in (STROKES, TRAIN_FACES[number % len(TRAIN_FACES)]):
            mask = glyph_mask(face, character, number, (32, 32))
            assert max(mask.size) <= 34
            assert max(mask.size) >= 30
            assert 20 < np.asarray(mask).mean() < 235 or character in "1il", (face, character)


def test_training_and_held_out_looks_are_disjoint():
    assert not set(TRAIN_FACES) & set(HELD_OUT_FACES)
    assert set(HELD_OUT_STYLE) == set(DIGITS)
    for digit in DIGITS:
        kept, reserved = (
            [np.concatenate([points for _, points in style]).tobytes() for style in styles(digit, held_out)]
            for held_out in (False, True)
        )
        assert len(reserved) == 1
        assert len(kept) >= 4
        assert not set(kept) & set(reserved)
    faces: dict[bool, set[str]] = {held_out: set() for held_out in (False, True)}
    for held_out, seen in faces.items():
        for seed in range(300):
            for kind in ("scan", "glyph", "pair"):
                seen |= {t.face for t in sample_scene(seed, kind, held_out=held_out).things}
    assert faces[False] - {STROKES, ""} == set(TRAIN_FACES)
    assert faces[True] - {STROKES, ""} == set(HELD_OUT_FACES)


def test_held_out_letters_are_never_handwritten():
    for seed in range(200):
        thing = sample_scene(seed, "glyph", category="letter", held_out=True).thing
        assert thing.face in HELD_OUT_FACES


def test_textures_have_two_levels_and_plain_has_one():
    for texture in TEXTURES:
        share = texture_pattern(texture, 3, (24, 24)).mean()
        assert (share == 0) == (texture == "plain")
        assert share < 0.7
    with pytest.raises(ValueError, match="wavy"):
        texture_pattern("wavy", 0, (8, 8))
    with pytest.raises(ValueError, match="maze"):
        sample_scene(0, "maze")


def test_shapes_are_told_apart():
    masks = {shape: np.asarray(shape_mask(shape, 0, 24)) > 127 for shape in SHAPES}
    for a in SHAPES:
        for b in SHAPES:
            if a < b:
                assert (masks[a] != masks[b]).mean() > 0.05, (a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_known_words_and_questions_are_short(kind):
    for _, qa in questions(kind):
        assert qa.answer in ANSWERS or qa.type == "caption"
        assert "{" not in qa.question
        assert len(qa.question) <= 60


def test_counts_are_the_scene_s():
    seen: Counter[str] = Counter()
    for scene, qa in questions("group"):
        wanted = qa.question.rstrip("?.")
        if qa.type == "count":
            assert qa.answer == str(len(scene.things))
        elif qa.type == "count some":
            (color,) = (word for word in wanted.split() if word in COLORS)
            assert qa.answer == str(sum(t.color == color for t in scene.things))
        elif qa.type == "count shape":
            (name,) = (word for word in wanted.split() if word in SHAPES)
            assert qa.answer == str(sum(t.name == name for t in scene.things))
        elif qa.type == "exists":
            color, name = (next(w for w in wanted.split() if w in words) for words in (COLORS, SHAPES))
            assert (qa.answer == "yes") == any((t.color, t.name) == (color, name) for t in scene.things)
        seen[qa.type] += 1
    assert min(seen[t] for t in ("count", "count some", "count shape", "exists")) > 100


def test_relations_follow_positions():
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    checked = 0
    for scene, qa in questions("pair"):
        named = {t.name: t for t in scene.things}
        assert len(named) == 2
        if qa.type not in ("relation", "is related"):
            continue
        relation = next(r for r in axis if f" {r} the " in qa.question)
        dimension, sign = axis[relation]
        # The word before the question mark is what the relation refers to.
        other = named[qa.question.rstrip("?").split()[-1]]
        if qa.type == "relation":
            assert sign * (named[qa.answer].center[dimension] - other.center[dimension]) > 0
        else:
            subject = named[qa.question.split()[2]]
            holds = sign * (subject.center[dimension] - other.center[dimension]) > 0
            assert (qa.answer == "yes") == holds
        checked += 1
    assert checked > 200


def test_single_things_are_described_rightly():
    for kind in ("scan", "glyph", "shape"):
        for scene, qa in questions(kind, 80):
            thing = scene.thing
            right = {
                thing.category: thing.name,
                "color": thing.color,
                "background": scene.background,
                "texture": thing.texture,
                "size": thing.size,
                "place": scene.place,
                "category": thing.category,
                "caption": f"{phrase(thing)} on {scene.background}",
            }
            if qa.type == "is it":
                assert (qa.answer == "yes") == (qa.question.rstrip("?").split()[-1] == thing.name)
            else:
                assert qa.answer == right[qa.type]


def test_places_are_where_they_say():
    for seed in range(200):
        scene = sample_scene(seed, "shape")
        x, y = scene.thing.center
        offset = {"left": SIZE / 2 - x, "right": x - SIZE / 2, "top": SIZE / 2 - y, "bottom": y - SIZE / 2}
        if scene.place:
            assert offset[scene.place] == max(offset.values())
            assert offset[scene.place] > 3


def test_two_images_are_asked_about_by_their_order():
    first, second = sample_scene(1, "scan"), sample_scene(2, "shape")
    for qa in ask_both(first, second, 5):
        assert qa.answer == (first if "first" in qa.question else second).thing.name


def test_yes_and_no_are_balanced():
    for kind, type_ in (("glyph", "is it"), ("group", "exists"), ("pair", "is related")):
        answers = [qa.answer for _, qa in questions(kind, 400) if qa.type == type_]
        # Half, within four standard deviations of as many fair coins.
        assert abs(answers.count("yes") - len(answers) / 2) < 4 * (len(answers) / 4) ** 0.5


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    directory = tmp_path_factory.mktemp("skeleton")
    return directory, write_skeleton(directory)


def test_labels_are_single_tokens_and_text_survives(skeleton):
    from transformers import AutoTokenizer

    directory, config = skeleton
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == config["text_config"]["vocab_size"] <= VOCAB_SIZE
    for answer in ANSWERS:
        assert len(tokenizer.encode(answer)) == 1, answer
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    for text in ("What digit is this?", "naïve — 東京 🙂\n\tx = 10;"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for kind in KINDS:
        for _, qa in questions(kind, 30):
            assert len(tokenizer.encode(qa.question)) <= 16


def test_the_chat_template_puts_images_first(skeleton):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(skeleton[0])
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit is this?"}]}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user <image>\nwhat digit is this?<|im_end|><|im_start|>assistant\n"
    answered = [user, {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == prompt + "7<|im_end|>"


def test_the_skeleton_is_always_the_same_and_its_files_agree(skeleton, tmp_path):
    directory, config = skeleton
    assert write_skeleton(tmp_path) == config
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (directory / file.name).read_bytes(), file.name
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    assert processor["image_grid_pinpoints"] == config["image_grid_pinpoints"]
    assert processor["size"]["height"] == config["vision_config"]["image_size"]
    text = config["text_config"]
    assert text["num_hidden_layers"] * text["num_attention_heads"] >= 64
