"""The options of ``sav-jax train``, ``ask`` and ``plan``, as frozen dataclasses. What they do is in ``_commands``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sav_jax._options import Devices, Place, optional


def _preset(metavar: str) -> Any:
    return optional(metavar, "as in the preset")


@dataclass(frozen=True)
class Steps:
    """How every recipe is run; whatever is left out is as in the preset."""

    epochs: Annotated[float | None, _preset("N")] = None
    """Passes over the data."""

    steps: Annotated[int | None, optional("N", "from the epochs")] = None
    """Number of steps, instead of epochs."""

    batch_size: Annotated[int | None, _preset("B")] = None
    """Conversations or documents per step, over all devices."""

    micro_batches: Annotated[int | None, _preset("N")] = None
    """Cut every batch into so many parts, one after the other, to save memory."""

    remat: Annotated[Literal["none", "dots", "full"] | None, _preset("{none,dots,full}")] = None
    """What layers compute again in the backward pass, to save memory: nothing, all but the products with weights, or
    everything."""

    warmup: Annotated[float | None, _preset("SHARE")] = None
    """Share of the steps in which the learning rate rises to its peak; behind them it falls to 0, as a cosine does."""

    weight_decay: Annotated[float | None, _preset("RATE")] = None
    """Of everything that trains, decoupled (AdamW): times the learning rate."""

    clip: Annotated[float | None, _preset("NORM")] = None
    """Largest norm of the gradient of all that trains; 0 leaves it as it is."""

    beta1: Annotated[float | None, _preset("B")] = None
    """Of Adam: how much of the mean gradient is kept from step to step."""

    beta2: Annotated[float | None, _preset("B")] = None
    """Of Adam: the same of the mean square."""

    epsilon: Annotated[float | None, _preset("E")] = None
    """Of Adam: added to the root of the mean square."""

    checkpoint_every: Annotated[int | None, _preset("STEPS")] = None
    """Steps between checkpoints."""

    keep: Annotated[int | None, _preset("N")] = None
    """How many checkpoints are kept, the newest."""

    log_every: Annotated[int | None, _preset("STEPS")] = None
    """Steps between rows of the log, which are means over them."""

    seed: int = 0
    """Of the order of the data, of dropout, of first values and of drawn documents."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given. What trains is float32."""


@dataclass(frozen=True)
class Training:
    """What both kinds of tuning can be told; whatever is left out is as in the preset."""

    model: str
    """The base model: 'tiny' or 'tiny-qwen' (bundled), a directory in Hugging Face layout, or a hub id."""

    data: Place
    """Conversations in LLaVA's format (JSON list or JSON Lines of {"image", "conversations": [{"from": "human" or
    "gpt", "value": text}, ...]}), or labelled rows as for 'fit', whose answer is the label."""

    output: Path
    """Folder for the run (log, checkpoints; a killed run goes on from the latest) and, at its end, 'model' (an ordinary
    checkpoint for every other command) and, if nothing but low-rank updates trained, 'adapter' (PEFT's format)."""

    image_folder: Annotated[Place | None, optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    rank: Annotated[int | None, _preset("R")] = None
    """Of the low-rank updates of the language model; 0 for none."""

    alpha: Annotated[float | None, _preset("A")] = None
    """Updates are scaled by alpha / rank."""

    dropout: Annotated[float | None, _preset("P")] = None
    """Share of the input dropped on the low-rank way."""

    target: Annotated[str | None, _preset("REGEX")] = None
    """Which projections of the language model, by path: 'language_model/layers/self_attn/(q|v)_proj'."""

    learning_rate: Annotated[float | None, _preset("RATE")] = None
    """Peak rate of the language model's updates."""

    vision_rank: Annotated[int | None, _preset("R")] = None
    """Of the low-rank updates of the vision tower; 0 for none."""

    vision_alpha: Annotated[float | None, _preset("A")] = None
    """As --alpha, of the vision tower."""

    vision_dropout: Annotated[float | None, _preset("P")] = None
    """As --dropout, of the vision tower."""

    vision_target: Annotated[str | None, _preset("REGEX")] = None
    """As --target, of the vision tower: '(vision_tower|visual)/layers/.*'."""

    vision_learning_rate: Annotated[float | None, _preset("RATE")] = None
    """Peak rate of the vision tower's updates."""

    projector_learning_rate: Annotated[float | None, _preset("RATE")] = None
    """Peak rate of what joins tower and language model, trained whole; 0 leaves it frozen."""

    max_tokens: Annotated[int | None, _preset("T")] = None
    """Cut conversations behind so many tokens; 0 for the model's own limit."""

    group_by_modality: Annotated[bool | None, optional("{True,False}", "as in the preset")] = None
    """Whether a batch holds either conversations about images or conversations without, as LLaVA's do."""

    run: Steps = field(default_factory=Steps)

    devices: Devices = field(default_factory=Devices)


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

    sq_ratio: Annotated[float | None, _preset("P")] = None
    """Share of the questions (but the first of each conversation, and only of those about images) that the model learns
    to ask."""

    conversation: Annotated[Literal["template", "vicuna-sq"] | None, _preset("{template,vicuna-sq}")] = None
    """How conversations are written: by the checkpoint's own chat template, or as SQ-LLaVA was released."""


@dataclass(frozen=True)
class Aim:
    model: str
    """The frozen model: 'tiny' or 'tiny-qwen' (bundled), a directory in Hugging Face layout, or a hub id."""

    output: Path
    """Folder for the run (log, checkpoints; a killed run goes on from the latest) and, at its end, 'projection'."""

    data: Annotated[Place | None, optional("FILE", "drawn scenes, for bundled models")] = None
    """Documents (JSON list or JSON Lines of {"segments": [{"image", "text", "question"?}, ...]}), or conversations in
    LLaVA's format or labelled rows, of which --pairs make a document."""

    image_folder: Annotated[Place | None, optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    preset: Literal["default", "tiny", "debug"] = "default"
    """'default': captions or interleaved documents, for models of billions of parameters. 'tiny': the bundled model.
    'debug': six steps."""

    documents: int = 3000
    """How many documents are drawn, without --data."""

    tokens: Annotated[Literal["text", "answer", "all"] | None, _preset("{text,answer,all}")] = None
    """Which tokens of a demonstration become virtual tokens: of question and answer, of the answer, or all but the
    images'."""

    layer: Annotated[int | None, _preset("L")] = None
    """Take hidden states after so many layers; 0 for all of them."""

    separator: Annotated[str | None, _preset("TEXT")] = None
    """Text behind each demonstration's virtual tokens."""

    projection: Annotated[Literal["linear", "mlp"] | None, _preset("{linear,mlp}")] = None
    """One linear layer, or two with a GELU between them."""

    norm: Annotated[bool | None, optional("{True,False}", "as in the preset")] = None
    """Whether a layer norm follows the projection."""

    initial: Annotated[Literal["identity", "random"] | None, _preset("{identity,random}")] = None
    """What the projection starts as."""

    shots: Annotated[str | None, _preset("K,K,...")] = None
    """Numbers of demonstrations, separated by commas; one is drawn for each step."""

    pairs: Annotated[int | None, _preset("N")] = None
    """Images and texts of a document that is made of single rows."""

    learning_rate: Annotated[float | None, _preset("RATE")] = None
    """Peak rate."""

    run: Steps = field(default_factory=Steps)

    devices: Devices = field(default_factory=Devices)


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
        optional("{template,vicuna-sq}", "as in the run.json beside the model, else vicuna-sq"),
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

    output: Annotated[Place | None, optional("FILE", "none")] = None
    """Write these rows to a file instead of printing questions."""

    batch_size: int = 8
    """Prompts decoded together. Lower it if memory runs out."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given."""


@dataclass(frozen=True)
class Plan:
    model: str
    """A config.json, a folder that has one (no weights are read), or 'tiny', 'tiny-qwen'."""

    topology: str
    """The pod to compile for: v5e:4x4, v5p:2x2x2, v6e:8x8, ..."""

    mesh: str
    """How its chips share the work: 'data' splits batches, 'fsdp' batches and the storage of weights, 'model' heads and
    feed-forward widths; fsdp=16, data=4,model=4."""

    task: Literal["extract", "train-lora", "train-sq"] = "extract"
    """Reading prompts ('sav-jax extract', 'fit', 'predict'), or a step of 'sav-jax train lora' or 'train sq-llava'."""

    preset: Annotated[str | None, optional("NAME", "llava, or stage2")] = None
    """The recipe, as for the commands that train."""

    batch_size: Annotated[
        int | None, optional("B", "one prompt per chip that shares the batch, or as in the preset")
    ] = None
    """Prompts of a batch, or conversations per step, over all chips."""

    largest: tyro.conf.FlagCreatePairsOff[bool] = False
    """Look for the largest batch that fits, to within a twentieth, too: compiles up to twelve programs more, usually
    three to five. Of a training step it begins with --batch-size, or the preset's, and leaves the rest of the recipe as
    it is."""

    micro_batches: Annotated[int | None, _preset("N")] = None
    """Cut every batch into so many parts, one after the other."""

    remat: Annotated[Literal["none", "dots", "full"] | None, _preset("{none,dots,full}")] = None
    """What layers compute again in the backward pass."""

    max_tokens: int = 2048
    """Tokens of every prompt or conversation, with those of its images."""

    image_rows: int = 1
    """Rows of pixels of every prompt or conversation: tiles (LLaVA) or patches (Qwen); 0 for text alone."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON."""
