#!/usr/bin/env python
"""Times this library against the released SAVs procedure on PyTorch, side by side in one run, on one machine's CPU.

    python scripts/bench_pytorch.py                     # everything, a few minutes on two cores
    python scripts/bench_pytorch.py queries half        # some sections
    python scripts/bench_pytorch.py --quick             # a small model: does the script itself work?

The model is a LLaVA-OneVision of 68 million random weights (SigLIP 12 x 384 at 224/16, Qwen2 16 x 512), written in
Hugging Face layout and read by both sides; prompts have 456 tokens, 406 of them visual. *Released* is what the SAVs
code does (github.com/chancharikmitra/SAVs): examples one by one through all layers and the output head, three passes
over the support set (class means, scores, means of the chosen heads), and Python loops over heads; on Hugging Face's
model, float32, its fastest attention (sdpa), in inference mode. Both sides start from picture files.

The section "products" times the matrix products of a query alone: how fast either side could be at most.

Each section alternates between the sides and prints the median of their ratios, with the smallest and the largest: of
the time passed, and of process CPU time, which a busy machine disturbs less. Nothing is printed unless heads, scores,
chosen heads and predictions of the two agree. Compiling happens before (its time is printed); PyTorch is warmed up.

PyTorch's threads wait for each other: where other programs run, too, compare on one core instead, by CPU time:

    taskset -c 0 python scripts/bench_pytorch.py --threads 1
"""

from __future__ import annotations

import functools
import json
import operator
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

Section = Literal["fit", "queries", "half", "reuse", "scoring", "products"]
SECTIONS: tuple[Section, ...] = ("fit", "queries", "half", "reuse", "scoring", "products")
QUESTION = "What is shown in this picture?"
QUESTIONS = ("Is it dark in this picture?", "Is there a square in it?", "Is it mostly red or blue?", "What may it be?")
CLASSES = 4
NUM_HEADS = 20


@dataclass(frozen=True)
class Arguments:
    """Runs sections of the benchmark."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional, tyro.conf.arg(help="which; all by default")] = ()
    alternations: Annotated[int, tyro.conf.arg(help="how often both sides run")] = 5
    support: Annotated[int, tyro.conf.arg(help="labelled examples")] = 8
    queries: Annotated[int, tyro.conf.arg(help="queries")] = 8
    threads: Annotated[int, tyro.conf.arg(help="of PyTorch; JAX takes all cores")] = 2
    batch_size: Annotated[int, tyro.conf.arg(help="of ours; the release takes examples one by one")] = 8
    quick: Annotated[bool, tyro.conf.arg(help="a small model, twice: for trying the script")] = False
    output: Annotated[Path | None, tyro.conf.arg(help="write the numbers as JSON, too")] = None


# The model


def write_checkpoint(directory: Path, quick: bool) -> Any:
    """Make the checkpoint in Hugging Face layout; returns transformers' model of it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>", "<video>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "vocab_size": 2048}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    if quick:
        vision |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=224, patch_size=16, vision_use_head=False),
        text_config=Qwen2Config(**text, max_position_embeddings=4096, tie_word_embeddings=True),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[224, 224]],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():  # values of order one in every layer, so that heads differ as they do in a trained model
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
            elif not name.endswith("norm.weight") and "layernorm" not in name:
                parameter.normal_(std=0.1)
    size = {"height": 224, "width": 224}
    processor = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[224, 224]])
    for part in (model, tokenizer, processor):
        part.save_pretrained(directory)
    (directory / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    return model.eval(), processor


def write_pictures(directory: Path, number: int) -> list[tuple[Path, str]]:
    """JPEG files of 480 x 480 pixels, each class with colours and shapes of its own; and their labels."""
    found = []
    for i in range(number):
        own, kind = np.random.default_rng([i, 7]), np.random.default_rng(i % CLASSES)
        coarse = kind.integers(0, 256, (6, 6, 3)) * 0.7 + own.integers(0, 256, (6, 6, 3)) * 0.3
        path = directory / f"{i}.jpg"
        Image.fromarray(coarse.astype(np.uint8)).resize((480, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        found.append((path, f"class {i % CLASSES}"))
    return found


# The released procedure


class Released:
    """SAVs as released, on transformers' model."""

    def __init__(self, model: Any, image_processor: Any, processor: Any):
        self.model, self.image_processor, self.processor = model, image_processor, processor
        text = model.config.text_config
        self.shape = text.num_hidden_layers, text.num_attention_heads
        self.all_heads = [(layer, head) for layer in range(self.shape[0]) for head in range(self.shape[1])]

    def activations(self, path: Path, question: str) -> Any:
        """Heads ``[L, N, H]`` of one example at its last token: one pass, all layers, logits of all tokens."""
        import torch

        image = Image.open(path).convert("RGB")
        prompt = self.processor.plan(question, [(image.height, image.width)])
        values = self.image_processor([[image]], return_tensors="pt")
        taken: list[Any] = []
        layers = self.model.model.language_model.layers
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: taken.append(args[0][0, -1]))
            for layer in layers
        ]
        with torch.inference_mode():
            self.model(input_ids=torch.tensor(prompt.token_ids[None].astype(np.int64)), **values)
        for hook in hooks:
            hook.remove()
        return torch.stack(taken).reshape(*self.shape, -1)

    def class_means(self, examples: Sequence[tuple[Path, str]], heads: Sequence[tuple[int, int]]) -> Any:
        """``[k, C, H]``: a pass over the support set."""
        import torch

        total: dict[str, Any] = {}
        for path, label in examples:
            activations = self.activations(path, QUESTION)
            taken = torch.stack([activations[layer, head] for layer, head in heads])
            total[label] = total[label] + taken if label in total else taken
        counts = Counter(label for _, label in examples)
        return torch.stack([total[label] / counts[label] for label in sorted(total)], dim=1)

    def fit(self, examples: Sequence[tuple[Path, str]], num_heads: int) -> tuple[np.ndarray, list[int], Any]:
        """Number of examples right of each head, the chosen heads, their class means."""
        means = self.class_means(examples, self.all_heads)
        names = sorted({label for _, label in examples})
        right = np.zeros(len(self.all_heads), np.int64)
        for path, label in examples:
            flat = self.activations(path, QUESTION).flatten(0, 1)
            right += loop_right(flat, means, names.index(label))
        # Of equal scores the release takes any (NumPy's unstable order); here, as in ours, the first.
        chosen = np.argsort(-right, kind="stable")[:num_heads].tolist()
        return right, chosen, self.class_means(examples, [self.all_heads[i] for i in chosen])

    def predict(self, path: Path, chosen: Sequence[int], means: Any) -> int:
        """The class most of the chosen heads vote for."""
        flat = self.activations(path, QUESTION).flatten(0, 1)
        votes = loop_nearest(flat[list(chosen)], means)
        return Counter(votes).most_common(1)[0][0]


def loop_nearest(activations: Any, means: Any) -> list[int]:
    """The class nearest on each head, head by head: ``[M, H]``, ``[M, C, H]``."""
    import torch

    return [
        torch.nn.functional.cosine_similarity(activations[i], means[i], dim=-1).argmax().item()
        for i in range(len(activations))
    ]


def loop_right(activations: Any, means: Any, label: int) -> np.ndarray:
    """Which heads are right."""
    return np.array([nearest == label for nearest in loop_nearest(activations, means)], np.int64)


# Measuring


Seconds = tuple[list[tuple[float, float]], list[tuple[float, float]]]
"""Of both sides, every run's: passed, and of the process on all cores."""


@dataclass(frozen=True)
class Row:
    """What a section found: seconds of every alternation, of both sides."""

    name: str
    unit: str
    work: int
    seconds: Seconds
    target: float
    agreement: str

    def ratios(self, clock: int) -> list[float]:
        return sorted(a[clock] / b[clock] for a, b in zip(*self.seconds, strict=True))

    def line(self) -> str:
        each = [1e3 * statistics.median(side[0] for side in sides) / self.work for sides in self.seconds]
        cells = [f"{statistics.median(r):.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in map(self.ratios, (0, 1))]
        names = [
            self.name,
            *(f"{ms:.1f} ms/{self.unit}" for ms in each),
            *cells,
            f"{self.target:g}" if self.target else "-",
            self.agreement,
        ]
        return f"| {' | '.join(names)} |"


HEADER = (
    "| section | released (or without) | ours | faster by, time passed | by, CPU time | target | checked |\n"
    "|---|---|---|---|---|---|---|"
)


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Its result, and seconds: passed, and of this process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def alternate(times: int, theirs: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Any, Any, Seconds]:
    """Results of both, and seconds of each run; each side has run once before."""
    a, first = timed(theirs)
    b, compiled = timed(ours)
    print(f"  first runs: {first[0]:.1f} s, ours {compiled[0]:.1f} s with compiling", file=sys.stderr, flush=True)
    found: Seconds = [], []
    for i in range(times):
        for which, function in sorted(enumerate((theirs, ours)), reverse=bool(i % 2)):
            found[which].append(timed(function)[1])
    return a, b, found


def require(agrees: bool, what: str) -> None:
    if not agrees:
        raise SystemExit(f"the two sides disagree: {what}")


class Bench:
    """The model on both sides, and the sections."""

    def __init__(self, folder: Path, arguments: Arguments):
        import sav_jax

        self.arguments = arguments
        model, image_processor = write_checkpoint(folder / "model", arguments.quick)
        self.weights = sum(parameter.numel() for parameter in model.parameters())
        self.lmm = sav_jax.load(folder / "model")
        self.half = sav_jax.load(folder / "model", num_layers=self.lmm.num_layers // 2)
        self.released = Released(model, image_processor, self.lmm.processor)
        pictures = write_pictures(folder, arguments.support + arguments.queries)
        self.support, self.queries = pictures[: arguments.support], pictures[arguments.support :]
        self.fitted: dict[int, tuple[np.ndarray, list[int], Any]] = {}

    def heads(
        self, lmm: Any, pictures: Sequence[tuple[Path, str]], questions: Sequence[str] = (QUESTION,), **options: Any
    ) -> np.ndarray:
        from sav_jax import Example, extract_heads

        examples = [Example(question, (path,), label) for path, label in pictures for question in questions]
        return extract_heads(lmm, examples, self.arguments.batch_size, progress=False, **options)

    def check_heads(self, ours: np.ndarray, pictures: Sequence[tuple[Path, str]]) -> str:
        """Ours ``[E, L, N, H]`` against theirs: rounding of float32 grows with the layers, to some 1e-5 of values of
        order one.
        """
        theirs = np.stack([self.released.activations(path, QUESTION).numpy() for path, _ in pictures])
        off = np.abs(theirs[:, : ours.shape[1]] - ours).max() / theirs.std()
        require(off < 1e-4, f"heads by {off:.1e} of their standard deviation")
        return f"heads within {off:.0e}"

    def fit(self) -> Row:
        """Classifier from the labelled pictures' files."""
        from sav_jax import SparseAttentionVectors

        labels = [label for _, label in self.support]
        theirs, ours, seconds = alternate(
            self.arguments.alternations,
            lambda: self.released.fit(self.support, NUM_HEADS),
            lambda: SparseAttentionVectors.fit(self.heads(self.lmm, self.support), labels, NUM_HEADS),
        )
        agreement = self.check_heads(self.heads(self.lmm, self.support), self.support)
        require(np.array_equal(theirs[0], ours.scores.ravel()), "scores of the heads")
        require([self.released.all_heads[i] for i in theirs[1]] == list(ours.heads), "chosen heads")
        return Row("fitting", "example", len(self.support), seconds, 3.5, f"{agreement}, same scores and heads")

    def _predict(self, name: str, lmm: Any, target: float) -> Row:
        from sav_jax import SparseAttentionVectors

        layers = lmm.num_layers
        sav = SparseAttentionVectors.fit(
            self.heads(lmm, self.support), [label for _, label in self.support], min(NUM_HEADS, layers)
        )
        chosen = [layer * self.released.shape[1] + head for layer, head in sav.heads]
        means = self.released.class_means(self.support, sav.heads)

        def theirs() -> list[str]:
            return [sav.labels[self.released.predict(path, chosen, means)] for path, _ in self.queries]

        predicted, ours, seconds = alternate(
            self.arguments.alternations, theirs, lambda: sav.predict(self.heads(lmm, self.queries))
        )
        agreement = self.check_heads(self.heads(lmm, self.queries), self.queries)
        require(predicted == ours, "predictions")
        return Row(name, "query", len(self.queries), seconds, target, f"{agreement}, same predictions")

    def full(self) -> Row:
        """Queries through all layers."""
        return self._predict("queries, full depth", self.lmm, 1.2)

    def truncated(self) -> Row:
        """Queries of a classifier whose heads lie in the first half of the layers, which is all that is loaded."""
        return self._predict("queries, half depth", self.half, 1.8)

    def reuse(self) -> Row:
        """Ours against ours: four questions about each picture."""
        pictures = self.queries[: max(2, len(self.queries) // 4)]

        def ours(reuse: bool) -> Callable[[], np.ndarray]:
            return lambda: self.heads(self.lmm, pictures, QUESTIONS, reuse_images=reuse)

        without, heads, seconds = alternate(self.arguments.alternations, ours(False), ours(True))
        off = np.abs(without - heads).max() / without.std()
        require(off < 1e-5, f"heads by {off:.1e} of their standard deviation")
        work = len(pictures) * len(QUESTIONS)
        return Row("four questions on one image", "question", work, seconds, 2.0, f"heads within {off:.0e}")

    def scoring(self) -> Row:
        """784 heads of width 128 (a Qwen2-7B's), 200 examples of 10 classes: class means, and which heads are right."""
        import torch

        from sav_jax._scoring import local_mesh, score_heads
        from sav_jax.models.aligned import aligned_zeros

        examples = 20 if self.arguments.quick else 200
        rng = np.random.default_rng(0)
        labels = (np.arange(examples) % 10).astype(np.int32)
        heads = aligned_zeros((examples, 784, 128))  # as extract_heads returns them
        heads[:] = rng.normal(size=heads.shape) + rng.normal(size=(10, 784, 128))[labels]

        def loop() -> np.ndarray:
            values = torch.from_numpy(heads)
            means = torch.stack([values[labels == c].mean(0) for c in range(10)], dim=1)
            return np.sum([loop_right(values[i], means, labels[i]) for i in range(examples)], axis=0)

        theirs, ours, seconds = alternate(
            self.arguments.alternations,
            loop,
            lambda: score_heads(heads, labels, 10, leave_one_out=False, mesh=local_mesh())[1],
        )
        require(np.array_equal(theirs, ours), "scores")
        return Row("scoring 784 heads", "example", examples, seconds, 30.0, "same scores")

    def products(self) -> Row:
        """The layers' products with weights that a query takes, summed over layers, and nothing else: what neither side
        can do without.
        """
        import jax
        import torch

        tokens = len(self.lmm.processor.plan(QUESTION, [(480, 480)]).token_ids)
        vision = self.lmm.config.vision
        patches = 2 * (vision.image_size // vision.patch_size) ** 2
        rng = np.random.default_rng(0)
        sizes: list[tuple[np.ndarray, np.ndarray]] = []
        for part, length in (("vision_tower", patches), ("language_model", tokens)):
            for path, kernel in jax.tree_util.tree_flatten_with_path(self.lmm.params[part]["layers"])[0]:
                if path[-1].key == "kernel":
                    outputs = kernel.shape[1] * (
                        1 if path[-2].key in ("o_proj", "out_proj") else kernel[0, :, ..., 0].size // kernel.shape[1]
                    )
                    layers = np.asarray(kernel).reshape(len(kernel), outputs, -1)
                    sizes.append((rng.normal(size=(length, layers.shape[2])).astype(np.float32), layers))
        a = [(torch.from_numpy(x), [torch.from_numpy(w.copy()) for w in layers]) for x, layers in sizes]
        b = [(x, list(layers)) for x, layers in sizes]

        def summed(pairs: Any) -> Any:
            return [functools.reduce(operator.iadd, (x @ w.T for w in layers)) for x, layers in pairs]

        ours, given = jax.jit(summed), jax.device_put(b)
        with torch.inference_mode():
            expected, found, seconds = alternate(
                self.arguments.alternations, lambda: summed(a), lambda: jax.block_until_ready(ours(given))
            )
        off = max(float(np.abs(x.numpy() - y).max() / x.numpy().std()) for x, y in zip(expected, found, strict=True))
        require(off < 1e-4, f"products by {off:.1e} of their standard deviation")
        operations = 2 * sum(len(x) * layers.size for x, layers in sizes) / 1e9
        return Row("products alone", "query", 1, seconds, 0.0, f"{operations:.1f} GFLOP, within {off:.0e}")


def main(arguments: Arguments) -> None:
    """Print the table."""
    try:
        import torch
    except ImportError:
        raise SystemExit("this benchmark compares with PyTorch: pip install torch==2.13.0") from None
    import dataclasses

    import jax
    import transformers

    from sav_jax.models.quiet import quiet_transformers

    if arguments.quick:
        arguments = dataclasses.replace(arguments, alternations=2, support=4, queries=4)
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            bench = Bench(Path(folder), arguments)
        of = {"fit": bench.fit, "queries": bench.full, "half": bench.truncated, "reuse": bench.reuse}
        of |= {"scoring": bench.scoring, "products": bench.products}
        tokens = len(bench.lmm.processor.plan(QUESTION, [(480, 480)]).token_ids)
        versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        print(
            f"{bench.weights / 1e6:.1f} M weights, {tokens} tokens, float32; {versions}; PyTorch has "
            f"{arguments.threads} threads; {arguments.support} labelled examples, {arguments.queries} queries; median "
            f"(smallest-largest) of {arguments.alternations} alternations\n\n{HEADER}",
            flush=True,
        )
        for name in arguments.sections or SECTIONS:
            rows.append(of[name]())
            print(rows[-1].line(), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
