"""AIM's claims (arXiv 2406.07588): demonstrations as virtual tokens, made by the frozen model and a trained projection.

What is trained and asked is in ``aim_measured.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sav_jax.eval.statistics import Interval
from scripts.reproduction.aim_measured import DESCRIBED, PART, SHOTS, Measured, asked_of, measured, size_of
from scripts.reproduction.attention import attended
from scripts.reproduction.heads import per_task
from scripts.reproduction.study import Answers, Finding, Study, Table, finding
from scripts.reproduction.trained import by_seed, carried, mean, of_seeds, over_both, trainings

HEADLINES = (
    "Demonstrations as turns of a conversation degrade a model that learned without any (questions)",
    "Fused tokens repair what demonstrations as turns of a conversation break (questions)",
    "Fused tokens are better than no demonstrations (questions)",
)
"""Claims for the README."""
METHODS = "zero-shot", "icl", "icl-turns", "icl-none", "aim"
SEPARATORS = 2
"""Tokens between demonstrations that "at text-length cost" is to allow."""
CAPTIONS = {
    "reproduction-aim": "Tasks whose question does not say what is meant, by number of demonstrations: accuracy "
    "(bars: lowest and highest of the seeds), tokens of a prompt, memory of its keys and values, and time to read it."
}


CUE = (
    "prompts of `icl` end in the word `Answer:`, which these models never learned and those of `icl-turns` and `aim` "
    "lack: see what it alone does, and the row of turns"
)


Sides: TypeAlias = tuple[Mapping[str, Answers], Mapping[str, Answers]]
"""Task -> answers of what a claim puts ahead, and of its rival."""
LOOKED = "A model that begins to answer looks at demonstrations' text more than at their images"


def measure(study: Study) -> list[Finding]:
    """All rows of AIM."""
    rows = []
    for model in study.models:
        rows += rows_of(study, model, measured(study, model))
        looked = attended(study, model, asked_of(study), SHOTS, size_of(study).middle)
        rows.append(attention_row(study, model, looked))
    return rows


def attention_row(study: Study, model: str, looked: Mapping[str, Any]) -> Finding:
    """Where the model looks before it answers."""
    tasks = list(looked)
    text, tokens, every = (
        per_task(looked, name) for name in ("text of the attention", "text of the tokens", "demonstrations")
    )
    seeds = len(next(iter(text.values())).values)
    return finding(
        PART,
        over_both(text, tokens),
        claim=LOOKED,
        source="AIM, figure 3",
        model=model,
        setting=f"{', '.join(tasks)}; {size_of(study).middle} demonstrations as turns; all heads of all layers, at the "
        "last token of the prompt; the text's share of the attention against its share of the tokens",
        values={
            "text's share of the attention on demonstrations": mean(text),
            "of their tokens": mean(tokens),
            "attention on demonstrations, of all": mean(every),
        },
        seeds=seeds,
        note="the paper shows one map of one prompt; tokens of the template are neither text nor image",
    )


def rows_of(study: Study, model: str, found: Measured) -> list[Finding]:
    """The rows of a model."""
    size, seeds = size_of(study), len(trainings(study))
    middle, least, most = size.middle, min(size.numbers), max(size.numbers)
    drawn, digits = found.unsaid.values()
    length = f"{size.steps} steps each" + (", loss still falling" if study.quick else ", as the preset has")
    trained = f"{seeds} projections of {length}; demonstrations of their own"
    images = "it saw prompts of two images in training" if model == "tiny" else "it saw one image a prompt in training"
    # Of other models one does not know what they saw and learned.
    images, cue = (images, CUE) if study.bundled(model) else ("", "")

    def row(
        claim: str, source: str, setting: str, of: Interval | Sides, values: Mapping[str, float], note: str = ""
    ) -> Finding:
        interval = of if isinstance(of, Interval) else over_both(*of)
        if not isinstance(of, Interval) and interval.ci is not None and interval.ci[0] > 0:
            note = "\n".join(filter(None, [note, carried(*of)]))
        return finding(
            PART,
            interval,
            claim=claim,
            source=f"AIM, {source}",
            model=model,
            setting=setting,
            values=dict(values),
            seeds=seeds,
            note=note,
        )

    def answers(tasks: Sequence[str], *methods: str, number: int = middle) -> list[dict[str, Answers]]:
        return [found.answers(tasks, method, number) for method in methods]

    rows = []
    for tasks, what, unit in (
        (asked_of(study), f"{', '.join(asked_of(study))}: accuracy", "accuracy"),
        ((DESCRIBED,), f"{DESCRIBED}: CIDEr-D times 100", "CIDEr"),
    ):
        none, icl, turns, word, aim = answers(tasks, "zero-shot", "icl", "icl-turns", "icl-none", "aim")
        kind = "captions" if unit == "CIDEr" else "questions"
        setting = f"{what}, {middle} demonstrations"
        values = {"zero-shot": mean(none), "aim": mean(aim)}
        in_prompt = {"icl": mean(icl), "the word alone": mean(word)}
        for shown, theirs, how, note in (
            (icl, in_prompt, "in the prompt", cue),
            (turns, {"icl-turns": mean(turns)}, "as turns of a conversation", ""),
        ):
            rows += [
                row(
                    f"Demonstrations {how} degrade a model that learned without any ({kind})",
                    "section 1",
                    setting,
                    (none, shown),
                    {"zero-shot": values["zero-shot"], **theirs},
                    "; ".join(filter(None, [images, note])),
                ),
                row(
                    f"Fused tokens repair what demonstrations {how} break ({kind})",
                    "sections 3 and 4",
                    setting,
                    (aim, shown),
                    {**values, **theirs},
                    "; ".join(filter(None, [trained, note])),
                ),
            ]
        rows.append(
            row(
                f"Fused tokens are better than no demonstrations ({kind})",
                "section 4",
                setting,
                (aim, none),
                values,
                "the question says all that must be known; no document of the training is of this kind",
            )
        )
    for names, kind in ((drawn, "the projection was trained on this kind"), (digits, "digits, new to the projection")):
        none, icl, turns, aim = answers(names, "zero-shot", "icl", "icl-turns", "aim")
        values = {"zero-shot": mean(none), "icl": mean(icl), "icl-turns": mean(turns), "aim": mean(aim)}
        setting = f"{len(names)} tasks whose question does not say what is meant, {middle} demonstrations"
        rows += [
            row(
                f"Fused tokens teach what only demonstrations say: better than none ({kind})",
                "section 4",
                setting,
                (aim, none),
                values,
                trained,
            ),
            row(
                f"Where demonstrations alone tell what is meant, fused tokens do less harm than they ({kind})",
                "section 4",
                setting,
                (aim, icl),
                values,
                f"{trained}; see the row before whether anything is taught",
            ),
            row(
                "Where demonstrations alone tell what is meant, fused tokens serve better than turns of a conversation "
                f"({kind})",
                "section 4",
                setting,
                (aim, turns),
                values,
                f"{trained}; against none, see above",
            ),
            row(
                f"Turns of a conversation teach what only demonstrations say: better than none ({kind})",
                "a control",
                setting,
                (turns, none),
                values,
                images,
            ),
        ]
    every = [*drawn, *digits]
    (few,), (many,) = answers(every, "aim", number=least), answers(every, "aim", number=most)
    rows.append(
        row(
            "More demonstrations help fused tokens",
            "figure 1",
            f"{len(every)} tasks whose question does not say what is meant, {most} against {least} demonstrations",
            (many, few),
            {f"{least} demonstrations": mean(few), f"{most} demonstrations": mean(many)},
            f"projections were trained with {', '.join(map(str, size.shots[:-1]))} or {size.shots[-1]}"
            if len(size.shots) > 1
            else f"projections were trained with {size.shots[0]}",
        )
    )
    return [*rows, *cost_rows(found, row, every, most)]


def cost_rows(found: Measured, row: Callable[..., Finding], every: Sequence[str], most: int) -> list[Finding]:
    """What demonstrations cost."""
    memory = {method: found.fact(every, method, most, "cache_bytes") for method in ("icl", "aim")}
    saved = [100 * (1 - a / i) for a, i in zip(memory["aim"], memory["icl"], strict=True)]
    seconds = {
        method: [float(np.median(spent["seconds"][method][str(most)])) for spent in found.costs]
        for method in ("icl", "aim")
    }
    faster = [100 * (1 - a / i) for a, i in zip(seconds["aim"], seconds["icl"], strict=True)]
    least = min(map(int, found.costs[0]["tokens"]["aim"]))
    adds = {
        method: np.array(
            [spent["tokens"][method][str(most)] - spent["tokens"][method][str(least)] for spent in found.costs]
        )
        / (most - least)
        for method in ("icl", "aim")
    }
    text = np.array([spent["text_tokens"] for spent in found.costs])
    passes = np.array([spent["passes"] for spent in found.costs], float)
    again = 100 * (1 - passes[:, 1:].sum(axis=1) / (2 * passes[:, 0]))

    return [
        row(
            "Fused tokens need less memory than demonstrations in the prompt",
            "figure 1",
            f"keys and values of a prompt with {most} demonstrations, less than of real ones, in %",
            of_seeds(saved),
            {f"{method}, kB": float(np.mean(of)) / 1000 for method, of in memory.items()},
            "keys and values are counted, not measured; demonstrations of all seeds are as long",
        ),
        row(
            f"A demonstration costs a prompt the tokens of its text and no more than {SEPARATORS} besides",
            "section 3",
            f"tokens that a demonstration adds to a prompt, of up to {most}; {SEPARATORS} added",
            of_seeds((text + SEPARATORS - adds["aim"]).tolist()),
            {"icl": adds["icl"].mean(), "aim": adds["aim"].mean(), "its text": text.mean()},
            "of the difference one unit is a token; what is added separates demonstrations, and was set when figures "
            "were known: the row describes and does not test",
        ),
        row(
            "Fused tokens make queries faster than demonstrations in the prompt",
            "figure 1",
            f"reading a prompt with {most} demonstrations, one at a time, less time than with real ones, in %",
            of_seeds(faster),
            {f"{method}, ms": 1000 * float(np.median(of)) for method, of in seconds.items()},
            "medians of five repetitions, methods taking turns; every seed has demonstrations of its own",
        ),
        row(
            "A bank reads demonstrations once, whatever is asked later",
            "section 3",
            f"passes over {most} demonstrations that a second set of queries, and another process, spare, in %",
            of_seeds(again.tolist()),
            dict(zip(("passes, first queries", "second queries", "bank from disk"), passes.mean(axis=0), strict=True)),
            "a count, which no seed changes",
        ),
    ]


REASONS = {
    "Fused tokens are better than no demonstrations (questions)": "The question says all; what stands before it can "
    "only disturb, and the projection was trained where demonstrations were needed.",
    "Fused tokens are better than no demonstrations (captions)": "No document of the training has a caption: tokens "
    "fused for short answers draw short answers.",
    **{
        f"{claim} ({kind})": why
        for kind, wide in (
            (
                "the projection was trained on this kind",
                "Projections gain unlike amounts (the picture's bars): with three of them the interval is wide.",
            ),
            ("digits, new to the projection", "Digits stand in no document of the projection's training."),
        )
        for claim, why in (
            ("Fused tokens teach what only demonstrations say: better than none", wide),
            (
                "Turns of a conversation teach what only demonstrations say: better than none",
                "No prompt of these models' training had demonstrations: they harm more than they tell.",
            ),
            (
                "Where demonstrations alone tell what is meant, fused tokens do less harm than they",
                "Digits stand in no document of the projection's training.",
            ),
            (
                "Where demonstrations alone tell what is meant, fused tokens serve better than turns of a conversation",
                "Digits stand in no document of the projection's training.",
            ),
        )
    },
    LOOKED: "These models learned to name what is in a picture: answers are in images, and their heads look there.",
    "More demonstrations help fused tokens": "Projections saw at most four in training; from 4 to 8 accuracy falls on "
    "`tiny-qwen` (table).",
}
"""What one thinks of claims that do not hold."""


def tables(study: Study) -> list[Table]:
    """Accuracy and costs by number of demonstrations, and by task."""
    size = size_of(study)
    by_number, by_task = [], []
    for model in study.models:
        found = measured(study, model)
        for group, tasks in found.unsaid.items():
            none = found.answers(tasks, "zero-shot", size.middle)
            by_number.append((model, group, "0", f"{mean(none):.1f}", "", "", "", "", "", ""))
            for number in size.numbers:
                icl, aim = (found.answers(tasks, method, number) for method in ("icl", "aim"))
                cost = [
                    f"{np.mean(found.fact(tasks, method, number, name)) / unit:.0f}"
                    for name, unit in (("prompt_tokens", 1), ("cache_bytes", 1000))
                    for method in ("icl", "aim")
                ]
                less = f"{_shown(over_both(aim, icl))}", f"{_shown(over_both(aim, none))}"
                scores = f"{mean(icl):.1f}", f"{mean(aim):.1f}"
                by_number.append(
                    (model, group, str(number), "", *scores, *less, " / ".join(cost[:2]), " / ".join(cost[2:]))
                )
        names = [*(name for tasks in found.unsaid.values() for name in tasks), *asked_of(study), DESCRIBED]
        for name in names:
            of_task = [f"{mean(found.answers([name], method, size.middle)):.1f}" for method in METHODS]
            by_task.append((model, name, *of_task))
    head = "model", "scenes", "demonstrations"
    return [
        Table(
            "AIM by number of demonstrations, on tasks whose question does not say what is meant",
            (
                *head,
                "zero-shot",
                "icl",
                "aim",
                "aim - icl",
                "aim - zero-shot",
                "tokens, icl / aim",
                "cache, kB, icl / aim",
            ),
            tuple(by_number),
            "Accuracy in %; brackets: 95 % over queries and over seeds, the wider of the two at either end.",
        ),
        Table(
            f"AIM by task, {size.middle} demonstrations",
            ("model", "task", *METHODS),
            tuple(by_task),
            "Accuracy in %; of captions CIDEr-D times 100. `icl-none`: the layout of `icl` without demonstrations. "
            "Tasks that stand in the tables of Sparse Attention Vectors "
            f"are asked {size.others} queries of each seed here, after other demonstrations.",
        ),
    ]


def _shown(interval: Interval) -> str:
    return f"{interval.mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def plots(study: Study) -> list[Path]:
    """Accuracy, tokens, memory and time against the number of demonstrations."""
    from sav_jax.eval.report.drawing import line_style, new_figure, styled

    size = size_of(study)
    path = study.pages / "reproduction-aim.svg"
    with styled():
        drawing = new_figure(10.0, 2.9 * len(study.models))
        axes = drawing.subplots(len(study.models), 4, squeeze=False)
        for line, model in zip(axes, study.models, strict=True):
            found = measured(study, model)
            tasks = [name for of in found.unsaid.values() for name in of]
            numbers = list(size.numbers)
            for place, method in enumerate(("icl", "aim")):
                style = line_style(place)
                of = [found.answers(tasks, method, number) for number in numbers]
                scores = [mean(one) for one in of]
                seeds = [by_seed(one, {task: _nothing(a) for task, a in one.items()}) for one in of]
                spread = np.array(
                    [[s - min(of_seed), max(of_seed) - s] for s, of_seed in zip(scores, seeds, strict=True)]
                )
                line[0].errorbar(numbers, scores, yerr=np.maximum(spread.T, 0), capsize=2, label=method, **style)
                tokens = [np.mean(found.fact(tasks, method, number, "prompt_tokens")) for number in numbers]
                memory = [np.mean(found.fact(tasks, method, number, "cache_bytes")) / 1000 for number in numbers]
                times = [
                    1000 * np.mean([np.median(spent["seconds"][method][str(number)]) for spent in found.costs])
                    for number in numbers
                ]
                for axis, values in zip(line[1:], (tokens, memory, times), strict=True):
                    axis.plot(numbers, values, **style)
            none = mean(found.answers(tasks, "zero-shot", size.middle))
            line[0].axhline(none, color="0.5", linestyle=":", label="zero-shot")
            for axis, what in zip(
                line, ("accuracy, %", "tokens of a prompt", "cache, kB", "ms per query"), strict=True
            ):
                axis.set(title=what, xlabel="demonstrations", xticks=numbers)
                axis.set_ylim(bottom=0)
            line[0].set_ylabel(model)
            line[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, metadata={"Date": None})
    return [path]


def _nothing(answers: Answers) -> Answers:
    return Answers(tuple(np.zeros_like(values) for values in answers.values), answers.clusters)
