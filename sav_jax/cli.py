"""The command line, ``sav-jax``: every command's options as a frozen dataclass. What they do is in ``_commands``.

Results go to stdout or to files, progress and warnings to stderr. A :class:`~sav_jax.errors.UserError` is one line on
stderr and exit status 2; nothing is then left half-written. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sav_jax.errors import UserError


def _optional(metavar: str, default: str) -> Any:
    """An option that may be left out: what its value looks like, and what happens without it."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_RESULTS = tyro.conf.arg(metavar="RESULTS [RESULTS ...]", help_behavior_hint="(required)")


@dataclass(frozen=True)
class Running:
    """How the model is run."""

    batch_size: int = 8
    """Examples per forward pass. Lower it if memory runs out."""

    frames: Annotated[int | None, _optional("FRAMES", "16")] = None
    """How many frames of each video are shown, sampled uniformly; a shorter video is shown whole. 'predict' takes as
    many as the classifier was made with, and refuses another number."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model. Unless given, float32 on a CPU and bfloat16 on TPU and GPU; 'predict' takes the
    classifier's. Statistics are float32 in any case."""

    cache: Annotated[str | None, _optional("DIR", "$SAV_JAX_CACHE or ~/.cache/sav_jax")] = None
    """Folder (or gs:// path) in which head vectors are kept: no example is run twice, and a killed run resumes."""

    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep no head vectors."""


@dataclass(frozen=True)
class Fit:
    model: str
    """The frozen model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

    train: Path
    """Labelled examples: JSON Lines with rows {"image": path or list of paths, "question": text, "label": text} (and
    "video" for videos), a JSON list of such rows, or a folder with one sub-folder of pictures (or of videos) per class.
    About 20 examples per class are enough."""

    output: Path
    """Folder for the classifier: classifier.json, which can be read, and classifier.safetensors."""

    question: Annotated[str | None, _optional("TEXT", "none")] = None
    """What to ask about each picture or video of a folder, and about rows without a question. Stored with the
    classifier."""

    num_heads: int = 20
    """How many attention heads vote: the paper uses 20."""

    leave_one_out: tyro.conf.FlagCreatePairsOff[bool] = False
    """Rank heads by how well they classify each example without its own help. The paper's ranking lets an example be
    part of its own class centroid, which favours heads that merely tell examples apart."""

    vote: Literal["majority", "confidence"] = "majority"
    """'majority': one vote per head. 'confidence': each head spreads its vote over the classes by similarity."""

    shots_per_class: Annotated[int | None, _optional("N", "all")] = None
    """Use only so many examples of each class, drawn by --seed."""

    max_layer: Annotated[int | None, _optional("LAYERS", "all")] = None
    """Choose heads only among the first so many layers: predictions then run no deeper, and faster."""

    seed: int = 0
    """Of the draw for --shots-per-class."""

    running: Running = Running()


@dataclass(frozen=True)
class Predict:
    classifier: Path
    """Folder written by 'sav-jax fit'."""

    data: Path
    """What to classify: rows or a folder as for 'fit'; labels may be left out."""

    output: str
    """JSON Lines file for the predictions, '-' for stdout. One row per input row, in order: id, prediction, votes
    (heads for each label), probability (of the prediction), and label where it is known."""

    model: Annotated[str | None, _optional("MODEL", "by the name that 'fit' was given")] = None
    """The model that the classifier was made with; another one is refused."""

    question: Annotated[str | None, _optional("TEXT", "the one stored with the classifier")] = None
    """What to ask about each picture or video of a folder, and about rows without a question."""

    running: Running = Running()


@dataclass(frozen=True)
class Extract:
    model: str
    """The frozen model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

    data: Path
    """Examples: rows or a folder as for 'fit'; labels may be left out."""

    output: str
    """Folder (or gs:// path) for the array: 'heads' (Zarr v3, float32 [examples, layers, heads, head_dim]),
    'rows.jsonl' (id and label of each example) and 'meta.json'."""

    question: Annotated[str | None, _optional("TEXT", "none")] = None
    """What to ask about each picture or video of a folder, and about rows without a question."""

    num_layers: Annotated[int | None, _optional("LAYERS", "all")] = None
    """Run only the first so many layers of the model."""

    running: Running = Running()


@dataclass(frozen=True)
class Eval:
    model: str = "tiny"
    """The frozen model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

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

    limit: Annotated[int | None, _optional("N", "all")] = None
    """Answer only so many queries of each task, drawn by seed: for a quick look."""

    data_dir: Annotated[Path | None, _optional("DIR", "$SAV_JAX_DATA or ~/.cache/sav_jax/data")] = None
    """Where benchmarks that must be fetched by hand are looked for, each in a sub-folder of its name."""

    allow_leak: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on when a query also stands among the labelled examples, same question and images; they are counted."""

    train: Annotated[Path | None, _optional("PATH", "none")] = None
    """A task of your own: labelled rows or a folder as for 'fit', from which --shots examples per class are drawn. It
    is called 'files'; the other rows are its queries unless --test is given."""

    test: Annotated[Path | None, _optional("PATH", "none")] = None
    """The labelled queries of the task 'files'."""

    question: Annotated[str | None, _optional("TEXT", "none")] = None
    """For the task 'files': what to ask about each picture or video of a folder, and about rows without a question."""

    clip: Annotated[str | None, _optional("MODEL", "none")] = None
    """CLIP checkpoint of the methods 'clip-...': a directory or a hub id."""

    siglip: Annotated[str | None, _optional("MODEL", "none")] = None
    """SigLIP checkpoint of the methods 'siglip-...': a directory or a hub id."""

    aim: Annotated[str | None, _optional("DIR", "none")] = None
    """Projection of the methods 'aim' and 'aim-likelihood': the folder of a 'sav-jax train aim' run."""

    output_path: Path = Path("results")
    """Folder for results.json (in the shape of lmms-eval's), samples_TASK.jsonl, heads_TASK.png and images/."""

    log_samples: bool = True
    """Write every single answer to samples_TASK.jsonl: 'compare' and 'report' read them."""

    running: Running = Running()


@dataclass(frozen=True)
class Tasks:
    names: tyro.conf.Positional[str] = "all"
    """Names separated by commas; 'all' prints one line about each."""

    data_dir: Annotated[Path | None, _optional("DIR", "$SAV_JAX_DATA or ~/.cache/sav_jax/data")] = None
    """Where benchmarks that must be fetched by hand are looked for."""


@dataclass(frozen=True)
class Compare:
    folders: tyro.conf.Positional[Annotated[tuple[Path, ...], _RESULTS]]
    """Results folders of 'sav-jax eval'. Two: each method with itself. One: all methods with --baseline."""

    baseline: Annotated[str | None, _optional("METHOD", "none")] = None
    """Compare all methods with this one, which is A; it is taken from the first folder."""

    methods: Annotated[str | None, _optional("A,B,...", "all")] = None
    """Compare only these, names separated by commas."""

    output: Annotated[Path | None, _optional("FILE", "none")] = None
    """Write the comparisons as JSON, too."""


@dataclass(frozen=True)
class Report:
    folders: tyro.conf.Positional[Annotated[tuple[Path, ...], _RESULTS]]
    """Results folders of 'sav-jax eval'; several are shown side by side."""

    output: Annotated[Path | None, _optional("DIR", "'report' in the first folder")] = None
    """Folder for report.html (one file that needs no other), and for report.md, report.tex, report.csv and figures."""


@dataclass(frozen=True)
class Devices:
    """On what it runs."""

    mesh: Annotated[str | None, _optional("AXIS=SIZE,...", "all devices share the batch")] = None
    """How all devices, of all processes, are laid out: 'data' shares the batch, 'model' the weights of every layer,
    such as data=4,model=4."""

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """One of several processes that run the same command. On a Cloud TPU pod, under SLURM and under Open MPI they find
    each other; elsewhere give the three options that follow."""

    coordinator: Annotated[str | None, _optional("HOST:PORT", "found out")] = None
    """Where process 0 can be reached by all, a free port of it; implies --distributed."""

    num_processes: Annotated[int | None, _optional("N", "found out")] = None
    """How many processes there are."""

    process_id: Annotated[int | None, _optional("I", "found out")] = None
    """Which of them this is, from 0."""


@dataclass(frozen=True)
class Training:
    """What both kinds of tuning can be told; whatever is left out is as in the preset."""

    model: str
    """The base model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

    data: Path
    """Conversations in LLaVA's format (JSON list or JSON Lines of {"image", "conversations": [{"from": "human" or
    "gpt", "value": text}, ...]}), or labelled rows as for 'fit', whose answer is the label."""

    output: Path
    """Folder for the run (log, checkpoints; a killed run goes on from the latest) and, at its end, 'model' (an ordinary
    checkpoint for every other command) and, if nothing but low-rank updates trained, 'adapter' (PEFT's format)."""

    image_folder: Annotated[Path | None, _optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    rank: Annotated[int | None, _optional("R", "as in the preset")] = None
    """Of the low-rank updates of the language model; 0 for none."""

    alpha: Annotated[float | None, _optional("A", "as in the preset")] = None
    """Updates are scaled by alpha / rank."""

    dropout: Annotated[float | None, _optional("P", "as in the preset")] = None
    """Share of the input dropped on the low-rank way."""

    target: Annotated[str | None, _optional("REGEX", "as in the preset")] = None
    """Which projections of the language model, by path: 'language_model/layers/self_attn/(q|v)_proj'."""

    learning_rate: Annotated[float | None, _optional("RATE", "as in the preset")] = None
    """Peak rate of the language model's updates."""

    vision_rank: Annotated[int | None, _optional("R", "as in the preset")] = None
    """Of the low-rank updates of the vision tower; 0 for none."""

    vision_alpha: Annotated[float | None, _optional("A", "as in the preset")] = None
    """As --alpha, of the vision tower."""

    vision_learning_rate: Annotated[float | None, _optional("RATE", "as in the preset")] = None
    """Peak rate of the vision tower's updates."""

    projector_learning_rate: Annotated[float | None, _optional("RATE", "as in the preset")] = None
    """Peak rate of what joins tower and language model, trained whole; 0 leaves it frozen."""

    epochs: Annotated[float | None, _optional("N", "as in the preset")] = None
    """Passes over the data."""

    steps: Annotated[int | None, _optional("N", "from the epochs")] = None
    """Number of steps, instead of epochs."""

    batch_size: Annotated[int | None, _optional("B", "as in the preset")] = None
    """Conversations per step, over all devices."""

    micro_batches: Annotated[int | None, _optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other, to save memory."""

    max_tokens: Annotated[int | None, _optional("T", "as in the preset")] = None
    """Cut conversations behind so many tokens; 0 for the model's own limit."""

    remat: Annotated[Literal["none", "dots", "full"] | None, _optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass, to save memory: nothing, all but the products with weights, or
    everything."""

    checkpoint_every: Annotated[int | None, _optional("STEPS", "as in the preset")] = None
    """Steps between checkpoints."""

    seed: int = 0
    """Of the order of the data, of dropout and of first values."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given. What trains is float32."""

    devices: Devices = Devices()


@dataclass(frozen=True)
class Lora(Training):
    preset: Literal["default", "llava", "debug"] = "default"
    """'default': some hundred examples on one machine. 'llava': the published LoRA recipe of LLaVA-1.5. 'debug': six
    steps."""


@dataclass(frozen=True)
class SqLlava(Training):
    preset: Literal["stage1", "stage1-vit-lora", "stage2", "debug"] = "stage2"
    """'stage1': the projector alone, on captions; 'stage1-vit-lora': and the vision tower's updates, as the released
    script has it. 'stage2': low-rank updates of language model and vision tower, and the projector. 'debug': six
    steps."""

    sq_ratio: Annotated[float | None, _optional("P", "as in the preset")] = None
    """Share of the questions (but the first of each conversation, and only of those about images) that the model learns
    to ask."""

    conversation: Annotated[
        Literal["template", "vicuna-sq"] | None, _optional("{template,vicuna-sq}", "as in the preset")
    ] = None
    """How conversations are written: by the checkpoint's own chat template, or as SQ-LLaVA was released."""


@dataclass(frozen=True)
class Aim:
    model: str
    """The frozen model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

    output: Path
    """Folder for the run (log, checkpoints; a killed run goes on from the latest) and, at its end, 'projection'."""

    data: Annotated[Path | None, _optional("FILE", "drawn scenes, for 'tiny'")] = None
    """Documents (JSON list or JSON Lines of {"segments": [{"image", "text", "question"?}, ...]}), or conversations in
    LLaVA's format or labelled rows, of which --pairs make a document."""

    image_folder: Annotated[Path | None, _optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    preset: Literal["default", "tiny", "debug"] = "default"
    """'default': captions or interleaved documents, for models of billions of parameters. 'tiny': the bundled model.
    'debug': six steps."""

    documents: int = 3000
    """How many documents are drawn, without --data."""

    tokens: Annotated[Literal["text", "answer", "all"] | None, _optional("{text,answer,all}", "as in the preset")] = (
        None
    )
    """Which tokens of a demonstration become virtual tokens: of question and answer, of the answer, or all but the
    images'."""

    layer: Annotated[int | None, _optional("L", "as in the preset")] = None
    """Take hidden states after so many layers; 0 for all of them."""

    separator: Annotated[str | None, _optional("TEXT", "as in the preset")] = None
    """Text behind each demonstration's virtual tokens."""

    projection: Annotated[Literal["linear", "mlp"] | None, _optional("{linear,mlp}", "as in the preset")] = None
    """One linear layer, or two with a GELU between them; a layer norm follows."""

    initial: Annotated[Literal["identity", "random"] | None, _optional("{identity,random}", "as in the preset")] = None
    """What the projection starts as."""

    shots: Annotated[str | None, _optional("K,K,...", "as in the preset")] = None
    """Numbers of demonstrations, separated by commas; one is drawn for each step."""

    pairs: Annotated[int | None, _optional("N", "as in the preset")] = None
    """Images and texts of a document that is made of single rows."""

    learning_rate: Annotated[float | None, _optional("RATE", "as in the preset")] = None
    """Peak rate."""

    epochs: Annotated[float | None, _optional("N", "as in the preset")] = None
    """Passes over the documents."""

    steps: Annotated[int | None, _optional("N", "from the epochs")] = None
    """Number of steps, instead of epochs."""

    batch_size: Annotated[int | None, _optional("B", "as in the preset")] = None
    """Documents per step, over all devices."""

    micro_batches: Annotated[int | None, _optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other, to save memory."""

    remat: Annotated[Literal["none", "dots", "full"] | None, _optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass, to save memory: nothing, all but the products with weights, or
    everything."""

    checkpoint_every: Annotated[int | None, _optional("STEPS", "as in the preset")] = None
    """Steps between checkpoints."""

    seed: int = 0
    """Of drawn documents, of the order of the data and of first values."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given. What trains is float32."""

    devices: Devices = Devices()


TrainCommand = (
    Annotated[
        Lora,
        tyro.conf.subcommand("lora", description="Low-rank adaptation (LoRA) on conversations or labelled examples."),
    ]
    | Annotated[
        SqLlava,
        tyro.conf.subcommand("sq-llava", description="Instruction tuning that also learns to ask (SQ-LLaVA)."),
    ]
    | Annotated[
        Aim,
        tyro.conf.subcommand("aim", description="A projection that turns demonstrations into virtual tokens (AIM)."),
    ]
)


@dataclass(frozen=True)
class Train:
    recipe: TrainCommand
    """What to train."""


@dataclass(frozen=True)
class Ask:
    model: str
    """A model that was trained to ask: the folder 'model' of a 'sav-jax train sq-llava' run, a merged SQ-LLaVA, ...
    (any model is run; what others write has little of a question)."""

    image: Annotated[
        tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="FILE", help_behavior_hint="(repeatable)")
    ]
    """The image to ask about; may be given several times."""

    num_questions: int = 5
    """How many questions are drawn about each image."""

    conversation: Annotated[
        Literal["template", "vicuna-sq"] | None,
        _optional("{template,vicuna-sq}", "as in the run.json beside the model, else vicuna-sq"),
    ] = None
    """How conversations were written in training: by the checkpoint's own chat template, or as SQ-LLaVA was
    released."""

    temperature: float = 1.2
    """Of the draws; 0 takes the likeliest tokens. The description before them is always of the likeliest."""

    top_k: int = 300
    """Draw among the so many likeliest tokens; 0 for all."""

    top_p: float = 0.95
    """Draw among the likeliest tokens that together reach this probability; 1 for all."""

    max_new_tokens: int = 300
    """Longest question."""

    description_tokens: int = 1024
    """Longest description of the image, which the model writes before it asks."""

    seed: int = 0
    """Of the draws."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON Lines: a row {"image", "description", "questions": [...]} for each image."""

    output: Annotated[Path | None, _optional("FILE", "none")] = None
    """Write these rows to a file instead of printing questions."""

    batch_size: int = 8
    """Prompts decoded together. Lower it if memory runs out."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, _optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given."""


@dataclass(frozen=True)
class Plan:
    model: str
    """A config.json, a folder that has one (no weights are read), or 'tiny'."""

    topology: str
    """The pod to compile for: v5e:4x4, v5p:2x2x2, v6e:8x8, ..."""

    mesh: str
    """How its chips share the work: 'data' splits batches, 'model' heads and feed-forward widths; data=4,model=4."""

    task: Literal["train-lora", "train-sq"] = "train-lora"
    """A step of 'sav-jax train lora' or of 'sav-jax train sq-llava'."""

    preset: Annotated[str | None, _optional("NAME", "llava, or stage2")] = None
    """The recipe, as for these commands."""

    batch_size: Annotated[int | None, _optional("B", "as in the preset")] = None
    """Conversations per step, over all chips."""

    micro_batches: Annotated[int | None, _optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other."""

    remat: Annotated[Literal["none", "dots", "full"] | None, _optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass."""

    max_tokens: int = 2048
    """Tokens of every conversation, with those of its images."""

    image_rows: int = 1
    """Rows of pixels of every conversation: tiles (LLaVA) or patches (Qwen); 0 for text alone."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON."""


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
        sys.stdout.flush()
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
