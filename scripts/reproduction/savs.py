"""The claims of the SAVs paper (arXiv 2412.00142)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from scripts.reproduction.drawing import Line, curves, matrix
from scripts.reproduction.heads import HEADS, per_task
from scripts.reproduction.rescoring import NUMBERS, SHOTS, heads_of, rescored, tasks_of, with_shots
from scripts.reproduction.study import (
    OUTPUT,
    Answers,
    Finding,
    Study,
    Table,
    answers_of,
    difference,
    finding,
    means_of,
    results_of,
    untested,
)
from scripts.reproduction.tower import TOWER, WITH_WORDS, asked_differently, towers

PAPER = "arXiv 2412.00142"
MARGIN = 1.0
"""Points that "suffices" and "no worse" allow."""

ASKING = "zero-shot", "zero-shot-likelihood"
FEATURES = "centroid-last-layer", "centroid-all-layers", "hec", "knn", "ridge"
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
    "SAVs beat in-context learning with 4 demonstrations (likeliest answer).",
    "SAVs beat LoRA on the same examples.",
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
    "Heads chosen on a similar task serve as well as the task's own: no more than 2 points below.": (
        "What is lost depends on the direction (see the matrix), as in the paper."
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


def lora_tasks(study: Study) -> tuple[str, ...]:
    """LoRA is trained for every draw: on a few tasks."""
    few = ("drawn-safety",) if study.quick else ("drawn-safety", "digits-scattered")
    tasks = tasks_of(study)
    return tuple(task for task in few if task in tasks) or tasks[: len(few)]


def asked(study: Study, model: str) -> Path:
    """All methods that read a prompt once."""
    return _eval(study, model, "methods", tasks_of(study), ("sav", *ASKING, *FEATURES), study.limit)


def in_context(study: Study, model: str) -> Path:
    """In-context learning, whose prompts are five times as long, on some of the queries."""
    limit = 40 if study.quick else 100
    return _eval(study, model, "icl", tasks_of(study), ("sav", "icl", "icl-likelihood"), limit)


def tuned(study: Study, model: str) -> Path:
    """LoRA on the same examples."""
    recipe = ["--lora-rates", "1e-3", "--lora-steps", "20" if study.quick else "100"]
    return _eval(study, model, "lora", lora_tasks(study), ("sav", "lora", "lora-likelihood"), study.limit, *recipe)


def _eval(
    study: Study, model: str, name: str, tasks: Sequence[str], methods: Sequence[str], limit: int, *further: str
) -> Path:
    seeds = ",".join(map(str, study.seeds))
    options = {"--shots": str(SHOTS), "--seeds": seeds, "--limit": str(limit)}
    listed = {"--model": model, "--tasks": study.called(tasks), "--methods": ",".join(methods), **options}
    if study.data_dir is not None:
        listed["--data-dir"] = str(study.data_dir)
    words = [word for pair in listed.items() for word in pair]
    return study.command(f"savs/{model}/{name}", ["eval", *words, *further, "--output-path", OUTPUT])


def prepare(study: Study) -> None:
    """Run all commands, of which LoRA may be too much for a large model: the rest of the study does without."""
    for model in study.models:
        asked(study, model)
        in_context(study, model)
        try:
            tuned(study, model)
        except UserError as error:
            study.say(f"error: {error}")


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
        interval = difference(better, worse, rest.pop("margin", 0.0))
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
        note="Nothing in training was called dangerous, and no digit was written by a hand (world.md). Most of the "
        "gain is that of drawn-safety, where asking is below chance: see the accuracies by task. `drawn-styles`, which "
        "training never asked either, is not among these tasks: there neither side is above chance (world.md).",
    )
    folder = in_context(study, model)
    few, setting = methods_of(folder, "sav", tasks), f"{many}, 4 demonstrations"
    for method, how in (("icl", "written answers"), ("icl-likelihood", "likeliest answer")):
        claim = f"SAVs beat in-context learning with 4 demonstrations ({how})."
        note = (
            "No prompt of these models' training had demonstrations or ended in the word `Answer:` as this rival's do: "
            "it is weak. That word alone, before any demonstration, takes most written answers away, and some of the "
            "likeliest ([methods-models.md](methods-models.md)); no row tells the two apart yet."
        )
        note = note if ours else ""
        add(claim, main, setting, few, methods_of(folder, method, tasks), names=("sav", method), note=note)
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
        note="The best other number is the best on these very queries, which is hard on the claim.",
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
        "Twenty heads beat the best one alone.",
        "accuracy over heads",
        many,
        twenty,
        one,
        names=("20 heads", "1 head"),
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
            f"{means_of(enough)}, {HEADS} heads, the same queries",
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
    for name, which, what in (
        (TOWER, with_text, "the vision tower alone where the question matters"),
        (WITH_WORDS, with_text, "the tower's features with the question's behind them where the question matters"),
        (TOWER, images, "the vision tower alone where all questions are the same"),
    ):
        add(
            f"SAVs beat {what}.",
            "interleaved inputs" if which is with_text else main,
            f"{', '.join(which)}; {SHOTS} shots",
            per_task(heads, f"{HEADS} heads", which),
            per_task(tower, name, which),
            names=("sav", name),
            missing="no task asks different examples different questions."
            if which is with_text
            else "every task asks different examples different questions.",
        )
    yield from found
    found.clear()
    some = lora_tasks(study)
    if study.special and not study.finished(f"savs/{model}/lora"):  # see prepare
        some = ()
    folder = tuned(study, model) if some else study.output  # last, as it takes longest
    add(
        "SAVs beat LoRA on the same examples.",
        main,
        f"{', '.join(some)}; {SHOTS} shots; rank 16, {20 if study.quick else 100} steps at a rate of 0.001",
        methods_of(folder, "sav", some),
        methods_of(folder, "lora", some),
        names=("sav", "lora"),
        missing=f"`sav-jax eval` could not train it; why is in savs/{model}/lora.log.",
        note="LoRA's rate and steps are fixed here, not chosen on the examples as `sav-jax eval` does by default."
        + ours * " With a chosen rate it is ahead on another task, the parity of digits (training.md).",
    )
    yield from found


_NO_PAIR = f"of tasks that are alike ({'; '.join(f'{a} and {b}' for a, b in SIMILAR[::2])}), no two are among these."


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


def mean(of: Mapping[str, Answers]) -> float:
    """Over tasks, in %."""
    return round(float(np.mean([answers.mean for answers in of.values()])), 2)


def methods_of(folder: Path, method: str, tasks: Sequence[str]) -> dict[str, Answers]:
    """Task -> a method's answers."""
    return {task: answers_of(folder, task, method) for task in tasks}


def unreadable(folder: Path, tasks: Sequence[str]) -> str:
    """How often the model wrote something that is no answer, where that is often."""
    results, told = results_of(folder), []
    for task in tasks:
        run = results.run(task, 0, "zero-shot") or results.run(task, SHOTS, "zero-shot")
        assert run is not None
        found = results.answers(run.key)
        none = np.mean([not text for seed in run.seeds for text in found["zero-shot", seed].predictions])
        if none > 0.05:
            told.append(f"{task} {100 * none:.0f} %")
    return f"Written answers that name no class: {', '.join(told)}." if told else ""


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
    if study.finished(f"savs/{model}/lora"):
        methods["lora"] = methods_of(tuned(study, model), "lora", lora_tasks(study))
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
        + "; `icl` on fewer. `all heads`, `random heads` and `tower`: "
        "above; the others are methods of `sav-jax eval` ([methods.md](methods.md), "
        "[methods-models.md](methods-models.md)): `likeliest` is `zero-shot-likelihood`, layers are `centroid-...`."
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
