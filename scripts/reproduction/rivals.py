"""What SAVs are compared with by ``sav-jax eval``: asking, demonstrations in the prompt, task vectors, LoRA, other uses
of the same features. And the rows of those that take commands of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sav_jax.errors import UserError
from scripts.reproduction.rescoring import SHOTS, tasks_of
from scripts.reproduction.study import OUTPUT, Answers, Study, answers_of, means_of, results_of

ASKING = "zero-shot", "zero-shot-likelihood"
FEATURES = "centroid-last-layer", "centroid-all-layers", "hec", "knn", "ridge"
MAIN = "main table"
_KINDS = ("", "written answers"), ("-likelihood", "likeliest answer")
_WEAK = "No prompt of these models' training had demonstrations: this rival is weak."


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
    return _eval(study, model, "icl", tasks_of(study), ("sav", "icl", "icl-likelihood"), shown_limit(study))


def in_turns(study: Study, model: str) -> Path:
    """In-context learning as turns of a conversation, which chat models are trained on."""
    return _eval(study, model, "icl-turns", tasks_of(study), ("icl-turns", "icl-turns-likelihood"), shown_limit(study))


def without_demonstrations(study: Study, model: str) -> Path:
    """The layout of in-context learning in one turn, without demonstrations: the word that ends it."""
    none = "--demonstrations", "0"
    return _eval(study, model, "icl-none", tasks_of(study), ("icl", "icl-likelihood"), shown_limit(study), *none)


def asked_again(study: Study, model: str) -> Path:
    """Zero-shot answers to the queries of in-context learning, which are fewer."""
    return _eval(study, model, "icl-asked", tasks_of(study), ASKING, shown_limit(study))


def vectors(study: Study, model: str) -> Path:
    """Multimodal task vectors, which are looked for under every draw: on a few tasks."""
    short = ("--mtv-prompts", "20", "--mtv-steps", "20") if study.quick else ()
    return _eval(study, model, "mtv", mtv_tasks(study), ("sav", "mtv", "mtv-likelihood"), shown_limit(study), *short)


def tuned(study: Study, model: str) -> Path:
    """LoRA on the same examples."""
    recipe = ["--lora-rates", "1e-3", "--lora-steps", "20" if study.quick else "100"]
    methods = ("sav", "lora") if study.quick else ("sav", "lora", "lora-likelihood")
    return _eval(study, model, "lora", lora_tasks(study), methods, study.limit, *recipe)


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


def mtv_tasks(study: Study) -> tuple[str, ...]:
    """Tasks of claims about task vectors: naming, judging, checking; some on which either side is strong."""
    tasks = tasks_of(study)
    few = ("digits-scattered", "drawn-safety", "drawn-hallucination", "drawn-textures", "digits")
    chosen = few[: 1 if study.quick else None]
    return tuple(task for task in chosen if task in tasks) or tasks[: len(chosen)]


def shown_limit(study: Study) -> int:
    """Queries with demonstrations, whose prompts are long."""
    return 40 if study.quick else 100


NAMES: Mapping[str, Callable[[Study, str], Path]] = {"icl-turns": in_turns, "mtv": vectors, "lora": tuned}
"""Commands that may fail on another model: its chat template writes no earlier answers, or it is too large to train."""


def prepare(study: Study) -> None:
    """Run all commands. The rest of the study does without those in :data:`NAMES` that fail."""
    for model in study.models:
        for run in (asked, in_context, without_demonstrations, asked_again):
            run(study, model)
        for may_fail in NAMES.values():
            try:
                may_fail(study, model)
            except UserError as error:
                study.say(f"error: {error}")


def ready(study: Study, model: str, name: str) -> bool:
    """Whether one of :data:`NAMES` has, or will have, answers."""
    return not study.special or study.finished(f"savs/{model}/{name}")


def _missing(model: str, name: str) -> str:
    return f"`sav-jax eval` could not run it; why is in savs/{model}/{name}.log."


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


def turns_of(study: Study, model: str) -> dict[str, dict[str, Answers]]:
    """Lines of the table for in-context learning as turns."""
    if not ready(study, model, "icl-turns"):
        return {}
    folder = in_turns(study, model)
    methods = {"icl-turns": "icl-turns", "icl-turns likeliest": "icl-turns-likelihood"}
    return {line: methods_of(folder, method, tasks_of(study)) for line, method in methods.items()}


def against_demonstrations(study: Study, model: str, add: Callable[..., None], many: str) -> None:
    """Rows of in-context learning in both layouts, and of what the layouts do by themselves.

    Args:
      study, model: which.
      add: makes a row (``savs.measure``).
      many: the setting, in words.
    """
    tasks, ours = tasks_of(study), study.bundled(model)
    one = in_context(study, model)
    sav, setting = methods_of(one, "sav", tasks), f"{many}, 4 demonstrations"
    in_turn = {
        kind: methods_of(in_turns(study, model), f"icl-turns{kind}", tasks) if ready(study, model, "icl-turns") else {}
        for kind, _ in _KINDS
    }
    for kind, how in _KINDS:
        add(
            f"SAVs beat in-context learning with 4 demonstrations as turns of a conversation ({how}).",
            MAIN,
            setting,
            sav if in_turn[kind] else {},
            in_turn[kind],
            names=("sav", f"icl-turns{kind}"),
            missing=_missing(model, "icl-turns"),
            note=_WEAK * ours,
        )
    for kind, how in _KINDS:
        add(
            f"SAVs beat in-context learning with 4 demonstrations in one turn ({how}).",
            MAIN,
            setting,
            sav,
            methods_of(one, f"icl{kind}", tasks),
            names=("sav", f"icl{kind}"),
            note=f"{_WEAK} Its prompts end in the word `Answer:`, which they never learned: see the controls." * ours,
        )
    none, again = without_demonstrations(study, model), asked_again(study, model)
    for kind, how in _KINDS:
        alone = methods_of(again, f"zero-shot{kind}", tasks)
        add(
            f"A control: the word `Answer:` behind a question harms, without any demonstration ({how}).",
            "layout of the prompt",
            f"{means_of(tasks)}; zero-shot, and the same questions in the layout of one turn with 0 demonstrations",
            alone,
            methods_of(none, f"icl{kind}", tasks),
            names=(f"zero-shot{kind}", "with the word"),
            values={"with the word and 4 demonstrations": mean(methods_of(one, f"icl{kind}", tasks))},
        )
        add(
            f"A control: 4 demonstrations harm without that word, as turns of a conversation ({how}).",
            "layout of the prompt",
            f"{means_of(tasks)}; zero-shot, and the same questions after 4 that are answered",
            alone if in_turn[kind] else {},
            in_turn[kind],
            names=(f"zero-shot{kind}", f"icl-turns{kind}"),
            missing=_missing(model, "icl-turns"),
        )


def against_vectors(study: Study, model: str, add: Callable[..., None]) -> None:
    """Rows of multimodal task vectors."""
    some = mtv_tasks(study) if ready(study, model, "mtv") else ()
    folder = vectors(study, model) if some else study.output
    for kind, how in _KINDS:
        add(
            f"SAVs beat multimodal task vectors on the same examples ({how}).",
            MAIN,
            f"{', '.join(some)}; {SHOTS} shots",
            methods_of(folder, "sav", some),
            methods_of(folder, f"mtv{kind}", some),
            names=("sav", f"mtv{kind}"),
            missing=_missing(model, "mtv"),
            note=f"Means over {20 if study.quick else 100} prompts of 4 demonstrations that end in the word `Answer:`; "
            f"a search of {20 if study.quick else 150} steps.",
        )


def tuned_tasks(study: Study, model: str) -> tuple[str, ...]:
    """Those of LoRA; none where it could not be trained."""
    return lora_tasks(study) if ready(study, model, "lora") else ()


def against_tuning(study: Study, model: str, add: Callable[..., None]) -> None:
    """The row of LoRA."""
    some = tuned_tasks(study, model)
    folder = tuned(study, model) if some else study.output
    add(
        "SAVs beat LoRA on the same examples.",
        MAIN,
        f"{', '.join(some)}; {SHOTS} shots; rank 16, {20 if study.quick else 100} steps at a rate of 0.001",
        methods_of(folder, "sav", some),
        methods_of(folder, "lora", some),
        names=("sav", "lora"),
        missing=f"`sav-jax eval` could not train it; why is in savs/{model}/lora.log.",
        note="LoRA's rate and steps are fixed here, not chosen on the examples as `sav-jax eval` does by default."
        + study.bundled(model) * " With a chosen rate it is ahead on another task, the parity of digits (training.md).",
    )
