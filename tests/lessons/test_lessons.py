"""The course: what a lesson says of its experiment is so, from the first step on."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import ekipl
import grpo
from blocks.dataset import BlocksSet
from evaluate import greedy_accuracy
from lessons.exercises import EXERCISES
from policy import Policy
from rollouts.transformers_sampler import TransformersSampler
from training import storage
from training.distributed import World

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "lessons" / "README.md").read_text()
LESSONS = dict(enumerate(re.split(r"^## (?=\d\. )", TEXT, flags=re.M)))  # 0: what stands before


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """flags -> the first step's record, of 16 questions."""
    runs, known = tmp_path_factory.mktemp("runs"), {}

    def step(*flags: str) -> dict:
        if flags not in known:
            short = ["--states", "16", "--batch-size", "16", "--eval-every", "0", *flags]
            short += ["--runs", str(runs), "--name", f"run{len(known)}"]
            config, _ = ekipl.parse([*short, "--rollout", "transformers"])
            path = ekipl.train(config, None, World.join("cpu"))
            known[flags] = storage.read(path / "metrics.jsonl")[-1]
        return known[flags]

    return step


def changed(number: int) -> list[str]:
    """The flags by which the run of a lesson differs from that of the first command."""
    (command,) = re.findall(r"^python ekipl\.py (.+)$", LESSONS[number], re.M)
    flags = shlex.split(command)
    for name in ("--states", "--eval-every", "--name"):
        at = flags.index(name)
        del flags[at : at + 2]
    assert len(flags) == 2, "an experiment changes one flag"
    return flags


def test_the_words_of_a_prompt_double_the_accuracy_in_one_step():
    policy = Policy.load(str(ROOT / "blocks" / "tiny"))
    sampler, found = TransformersSampler(policy, 80), []
    one_step = [s for s in BlocksSet("counting-id", 60) if s.part == "one-step"]
    for ask in ("", "check ."):
        states = [dataclasses.replace(state, ask=ask) for state in one_step]
        scores = greedy_accuracy(sampler, {"counting-id": states}, World.join("cpu"))
        found.append(scores["eval/counting-id"])
    assert found[1] > 1.7 * found[0] > 0.5, found


def test_a_short_limit_takes_the_experts_steps_away(first_step):
    assert first_step()["share/careful"] > 0.4
    assert first_step(*changed(2))["share/careful"] == 0.0


def test_by_the_selected_nearly_all_groups_are_dead(first_step):
    assert first_step()["dead_groups"] < 0.1
    assert first_step(*changed(3))["dead_groups"] > 0.85


def test_only_a_second_update_clips(first_step):
    assert first_step()["clip_fraction"] == 0.0
    assert first_step(*changed(4))["clip_fraction"] > 0.01


def test_the_expert_that_is_named_first_is_kept_more(first_step):
    first, turned = first_step(), first_step(*changed(5))
    assert first["share/careful"] > 2 * first["share/quick"]
    assert turned["share/quick"] > 1.2 * turned["share/careful"]


def test_exact_weights_leave_the_experts_steps_out(first_step):
    kept = first_step(*changed(6))
    assert kept["share/careful"] > 0.2  # as many are kept, and their weight is small
    assert kept["weight_q95/careful"] < 0.01 and kept["weight_q95/quick"] > 0.3


def test_every_lesson_has_its_parts_and_every_exercise_its_row():
    assert list(LESSONS)[1:] == [1, 2, 3, 4, 5, 6]
    for number in range(1, 7):
        lesson = LESSONS[number]
        assert lesson.startswith(f"{number}. ") and "Paper: " in lesson
        assert re.search("Code(, after the exercise)?: ", lesson)
        assert lesson.count("```bash") >= 2 and "**Change one flag**" in lesson
        questions, _, answers = lesson.partition("<details>")
        for item in ("1. ", "2. ", "3. "):
            assert f"\n{item}" in questions and f"\n{item}" in answers
        assert re.search(r"!\[.+\]\([\w./]+\.png\)", lesson)
    for exercise in EXERCISES.values():
        assert f"| `{exercise.name}` | {exercise.file} | {exercise.equation} |" in TEXT


def test_the_example_of_lesson_three_is_worked_out():
    found = grpo.group_advantages([2.0] + [1.0] * 7, eps=0.0)
    assert [round(float(a), 2) for a in found[:2]] == [2.47, -0.35]
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-6)
    assert "2.47 and -0.35" in LESSONS[3] and f"{1 - 0.95**8:.2f}" in LESSONS[5]
