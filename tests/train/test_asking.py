"""Questions a model asks: prompts are beginnings of training conversations, draws repeat, the command writes rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax.cli import main
from sav_jax.errors import UserError
from sav_jax.train.asking import DESCRIBE, Sampling, ask, conversation_of
from sav_jax.train.chats import VICUNA_SQ, Chat, Turn, chat_format, lesson, prompt_of

FEW = Sampling(max_new_tokens=8, description_tokens=8)


@pytest.fixture(scope="module")
def llava(make_reference: Callable[..., Reference]) -> sav_jax.LMM:
    return sav_jax.load(make_reference("llava").directory)


@pytest.mark.parametrize("form_name", ["template", "vicuna-sq"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_the_prompt_is_the_beginning_of_training_conversations(
    lmm: sav_jax.LMM, llava: sav_jax.LMM, family: str, form_name: str
) -> None:
    model = llava if family == "llava" else lmm
    form = VICUNA_SQ if form_name == "vicuna-sq" else chat_format(model.processor, model.stop_token_ids)
    media = sav_jax.Example("-", (picture(37, 53),))
    said = Chat((Turn("user", DESCRIBE), Turn("assistant", "A cat, and a dog.")), media)
    asked = prompt_of(model.processor, said, form, "vuser").token_ids
    for question in ("Why is the sky dark?", "who", "3?"):
        whole = Chat((*said.turns, Turn("vuser", question), Turn("assistant", "So.")), media)
        made = lesson(model.processor, whole, form)
        np.testing.assert_array_equal(made.prompt.token_ids[: len(asked)], asked)
        # What comes next is the first token of the question, and it is learned.
        rest = made.targets[len(asked) :]
        assert rest[0] == made.prompt.token_ids[len(asked)]
        learned = rest[: int(np.argmin(rest >= 0))]
        assert model.processor.tokenizer.decode(learned) == question + form.vuser_end
    described = prompt_of(model.processor, Chat(said.turns[:1], media), form, "assistant").token_ids
    np.testing.assert_array_equal(asked[: len(described)], described)
    assert len(asked) > len(described)


def test_a_space_before_the_question_is_the_questions(llava: sav_jax.LMM) -> None:
    """As in the vocabularies of real models, here with one merge: space and W are one token."""
    from tokenizers import Tokenizer

    settings = json.loads(llava.processor.tokenizer.backend_tokenizer.to_str())
    settings["model"]["merges"] = [["Ġ", "W"]]
    settings["model"]["vocab"]["ĠW"] = max([*settings["model"]["vocab"].values(), len(llava.processor.tokenizer)]) + 1
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        eos_token=llava.processor.tokenizer.eos_token,
        bos_token=llava.processor.tokenizer.bos_token,
    )
    processor = type(llava.processor)(
        llava.processor.config, tokenizer, llava.processor.image_processor, llava.processor.chat_template
    )
    said = Chat((Turn("user", DESCRIBE), Turn("assistant", "A cat.")), sav_jax.Example("-", (picture(37, 53),)))
    asked = prompt_of(processor, said, VICUNA_SQ, "vuser").token_ids
    assert tokenizer.decode(asked).endswith("VUSER:")
    whole = lesson(processor, dataclasses.replace(said, turns=(*said.turns, Turn("vuser", "Who?"))), VICUNA_SQ)
    assert tokenizer.decode(whole.targets[len(asked) : len(asked) + 1]) == " W"


def test_questions_repeat_with_the_seed(lmm: sav_jax.LMM) -> None:
    examples = [sav_jax.Example("-", (picture(30, 30, seed),)) for seed in range(2)]
    first, again, other = (
        ask(lmm, examples, 3, sampling=dataclasses.replace(FEW, seed=seed), batch_size=2, progress=False)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert [one.description for one in first] == [one.description for one in other]
    assert [one.questions for one in first] != [one.questions for one in other]
    assert [len(one.questions) for one in first] == [3, 3]
    assert len(set(first[0].questions)) > 1
    greedy = dataclasses.replace(FEW, temperature=0.0)
    likeliest = ask(lmm, examples, 2, sampling=greedy, batch_size=2, progress=False)
    assert all(one.questions[0] == one.questions[1] for one in likeliest)


def test_the_description_and_the_end_of_a_turn(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model is given when it asks holds what it said when it described."""
    from sav_jax.train import asking

    given: list[Any] = []

    def told(lmm: Any, examples: Any, room: int, *, prompts: Any, **options: Any) -> Any:
        given.append([lmm.processor.tokenizer.decode(prompt.token_ids) for prompt in prompts])
        return [sav_jax.Generation(" A cat.</s> ASSISTANT: and more", ()) for _ in prompts]

    monkeypatch.setattr(asking, "generate", told)
    (asked,) = ask(lmm, [sav_jax.Example("-", (picture(30, 30),))], 2, sampling=FEW, progress=False)
    assert asked == asking.Asked("A cat.", ("A cat.", "A cat."))
    assert given[0][0].endswith(f"\n{DESCRIBE} ASSISTANT:")
    assert given[1] == [given[0][0] + " A cat.</s>VUSER: "] * 2


def test_no_room_and_no_questions(lmm: sav_jax.LMM) -> None:
    example = sav_jax.Example("-", (picture(30, 30),))
    with pytest.raises(UserError, match="num_questions must be at least 1"):
        ask(lmm, [example], 0, progress=False)
    short = dataclasses.replace(lmm, max_tokens=60)
    with pytest.raises(UserError, match=r"reads at most 60 tokens: too few for a prompt of \d+ and questions of 8"):
        ask(short, [example], 1, sampling=FEW, progress=False)


def test_the_run_says_how_it_was_trained(tmp_path: Path) -> None:
    assert conversation_of(tmp_path / "model") == "vicuna-sq"
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"conversation": "template"}}))
    assert conversation_of(tmp_path / "model") == "template"
    (tmp_path / "run.json").write_text("[1]")
    assert conversation_of(tmp_path / "model") == "vicuna-sq"


@pytest.mark.usefixtures("elsewhere")
def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        picture(30, 30, seed).save(tmp_path / f"{seed}.png")
    images = ["--image", str(tmp_path / "0.png"), "--image", str(tmp_path / "1.png")]
    few = ["--num-questions", "2", "--max-new-tokens", "8", "--description-tokens", "8", "--batch-size", "2"]
    command = ["ask", "--model", model, *images, *few]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["image"] for row in rows] == images[1::2]
    assert all(list(row) == ["image", "description", "questions"] and len(row["questions"]) == 2 for row in rows)
    assert main([*command, "--output", "rows.jsonl"]) == 0
    assert Path("rows.jsonl").read_text() == printed
    assert capsys.readouterr().out == ""
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == images[1::2]
    assert lines[1] == "  1. " + " ".join(rows[0]["questions"][0].split())


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--image FILE is missing"),
        (["--image", "no.png"], "--image: no.png is no file"),
        (["--image", "{image}", "--num-questions", "0"], "num_questions must be at least 1"),
        (["--image", "{image}", "--top-p", "2"], "top_p in (0, 1]"),
        (["--image", "{image}", "--top-k", "-1"], "--top-k must not be negative"),
        (["--image", "{image}", "--temperature", "-1"], "temperature must be 0"),
        (["--image", "{image}", "--description-tokens", "0"], "description_tokens must be at least 1"),
        (["--image", "{image}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--image", "{text}"], "cannot"),
    ],
)
def test_what_the_command_refuses(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("no picture")
    given = [word.format(image=tmp_path / "a.png", text=tmp_path / "a.txt") for word in words]
    few = [] if "--description-tokens" in words else ["--description-tokens", "4"]
    assert main(["ask", "--model", model, *given, *few, "--max-new-tokens", "4"]) == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1
    assert problem in errors[0]
