"""The drawn world: the same from the same seed, right by construction, held-out looks held out."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import ImageFont

from sav_jax.world.checkpoint import FAMILIES, QWEN_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE, write_skeleton
from sav_jax.world.facts import ASKERS, OPEN
from sav_jax.world.glyphs import (
    DIGITS,
    HELD_OUT_FACES,
    LETTERS,
    STROKES,
    TRAIN_FACES,
    font_directory,
    glyph_mask,
)
from sav_jax.world.objects import HARMFUL, HARMLESS, OBJECTS, object_mask
from sav_jax.world.questions import ANSWERS, OPTION_LETTERS, ask, phrase
from sav_jax.world.scene import KINDS, LARGE, SIZE, draw, held_out_pair, sample_scene
from sav_jax.world.several import ask_both, ask_several, sample_images
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES, UNNAMED_TEXTURES, shape_mask, texture_pattern
from sav_jax.world.strokes import HELD_OUT_STYLE, styles
from sav_jax.world.things import STYLES

SINGLES = ("scan", "glyph", "shape", "object", "word")


def questions(kind: str, number: int = 150, forms: dict[str, float] | None = None) -> list:
    """(scene, question) for every question of many scenes of a kind."""
    scenes = [sample_scene(seed, kind) for seed in range(number)]
    given = {} if forms is None else {"forms": forms}
    return [(scene, qa) for seed, scene in enumerate(scenes) for qa in ask(scene, seed, 9, **given)]


def held(scene, statement: str) -> bool:
    """Whether a check or a claim about a scene is right, read off its words, independently of how they were made."""
    text = statement.rstrip("?.").replace("true or false: ", "").replace(" an ", " a ")
    words = text.split()
    things = scene.things
    named = {t.name: t for t in things}
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for relation, (dimension, sign) in axis.items():
        found = re.search(rf"the (\w+) (?:is )?{relation} the (\w+)$", text)
        if found:
            one, other = (named[name].center[dimension] for name in found.groups())
            return sign * (one - other) > 0
    if found := re.search(r"the (\w+) (?:is )?larger than the (\w+)$", text):
        one, other = (named[name].box[2] for name in found.groups())
        return one > other
    if found := re.search(r"the (\w+) and the (\w+) have (the same color|different colors)$", text):
        one, other = (named[name].color for name in found.groups()[:2])
        return (one == other) == (found[3] == "the same color")
    if found := re.search(r"more (\w+) things than (\w+) things$", text):
        one, other = (sum(t.color == color for t in things) for color in found.groups())
        return one > other
    if found := re.search(r"more (\w+) shapes than (\w+) shapes$", text):
        one, other = (sum(t.name == name for t in things) for name in found.groups())
        return one > other
    if found := re.search(r"(?:are there|number of) ?(\d)? ?(\w+)? (things|shapes|letters)(?: is (\d))?$", text):
        count = int(found[1] or found[4])
        if found[3] == "letters":
            return count == len(scene.thing.name)
        return count == sum(found[2] is None or found[2] in (t.color, t.name) for t in things)
    if found := re.search(r"(\d) letters$", text):
        return int(found[1]) == len(scene.thing.name)
    if found := re.search(r"word (start|end)s? with (\w)$", text):
        return scene.thing.name[0 if found[1] == "start" else -1] == found[2]
    if "background" in words:
        return words[-1] == scene.background
    if "sign" in words:
        return words[-1] == scene.frame
    if found := re.search(r"the thing (on|at) the (\w+) (?:is )?a (\w+)$", text):
        thing = things[0 if found[2] in ("left", "top") else 1]
        return thing.name == found[3]
    if found := re.search(r"at the (\w+)$", text):
        return scene.place == found[1]
    if found := re.search(r"\ba (\w+) (\w+)(?: in the image)?$", text):
        return any(t.name == found[2] and found[1] in (t.color, t.size, t.texture) for t in things)
    subject = named.get(words[words.index("the") + 1]) if "the" in words else None
    thing = subject or things[0]
    return words[-1] in (thing.name, thing.color, thing.size, thing.texture, thing.category)


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
            for kind in ("scan", "glyph", "word"):
                seen |= {t.face for t in sample_scene(seed, kind, held_out=held_out).things}
    assert faces[False] - {STROKES, ""} == set(TRAIN_FACES)
    assert faces[True] - {STROKES, ""} == set(HELD_OUT_FACES)


def test_held_out_letters_are_never_handwritten():
    for seed in range(200):
        thing = sample_scene(seed, "glyph", category="letter", held_out=True).thing
        assert thing.face in HELD_OUT_FACES


def test_textures_have_two_levels_and_plain_has_one():
    for texture in TEXTURES + UNNAMED_TEXTURES:
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


def test_objects_are_told_apart_and_half_of_them_do_harm():
    assert len(HARMFUL) == len(HARMLESS)
    masks = {name: np.asarray(object_mask(name, 0, 24)) > 127 for name in OBJECTS}
    for a in OBJECTS:
        assert 0.05 < masks[a].mean() < 0.8, a
        for b in OBJECTS:
            if a < b:
                assert (masks[a] != masks[b]).mean() > 0.05, (a, b)


def test_training_never_draws_a_held_out_colour_of_a_shape_or_object():
    colors: dict[bool, set[tuple[str, str]]] = {held_out: set() for held_out in (False, True)}
    for held_out, seen in colors.items():
        for seed in range(250):
            for kind in ("shape", "object", "pair", "group", "crowd"):
                seen |= {(t.color, t.name) for t in sample_scene(seed, kind, held_out=held_out).things}
            for scene in sample_images(2 * seed, held_out=held_out):
                seen |= {(t.color, t.name) for t in scene.things}
    pairs = {(c, n) for c in COLORS for n in SHAPES + OBJECTS if held_out_pair(c, n)}
    assert 0.05 < len(pairs) / (len(COLORS) * len(SHAPES + OBJECTS)) < 0.15
    assert not colors[False] & pairs
    assert len(colors[True] & pairs) > len(pairs) / 3


def test_styles_frames_and_bars_occur_and_no_question_names_what_is_kept_back():
    scenes = [sample_scene(seed, kind) for kind in ("object", "shape", "swatch") for seed in range(300)]
    assert {scene.style for scene in scenes} == set(STYLES)
    assert any(scene.occluder for scene in scenes)
    assert {scene.frame for scene in scenes} == {"", "triangle", "circle", "square"}
    assert {s.thing.texture for s in scenes if s.kind == "swatch"} == set(UNNAMED_TEXTURES)
    text = " ".join(f"{qa.question} {qa.answer}" for kind in KINDS for _, qa in questions(kind, 100))
    kept_back = {*STYLES, *UNNAMED_TEXTURES, "dangerous", "harmful", "safe", "even", "odd", "vowel", "style"}
    assert not kept_back & set(re.findall("[a-z]+", text.lower()))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_known_words_and_questions_are_short(kind):
    for _, qa in questions(kind):
        assert qa.answer in ANSWERS or qa.type == "caption"
        assert "{" not in qa.question
        assert len(qa.question) <= 70 or qa.type in ("choice", "claim")


@pytest.mark.parametrize("kind", KINDS)
def test_yes_and_no_true_and_false_are_what_the_scene_says(kind):
    asked = questions(kind, forms={"check": 0.6, "claim": 0.4})
    answers = [qa.answer for scene, qa in asked if qa.answer in ("yes", "no", "true", "false")]
    for scene, qa in asked:
        if qa.answer in ("yes", "no", "true", "false"):
            assert held(scene, qa.question) == (qa.answer in ("yes", "true")), (qa, scene)
    right = sum(answer in ("yes", "true") for answer in answers)
    assert len(answers) > 200
    # Half, within four standard deviations of as many fair coins.
    assert abs(right - len(answers) / 2) < 4 * (len(answers) / 4) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_options_hold_the_answer_once(kind):
    letters: Counter[str] = Counter()
    for scene, qa in questions(kind, forms={"choice": 1.0}):
        if qa.type != "choice":
            assert qa.type in ("caption", "side") or qa.answer
            continue
        question, *lines = qa.question.split("\n")
        options = [line.split(". ") for line in lines]
        assert [letter for letter, _ in options] == list(OPTION_LETTERS[: len(lines)])
        values = [value for _, value in options]
        assert len(set(values)) == len(values)
        answer = values[OPTION_LETTERS.index(qa.answer)]
        letters[qa.answer] += 1
        if set(values) == {"yes", "no"}:
            assert held(scene, question) == (answer == "yes")
        elif kind in SINGLES:
            thing = scene.thing
            assert answer in (
                thing.name, thing.color, thing.size, thing.texture, thing.category, scene.background, scene.place,
                scene.frame, thing.name[0], thing.name[-1], str(len(thing.name)),
            )  # fmt: skip
    assert letters["A"] > 20
    assert letters["B"] > 20


def test_counts_are_the_scene_s():
    seen: Counter[str] = Counter()
    for kind in ("group", "crowd"):
        for scene, qa in questions(kind, forms={"open": 1.0}):
            wanted = qa.question.rstrip("?.")
            if qa.type == "count":
                assert qa.answer == str(len(scene.things))
            elif qa.type == "count some":
                (color,) = (word for word in wanted.split() if word in COLORS)
                assert qa.answer == str(sum(t.color == color for t in scene.things))
            elif qa.type == "count shape":
                (name,) = (word for word in wanted.split() if word in SHAPES)
                assert qa.answer == str(sum(t.name == name for t in scene.things))
            seen[qa.type] += 1
    assert min(seen[t] for t in ("count", "count some", "count shape")) > 100


def test_relations_follow_positions():
    axis = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
    checked = 0
    for scene, qa in questions("pair", forms={"open": 1.0}):
        named = {t.name: t for t in scene.things}
        assert len(named) == 2
        # The word before the question mark is what the relation refers to.
        other = named.get(qa.question.rstrip("?").split()[-1])
        if qa.type == "relation":
            word = next(r for r in axis if f" is {r} " in qa.question)
            dimension, sign = axis[word]
            assert other is not None
            assert sign * (named[qa.answer].center[dimension] - other.center[dimension]) > 0
        elif qa.type == "side" and other is not None:
            dimension, sign = axis[qa.answer]
            assert sign * (named[qa.question.split()[2]].center[dimension] - other.center[dimension]) > 0
        elif qa.type == "larger":
            assert qa.answer == max(scene.things, key=lambda t: t.box[2]).name
        elif qa.type == "same color":
            assert (qa.answer == "same") == (len({t.color for t in scene.things}) == 1)
        checked += qa.type in ("relation", "side", "larger", "same color")
    assert checked > 300


def test_single_things_are_described_rightly():
    for kind in SINGLES:
        for scene, qa in questions(kind, 80, forms={"open": 1.0}):
            thing = scene.thing
            right = {
                thing.category: thing.name,
                "color": thing.color,
                "background": scene.background,
                "texture": thing.texture,
                "size": thing.size,
                "place": scene.place,
                "board": scene.frame,
                "category": thing.category,
                "first letter": thing.name[0],
                "last letter": thing.name[-1],
                "length": str(len(thing.name)),
                "caption": f"{phrase(thing)} on {scene.background}",
            }
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


def test_two_images_agree_or_differ_as_the_answers_say():
    seen: Counter[str] = Counter()
    for seed in range(0, 1200, 2):
        scenes = sample_images(seed)
        assert scenes == sample_images(seed)
        for qa in ask_several(scenes, seed, 4):
            assert qa.answer in ANSWERS
            text = qa.question.lower()
            index = int("second" in text)
            if qa.type == "ordinal":
                assert qa.answer == scenes[index].thing.name
            elif qa.type == "ordinal count":
                assert qa.answer == str(len(scenes[index].things))
            elif qa.type == "which has more":
                counts = [len(scene.things) for scene in scenes]
                assert counts[("first", "second").index(qa.answer)] == max(counts) > min(counts)
            elif qa.type == "which image":
                name = text.rstrip("?").split()[-1]
                assert scenes[("first", "second").index(qa.answer)].thing.name == name
            elif qa.type in ("same", "is same"):
                if "number" in text:
                    same = len(scenes[0].things) == len(scenes[1].things)
                elif "color" in text:
                    same = scenes[0].thing.color == scenes[1].thing.color
                else:
                    same = scenes[0].thing.name == scenes[1].thing.name
                if qa.type == "same":
                    assert (qa.answer == "same") == same
                else:
                    assert (qa.answer == "yes") == (same == ("the same" in text))
            seen[f"{qa.type} {qa.answer}" if "same" in qa.type else qa.type] += 1
    assert min(seen[t] for t in ("ordinal", "ordinal count", "which has more", "which image", "is ordinal")) > 40
    assert min(seen[t] for t in ("same same", "same different", "is same yes", "is same no")) > 40


def test_every_fact_that_can_be_asked_openly_has_words_for_it():
    for kind, askers in ASKERS.items():
        for seed in range(30):
            rng = np.random.default_rng(seed)
            for _, asker in askers:
                fact = asker(sample_scene(seed, kind), rng)
                if fact is not None and fact.answer:
                    for wording in OPEN[fact.type]:
                        assert "{" not in wording.format(**dict(fact.open))
                    assert fact.answer not in fact.others


@pytest.fixture(scope="module", params=FAMILIES)
def skeleton(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("skeleton")
    return request.param, directory, write_skeleton(directory, request.param)


def test_labels_are_single_tokens_and_text_survives(skeleton):
    from transformers import AutoTokenizer

    family, directory, config = skeleton
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == config["text_config"]["vocab_size"] <= VOCAB_SIZE
    for answer in ANSWERS:
        assert len(tokenizer.encode(answer)) == 1, answer
    for token in SPECIAL_TOKENS if family == "tiny" else QWEN_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    for text in ("What digit is this?", "naïve — 東京 🙂\n\tx = 10;"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for kind in KINDS:
        for _, qa in questions(kind, 30):
            assert len(tokenizer.encode(qa.question)) <= (16 if qa.type != "choice" else 36)


def test_the_chat_template_puts_images_first(skeleton):
    from transformers import AutoTokenizer

    family, directory, _ = skeleton
    tokenizer = AutoTokenizer.from_pretrained(directory)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit is this?"}]}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    images, end = {
        "tiny": (" <image>\n", "<|im_end|>"),
        "tiny-qwen": ("\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n"),
    }[family]
    assert prompt == f"<|im_start|>user{images}what digit is this?{end}<|im_start|>assistant\n"
    answered = [user, {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt}7{end}"


def test_the_skeleton_is_always_the_same_and_its_files_agree(skeleton, tmp_path):
    family, directory, config = skeleton
    assert write_skeleton(tmp_path, family) == config
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (directory / file.name).read_bytes(), file.name
    processor = json.loads((directory / "preprocessor_config.json").read_text())
    if family == "tiny":
        assert processor["image_grid_pinpoints"] == config["image_grid_pinpoints"]
        assert processor["size"]["height"] == config["vision_config"]["image_size"]
    else:
        assert processor["patch_size"] == config["vision_config"]["patch_size"]
    text = config["text_config"]
    assert 64 <= text["num_hidden_layers"] * text["num_attention_heads"] <= 144
