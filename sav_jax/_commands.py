"""What the commands of ``sav-jax`` do; imported once the options are known to be good, as it loads JAX."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from sav_jax import _planning, cli
from sav_jax import _training_options as training_options
from sav_jax._compiling import counted, keep_programs
from sav_jax._files import check_output_file, check_output_folder, to_stdout, write_file
from sav_jax._options import Devices, Running
from sav_jax._processes import by_the_first, failing_together, start
from sav_jax._profiling import profiled
from sav_jax._storage import Location, is_url, lies_in, local, location
from sav_jax._tpu import leave_tpus_alone
from sav_jax.classifier import SparseAttentionVectors, choose_shots, load_classifier
from sav_jax.errors import UserError
from sav_jax.examples import DEFAULT_FRAMES, Example, read_examples
from sav_jax.extract import extract_heads
from sav_jax.headstore import check_head_array_path, default_cache_dir, local_cache_dir, write_head_array
from sav_jax.lmm import BUNDLED, LMM, find_model, load, local_model, usual_mesh
from sav_jax.sharding import mesh_of

if TYPE_CHECKING:
    from sav_jax.eval.tasks import Task

T = TypeVar("T")


def run(options: Any) -> None:
    """Run a command, one of the dataclasses of :data:`sav_jax.cli.Command`.

    Raises:
      UserError: for bad input; no output is then left behind.
    """
    leave_tpus_alone()
    commands: dict[type, Callable[[Any], None]] = {
        cli.Fit: _fit,
        cli.Predict: _predict,
        cli.Extract: _extract,
        training_options.Train: _train,
        training_options.Ask: _ask,
        training_options.Plan: _planning.run,
        cli.Eval: _eval,
        cli.Tasks: _tasks,
        cli.Compare: _compare,
        cli.Report: _report,
    }
    devices = getattr(getattr(options, "recipe", options), "devices", None)
    if devices is not None:
        _join(devices)
    with contextlib.ExitStack() as stack:
        if jax.distributed.is_initialized() and jax.process_index() != 0:  # the first speaks for all
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if (running := getattr(options, "running", None)) is not None:
            keep_programs(_programs_dir(running))
            stack.enter_context(counted())
            if running.profile is not None:
                stack.enter_context(profiled(running.profile))
        if devices is not None:
            stack.enter_context(failing_together())
        commands[type(options)](options)


def _join(devices: Devices) -> None:
    if devices.distributed or devices.coordinator is not None:
        start(devices.coordinator, devices.num_processes, devices.process_id)
    elif devices.num_processes is not None or devices.process_id is not None:
        raise UserError("--num-processes and --process-id need --coordinator HOST:PORT")


def _fit(options: cli.Fit) -> None:
    by_the_first(lambda: check_output_folder(options.output, "classifier.json"))
    frames = options.running.frames or DEFAULT_FRAMES
    examples = read_examples(options.train, options.question, require_labels=True, frames=frames)
    labels = [str(example.label) for example in examples]
    if len(set(labels)) < 2:
        raise UserError(
            f"{options.train}: a classifier needs examples of at least two classes; every label is {labels[0]!r}"
        )
    if options.shots_per_class is not None:
        chosen = choose_shots(labels, options.shots_per_class, options.seed)
        examples, labels = [examples[i] for i in chosen], [labels[i] for i in chosen]
    lmm = _load(options.model, options.running.dtype, mesh=options.devices.mesh, lm_head=False)
    _check_heads(lmm, options.num_heads, options.max_layer)
    heads = extract_heads(lmm, examples, options.running.batch_size, _cache(options.running))
    classifier = SparseAttentionVectors.fit(
        heads,
        labels,
        options.num_heads,
        leave_one_out=options.leave_one_out,
        vote=options.vote,
        shots_per_class=options.shots_per_class,
        max_layer=options.max_layer,
        seed=options.seed,
        metadata={
            "model": _model_facts(lmm),
            "question": options.question or _common_question(examples),
            "frames": frames if any(example.videos for example in examples) else None,
        },
    )
    by_the_first(lambda: classifier.save(options.output))
    print(_summary(classifier, options.output))


def _predict(options: cli.Predict) -> None:
    if options.output != "-":
        by_the_first(lambda: check_output_file(options.output))
        if lies_in(location(options.output), options.data):
            raise UserError(f"{options.output}: is, or lies in, the data to be classified; choose another output")
    classifier = load_classifier(options.classifier)
    made_with = classifier.metadata.get("model")
    if not isinstance(made_with, dict) or not {"name", "fingerprint", "dtype"} <= made_with.keys():
        raise UserError(f"{options.classifier}: does not say which model it was made with; it was not written by 'fit'")
    frames = _classifier_frames(classifier, options)
    examples = read_examples(options.data, options.question or classifier.metadata.get("question"), frames=frames)
    if options.devices.mesh is not None:
        mesh_of(jax.devices(), options.devices.mesh)  # what is wrong with it has nothing to do with the model
    wanted = f"{options.classifier} was made with {made_with['name']} (fingerprint {made_with['fingerprint'][:12]})"
    name, dtype = options.model or made_with["name"], options.running.dtype or made_with["dtype"]
    try:
        # Layers above the deepest selected head are not even loaded.
        lmm = _load(name, dtype, classifier.num_layers, options.devices.mesh, lm_head=False)
    except UserError as error:
        hint = "" if options.model else "; say where that model is with --model"
        raise UserError(f"{name}: {error}; {wanted}{hint}") from None
    if lmm.fingerprint != made_with["fingerprint"]:
        raise UserError(f"{wanted}, not with {lmm.name} (fingerprint {lmm.fingerprint[:12]})")
    if (runs := np.dtype(lmm.dtype).name) != made_with["dtype"]:
        note = (
            f"note: {options.classifier} was made from heads in {made_with['dtype']}; in {runs} some answers may differ"
        )
        by_the_first(lambda: print(note, file=sys.stderr))
    heads = extract_heads(lmm, examples, options.running.batch_size, _cache(options.running))
    predictions, votes, probabilities = classifier.classify(heads)

    lines = []
    for example, prediction, counts, row in zip(examples, predictions, votes, probabilities, strict=True):
        line = {
            "id": example.id,
            "prediction": prediction,
            "votes": dict(zip(classifier.labels, map(int, counts), strict=True)),
            "probability": round(float(row[classifier.labels.index(prediction)]), 6),
        }
        lines.append(line if example.label is None else line | {"label": example.label})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if options.output == "-":
        to_stdout(text)
    else:
        by_the_first(lambda: write_file(options.output, text.encode()))
    report = _accuracy(classifier, examples, predictions)
    if jax.process_index() == 0:
        print(report, file=sys.stderr if options.output == "-" else sys.stdout)


def _extract(options: cli.Extract) -> None:
    by_the_first(lambda: check_head_array_path(options.output))
    examples = read_examples(options.data, options.question, frames=options.running.frames or DEFAULT_FRAMES)
    lmm = _load(options.model, options.running.dtype, options.num_layers, options.devices.mesh, lm_head=False)
    heads = extract_heads(lmm, examples, options.running.batch_size, _cache(options.running))
    rows = [{"id": example.id, "label": example.label} for example in examples]
    by_the_first(lambda: write_head_array(options.output, heads, rows, {"model": _model_facts(lmm)}))
    print(f"{options.output}: heads {list(heads.shape)} float32 = [examples, layers, heads, head_dim]")


def _eval(options: cli.Eval) -> None:
    from sav_jax.eval.methods import METHODS
    from sav_jax.eval.run import Plan, evaluate
    from sav_jax.eval.tasks import GROUPS, TASKS, default_data_dir, find_tasks
    from sav_jax.eval.tasks.files import from_files
    from sav_jax.task_vectors import Recipe

    if "list" in (options.tasks, options.methods):
        if options.tasks == "list":
            print(_listed(_task_lines(TASKS) | _groups(GROUPS) | _ANY_TFDS))
        if options.methods == "list":
            free = {True: " (free answers, too)", False: ""}
            print(_listed({name: f"{of.description}{free[of.generates]}" for name, of in METHODS.items()}))
        return
    data_dir = local(options.data_dir or default_data_dir(), "the folder of the benchmarks' files (--data-dir)")
    if options.train is None and options.test is not None:
        raise UserError("a task of your own needs --train")
    if options.train is not None:
        tasks = [from_files(options.train, options.test, options.question, options.running.frames or DEFAULT_FRAMES)]
    else:
        tasks = find_tasks(options.tasks)
    local_model(options.model)  # a wrong name is no news after an hour of methods that need no model
    evaluate(
        lambda: _load(options.model, options.running.dtype, mesh=options.devices.mesh),
        tasks,
        _choose("method", options.methods, METHODS),
        Plan(
            shots=_numbers("--shots", options.shots),
            seeds=_numbers("--seeds", options.seeds),
            num_heads=options.num_heads,
            demonstrations=options.demonstrations,
            mtv=Recipe(prompts=options.mtv_prompts, steps=options.mtv_steps),
            lora_rank=options.lora_rank,
            lora_rates=_rates("--lora-rates", options.lora_rates),
            lora_steps=_numbers("--lora-steps", options.lora_steps),
            max_new_tokens=options.max_new_tokens,
            limit=options.limit,
            batch_size=options.running.batch_size,
            cache=_cache_dir(options.running),
            clip=options.clip,
            siglip=options.siglip,
            aim=options.aim,
            allow_leak=options.allow_leak,
            data_dir=data_dir,
            log_samples=options.log_samples,
        ),
        options.output_path,
        GROUPS,
    )


def _train(options: training_options.Train) -> None:
    if isinstance(options.recipe, training_options.Aim):
        _train_aim(options.recipe)
    else:
        _tune(options.recipe)


def _tune(chosen: training_options.Lora | training_options.SqLlava) -> None:
    from sav_jax.train.chats import read_chats
    from sav_jax.train.recipes import LORA_PRESETS, SQ_PRESETS, overridden
    from sav_jax.train.tune import export, tuned_with_updates

    local(chosen.output, "the output of training")
    presets = LORA_PRESETS if isinstance(chosen, training_options.Lora) else SQ_PRESETS
    recipe = overridden(presets[chosen.preset], vars(chosen) | vars(chosen.run))
    by_the_first(lambda: check_output_folder(chosen.output, "run.json"))
    chats = read_chats(chosen.data, chosen.image_folder)
    base = _load(chosen.model, chosen.run.dtype, mesh=chosen.devices.mesh)
    tuned, trainable = tuned_with_updates(base, chats, recipe, chosen.output)
    written = export(base, tuned, recipe, trainable, chosen.output, chosen.model)
    if jax.process_index() == 0:
        print(f"written to {chosen.output}: {', '.join(written)}")


def _train_aim(options: training_options.Aim) -> None:
    from sav_jax.train.aim import AIM_PRESETS, train_aim
    from sav_jax.train.documents import drawn_documents, read_documents
    from sav_jax.train.recipes import overridden

    local(options.output, "the output of training")
    given = (
        vars(options)
        | vars(options.run)
        | {"shots": None if options.shots is None else _numbers("--shots", options.shots)}
    )
    recipe = overridden(AIM_PRESETS[options.preset], given)
    by_the_first(lambda: check_output_folder(options.output, "run.json"))
    if options.data is not None:
        documents = read_documents(options.data, options.image_folder, recipe.pairs, options.run.seed)
    elif options.model in BUNDLED:
        if options.documents < 1:
            raise UserError(f"--documents must be at least 1, not {options.documents}")
        documents = drawn_documents(options.documents, recipe.pairs, options.run.seed)
    else:
        raise UserError("--data FILE is missing; only bundled models learn from drawn scenes")
    lmm = _load(options.model, options.run.dtype, mesh=options.devices.mesh)
    train_aim(lmm, documents, recipe, options.output)
    if jax.process_index() == 0:
        print(f"written to {options.output}: projection")


def _ask(options: training_options.Ask) -> None:
    from sav_jax.train.asking import Sampling, ask, conversation_of
    from sav_jax.train.chats import format_called

    if not options.image:
        raise UserError("--image FILE is missing")
    if options.output is not None:
        check_output_file(options.output)
    for image in options.image:
        if not image.is_file():
            raise UserError(f"--image: {image} is no file")
    if options.top_k < 0:
        raise UserError(f"--top-k must not be negative, not {options.top_k}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    lmm = _load(options.model, options.dtype)
    name = options.conversation or conversation_of(find_model(options.model))
    asked = ask(
        lmm,
        [Example("-", (image,), id=str(image), source=str(image)) for image in options.image],
        options.num_questions,
        format_called(name, lmm.processor, lmm.stop_token_ids),
        Sampling(
            temperature=options.temperature,
            top_k=options.top_k or None,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            description_tokens=options.description_tokens,
        ),
        options.batch_size,
    )
    rows: list[dict[str, Any]] = [
        {"image": str(image), "description": one.description, "questions": one.questions}
        for image, one in zip(options.image, asked, strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.output is not None:
        write_file(options.output, text.encode())
    elif options.json:
        to_stdout(text)
    else:
        print(
            "\n".join(f"{image}\n" + _numbered(one.questions) for image, one in zip(options.image, asked, strict=True))
        )


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"  {number}. {' '.join(text.split())}" for number, text in enumerate(texts, 1))


def _tasks(options: cli.Tasks) -> None:
    from sav_jax.eval.tasks import GROUPS, TASKS, card, default_data_dir, find_tasks

    if options.names in ("all", "list"):
        print(_listed(_task_lines(TASKS) | _groups(GROUPS) | _ANY_TFDS))
        return
    data_dir = options.data_dir or default_data_dir()
    print("\n\n".join(card(task, data_dir) for task in find_tasks(options.names)), end="")


_ANY_TFDS = {"tfds:NAME": f"{'classification':<14}  any classification set of tensorflow-datasets, by its name there"}


def _task_lines(tasks: Mapping[str, Task]) -> dict[str, str]:
    return {name: f"{task.kind:<14}  {task.description}" for name, task in tasks.items()}


def _groups(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: f"{'group':<14}  all of {', '.join(members)}" for name, members in groups.items()}


def _listed(entries: Mapping[str, str]) -> str:
    """Names and descriptions, in columns."""
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {description}" for name, description in entries.items())


def _compare(options: cli.Compare) -> None:
    from sav_jax.eval.compare import compare, compare_json, table
    from sav_jax.eval.stored import Results

    if not 1 <= len(options.folders) <= 2:
        raise UserError(f"'compare' takes one or two results folders, not {len(options.folders)}")
    if options.output is not None:
        check_output_file(options.output)
    a, *others = [Results(folder) for folder in options.folders]
    methods = [name.strip() for name in (options.methods or "").split(",") if name.strip()]
    compared = compare(a, others[0] if others else None, baseline=options.baseline, methods=methods)
    if options.output is not None:
        write_file(options.output, compare_json(compared))
    print(table(compared))


def _report(options: cli.Report) -> None:
    from sav_jax.eval.report import write_report
    from sav_jax.eval.stored import Results

    if not options.folders:
        raise UserError("'report' takes one or more results folders")
    output = options.output or options.folders[0] / "report"
    check_output_folder(output, "report.html")
    files = write_report([Results(folder) for folder in options.folders], output)
    print(f"written to {output}: {', '.join(files)}")


# What the commands share


def _load(
    model: str, dtype: str | None, num_layers: int | None = None, mesh: str | None = None, lm_head: bool = True
) -> LMM:
    """Load a model onto all devices, laid out as ``mesh`` says, or as usual."""
    placed = (
        mesh_of(jax.devices(), usual_mesh(model, dtype) if mesh is None else mesh)
        if mesh is not None or jax.device_count() > 1
        else None
    )
    return load(model, dtype=dtype, mesh=placed, num_layers=num_layers, lm_head=lm_head)


def _choose(what: str, names: str, available: Mapping[str, T]) -> list[T]:
    """Look up names separated by commas."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in available:
            raise UserError(f"no {what} is called {name!r}; there are: {', '.join(available)}")
    if not chosen:
        raise UserError(f"no {what} is named; there are: {', '.join(available)}")
    return [available[name] for name in dict.fromkeys(chosen)]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, not {text!r}") from None


def _rates(option: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise UserError(f"{option} takes numbers separated by commas, not {text!r}") from None


def _cache_dir(running: Running) -> str | None:
    return None if running.no_cache else (running.cache or default_cache_dir()).rstrip("/")


def _programs_dir(running: Running) -> str | None:
    """JAX needs further packages to write to a bucket: programs stay on the local disk."""
    folder = _cache_dir(running)
    return local_cache_dir() if folder is not None and is_url(folder) else folder


def _cache(running: Running) -> str | None:
    folder = _cache_dir(running)
    return folder and f"{folder}/heads"


def _classifier_frames(classifier: SparseAttentionVectors, options: cli.Predict) -> int:
    """As many frames of a video as the classifier has learned from."""
    asked, made_with = options.running.frames, classifier.metadata.get("frames")
    if made_with is None:  # by pictures or text alone
        return asked or DEFAULT_FRAMES
    if asked not in (None, made_with):
        raise UserError(f"--frames is {asked}; {options.classifier} was made with {made_with} frames of each video")
    return int(made_with)


def _check_heads(lmm: LMM, num_heads: int, max_layer: int | None) -> None:
    """Refuse impossible counts before any example is run."""
    if max_layer is not None and not 1 <= max_layer <= lmm.num_layers:
        raise UserError(f"--max-layer is {max_layer}; {lmm.name} has 1 to {lmm.num_layers} layers")
    eligible = (max_layer or lmm.num_layers) * lmm.num_heads
    if not 1 <= num_heads <= eligible:
        raise UserError(f"--num-heads is {num_heads}; there are {eligible} heads to choose from")


def _model_facts(lmm: LMM) -> dict[str, Any]:
    return {
        "name": lmm.name,
        "fingerprint": lmm.fingerprint,
        "dtype": np.dtype(lmm.dtype).name,
        "num_layers": lmm.num_layers,
        "num_heads": lmm.num_heads,
        "head_dim": lmm.head_dim,
    }


def _common_question(examples: Sequence[Example]) -> str | None:
    questions = {example.question for example in examples}
    return questions.pop() if len(questions) == 1 else None


def _summary(classifier: SparseAttentionVectors, output: Location) -> str:
    total = sum(classifier.support)
    classes = [f"{name} ({count})" for name, count in zip(classifier.labels, classifier.support, strict=True)]
    best = [
        f"  layer {layer:>2}  head {head:>2}  {classifier.scores[layer, head]:>4} of {total} right"
        for layer, head in classifier.heads[:10]
    ]
    more = classifier.num_heads - len(best)
    shown = ", ".join(classes[:20]) + (f", and {len(classes) - 20} more" if len(classes) > 20 else "")
    return "\n".join(
        [
            f"{len(classes)} classes, {total} examples: {shown}",
            f"{classifier.num_heads} heads chosen of {classifier.scores.size}, best first:",
            *best,
            *([f"  and {more} more"] if more else []),
            f"queries run {classifier.num_layers} of {len(classifier.scores)} layers",
            f"classifier written to {output}",
        ]
    )


def _accuracy(classifier: SparseAttentionVectors, examples: Sequence[Example], predictions: Sequence[str]) -> str:
    """Say how many known labels were met; one that the classifier does not know counts as missed, with a warning."""
    known = [
        (example, prediction)
        for example, prediction in zip(examples, predictions, strict=True)
        if example.label is not None
    ]
    if not known:
        return f"{len(examples)} predictions; no labels to compare with"
    strange = [example for example, _ in known if example.label not in classifier.labels]
    if strange and jax.process_index() == 0:
        print(
            f"warning: {len(strange)} rows have labels that the classifier does not know and count as wrong, "
            f"the first being {strange[0].label!r} in {strange[0].source}",
            file=sys.stderr,
        )
    right = sum(example.label == prediction for example, prediction in known)
    return f"accuracy {right / len(known):.4f} ({right} of {len(known)} right)"
