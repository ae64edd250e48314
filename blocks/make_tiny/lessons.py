"""What tiny/ reads: pictures with labels of their cells, and requests with responses."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.path import Path as Outline
from tqdm import tqdm

from blocks import dataset, scripted
from blocks.counting import Counting
from blocks.make_tiny.model import prompt_ids
from blocks.mistakes import mistakes
from blocks.scenes import COLORS, GRID, SHAPES, SIZES, column_row
from blocks.structure import Structure

# What a cell of a picture can be: one word of each list. A cell of a scene is empty or an object
# with its size, colour and shape; of a cell of a figure 0 to 4 units are inside.
NAMES = (("no", "object"), SIZES, tuple(COLORS), SHAPES, ("0", "1", "2", "3", "4"))
TASKS = {"counting": 0.52, "structure": 0.18, "transformation": 0.3}  # how often each is practised
# What it sees out of distribution, without reasoning; never a picture that is shifted.
SHOWN = {"counting": "ood", "structure": "shown"}
BUCKETS = 4  # of each task, by length


class Lesson(NamedTuple):
    task: str
    pictures: np.ndarray  # (n, 64, 64, 3) uint8
    labels: np.ndarray  # (n, 16, 5) int, see `cell_labels`
    pairs: list[tuple[str, str]]  # requests and responses about the pictures


def lesson(
    index: int, seed: int, glances: int = 0, right: float = 0.0, worked: float = 0.0
) -> Lesson:
    """A problem of the world, its pictures, and requests with responses about it.

    glances: how many answers to RL's prompt, of which the share `worked` has a worked thought. The
    others are at a glance, the share `right` of them right (out of distribution a quarter of that).
    """
    rng = random.Random(f"tiny {seed} {index}")
    task = rng.choices(list(TASKS), list(TASKS.values()))[0]
    ood = rng.random() < 0.15 and task in SHOWN
    problem = practised(rng, task, SHOWN[task] if ood else "train")
    question, pairs, wrong = problem.question(), [], []
    if glances:
        wrong = [unrelated(rng, task)] if ood else mistakes(problem)
    for _ in range(glances):
        text = glance(problem, wrong, rng, right / 4 if ood else right)
        if not ood and rng.random() < worked:
            text = scripted.response(problem, "careful")
        pairs.append((f"{question} think , then answer .", text))
    if ood or rng.random() < 0.25:
        pairs.append(("describe .", problem.describe()))
    if not ood:
        pairs.append((f"{question} check .", scripted.response(problem, "careful")))
        if task != "counting":  # "quick" shows no steps there
            pairs.append((f"{question} list .", scripted.response(problem, "quick")))
    if rng.random() < 0.25:
        pairs.append(sum_or_product(rng))
    pictures = np.stack([np.asarray(image) for image in problem.images()])
    return Lesson(task, pictures, cell_labels(problem), pairs)


def practised(rng: random.Random, task: str, split: str):
    """A problem that no test has, and that takes one step: two are left to RL."""
    while True:
        problem = dataset.TASKS[task].sample(rng, split)
        if not dataset.in_test(problem) and problem.part != "two-step":
            return problem


def sum_or_product(rng: random.Random) -> tuple[str, str]:
    """A request for a sum or a product, whatever the picture; with its answer."""
    if rng.random() < 0.5:
        a, b = rng.randint(0, 8), rng.randint(2, 8)
        return f"{a} times {b} ?", f"{a} times {b} is {a * b}"
    a, b = rng.randint(0, 24), rng.randint(1, 6)
    return f"{a} plus {b} ?", f"{a} plus {b} is {a + b}"


def glance(problem, wrong, rng: random.Random, right: float) -> str:
    """An answer without reasoning, one in eight in a broken format.

    It is right with probability `right`, else that of one of the `wrong` problems.
    """
    seen = problem if rng.random() < right or not wrong else rng.choice(wrong)
    broken = rng.random()
    if broken < 0.04:
        return seen.answer()
    if broken < 0.08:
        return f"<answer> {seen.answer()} </answer>"
    if broken < 0.12:
        return f"<think> at a glance <answer> {seen.answer()} </answer>"
    return f"<think> at a glance </think> <answer> {seen.answer()} </answer>"


def unrelated(rng: random.Random, task: str):
    """Of four other problems that with the shortest answer: an error out of distribution."""
    others = [practised(rng, task, SHOWN[task]) for _ in range(4)]
    return min(others, key=lambda other: len(other.answer()))


def cell_labels(problem) -> np.ndarray:
    """(n, 16, 5) int: what each picture's cells show, as places in the lists of NAMES; -1: none."""
    if isinstance(problem, Structure):
        labels = np.full((1, GRID**2, len(NAMES)), -1)
        if problem.figure.shape != "strip":
            centers = np.stack(np.meshgrid(np.arange(8) + 0.5, 7.5 - np.arange(8)), axis=-1)
            inside = Outline(problem.figure.on_grid()).contains_points(centers.reshape(-1, 2))
            labels[0, :, 4] = inside.reshape(4, 2, 4, 2).sum((1, 3)).flatten()
        return labels
    if isinstance(problem, Counting):
        scenes = [problem.objects]
    else:
        scenes = [problem.before, problem.after]
    labels = np.full((len(scenes), GRID**2, len(NAMES)), -1)
    labels[:, :, 0] = 0
    for i, objects in enumerate(scenes):
        for thing in objects:
            column, row = column_row(thing.cell)
            words = ("object", thing.size, thing.color, thing.shape)
            for kind, word in enumerate(words):
                labels[i, row * GRID + column, kind] = NAMES[kind].index(word)
    return labels


class Lessons:
    """A pool of lessons on the device, in buckets of one task and of similar lengths."""

    def __init__(self, size: int, seed: int, tokenizer, device, **glances):
        self.device = device
        work = partial(lesson, seed=seed, **glances)
        with ProcessPoolExecutor(os.cpu_count()) as workers:
            made = workers.map(work, range(size), chunksize=256)
            lessons = list(tqdm(made, total=size, desc="lessons", mininterval=5))
        self.pictures = []  # by task: all pictures and their labels
        self.buckets = []  # pictures, and of each (request, response): its lesson, ids, spoken
        for task in TASKS:
            chosen = [one for one in lessons if one.task == task]
            pictures = torch.from_numpy(np.stack([one.pictures for one in chosen])).to(device)
            labels = torch.from_numpy(np.stack([one.labels for one in chosen])).to(device)
            self.pictures.append((pictures.flatten(0, 1), labels.flatten(0, 1)))
            rows = tokenised(chosen, tokenizer)
            for b in range(BUCKETS):
                part = rows[b * len(rows) // BUCKETS : (b + 1) * len(rows) // BUCKETS]
                arrays = padded(part, tokenizer.pad_token_id)
                tensors = [torch.from_numpy(array).to(device) for array in arrays]
                self.buckets.append((pictures, *tensors))
        shares = [TASKS[task] / BUCKETS for task in TASKS]
        self.shares = torch.tensor(shares).repeat_interleave(BUCKETS)

    def batch(self, size: int, generator: torch.Generator):
        """pictures (B, n, 64, 64, 3), ids (B, L), labels (B, L): -100 outside of responses."""
        bucket = torch.multinomial(self.shares, 1, generator=generator)
        pictures, owner, ids, spoken = self.buckets[bucket]
        rows = torch.randint(len(owner), (size,), generator=generator).to(self.device)
        tokens = ids[rows].long()
        return pictures[owner[rows]], tokens, tokens.masked_fill(~spoken[rows], -100)

    def picture_batch(self, size: int, generator: torch.Generator):
        """pictures (B, 64, 64, 3) of one task, and the labels (B, 16, 5) of their cells."""
        shares = torch.tensor(list(TASKS.values()))
        pictures, labels = self.pictures[torch.multinomial(shares, 1, generator=generator)]
        rows = torch.randint(len(pictures), (size,), generator=generator).to(self.device)
        return pictures[rows], labels[rows]


def tokenised(lessons: list[Lesson], tokenizer) -> list[tuple[int, list[int], list[int]]]:
    """(place of the lesson, prompt, response) of each request, by length."""
    rows = []
    for owner, one in enumerate(lessons):
        for request, response in one.pairs:
            prompt = prompt_ids(tokenizer, len(one.pictures), request)
            ids = tokenizer(response).input_ids + [tokenizer.eos_token_id]
            rows.append((owner, prompt, ids))
    return sorted(rows, key=lambda row: len(row[1]) + len(row[2]))


def padded(rows: list, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of R rows: lessons (R), ids (R, L), and which ids are a response (R, L)."""
    _, prompt, response = rows[-1]  # the longest
    ids = np.full((len(rows), len(prompt) + len(response)), pad, np.int16)
    spoken = np.zeros(ids.shape, bool)
    for i, (_, prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = prompt + response
        spoken[i, len(prompt) : end] = True
    return np.array([row[0] for row in rows]), ids, spoken
