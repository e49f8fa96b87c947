"""What a training run is made of, as data: presets, and what they become for a model and its conversations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sav_jax.errors import UserError
from sav_jax.models.lora import Target
from sav_jax.train.optimizer import Group, Optimization, check, check_name

if TYPE_CHECKING:
    from sav_jax.train.aim import AimRecipe

AnyRecipe = TypeVar("AnyRecipe", "Recipe", "AimRecipe")
LLM = "language_model/layers/.*"
TOWER = "(vision_tower|visual)/layers/.*"
CONVERSATIONS = ("template", "vicuna-sq")
PROJECTOR = "params/(multi_modal_projector|visual/(merger|deepstack_mergers|prototypes|resampler|proj))/.*"


@dataclass(frozen=True)
class Recipe:
    """Instruction tuning with low-rank updates.

    Attributes:
        rank, alpha, dropout: of the updates of the language model; rank 0 for none.
        target: which projections of the model they are of (``re.fullmatch`` on the path).
        learning_rate: of these; above 0 (rank 0 trains none).
        vision_rank, vision_alpha, vision_dropout, vision_target, vision_learning_rate: the same of the vision tower.
        projector_learning_rate: of what joins tower and language model; 0 leaves it frozen.
        weight_decay: of everything that trains.
        epochs: passes over the data; ``steps``, if not 0, counts instead.
        sq_ratio: share of the questions that the model learns to ask (SQ-LLaVA); 0 for ordinary tuning.
        conversation: "template": written as the checkpoint's chat template writes it; "vicuna-sq": as SQ-LLaVA was
            released.
        max_tokens: longer conversations are cut; 0: the model's own limit.
        group_by_modality: batches hold rows with images or rows without.
        optimization: everything else.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target: str = LLM
    learning_rate: float = 2e-4
    vision_rank: int = 0
    vision_alpha: float = 64.0
    vision_dropout: float = 0.0
    vision_target: str = TOWER
    vision_learning_rate: float = 2e-4
    projector_learning_rate: float = 0.0
    weight_decay: float = 0.0
    epochs: float = 3.0
    steps: int = 0
    sq_ratio: float = 0.0
    conversation: str = "template"
    max_tokens: int = 0
    group_by_modality: bool = False
    optimization: Optimization = field(default_factory=Optimization)

    def __post_init__(self) -> None:
        whole = ("rank", "vision_rank", "projector_learning_rate", "weight_decay", "steps", "max_tokens")
        check(self, whole, "at least 0", lambda x: x >= 0)
        check(self, ("epochs",), "above 0", lambda x: x > 0)
        check(self, ("sq_ratio",), "between 0 and 1", lambda x: 0 <= x <= 1)
        check_name("conversation", self.conversation, CONVERSATIONS)
        for kind in ("", "vision_"):
            check(self, (f"{kind}alpha", f"{kind}learning_rate"), "above 0", lambda x: x > 0)
            check(self, (f"{kind}dropout",), "at least 0 and below 1", lambda x: 0 <= x < 1)
        if not (self.rank or self.vision_rank or self.projector_learning_rate):
            raise UserError("nothing is trained: both ranks and the projector's learning rate are 0")
        _ = self.targets  # whose patterns must be regular expressions

    @property
    def targets(self) -> tuple[Target, ...]:
        """Of the low-rank updates."""
        targets = []
        if self.rank:
            targets.append(Target(self.target, self.rank, self.alpha, self.dropout))
        if self.vision_rank:
            targets.append(Target(self.vision_target, self.vision_rank, self.vision_alpha, self.vision_dropout))
        return tuple(targets)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Learning rates over all leaves."""
        groups = []
        if self.vision_rank:
            groups.append(Group("lora/(vision_tower|visual)/.*", self.vision_learning_rate, self.weight_decay))
        if self.rank:
            groups.append(Group("lora/.*", self.learning_rate, self.weight_decay))
        if self.projector_learning_rate:
            groups.append(Group(PROJECTOR, self.projector_learning_rate, self.weight_decay))
        return (*groups, Group("params/.*", 0.0))

    def resolved(self, rows: int) -> Recipe:
        """With the number of steps that the epochs over ``rows`` conversations come to."""
        steps = self.steps or math.ceil(self.epochs * rows / self.optimization.batch_size)
        return dataclasses.replace(
            self, steps=steps, optimization=dataclasses.replace(self.optimization, steps=max(steps, 1))
        )

    def facts(self) -> dict[str, Any]:
        """For the run's file: everything but how often it is written and looked at."""
        facts = dataclasses.asdict(self)
        for name in ("checkpoint_every", "keep", "log_every"):
            del facts["optimization"][name]
        return facts


_DEBUG = Optimization(steps=6, batch_size=8, checkpoint_every=2, log_every=1, warmup=0.0)
# Batches, lengths and rates of LLaVA-1.5's published LoRA recipe, which SQ-LLaVA took over.
_LLAVA = Optimization(batch_size=128, micro_batches=1, warmup=0.03, remat="full", checkpoint_every=200)

LORA_PRESETS: Mapping[str, Recipe] = {
    "default": Recipe(),
    "llava": Recipe(
        rank=128,
        alpha=256.0,
        projector_learning_rate=2e-5,
        epochs=1.0,
        max_tokens=2048,
        group_by_modality=True,
        optimization=_LLAVA,
    ),
    "debug": Recipe(rank=4, alpha=8.0, learning_rate=1e-2, steps=6, optimization=_DEBUG),
}
"""``default``: a few hundred examples on one machine. ``llava``: LLaVA-1.5's LoRA recipe. ``debug``: six steps."""

SQ_PRESETS: Mapping[str, Recipe] = {
    # The paper freezes tower and language model in stage 1; the released script trains the tower's LoRA as well.
    "stage1": Recipe(
        rank=0,
        projector_learning_rate=1e-3,
        epochs=1.0,
        conversation="vicuna-sq",
        max_tokens=2048,
        optimization=dataclasses.replace(_LLAVA, batch_size=256),
    ),
    "stage1-vit-lora": Recipe(
        rank=0,
        vision_rank=64,
        vision_alpha=128.0,
        vision_dropout=0.2,
        projector_learning_rate=1e-3,
        epochs=1.0,
        conversation="vicuna-sq",
        max_tokens=2048,
        optimization=dataclasses.replace(_LLAVA, batch_size=256),
    ),
    "stage2": Recipe(
        rank=128,
        alpha=256.0,
        vision_rank=32,
        vision_alpha=64.0,
        vision_dropout=0.2,
        vision_learning_rate=2e-5,
        projector_learning_rate=2e-5,
        epochs=1.0,
        sq_ratio=0.5,
        conversation="vicuna-sq",
        max_tokens=2048,
        group_by_modality=True,
        optimization=_LLAVA,
    ),
    "debug": Recipe(
        rank=4,
        alpha=8.0,
        learning_rate=1e-2,
        vision_rank=2,
        vision_alpha=4.0,
        vision_learning_rate=1e-3,
        projector_learning_rate=1e-3,
        steps=6,
        sq_ratio=0.5,
        optimization=_DEBUG,
    ),
}
"""SQ-LLaVA's two stages (arXiv 2403.11299, section 4; the released scripts), and ``debug``: six steps."""


def overridden(preset: AnyRecipe, options: Mapping[str, Any]) -> AnyRecipe:
    """The preset with every option that is given (not None) and that a recipe or its optimisation has.

    Raises:
        UserError: a value is out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("steps") == 0:
        raise UserError("steps must be at least 1, not 0")
    if "epochs" in given and "steps" not in given:
        given["steps"] = 0
    inner = {f.name for f in dataclasses.fields(Optimization)} - {"steps"}
    outer = {f.name for f in dataclasses.fields(preset)} - {"optimization"}
    optimization = dataclasses.replace(preset.optimization, **{n: v for n, v in given.items() if n in inner})
    return dataclasses.replace(preset, **{n: v for n, v in given.items() if n in outer}, optimization=optimization)
