"""The command line, ``sav-jax``: every command's options as a frozen dataclass. What they do is in ``_commands``.

Results go to stdout or to files, progress and warnings to stderr. A :class:`~sav_jax.errors.UserError` is one line on
stderr and exit status 2; nothing is then left half-written. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sav_jax._files import to_stdout
from sav_jax._options import Devices, Place, Running, optional
from sav_jax._training_options import Ask, Plan, Train
from sav_jax.errors import UserError

_RESULTS = tyro.conf.arg(metavar="RESULTS [RESULTS ...]", help_behavior_hint="(required)")


@dataclass(frozen=True)
class Fit:
    model: str
    """The frozen model: 'tiny' or 'tiny-qwen' (bundled), a directory in Hugging Face layout, or a hub id."""

    train: Place
    """Labelled examples: JSON Lines with rows {"image": path or list of paths, "question": text, "label": text} (and
    "video" for videos), a JSON list of such rows, or a folder with one sub-folder of pictures (or of videos) per class.
    About 20 examples per class are enough."""

    output: Place
    """Folder for the classifier: classifier.json, which can be read, and classifier.safetensors."""

    question: Annotated[str | None, optional("TEXT", "none")] = None
    """What to ask about each picture or video of a folder, and about rows without a question. Stored with the
    classifier."""

    num_heads: int = 20
    """How many attention heads vote: the paper uses 20."""

    leave_one_out: tyro.conf.FlagCreatePairsOff[bool] = False
    """Rank heads by how well they classify each example without its own help. The paper's ranking lets an example be
    part of its own class centroid, which favours heads that merely tell examples apart."""

    vote: Literal["majority", "confidence"] = "majority"
    """'majority': one vote per head. 'confidence': each head spreads its vote over the classes by similarity."""

    shots_per_class: Annotated[int | None, optional("N", "all")] = None
    """Use only so many examples of each class, drawn by --seed."""

    max_layer: Annotated[int | None, optional("LAYERS", "all")] = None
    """Choose heads only among the first so many layers: predictions then run no deeper, and faster."""

    seed: int = 0
    """Of the draw for --shots-per-class."""

    running: Running = field(default_factory=Running)

    devices: Devices = field(default_factory=Devices)


@dataclass(frozen=True)
class Predict:
    classifier: Place
    """Folder written by 'sav-jax fit'."""

    data: Place
    """What to classify: rows or a folder as for 'fit'; labels may be left out."""

    output: str
    """JSON Lines file for the predictions, '-' for stdout. One row per input row, in order: id, prediction, votes
    (heads for each label), probability (of the prediction), and label where it is known."""

    model: Annotated[str | None, optional("MODEL", "by the name that 'fit' was given")] = None
    """The model that the classifier was made with; another one is refused."""

    question: Annotated[str | None, optional("TEXT", "the one stored with the classifier")] = None
    """What to ask about each picture or video of a folder, and about rows without a question."""

    running: Running = field(default_factory=Running)

    devices: Devices = field(default_factory=Devices)


@dataclass(frozen=True)
class Extract:
    model: str
    """The frozen model: 'tiny' or 'tiny-qwen' (bundled), a directory in Hugging Face layout, or a hub id."""

    data: Place
    """Examples: rows or a folder as for 'fit'; labels may be left out."""

    output: Place
    """Folder for the array: 'heads' (Zarr v3, float32 [examples, layers, heads, head_dim]),
    'rows.jsonl' (id and label of each example) and 'meta.json'."""

    question: Annotated[str | None, optional("TEXT", "none")] = None
    """What to ask about each picture or video of a folder, and about rows without a question."""

    num_layers: Annotated[int | None, optional("LAYERS", "all")] = None
    """Run only the first so many layers of the model."""

    running: Running = field(default_factory=Running)

    devices: Devices = field(default_factory=Devices)


@dataclass(frozen=True)
class Eval:
    model: str = "tiny"
    """The frozen model: 'tiny' or 'tiny-qwen' (bundled), a directory in Hugging Face layout, or a hub id."""

    tasks: str = "digits"
    """Names separated by commas; 'list' prints them all, 'sav-jax tasks NAME' describes one."""

    methods: str = "chance,zero-shot,pixels,sav-random,sav"
    """Names separated by commas; 'list' prints them all."""

    shots: str = "20"
    """Labelled examples per class (in all, of tasks whose answers are written freely), or several numbers separated by
    commas (5,20)."""

    seeds: Annotated[str, tyro.conf.arg(aliases=["--seed"])] = "0"
    """Of the draw of labelled examples, of --limit, and of random weights; or several separated by commas (0,1,2):
    results are then means over them."""

    num_heads: int = 20
    """How many attention heads vote in 'sav' and the like."""

    demonstrations: int = 4
    """Labelled examples in the prompt of in-context learning, or shown as virtual tokens by AIM."""

    mtv_prompts: int = 100
    """Prompts with demonstrations whose heads 'mtv' averages: a pass each."""

    mtv_steps: int = 150
    """Steps of the search of 'mtv', of four labelled examples each (published: 600 of one). 0 draws heads at random."""

    lora_rank: int = 16
    """Of the low-rank updates of 'lora'."""

    lora_rates: str = "3e-4,1e-3,3e-3"
    """Peak learning rates that 'lora' tries on the labelled examples, separated by commas; a single one is used."""

    lora_steps: str = "100"
    """Numbers of steps, of --batch-size examples each, that 'lora' tries with every rate, separated by commas."""

    max_new_tokens: int = 32
    """Longest answer that the model may write."""

    limit: Annotated[int | None, optional("N", "all")] = None
    """Answer only so many queries of each task, drawn by seed: for a quick look."""

    data_dir: Annotated[Path | None, optional("DIR", "$SAV_JAX_DATA or ~/.cache/sav_jax/data")] = None
    """Where benchmarks that must be fetched by hand are looked for, each in a sub-folder of its name."""

    allow_leak: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on when a query also stands among the labelled examples, same question and images; they are counted."""

    train: Annotated[Place | None, optional("PATH", "none")] = None
    """A task of your own: labelled rows or a folder as for 'fit', from which --shots examples per class are drawn. It
    is called 'files'; the other rows are its queries unless --test is given."""

    test: Annotated[Place | None, optional("PATH", "none")] = None
    """The labelled queries of the task 'files'."""

    question: Annotated[str | None, optional("TEXT", "none")] = None
    """For the task 'files': what to ask about each picture or video of a folder, and about rows without a question."""

    clip: Annotated[str | None, optional("MODEL", "none")] = None
    """CLIP checkpoint of the methods 'clip-...': a directory or a hub id."""

    siglip: Annotated[str | None, optional("MODEL", "none")] = None
    """SigLIP checkpoint of the methods 'siglip-...': a directory or a hub id."""

    aim: Annotated[str | None, optional("DIR", "none")] = None
    """Projection of the methods 'aim' and 'aim-likelihood': the folder of a 'sav-jax train aim' run."""

    output_path: Place = Path("results")
    """Folder for results.json (in the shape of lmms-eval's), samples_TASK.jsonl, heads_TASK.png and images/."""

    log_samples: bool = True
    """Write every single answer to samples_TASK.jsonl: 'compare' and 'report' read them."""

    running: Running = field(default_factory=Running)

    devices: Devices = field(default_factory=Devices)


@dataclass(frozen=True)
class Tasks:
    names: tyro.conf.Positional[str] = "all"
    """Names separated by commas; 'all' or 'list' prints one line about each."""

    data_dir: Annotated[Path | None, optional("DIR", "$SAV_JAX_DATA or ~/.cache/sav_jax/data")] = None
    """Where benchmarks that must be fetched by hand are looked for."""


@dataclass(frozen=True)
class Compare:
    folders: tyro.conf.Positional[Annotated[tuple[Place, ...], _RESULTS]]
    """Results folders of 'sav-jax eval'. Two: each method with itself. One: all methods with --baseline."""

    baseline: Annotated[str | None, optional("METHOD", "none")] = None
    """Compare all methods with this one, which is A; it is taken from the first folder."""

    methods: Annotated[str | None, optional("A,B,...", "all")] = None
    """Compare only these, names separated by commas."""

    output: Annotated[Place | None, optional("FILE", "none")] = None
    """Write the comparisons as JSON, too."""


@dataclass(frozen=True)
class Report:
    folders: tyro.conf.Positional[Annotated[tuple[Place, ...], _RESULTS]]
    """Results folders of 'sav-jax eval'; several are shown side by side."""

    output: Annotated[Place | None, optional("DIR", "'report' in the first folder")] = None
    """Folder for report.html (one file that needs no other), and for report.md, report.tex, report.csv and figures."""


def _command(name: str, summary: str, example: str) -> Any:
    return tyro.conf.subcommand(name, description=f"{summary}\n\nExample: {example}")


Command = (
    Annotated[
        Fit,
        _command(
            "fit",
            "Make a few-shot classifier from labelled examples: choose the attention heads of a frozen model that best "
            "tell the classes apart, and keep their class centroids.",
            "sav-jax fit --model tiny --train train.jsonl --num-heads 20 --output clf/",
        ),
    ]
    | Annotated[
        Predict,
        _command(
            "predict",
            "Classify images or videos with a classifier made by 'fit'.",
            "sav-jax predict --classifier clf/ --data test.jsonl --output predictions.jsonl",
        ),
    ]
    | Annotated[
        Extract,
        _command(
            "extract",
            "Write the head vectors of examples as one array: what every attention head puts out at the last token of "
            "the prompt, before the output projection.",
            "sav-jax extract --model tiny --data rows.jsonl --output heads/",
        ),
    ]
    | Annotated[
        Train,
        _command(
            "train",
            "Tune a model on conversations or labelled examples.",
            "sav-jax train lora --model tiny --data train.jsonl --output run/",
        ),
    ]
    | Annotated[
        Ask,
        _command(
            "ask",
            "Write the questions that a model trained with SQ-LLaVA's recipe asks about images.",
            "sav-jax ask --model runs/sq/model --image photo.jpg",
        ),
    ]
    | Annotated[
        Plan,
        _command(
            "plan",
            "Compile for a TPU pod that is not there: memory of each chip, products, collectives. Needs libtpu (extra "
            "'plan').",
            "sav-jax plan --model config.json --topology v5e:4x4 --mesh data=4,model=4 --batch-size 16",
        ),
    ]
    | Annotated[
        Eval,
        _command(
            "eval",
            "Compare methods on tasks, each from the same labelled examples and on the same queries.",
            "sav-jax eval --model tiny --tasks digits --methods zero-shot,sav --shots 20 --output-path results/",
        ),
    ]
    | Annotated[
        Tasks,
        _command(
            "tasks",
            "Describe tasks: what is asked, where the data comes from and must lie, labels, split and metrics.",
            "sav-jax tasks naturalbench",
        ),
    ]
    | Annotated[
        Compare,
        _command(
            "compare",
            "Say which of two methods, or of two runs, is better: paired tests on identical items, corrected for the "
            "number of comparisons.",
            "sav-jax compare results/ --baseline zero-shot",
        ),
    ]
    | Annotated[
        Report,
        _command(
            "report",
            "Make a page of tables and pictures from results.",
            "sav-jax report results/ --output results/report",
        ),
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
      argv: its words after ``sav-jax``; by default those of this process.

    Returns:
      The exit status: 0; 2 for bad input or bad options; 130 if interrupted.
    """
    try:
        options: Any = tyro.cli(
            Command,
            args=argv,
            prog="sav-jax",
            description="Few-shot classifiers from the attention heads of frozen multimodal models.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        running = getattr(options, "running", None)  # not of the commands that run no model
        for name in ("batch_size", "frames") if running is not None else ():
            number = getattr(running, name)
            if number is not None and number < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
        from sav_jax import _commands

        _commands.run(options)
        to_stdout("")
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro's, after --help or bad options
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0
