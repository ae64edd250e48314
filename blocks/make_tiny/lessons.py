"""What tiny/ reads: pictures with labels of their cells, and requests with responses."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.path import Path as Outline
from tqdm import tqdm

from blocks import dataset
from blocks.counting import Counting
from blocks.make_tiny.model import prompt_ids
from blocks.mistakes import mistakes
from blocks.scenes import CELLS, COLORS, GRID, SHAPES, SIZES, direction, seen_at
from blocks.structure import Structure
from blocks.transformation import Transformation
from data.state import SETS

# What a cell of a picture can be: one word of each list. A cell of a scene is empty or an object
# with its size, colour and shape; of a cell of a figure 0 to 4 units are inside.
NAMES = (("no", "object"), SIZES, tuple(COLORS), SHAPES, ("0", "1", "2", "3", "4"))
TASKS = {"counting": 0.52, "structure": 0.18, "transformation": 0.3}  # how often each is practised
BUCKETS = 4  # of each task, by length


class Lesson(NamedTuple):
    task: str
    pictures: np.ndarray  # (n, 64, 64, 3) uint8
    labels: np.ndarray  # (n, 16, 5) int, see `cell_labels`
    pairs: list[tuple[str, str]]  # requests and responses about the pictures


def lesson(index: int, seed: int, glances: int = 0, right: float = 0.0) -> Lesson:
    """A problem of the world, its pictures, and requests with responses about it.

    glances: how many answers at a glance, of which the share `right` is right (out of distribution
    a quarter of that).
    """
    rng = random.Random(f"tiny {seed} {index}")
    task = rng.choices(list(TASKS), list(TASKS.values()))[0]
    ood = rng.random() < 0.15
    split = rng.choice([name.split("-")[1] for name in SETS[task][1:]]) if ood else "train"
    problem = dataset.TASKS[task].sample(rng, split)
    while dataset.in_test(problem):
        problem = dataset.TASKS[task].sample(rng, split)
    question, pairs = problem.question(), []
    if glances:
        wrong = [unrelated(problem, rng, split)] if ood else mistakes(problem)
        share = right / 4 if ood else right
        for _ in range(glances):
            pairs.append((f"{question} think , then answer .", glance(problem, wrong, rng, share)))
    if ood or rng.random() < 0.25:
        pairs.append(("describe .", problem.describe()))
    if not ood:
        pairs.append((f"{question} check .", reasoned(problem, "careful")))
        pairs.append((f"{question} list .", reasoned(problem, "quick")))
    pictures = np.stack([np.asarray(image) for image in problem.images()])
    return Lesson(task, pictures, cell_labels(problem), pairs)


def reasoned(problem, style: str) -> str:
    return f"<think> {problem.think(style)} </think> <answer> {problem.answer()} </answer>"


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


def unrelated(problem, rng: random.Random, split: str):
    """Of four other problems that with the shortest answer: an error out of distribution.

    In transformation things seem to have moved, which is how a scene looks from the side.
    """
    others = []
    for _ in range(4):
        moves = isinstance(problem, Transformation)
        others.append(moved(problem, rng) if moves else type(problem).sample(rng, split))
    return min(others, key=lambda other: len(other.answer()))


def moved(problem: Transformation, rng: random.Random) -> Transformation:
    """The same objects before, and after them one a step away and no other change."""
    taken = {thing.cell for thing in problem.before}
    steps = []
    for i, thing in enumerate(problem.before):
        near = [cell for cell in CELLS if direction(thing.cell, cell)]
        steps += [(i, cell) for cell in near if cell not in taken]
    i, cell = rng.choice(steps)
    after = list(problem.before)
    after[i] = replace(after[i], cell=cell)
    return replace(problem, after=tuple(after))


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
        scenes = [(problem.objects, "center")]
    else:
        scenes = [(problem.before, "center"), (problem.after, problem.view)]
    labels = np.full((len(scenes), GRID**2, len(NAMES)), -1)
    labels[:, :, 0] = 0
    for i, (objects, view) in enumerate(scenes):
        for thing in objects:
            column, row = seen_at(thing.cell, view)
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
