"""How tiny/ was made: a Qwen2-VL of 1.3 M parameters that sees the blocks world well and reasons about it poorly.

    python -m blocks.make_tiny --out tiny          # seeded; writes the Hugging Face directory and losses.csv; half an hour on one CPU core

It stands for a pretrained model, so it gets what pretraining gives, in three phases:

    name    the tokens of a picture learn to name what they show, in the language model's own words: the alignment that a real vision
            tower brings along, and without which a small model takes very long to look at pictures at all
    see     it learns to describe pictures ("describe .") and, asked for that ("check ." or "list ."), to go through a question's
            objects step by step. The questions are RL's own, since matching objects with a question's words is the slow part
    glance  it learns tags, and the prompt of RL ("think , then answer ."), where it answers at a glance: no reasoning, an answer that is
            often wrong, now and then a broken format

What it can do step by step when asked to "check" it does not do by itself when asked to think; whether RL finds out that it pays is the
experiment. Of the out-of-distribution splits it has seen pictures, but no question worked out step by step. No test question is used.
"""

import argparse
import csv
import itertools
import json
import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.path import Path as Outline
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from blocks import counting, dataset, drawing, scripted, structure, transformation
from blocks.scenes import CELLS, COLORS, SHAPES, SIZES
from data import state

SPECIAL = [
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "image_pad",
        "video_pad",
    )
]
CHAT_TEMPLATE = (  # as Qwen2-VL's, less the system prompt
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
SIDE, PATCH = drawing.GRID * drawing.CELL, 8
# What a cell of a picture can be: one word of each list.
NAMES = (
    ("no", "object"),
    SIZES,
    tuple(COLORS),
    SHAPES,
    ("0", "1", "2", "3", "4"),
)
# How often each task is practised.
TASKS = {"counting": 0.52, "structure": 0.18, "transformation": 0.3}


# ---------------------------------------------------------------------------------------------- the parts


def build_processor() -> Qwen2VLProcessor:
    """A word-level tokenizer, whose vision and chat tokens are added special ones, and the picture processors."""
    words = {word: i for i, word in enumerate(["<unk>", *dataset.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    limits = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, **sizes),
        video_processor=Qwen2VLVideoProcessor(size=limits, **sizes),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer) -> Qwen2VLForConditionalGeneration:
    """An untrained model. Head dimensions are 32, which every attention kernel takes."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end", "endoftext")}  # fmt: skip
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=None,
            eos_token_id=ids["im_end"],
            pad_token_id=ids["endoftext"],
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            embed_dim=96,
            num_heads=3,
            mlp_ratio=4,
            hidden_size=128,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),  # fmt: skip
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


# ---------------------------------------------------------------------------------------------- what it reads


def reasoned(problem, style: str) -> str:
    return f"<think> {problem.think(style)} </think> <answer> {problem.answer()} </answer>"


def glance(problem, wrong: list, rng: random.Random, right: float) -> str:
    """An answer without reasoning: right that often, else that of one of the `wrong` problems; one in eight in a broken format."""
    seen = problem if rng.random() < right or not wrong else rng.choice(wrong)
    broken = rng.random()
    if broken < 0.04:
        return seen.answer()
    if broken < 0.08:
        return f"<answer> {seen.answer()} </answer>"
    if broken < 0.12:
        return f"<think> at a glance <answer> {seen.answer()} </answer>"
    return f"<think> at a glance </think> <answer> {seen.answer()} </answer>"


def lesson(
    index: int, seed: int, glances: int, right: float
) -> tuple[str, np.ndarray, np.ndarray, list]:
    """A task, pictures (n, 64, 64, 3) uint8 of one of its problems, their `names`, and (request, response) pairs about them.

    glances: how many answers at a glance, of which the share `right` is right
    (out of distribution a quarter of that).
    """
    rng = random.Random(f"tiny {seed} {index}")
    task = rng.choices(list(TASKS), list(TASKS.values()))[0]
    ood = rng.random() < 0.15
    split = rng.choice([name.split("-")[1] for name in state.SETS[task][1:]]) if ood else "train"
    problem = dataset.TASKS[task].sample(rng, split)
    while dataset.in_test(problem):
        problem = dataset.TASKS[task].sample(rng, split)
    question, images = problem.question(), problem.images()
    pairs = []
    if glances:
        # In distribution it errs plausibly; out of it, it says what would answer another question, one with a short answer. Seen from the
        # side, things seem to have moved.
        wrong = scripted.mistakes(problem)
        if ood:
            others = [
                moved(problem, rng)
                if task == "transformation"
                else dataset.TASKS[task].sample(rng, split)
                for _ in range(4)
            ]
            wrong = [min(others, key=lambda other: len(other.answer()))]
        share = right / 4 if ood else right
        pairs += [
            (f"{question} think , then answer .", glance(problem, wrong, rng, share))
            for _ in range(glances)
        ]
    if ood or rng.random() < 0.25:
        pairs += [("describe .", problem.describe())]
    if not ood:
        pairs += [
            (f"{question} check .", reasoned(problem, "careful")),
            (f"{question} list .", reasoned(problem, "quick")),
        ]
    return task, np.stack([np.asarray(image) for image in images]), names(problem), pairs


def moved(
    problem: transformation.Transformation, rng: random.Random
) -> transformation.Transformation:
    """The same objects before, and one of them a step away after: nothing else has changed."""
    taken = {thing.cell for thing in problem.before}
    steps = [
        (i, cell)
        for i, thing in enumerate(problem.before)
        for cell in CELLS
        if cell not in taken and transformation.direction(thing.cell, cell)
    ]
    i, cell = rng.choice(steps)
    return replace(
        problem,
        after=problem.before[:i]
        + (replace(problem.before[i], cell=cell),)
        + problem.before[i + 1 :],
    )


def names(problem) -> np.ndarray:
    """(n, 16, 5) int: what each picture's cells show, as places in the lists of `NAMES`; -1 where there is nothing to say.

    A cell of a scene: empty or an object, its size, colour, shape. A cell of a figure: how many of its four units are inside.
    """
    if isinstance(problem, structure.Structure):
        shown = np.full((1, drawing.GRID**2, len(NAMES)), -1)
        figure = problem.figure
        if figure.shape != "strip":
            outline = Outline([(figure.x + x, figure.y + y) for x, y in figure.corners()])
            centers = [(x + 0.5, 7.5 - y) for y in range(8) for x in range(8)]
            inside = outline.contains_points(centers).reshape(4, 2, 4, 2).sum((1, 3))
            shown[0, :, 4] = inside.flatten()
        return shown
    scenes = (
        [(problem.objects, "center")]
        if isinstance(problem, counting.Counting)
        else [(problem.before, "center"), (problem.after, problem.view)]
    )
    shown = np.full((len(scenes), drawing.GRID**2, len(NAMES)), -1)
    shown[:, :, 0] = 0
    for i, (objects, view) in enumerate(scenes):
        for thing in objects:
            column, row = drawing.seen_at(thing.cell, view)
            words = ("object", thing.size, thing.color, thing.shape)
            shown[i, row * drawing.GRID + column, :4] = [
                NAMES[k].index(word) for k, word in enumerate(words)
            ]
    return shown


class Lessons:
    """A pool of lessons on the device, in buckets of one task and of similar lengths, from which batches are drawn."""

    def __init__(
        self,
        size: int,
        seed: int,
        tokenizer,
        device,
        glances: int = 0,
        right: float = 0.0,
        buckets: int = 4,
    ):
        arguments = (range(size), *map(itertools.repeat, (seed, glances, right)))
        with ProcessPoolExecutor(os.cpu_count()) as workers:
            lessons = list(
                tqdm(
                    workers.map(lesson, *arguments, chunksize=256),
                    total=size,
                    desc="lessons",
                    mininterval=5,
                )
            )
        self.pictures = []  # by task: all pictures and their names
        self.buckets, self.shares = (
            [],
            [],
        )  # a bucket: pictures, and one row per (request, response)
        for task, share in TASKS.items():
            chosen = [rest for name, *rest in lessons if name == task]
            pictures, shown = (
                torch.from_numpy(np.stack([part[i] for part in chosen])).to(device) for i in (0, 1)
            )
            self.pictures.append((pictures.flatten(0, 1), shown.flatten(0, 1)))
            rows = []
            for owner, (images, _, pairs) in enumerate(chosen):
                for request, response in pairs:
                    prompt = prompt_ids(tokenizer, len(images), request)
                    rows.append(
                        (owner, prompt, tokenizer(response).input_ids + [tokenizer.eos_token_id])
                    )
            rows.sort(key=lambda row: len(row[1]) + len(row[2]))
            for b in range(buckets):
                part = rows[b * len(rows) // buckets : (b + 1) * len(rows) // buckets]
                ids = np.full(
                    (len(part), len(part[-1][1]) + len(part[-1][2])),
                    tokenizer.pad_token_id,
                    np.int16,
                )
                spoken = np.zeros(ids.shape, bool)
                for i, (_, prompt, response) in enumerate(part):
                    ids[i, : len(prompt) + len(response)] = prompt + response
                    spoken[i, len(prompt) : len(prompt) + len(response)] = True
                tensors = [
                    torch.from_numpy(x).to(device)
                    for x in (np.array([row[0] for row in part]), ids, spoken)
                ]
                self.buckets.append((pictures, *tensors))
                self.shares.append(share / buckets)

    def batch(self, size: int, generator: torch.Generator):
        """pictures (B, n, 64, 64, 3), ids (B, L), labels (B, L): -100 but on the responses."""
        bucket = torch.multinomial(torch.tensor(self.shares), 1, generator=generator)
        pictures, owner, ids, spoken = self.buckets[bucket]
        rows = torch.randint(len(owner), (size,), generator=generator).to(ids.device)
        tokens = ids[rows].long()
        return pictures[owner[rows]], tokens, tokens.masked_fill(~spoken[rows], -100)


def prompt_ids(tokenizer, images: int, text: str) -> list[int]:
    """The prompt as the processor makes it: each picture is 16 image tokens."""
    picture = f"<|vision_start|>{'<|image_pad|>' * drawing.GRID**2}<|vision_end|>"
    return tokenizer(
        f"<|im_start|> user {picture * images}{text} <|im_end|> <|im_start|> assistant "
    ).input_ids


# ---------------------------------------------------------------------------------------------- how it learns


class Learner:
    """The model's forward pass for many pictures of one size: the same numbers as its own, which goes picture by picture."""

    def __init__(self, model, processor, device):
        self.model = model.to(device)
        self.image_token, self.device = model.config.image_token_id, device
        self.positions = []  # (3, 1024), by the number of pictures
        rotary = []
        handle = model.model.visual.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: rotary.append(kwargs["position_embeddings"]),
            with_kwargs=True,
        )
        for count in (1, 2):
            problem = dataset.BlocksSet(
                "counting-train" if count == 1 else "transformation-train", 1
            )[0]
            text = processor.apply_chat_template(
                problem.messages(), tokenize=False, add_generation_prompt=True
            )
            inputs = processor(text=[text], images=list(problem.images), return_tensors="pt").to(
                device
            )
            assert inputs.input_ids[0].tolist() == prompt_ids(
                processor.tokenizer, count, f"{problem.question} {problem.request}"
            )
            captured = {}
            text_model = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs, captured=captured: captured.update(kwargs),
                with_kwargs=True,
            )
            with torch.no_grad():
                expected = model(**inputs).logits
            text_model.remove()
            position = captured["position_ids"][-3:, 0]  # (3, P)
            tail = position.max() + 1 + torch.arange(1024 - position.shape[1], device=device)
            self.positions.append(torch.cat([position, tail.expand(3, -1)], dim=1))
            if count == 1:
                handle.remove()
                self.cos, self.sin = rotary[0]
            pictures = torch.from_numpy(
                np.stack([np.asarray(image) for image in problem.images])
            ).to(device)
            with torch.no_grad():
                logits = self.logits(pictures[None], inputs.input_ids)
            torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(n, 64, 64, 3) uint8 -> (n, 16, hidden): `model.visual`, all pictures at once."""
        tower, n = self.model.model.visual, len(pictures)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=self.device)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=self.device)
        x = ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)  # (n, 3, 64, 64)
        m, g = 2, SIDE // PATCH // 2
        x = x.view(n, 3, g, m, PATCH, g, m, PATCH).permute(
            0, 2, 5, 3, 6, 1, 4, 7
        )  # (n, g, g, m, m, 3, P, P)
        x = x.reshape(-1, 3, 1, PATCH, PATCH).expand(
            -1, -1, 2, -1, -1
        )  # a still picture is a film of two frames
        x = tower.patch_embed(x.reshape(len(x), -1)).view(n, (g * m) ** 2, -1)  # (n, 64, width)
        for block in tower.blocks:
            q, k, v = (
                block.attn.qkv(block.norm1(x))
                .view(n, x.shape[1], 3, block.attn.num_heads, -1)
                .unbind(2)
            )
            q, k = (self.rotate(y).transpose(1, 2) for y in (q, k))
            y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return tower.merger(x.flatten(0, 1)).view(n, g * g, -1)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[:, None] + torch.cat([-second, first], dim=-1) * self.sin[:, None]

    def logits(
        self, pictures: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, n, 64, 64, 3), (B, L) -> (B, L, vocabulary), or (K, vocabulary) of the K positions that `keep` (B, L) marks."""
        x = self.model.model.language_model.embed_tokens(ids)
        seen = self.features(pictures.flatten(0, 1)).to(x.dtype)
        x = x.masked_scatter((ids == self.image_token)[..., None], seen)
        position = self.positions[pictures.shape[1] - 1][:, None, : ids.shape[1]].expand(
            -1, len(ids), -1
        )
        x = self.model.model.language_model(
            inputs_embeds=x, position_ids=position, use_cache=False
        ).last_hidden_state
        return self.model.lm_head(x if keep is None else x[keep])

    def naming_loss(
        self, pictures: torch.Tensor, shown: torch.Tensor, words: list[list[int]]
    ) -> torch.Tensor:
        """How badly the pictures' tokens (n, 16) name their cell and what it shows, by the language model's own words."""
        logits = self.model.lm_head(self.features(pictures)).flatten(0, 1)  # (n x 16, vocabulary)
        cells = torch.arange(drawing.GRID**2, device=self.device).repeat(len(pictures))
        loss = F.cross_entropy(logits[:, words[-1]], cells)
        for ids, label in zip(words, shown.flatten(0, 1).T, strict=False):
            if (label >= 0).any():
                loss = loss + F.cross_entropy(logits[:, ids], label, ignore_index=-1)
        return loss

    def loss(self, pictures, ids, labels) -> torch.Tensor:
        spoken = labels[:, 1:] != -100
        logits = self.logits(pictures, ids[:, :-1], keep=spoken)
        return F.cross_entropy(logits.float(), labels[:, 1:][spoken])


def train(learner: Learner, batches, steps: int, peak: float, phase: str, log: list) -> None:
    """AdamW, one cycle: 10 % up, then a cosine down. batches() gives the loss of the next batch.

    Appends (phase, step, loss) to `log` every 50 steps.
    """
    parameters = list(learner.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    total, count = torch.zeros((), device=learner.device), 0
    bar = tqdm(range(steps), desc=phase, mininterval=5)
    for step in bar:
        up = min(1.0, (step + 1) / (0.1 * steps))
        optimizer.param_groups[0]["lr"] = peak * up * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast(
            learner.device.type, torch.bfloat16, enabled=learner.device.type == "cuda"
        ):
            loss = batches()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total, count = total + loss.detach(), count + 1
        if count == 50 or step == steps - 1:
            log.append((phase, step + 1, round(float(total / count), 5)))
            bar.set_postfix(loss=log[-1][-1])
            total, count = torch.zeros_like(total), 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the tiny Qwen2-VL of the blocks world.")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        default=(250, 4800, 400),
        metavar="N",
        help="of the three phases",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak of each phase")
    parser.add_argument(
        "--lessons", type=int, default=60000, help="problems in the pool of a phase"
    )
    parser.add_argument(
        "--right", type=float, default=0.45, help="share of right answers at a glance"
    )
    parser.add_argument(
        "--start",
        metavar="DIR",
        help="start from these weights, not from random ones (leave out phases by 0 steps)",
    )
    args = parser.parse_args()
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    out = Path(args.out)
    processor = build_processor()
    processor.save_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)  # as users will load it
    model = build_model(processor.tokenizer)
    if args.start:
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}",
        flush=True,
    )
    learner, log = Learner(model, processor, device), []
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = processor.tokenizer
    words = [tokenizer.convert_tokens_to_ids(list(names)) for names in (*NAMES, CELLS)]

    def name_pictures() -> torch.Tensor:
        pictures, shown = lessons.pictures[
            torch.multinomial(torch.tensor(list(TASKS.values())), 1, generator=generator)
        ]
        rows = torch.randint(len(pictures), (args.batch,), generator=generator).to(device)
        return learner.naming_loss(pictures[rows], shown[rows], words)

    def answer() -> torch.Tensor:
        return learner.loss(*lessons.batch(args.batch, generator))

    for phase, steps in enumerate(args.steps):
        if not steps:
            continue
        name = ("name", "see", "glance")[phase]
        if (
            name != "see" or not args.steps[0]
        ):  # the second phase goes on with the pictures of the first
            generator.manual_seed(args.seed + phase)
            glances = dict(glances=2, right=args.right) if name == "glance" else {}
            size = 2 * steps * args.batch if name == "glance" else args.lessons
            lessons = Lessons(size, args.seed + phase, tokenizer, device, **glances)
        if name == "glance":
            save(model, out / "seen", dtype=torch.float32)  # to try other last phases from
        train(learner, name_pictures if name == "name" else answer, steps, args.lr, name, log)
    save(model, out, dtype=torch.bfloat16)
    with open(out / "losses.csv", "w", newline="") as file:
        csv.writer(file).writerows([("phase", "step", "loss"), *log])
    print(f"made {out} in {time.time() - started:.0f} s")


def save(model, out: Path, dtype: torch.dtype) -> None:
    """Writes the weights in `dtype` and leaves the model as it is."""
    weights = {
        name: tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
