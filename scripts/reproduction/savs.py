"""The claims of the SAVs paper (arXiv 2412.00142)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.reproduction.drawing import Line, curves, matrix
from scripts.reproduction.halves import TASK as CONTROL
from scripts.reproduction.halves import halved
from scripts.reproduction.heads import HEADS, per_task
from scripts.reproduction.rescoring import NUMBERS, SHOTS, heads_of, rescored, tasks_of, with_shots
from scripts.reproduction.rivals import (
    against_demonstrations,
    against_tuning,
    against_vectors,
    asked,
    in_context,
    lora_tasks,
    mean,
    methods_of,
    mtv_tasks,
    prepare,
    tuned,
    tuned_tasks,
    turns_of,
    unreadable,
    vectors,
)
from scripts.reproduction.study import Answers, Finding, Study, Table, finding, means_of, untested
from scripts.reproduction.tower import TOWER, WITH_WORDS, asked_differently, towers
from scripts.reproduction.trained import carried, over_both
from scripts.reproduction.variants import lora_elsewhere, losses, varied

__all__ = ["prepare"]  # which the study runs first on other models
PAPER = "arXiv 2412.00142"
MARGIN = 1.0
"""Points that "suffices" and "no worse" allow."""

SIMILAR = (
    ("digits", "digits-scattered"),
    ("digits-scattered", "digits"),
    ("drawn-hallucination", "drawn-paired"),
    ("drawn-paired", "drawn-hallucination"),
)
"""Heads of the first serve the second: naming digits, and checking what is said about a picture."""

WITH_TEXT = ("drawn-hallucination", "drawn-paired", "drawn-multiimage")
"""Of the study's own tasks those whose answer depends on the question as much as on the image."""

NEW = ("drawn-safety", "digits", "digits-scattered")
"""What the bundled models were never asked, or never shown."""

HEADLINES = (
    "SAVs beat asking the model, whose likeliest of the offered answers is taken.",
    "SAVs beat asking the model where its training never went.",
    "A control: harm is told better than arbitrary halves of the same objects.",
    "SAVs beat in-context learning with 4 demonstrations as turns of a conversation (likeliest answer).",
    "SAVs beat LoRA on the same examples.",
    "SAVs beat LoRA on the same examples of tasks that come in pairs.",
    f"Twenty heads suffice: no more than {MARGIN:g} point below any other number of heads.",
    "Twenty heads beat all heads voting.",
    "Heads chosen on a similar task beat random ones.",
)
"""Claims for the README."""

_STRONG_RIVAL = (
    "The drawn tasks mostly ask what these models were trained to answer, so that asking is a far stronger rival than "
    "in the paper, whose models are below chance on its two safety benchmarks; on digits by hand and on what is "
    "dangerous, which training never showed, SAVs are ahead."
)
_FEW_HEADS = (
    "Twenty are a fifth of these models' 96 heads, and a fortieth of the paper's 784: most heads of so small a model "
    "know something of every task."
)

REASONS: dict[str, str] = {
    "SAVs beat asking the model (zero-shot), whose written answers are read.": _STRONG_RIVAL,
    "SAVs beat asking the model, whose likeliest of the offered answers is taken.": _STRONG_RIVAL,
    f"Twenty heads suffice: no more than {MARGIN:g} point below any other number of heads.": _FEW_HEADS,
    "Twenty heads beat all heads voting.": _FEW_HEADS,
    "Five heads, a twentieth of all, beat all heads voting.": _FEW_HEADS,
    "A control: harm is told better than arbitrary halves of the same objects.": (
        "The heads know which object it is. Which objects are dangerous is to a model that was never told a division "
        "like any other: the examples tell it."
    ),
    "SAVs beat the vision tower alone on real handwritten digits.": (
        "The tower was trained to tell drawn digits apart: the decoder has nothing to add to that."
    ),
    "Heads chosen on a similar task serve as well as the task's own: no more than 2 points below.": (
        "What is lost depends on the direction (see the matrix), as in the paper."
    ),
    "SAVs beat LoRA on the same examples of tasks that come in pairs.": (
        "Naming digits and checking claims is near to what these models were trained on: a short training sharpens it."
    ),
    "Choosing twenty heads beats choosing as many whole layers as are best.": _FEW_HEADS,
    "Heads chosen on a similar task lose less than LoRA tuned on it.": (
        "Tasks of a pair name the same things, or check the same kinds of claims, in the same words: LoRA's answers "
        "carry over. The paper's are of unlike data sets."
    ),
    f"Nearest class means on chosen heads are no more than {MARGIN:g} point below nearest neighbours on all heads.": (
        "Neighbours on all heads are ahead on `drawn-safety` and pairs and far behind on textures: which of the two is "
        "better depends on the task."
    ),
    f"Nearest class means on chosen heads are no more than {MARGIN:g} point below a linear probe on all heads.": (
        "96 heads of 24 numbers are few enough for a ridge classifier whose penalty is chosen on the examples; the "
        "paper's probe has 784 heads of 128."
    ),
}
"""What one thinks of claims that do not hold."""


def measure(study: Study) -> Iterator[Finding]:
    """All findings, model by model."""
    for model in study.models:
        yield from _of_model(study, model)


def _of_model(study: Study, model: str) -> Iterator[Finding]:
    found: list[Finding] = []
    tasks = tasks_of(study)

    def add(
        claim: str, source: str, setting: str, better: Mapping[str, Answers], worse: Mapping[str, Answers], **rest: Any
    ) -> None:
        names, missing = rest.pop("names"), rest.pop("missing", "")
        if not better:  # with no word of what is missing, the claim is not about such a model
            if not missing:
                return
            claimed = {"claim": claim, "source": f"{PAPER}, {source}", "model": model}
            found.append(untested("savs", missing, setting=f"{SHOTS} shots", **claimed))
            return
        values = rest.pop("curve", None) or {name: mean(of) for name, of in zip(names, (better, worse), strict=True)}
        values |= rest.pop("values", {})
        seeds = len(next(iter(better.values())).values)
        margin = rest.pop("margin", 0.0)
        interval = over_both(better, worse, margin)
        if interval.ci is not None and interval.ci[0] > 0 and not margin:
            rest["note"] = "\n".join(filter(None, [rest.get("note", ""), carried(better, worse)]))
        found.append(
            finding(
                "savs",
                interval,
                claim=claim,
                source=f"{PAPER}, {source}",
                model=model,
                setting=setting,
                values=values,
                seeds=seeds,
                **rest,
            )
        )

    folder, many = asked(study, model), f"{means_of(tasks)}, {SHOTS} shots"
    sav = methods_of(folder, "sav", tasks)
    main = "main table"
    add(
        "SAVs beat asking the model (zero-shot), whose written answers are read.",
        main,
        many,
        sav,
        methods_of(folder, "zero-shot", tasks),
        names=("sav", "zero-shot"),
        note=unreadable(folder, tasks),
    )
    add(
        "SAVs beat asking the model, whose likeliest of the offered answers is taken.",
        main,
        many,
        sav,
        methods_of(folder, "zero-shot-likelihood", tasks),
        names=("sav", "zero-shot-likelihood"),
    )
    ours = study.bundled(model)  # of others one does not know where training went
    new = [task for task in tasks if ours and task in NEW]
    add(
        "SAVs beat asking the model where its training never went.",
        main,
        f"{', '.join(new)}; {SHOTS} shots; likeliest answer",
        {task: sav[task] for task in new},
        methods_of(folder, "zero-shot-likelihood", new),
        names=("sav", "zero-shot-likelihood"),
        missing=f"of tasks that training never asked, {', '.join(NEW)}, none is among these." if ours else "",
        note="Nothing in training was called dangerous, and no digit was written by a hand (world.md). On drawn-safety "
        "asking is below chance: see the accuracies by task. `drawn-styles`, which training never asked either, is not "
        "among these tasks: there neither side is above chance (world.md). Training drew digits, some of them scanned "
        "at 8x8 pixels as the real ones were.",
    )
    control = halved(study, model) if ours and CONTROL in tasks else {}
    add(
        "A control: harm is told better than arbitrary halves of the same objects.",
        "safety",
        f"{CONTROL}; {SHOTS} shots; against the mean of divisions of its objects that mean nothing",
        per_task(control, "harm"),
        per_task(control, "halves"),
        names=("harmful or not", "arbitrary halves"),
        missing=f"{CONTROL} is not among these tasks." if ours else "",
    )
    against_demonstrations(study, model, add, many)
    heads = rescored(study, model)
    twenty, every = per_task(heads, f"{HEADS} heads"), per_task(heads, "all heads")
    curve = {f"{n} heads": per_task(heads, f"{n} heads") for n in NUMBERS} | {"all heads": every}
    best = max((name for name in curve if name != f"{HEADS} heads"), key=lambda name: mean(curve[name]))
    add(
        f"Twenty heads suffice: no more than {MARGIN:g} point below any other number of heads.",
        "accuracy over heads",
        f"{many}; the best other number ({best}), {MARGIN:g} point added",
        twenty,
        curve[best],
        names=("20 heads", best),
        curve={name: mean(curve[name]) for name in curve},
        margin=MARGIN,
        note="The best other number is the best on these very queries, which is hard on the claim."
        + ours * "\nTwenty are a fifth of these models' 96 heads; the paper's are a fortieth of 784.",
    )
    add(
        "Twenty heads beat all heads voting.",
        "accuracy over heads",
        many,
        twenty,
        every,
        names=("20 heads", "all heads"),
    )
    one = per_task(heads, "1 heads")
    add(
        "Five heads, a twentieth of all, beat all heads voting.",
        "less than 5 % of the heads",
        many,
        curve["5 heads"],
        every,
        names=("5 heads", "all heads"),
    )
    add(
        "Twenty heads beat the best one alone.",
        "accuracy over heads",
        many,
        twenty,
        one,
        names=("20 heads", "1 head"),
    )
    layers = {n: per_task(varied(study, model), f"{n} layers") for n in range(1, 1 + heads_of(study, model)[0])}
    best_layers = max(layers, key=lambda n: mean(layers[n]))
    for claim, number, told in (
        ("Choosing twenty heads beats choosing two whole layers.", 2, "the best 2 layers"),
        (
            "Choosing twenty heads beats choosing as many whole layers as are best.",
            best_layers,
            f"the best number of layers ({best_layers}) on these very queries",
        ),
    ):
        add(
            claim,
            "heads or layers",
            f"{many}; {told}; a layer is one vector, chosen and voting as heads do (two vote as the better one)",
            twenty,
            layers[number],
            names=("20 heads", f"{number} layers"),
            curve={"20 heads": mean(twenty), **{f"{n} layers": mean(of) for n, of in layers.items()}},
        )
    random = per_task(heads, "random heads")
    setting = f"{many}; against the mean of twenty random sets"
    add(
        "The chosen twenty heads beat twenty random ones.",
        "method",
        setting,
        twenty,
        random,
        names=("chosen", "random"),
    )
    for more, less in ((20, 5), (50, 20)):
        enough = with_shots(heads, more)
        numbers = [n for n in NUMBERS if set(enough) <= set(with_shots(heads, n))]  # means of the same tasks
        shots = {n: per_task(heads, f"{n} shots", enough, "shots") for n in numbers}
        add(
            f"More examples help: {more} of a class beat {less}.",
            "accuracy over examples per label",
            f"{means_of(enough)}, {HEADS} heads; the same queries, which are others than in rows of 20 shots alone",
            shots[more],
            shots[less],
            names=(f"{more} shots", f"{less} shots"),
            curve={f"{n} shots": mean(of) for n, of in shots.items() if of},
            missing=f"no task has {more} examples of each class and others to ask.",
        )
    _transfers(heads, add)
    folder = asked(study, model)
    for method, what in (("centroid-last-layer", "the last layer's"), ("centroid-all-layers", "all layers'")):
        claim = f"The chosen heads beat {what} features."
        add(claim, "table of version 2", many, sav, methods_of(folder, method, tasks), names=("sav", method))
    for method, what in (("knn", "nearest neighbours"), ("ridge", "a linear probe")):
        claim = f"Nearest class means on chosen heads are no more than {MARGIN:g} point below {what} on all heads."
        setting, rival = f"{many}; {MARGIN:g} point added", methods_of(folder, method, tasks)
        add(claim, "choice of classifier", setting, sav, rival, names=("sav", method), margin=MARGIN)

    tower = towers(study, model)
    with_text = asked_differently(study, model, WITH_TEXT)
    images = [task for task in tasks if task not in with_text]
    real = [task for task in tasks if ours and task == "digits"]
    for name, which, what in (
        (TOWER, with_text, "the vision tower alone where the question matters"),
        (WITH_WORDS, with_text, "the tower's features with the question's behind them where the question matters"),
        (TOWER, images, "the vision tower alone where all questions are the same"),
        (TOWER, real, "the vision tower alone on real handwritten digits"),
    ):
        if which is real and not ours:
            continue
        add(
            f"SAVs beat {what}.",
            "interleaved inputs" if which is with_text else main,
            f"{', '.join(which)}; {SHOTS} shots",
            per_task(heads, f"{HEADS} heads", which),
            per_task(tower, name, which),
            names=("sav", name),
            missing="no task asks different examples different questions."
            if which is with_text
            else "the short form does not ask about them." * study.quick or "digits are not among these tasks."
            if which is real
            else "every task asks different examples different questions.",
        )
    yield from found
    found.clear()
    for against in (against_vectors, against_tuning):  # last, as these take longest
        against(study, model, add)
        yield from found
        found.clear()
    add_elsewhere(study, model, heads, add)
    yield from found


_NO_PAIR = f"of tasks that are alike ({'; '.join(f'{a} and {b}' for a, b in SIMILAR[::2])}), no two are among these."


def add_elsewhere(study: Study, model: str, heads: Mapping[str, Any], add: Callable[..., None]) -> None:
    """What is lost if another task chose the heads, or tuned the model."""
    pairs = [pair for pair in SIMILAR if set(pair) <= set(heads)]
    if study.quick or not tuned_tasks(study, model):
        pairs = []
    targets = [target for _, target in pairs]
    with_lora = lora_elsewhere(study, model, tuple(pairs)) if pairs else {}
    own = {t: per_task(with_lora, f"lora of {t}", [t])[t] for t in targets}
    borrowed = {t: per_task(with_lora, f"lora of {source}", [t])[t] for source, t in pairs}
    own_heads = per_task(heads, f"{HEADS} heads", targets)
    borrowed_heads = {t: per_task(heads, f"heads of {source}", [t])[t] for source, t in pairs}
    sides = {
        "heads of another task": borrowed_heads,
        "own heads": own_heads,
        "LoRA of another task": borrowed,
        "own LoRA": own,
    }
    add(
        "SAVs beat LoRA on the same examples of tasks that come in pairs.",
        "main table",
        f"{', '.join(targets)}; {SHOTS} shots; rank 16, 100 steps at a rate of 0.001",
        own_heads,
        own,
        names=("sav", "lora"),
        missing="the short form trains no LoRA on them."
        if study.quick
        else f"{_NO_PAIR} Or LoRA could not be trained.",
    )
    add(
        "Heads chosen on a similar task lose less than LoRA tuned on it.",
        "cross-task generalisation",
        f"{'; '.join(' to '.join(pair) for pair in pairs)}; what each loses against the task's own",
        losses(own_heads, borrowed_heads),
        losses(own, borrowed),
        names=("change of heads", "change of LoRA"),
        values={name: mean(of) for name, of in sides.items() if of},
        missing="the short form trains no LoRA on them."
        if study.quick
        else f"{_NO_PAIR} Or LoRA could not be trained.",
        note="Borrowed heads have class means of the task's own examples, as in the paper; LoRA saw none of these.",
    )


def _transfers(heads: Mapping[str, Any], add: Callable[..., None]) -> None:
    """Heads of a similar task."""
    pairs = [pair for pair in SIMILAR if set(pair) <= set(heads)]
    targets = [target for _, target in pairs]
    own = per_task(heads, f"{HEADS} heads", targets)
    borrowed = {t: per_task(heads, f"heads of {source}", [t])[t] for source, t in pairs}
    told = "; ".join(f"{source} to {target}" for source, target in pairs)
    add(
        "Heads chosen on a similar task beat random ones.",
        "cross-task generalisation",
        f"{told}; {SHOTS} shots of either",
        borrowed,
        per_task(heads, "random heads", targets),
        names=("borrowed", "random"),
        values={"own": mean(own)} if own else {},
        missing=_NO_PAIR,
    )
    add(
        "Heads chosen on a similar task serve as well as the task's own: no more than 2 points below.",
        "cross-task generalisation",
        f"{told}; 2 points added",
        borrowed,
        own,
        names=("borrowed", "own"),
        margin=2.0,
        missing=_NO_PAIR,
        note="The paper's own loss is 2.0 points one way and 13.8 the other.",
    )


def tables(study: Study) -> list[Table]:
    """Accuracy by task and method."""
    return [_by_task(study, model) for model in study.models]


def _by_task(study: Study, model: str) -> Table:
    tasks = tasks_of(study)
    heads, tower = rescored(study, model), towers(study, model)
    methods: dict[str, Mapping[str, Answers]] = {
        "zero-shot": methods_of(asked(study, model), "zero-shot", tasks),
        "likeliest": methods_of(asked(study, model), "zero-shot-likelihood", tasks),
        "icl": methods_of(in_context(study, model), "icl", tasks),
        "icl likeliest": methods_of(in_context(study, model), "icl-likelihood", tasks),
        **turns_of(study, model),
        TOWER: per_task(tower, TOWER),
        WITH_WORDS: per_task(tower, WITH_WORDS),
        "last layer": methods_of(asked(study, model), "centroid-last-layer", tasks),
        "all layers": methods_of(asked(study, model), "centroid-all-layers", tasks),
        "all heads": per_task(heads, "all heads"),
        "random heads": per_task(heads, "random heads"),
        "knn": methods_of(asked(study, model), "knn", tasks),
        "ridge": methods_of(asked(study, model), "ridge", tasks),
        "hec": methods_of(asked(study, model), "hec", tasks),
        "sav": methods_of(asked(study, model), "sav", tasks),
    }
    for name, run, some in (("mtv", vectors, mtv_tasks), ("lora", tuned, lora_tasks)):
        if study.finished(f"savs/{model}/{name}"):
            methods[name] = methods_of(run(study, model), name, some(study))
    rows = [
        (
            name,
            *(f"{of[task].mean:.1f}" if task in of else "" for task in tasks),
            f"{mean(of):.1f}" if len(of) == len(tasks) else "",
        )
        for name, of in methods.items()
    ]
    note = (
        f"{SHOTS} shots, {len(study.seeds)} seeds, {study.limit} queries of each at most"
        + " (the [README](../README.md) asks all of the digits)" * (not study.special)
        + "; `icl`, `icl-turns`, `mtv` on fewer. `all heads` and `random heads`: above; `tower`: nearest class mean of "
        "an image's mean visual token, as the decoder gets it; the others are methods of `sav-jax eval` "
        "([methods.md](methods.md), [methods-models.md](methods-models.md)): `likeliest` is `zero-shot-likelihood`, "
        "layers are `centroid-...`."
    )
    return Table(f"Accuracy of `{model}` by task, in %", ("method", *tasks, "mean"), tuple(rows), note)


def plots(study: Study) -> list[Path]:
    """Accuracy over heads and over shots; which task's heads serve which."""
    found = {model: rescored(study, model) for model in study.models}
    by_heads, by_shots = [], []
    for model, heads in found.items():
        points = [*((n, f"{n} heads") for n in NUMBERS), (int(np.prod(heads_of(study, model))), "all heads")]
        by_heads.append((model, _lines(heads, points, "sheet")))
        by_shots.append((model, _lines(heads, [(n, f"{n} shots") for n in NUMBERS], "shots")))
    tasks = tasks_of(study)
    squares = [
        (model, [[per_task(heads, f"heads of {source}", [task])[task].mean for source in tasks] for task in tasks])
        for model, heads in found.items()
    ]
    return [
        curves(study.pages / "reproduction-heads.svg", by_heads, "heads that vote, best first", mark=HEADS),
        curves(study.pages / "reproduction-shots.svg", by_shots, "labelled examples of each class"),
        matrix(study.pages / "reproduction-transfer.svg", squares, tasks, "heads chosen on", "classes and queries of"),
    ]


def _lines(heads: Mapping[str, Any], points: Sequence[tuple[int, str]], sheet: str) -> list[Line]:
    lines = []
    for task in heads:
        there = [(place, name) for place, name in points if name in heads[task][sheet]["values"]]
        values = [per_task(heads, name, [task], sheet)[task].mean for _, name in there]
        lines.append(Line(task, [place for place, _ in there], values))
    fewest = min(len(line.at) for line in lines)  # the mean ends where a task does
    means = np.mean([line.values[:fewest] for line in lines], axis=0).tolist()
    return [*lines, Line("mean", lines[0].at[:fewest], means, thick=True)]
