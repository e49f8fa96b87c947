"""Conversations: what is read, how it is written out, and which tokens are learned, token by token."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Reference, picture
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sav_jax
from sav_jax.errors import UserError
from sav_jax.models.processor import Processor
from sav_jax.train.chats import VICUNA_SQ, Chat, Turn, chat_format, lesson, read_chats, with_questions, written


def conversation(*turns: tuple[str, str], images: int = 1) -> Chat:
    pictures = tuple(picture(40, 30, seed) for seed in range(images))
    return Chat(tuple(Turn(role, text) for role, text in turns), sav_jax.Example("-", pictures))


def pieces_of(lmm: sav_jax.LMM, chat: Chat, form: Any) -> tuple[list[int], list[int]]:
    """Text tokens (images taken out) and targets of the same places."""
    made = lesson(lmm.processor, chat, form)
    text = made.prompt.visual_index[:, 0] < 0
    return made.prompt.token_ids[text].tolist(), made.targets[text].tolist()


def expected(lmm: sav_jax.LMM, pieces: list[tuple[str, bool]], bos: bool) -> tuple[list[int], list[int]]:
    """The same from pieces of text; the tokenizer's tokens are bytes, so that pieces are read as the whole is."""
    ids = [lmm.processor.tokenizer.bos_token_id] if bos else []
    targets = [-1] * len(ids)
    for text, learned in pieces:
        tokens = [t for t in lmm.processor.encode(text) if t != lmm.config.image_token_id]
        ids += tokens
        targets += tokens if learned else [-1] * len(tokens)
    return ids, targets


@pytest.fixture(scope="module")
def llava(make_reference: Callable[..., Reference]) -> sav_jax.LMM:
    return sav_jax.load(make_reference("llava").directory)


def test_labelled_rows_take_an_image_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "one.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "one.png", "question": "what?", "label": "a"}\n')
    (chat,) = read_chats(rows, tmp_path / "pictures")
    assert chat.media.images == (tmp_path / "pictures" / "one.png",)
    with pytest.raises(UserError, match="does not exist"):
        read_chats(rows)


def test_masks_of_the_checkpoints_own_template(lmm: sav_jax.LMM) -> None:
    chat = conversation(
        ("user", "What?"), ("assistant", "a cat"), ("vuser", "Why?"), ("assistant", "who knows"), ("user", "And?"),
        ("assistant", "no"),
    )  # fmt: skip
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    end, after = "<|im_end|>", "\n"
    pieces = [
        ("<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n", False),
        ("a cat" + end, True),
        (after + "<|im_start|>vuser\n", False),
        ("Why?" + end, True),
        (after + "<|im_start|>assistant\n", False),
        ("who knows" + end, True),
        (after + "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("no" + end, True),
        (after, False),
    ]
    assert pieces_of(lmm, chat, form) == expected(lmm, pieces, bos=False)


SQ_CASES = {
    "one question": (
        [("user", "What?"), ("assistant", "a cat")],
        [("USER: <image>\nWhat? ASSISTANT:", False), (" a cat</s>", True)],
    ),
    "asks the second": (
        [("user", "What?"), ("assistant", "a cat"), ("vuser", "Why?"), ("assistant", "because")],
        [
            ("USER: <image>\nWhat? ASSISTANT:", False),
            (" a cat</s>", True),
            ("VUSER: ", False),
            ("Why?</s>", True),
            (" ASSISTANT:", False),
            (" because</s>", True),
        ],
    ),
    "is asked, then asks": (
        [
            ("user", "What?"),
            ("assistant", "a cat"),
            ("user", "Where?"),
            ("assistant", "here"),
            ("vuser", "Why?"),
            ("assistant", "so"),
        ],
        [
            ("USER: <image>\nWhat? ASSISTANT:", False),
            (" a cat</s>", True),
            ("USER: Where? ASSISTANT:", False),
            (" here</s>", True),
            ("VUSER: ", False),
            ("Why?</s>", True),
            (" ASSISTANT:", False),
            (" so</s>", True),
        ],
    ),
}


@pytest.mark.parametrize("name", SQ_CASES)
def test_masks_of_sq_llava(llava: sav_jax.LMM, name: str) -> None:
    """The texts are those of SQ-LLaVA's ``conv_vicuna_v1_sq`` and ``preprocess_v1_sq2``, written out by hand."""
    turns, pieces = SQ_CASES[name]
    whole = [(VICUNA_SQ.system, False), *pieces]
    bos = llava.processor.tokenizer.bos_token is not None
    assert pieces_of(llava, conversation(*turns), VICUNA_SQ) == expected(llava, whole, bos)
    assert VICUNA_SQ.system.endswith("do not ask about uncertain details. ")


def joining(processor: Processor) -> Processor:
    """With a BPE tokenizer whose merges reach across words, headers and turns."""
    merges = [
        ("Ġ", "a"),
        ("c", "a"),
        ("ca", "t"),
        ("Ġ", "W"),
        (":", "ĠW"),
        (":", "Ġa"),
        ("h", "y"),
        ("S", "E"),
        ("?", "Ġ"),
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = copy.copy(processor)
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    made.config = dataclasses.replace(processor.config, image_token_id=len(vocabulary) + 10)  # there is none
    return made


def test_masks_where_tokens_reach_across_borders(llava: sav_jax.LMM) -> None:
    """A token with anything in it that is to be learned is learned whole."""
    pieces = [
        ("USER: What? ASSISTANT:", False),
        (" a cat</s>", True),
        ("USER: Where? ASSISTANT:", False),
        (" cat</s>", True),
        ("VUSER: ", False),
        ("Why?</s>", True),
        (" ASSISTANT:", False),
        (" a</s>", True),
    ]
    turns = ("user", "What?"), ("assistant", "a cat"), ("user", "Where?"), ("assistant", "cat"), ("vuser", "Why?")
    made = lesson(joining(llava.processor), conversation(*turns, ("assistant", "a"), images=0), VICUNA_SQ)
    tokens = joining(llava.processor).tokenizer.convert_ids_to_tokens(made.prompt.token_ids.tolist())
    # All text is ASCII: a token has as many characters as its name.
    characters = np.repeat(
        [False, *(learned for _, learned in pieces)], [len(VICUNA_SQ.system), *(len(t) for t, _ in pieces)]
    )
    ends = np.cumsum([len(token) for token in tokens])
    assert ends[-1] == len(characters)
    wanted = [bool(characters[end - len(token) : end].any()) for token, end in zip(tokens, ends, strict=True)]
    np.testing.assert_array_equal(made.targets >= 0, wanted)
    np.testing.assert_array_equal(made.targets[made.targets >= 0], made.prompt.token_ids[made.targets >= 0])
    end = list(zip(tokens, (made.targets >= 0).tolist(), strict=True))[-20:]
    assert [token for token, _ in end[:9]] == ["V", "U", "SE", "R", ":ĠW", "hy", "?", "</s>", "Ġ"]
    assert [learned for _, learned in end[:9]] == [False, False, False, False, True, True, True, True, False]
    assert end[-3:] == [("T", False), (":Ġa", True), ("</s>", True)]


def test_a_training_prompt_begins_as_the_prompt_of_inference(llava: sav_jax.LMM, lmm: sav_jax.LMM) -> None:
    for model in (llava, lmm):
        example = sav_jax.Example("What is it?", (picture(37, 53),))
        asked = model.processor.plan(example.question, example.image_sizes()).token_ids
        chat = Chat((Turn("user", example.question), Turn("assistant", "a cat")), example)
        made = lesson(model.processor, chat, chat_format(model.processor, model.stop_token_ids))
        np.testing.assert_array_equal(made.prompt.token_ids[: len(asked)], asked)
        assert (made.targets[: len(asked)] == -1).all()
        assert made.targets[len(asked)] == made.prompt.token_ids[len(asked)]
        # The last thing learned is to stop.
        assert made.targets[made.targets >= 0][-1] in model.stop_token_ids


def test_questions_are_drawn_anew_but_never_the_first() -> None:
    chat = conversation(*[(role, f"{role} {i}") for i in range(6) for role in ("user", "assistant")])
    drawn = [with_questions(chat, 0.5, np.random.default_rng(seed)) for seed in range(200)]
    asked = np.array([[turn.role == "vuser" for turn in one.turns[::2]] for one in drawn])
    assert not asked[:, 0].any()
    # 1,000 draws at one half: three standard deviations are 0.047.
    assert abs(asked[:, 1:].mean() - 0.5) < 0.05
    assert all(turn.role == "assistant" for one in drawn for turn in one.turns[1::2])
    text_only = conversation(*[(t.role, t.text) for t in chat.turns], images=0)
    assert with_questions(text_only, 1.0, np.random.default_rng(0)) == text_only
    assert with_questions(chat, 0.0, np.random.default_rng(0)) == chat


def said(*texts: str) -> list[dict[str, str]]:
    """Turns as LLaVA's files have them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_images_stand_where_the_rows_put_them(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(20, 30).save(tmp_path / name)
    two = ("<image>\nthis?", "A.", "and <image>?", "B.", "bye")
    rows = [
        {"id": 7, "image": "a.png", "conversations": said("Look.\n<image>", "Yes.")},
        {"image": ["a.png", "b.png"], "conversations": said(*two)},
        {"conversations": said("Hello", "Hi")},
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    chats = read_chats(file)
    assert [chat.media.id for chat in chats] == ["7", "1", "2"]
    assert [chat.has_image for chat in chats] == [True, True, False]
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    texts = [written(chat, form, lmm.processor.image_mark)[0] for chat in chats]
    assert texts[0].startswith("<|im_start|>user")
    assert "Look.\n<image><|im_end|>" in texts[0]
    assert texts[1].index("<image>\nthis?") < texts[1].index("and <image>?")
    assert texts[1].count("<image>") == 2
    assert "bye" not in texts[1]
    assert "<image>" not in texts[2]
    assert all(len(lesson(lmm.processor, chat, form).targets) for chat in chats)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "label": "cat"}) + "\n")
    assert read_chats(tmp_path / "rows.jsonl")[0].turns == (Turn("user", "What?"), Turn("assistant", "cat"))


GOOD = said("a", "b")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": []}, "must be a list of turns"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "turn 1: human and gpt",
        ),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "speaker 'robot' is not known"),
        ({"conversations": [{"from": "human"}]}, 'turn 0: "value" is missing'),
        ({"conversations": [{"value": "a"}]}, 'turn 0: "from" is missing'),
        ({"conversations": ["a"]}, 'turn 0: must be an object with "from" and "value", not a string'),
        ({"conversations": [{"from": "human", "value": 7}]}, 'turn 0: "value" must be a string, not a number'),
        ({"imgae": "a.png", "conversations": GOOD}, 'field "imgae" is not known; is "image" meant?'),
        ({"images": ["a.png"], "conversations": GOOD}, 'field "images" is not known; is "image" meant?'),
        ({"conversation": GOOD}, 'field "conversation" is not known; is "conversations" meant?'),
        ({"video": "a.mp4", "conversations": GOOD}, 'field "video" is read from labelled rows only'),
        ({"image": "", "conversations": GOOD}, "field \"image\" names ''"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "nothing is answered"),
        ({"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "b"}]}, "turn 0: says nothing"),
        (
            {"image": "no.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "does not exist",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]},
            'field "conversations" holds 1 <image> mark for 0 images in field "image"',
        ),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    good = {"conversations": GOOD}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2: ") as caught:
        read_chats(file)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    # Rows of a list on one line are told apart by number and id.
    (tmp_path / "data.json").write_text(json.dumps([good, {"id": "000/7", **row}]))
    with pytest.raises(UserError, match=r'data\.json:1, row 1, id "000/7": ') as caught:
        read_chats(tmp_path / "data.json")
    assert problem in str(caught.value)


def test_published_rows_may_say_more_than_is_read(tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "a.png")
    more = {"model": "", "source": "x", "metadata": {"image": 1}, "image_id": 3, "width": 20}
    row = {"id": "a", "image": "a.png", **more, "conversations": [{**turn, "weight": 1} for turn in GOOD]}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": GOOD}, row]))
    text, chat = read_chats(tmp_path / "data.json")
    assert (text.source, chat.source) == (f"{tmp_path}/data.json:1, row 0", f'{tmp_path}/data.json:1, row 1, id "a"')
    assert (text.has_image, chat.has_image) == (False, True)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; a file of conversations or labelled rows is expected"):
        read_chats(tmp_path)


def test_cutting_keeps_what_fits(lmm: sav_jax.LMM) -> None:
    chat = conversation(("user", "What?"), ("assistant", "a cat"), ("user", "Why?"), ("assistant", "so"))
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    whole = lesson(lmm.processor, chat, form)
    first = int(np.flatnonzero(whole.targets >= 0)[0])
    short = lesson(lmm.processor, chat, form, first + 3)
    np.testing.assert_array_equal(short.targets, whole.targets[: first + 3])
    assert len(short.prompt.token_ids) == len(short.prompt.visual_index) == first + 3
    with pytest.raises(UserError, match=f"nothing is to be learned within {first} tokens"):
        lesson(lmm.processor, chat, form, first)
