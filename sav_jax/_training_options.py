"""The options of ``sav-jax train``, ``ask`` and ``plan``, as frozen dataclasses. What they do is in ``_commands``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sav_jax._options import Devices, optional


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

    image_folder: Annotated[Path | None, optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    rank: Annotated[int | None, optional("R", "as in the preset")] = None
    """Of the low-rank updates of the language model; 0 for none."""

    alpha: Annotated[float | None, optional("A", "as in the preset")] = None
    """Updates are scaled by alpha / rank."""

    dropout: Annotated[float | None, optional("P", "as in the preset")] = None
    """Share of the input dropped on the low-rank way."""

    target: Annotated[str | None, optional("REGEX", "as in the preset")] = None
    """Which projections of the language model, by path: 'language_model/layers/self_attn/(q|v)_proj'."""

    learning_rate: Annotated[float | None, optional("RATE", "as in the preset")] = None
    """Peak rate of the language model's updates."""

    vision_rank: Annotated[int | None, optional("R", "as in the preset")] = None
    """Of the low-rank updates of the vision tower; 0 for none."""

    vision_alpha: Annotated[float | None, optional("A", "as in the preset")] = None
    """As --alpha, of the vision tower."""

    vision_learning_rate: Annotated[float | None, optional("RATE", "as in the preset")] = None
    """Peak rate of the vision tower's updates."""

    projector_learning_rate: Annotated[float | None, optional("RATE", "as in the preset")] = None
    """Peak rate of what joins tower and language model, trained whole; 0 leaves it frozen."""

    epochs: Annotated[float | None, optional("N", "as in the preset")] = None
    """Passes over the data."""

    steps: Annotated[int | None, optional("N", "from the epochs")] = None
    """Number of steps, instead of epochs."""

    batch_size: Annotated[int | None, optional("B", "as in the preset")] = None
    """Conversations per step, over all devices."""

    micro_batches: Annotated[int | None, optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other, to save memory."""

    max_tokens: Annotated[int | None, optional("T", "as in the preset")] = None
    """Cut conversations behind so many tokens; 0 for the model's own limit."""

    remat: Annotated[Literal["none", "dots", "full"] | None, optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass, to save memory: nothing, all but the products with weights, or
    everything."""

    checkpoint_every: Annotated[int | None, optional("STEPS", "as in the preset")] = None
    """Steps between checkpoints."""

    seed: int = 0
    """Of the order of the data, of dropout and of first values."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given. What trains is float32."""

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

    sq_ratio: Annotated[float | None, optional("P", "as in the preset")] = None
    """Share of the questions (but the first of each conversation, and only of those about images) that the model learns
    to ask."""

    conversation: Annotated[
        Literal["template", "vicuna-sq"] | None, optional("{template,vicuna-sq}", "as in the preset")
    ] = None
    """How conversations are written: by the checkpoint's own chat template, or as SQ-LLaVA was released."""


@dataclass(frozen=True)
class Aim:
    model: str
    """The frozen model: 'tiny' (bundled), a directory in Hugging Face layout, or a hub id."""

    output: Path
    """Folder for the run (log, checkpoints; a killed run goes on from the latest) and, at its end, 'projection'."""

    data: Annotated[Path | None, optional("FILE", "drawn scenes, for 'tiny'")] = None
    """Documents (JSON list or JSON Lines of {"segments": [{"image", "text", "question"?}, ...]}), or conversations in
    LLaVA's format or labelled rows, of which --pairs make a document."""

    image_folder: Annotated[Path | None, optional("DIR", "the data file's folder")] = None
    """What relative image paths are relative to."""

    preset: Literal["default", "tiny", "debug"] = "default"
    """'default': captions or interleaved documents, for models of billions of parameters. 'tiny': the bundled model.
    'debug': six steps."""

    documents: int = 3000
    """How many documents are drawn, without --data."""

    tokens: Annotated[Literal["text", "answer", "all"] | None, optional("{text,answer,all}", "as in the preset")] = None
    """Which tokens of a demonstration become virtual tokens: of question and answer, of the answer, or all but the
    images'."""

    layer: Annotated[int | None, optional("L", "as in the preset")] = None
    """Take hidden states after so many layers; 0 for all of them."""

    separator: Annotated[str | None, optional("TEXT", "as in the preset")] = None
    """Text behind each demonstration's virtual tokens."""

    projection: Annotated[Literal["linear", "mlp"] | None, optional("{linear,mlp}", "as in the preset")] = None
    """One linear layer, or two with a GELU between them; a layer norm follows."""

    initial: Annotated[Literal["identity", "random"] | None, optional("{identity,random}", "as in the preset")] = None
    """What the projection starts as."""

    shots: Annotated[str | None, optional("K,K,...", "as in the preset")] = None
    """Numbers of demonstrations, separated by commas; one is drawn for each step."""

    pairs: Annotated[int | None, optional("N", "as in the preset")] = None
    """Images and texts of a document that is made of single rows."""

    learning_rate: Annotated[float | None, optional("RATE", "as in the preset")] = None
    """Peak rate."""

    epochs: Annotated[float | None, optional("N", "as in the preset")] = None
    """Passes over the documents."""

    steps: Annotated[int | None, optional("N", "from the epochs")] = None
    """Number of steps, instead of epochs."""

    batch_size: Annotated[int | None, optional("B", "as in the preset")] = None
    """Documents per step, over all devices."""

    micro_batches: Annotated[int | None, optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other, to save memory."""

    remat: Annotated[Literal["none", "dots", "full"] | None, optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass, to save memory: nothing, all but the products with weights, or
    everything."""

    checkpoint_every: Annotated[int | None, optional("STEPS", "as in the preset")] = None
    """Steps between checkpoints."""

    seed: int = 0
    """Of drawn documents, of the order of the data and of first values."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model: float32 on a CPU and bfloat16 on TPU and GPU unless given. What trains is float32."""

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

    output: Annotated[Path | None, optional("FILE", "none")] = None
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
    """A config.json, a folder that has one (no weights are read), or 'tiny'."""

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
    """Look for the largest batch that fits, too: compiles two to four programs more. Of 'extract' only."""

    micro_batches: Annotated[int | None, optional("N", "as in the preset")] = None
    """Cut every batch into so many parts, one after the other."""

    remat: Annotated[Literal["none", "dots", "full"] | None, optional("{none,dots,full}", "as in the preset")] = None
    """What layers compute again in the backward pass."""

    max_tokens: int = 2048
    """Tokens of every prompt or conversation, with those of its images."""

    image_rows: int = 1
    """Rows of pixels of every prompt or conversation: tiles (LLaVA) or patches (Qwen); 0 for text alone."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one line of JSON."""
