"""Questions are reproducible, train and test apart; answers, thoughts and pictures are right."""

import hashlib
import inspect
import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from blocks import counting, dataset, scenes, structure
from blocks.dataset import BlocksSet
from blocks.drawing import draw_figure, draw_scene, sprite
from blocks.figures import Figure
from blocks.mistakes import mistakes
from blocks.scenes import COLORS, SHAPES, SIZES, Object
from blocks.scripted import STYLES
from blocks.sheet import main, show
from data.state import SETS
from rewards import accuracy_reward, reward

TRAIN = tuple(f"{task}-train" for task in SETS)
TEST = tuple(name for names in SETS.values() for name in names)
ALL = TRAIN + TEST


@cache
def states(name: str, count: int = 80) -> list[dataset.BlocksState]:
    questions = BlocksSet(name, count)
    return [questions[i] for i in range(count)]


def fingerprint(state) -> str:
    parts = [state.id, state.question, state.answer, state.kind, state.thought, repr(state.problem)]
    return hashlib.sha256(
        "|".join(parts).encode() + b"".join(image.tobytes() for image in state.images)
    ).hexdigest()


def response(thought: str, answer: str) -> str:
    return f"<think> {thought} </think> <answer> {answer} </answer>"


# --------------------------------------------------------------------------------------------- sets


@pytest.mark.parametrize("name", ALL)
def test_name_seed_and_index_alone_decide_a_state(name):
    forward, backward, other_size = (
        BlocksSet(name, 9, seed=3),
        BlocksSet(name, 9, seed=3),
        BlocksSet(name, 99, seed=3),
    )
    read = [fingerprint(forward[i]) for i in range(9)]
    assert read == [fingerprint(backward[i]) for i in reversed(range(9))][::-1]
    assert fingerprint(other_size[7]) == read[7]
    assert len(set(read)) == 9
    other_seed = BlocksSet(name, 9, seed=4)
    assert [state.problem for state in other_seed] != [state.problem for state in forward]
    assert forward[0].id != other_seed[0].id  # experts and caches know a state by its id


def test_another_process_makes_the_same_states():
    # Python's own hashes differ between processes: nothing may depend on them.
    code = (
        "import hashlib; from blocks.dataset import BlocksSet\n"
        f"{inspect.getsource(fingerprint)}\n"
        f"print(*(fingerprint(BlocksSet(n, 2)[1]) for n in {ALL!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout.split() == [fingerprint(BlocksSet(name, 2)[1]) for name in ALL]


@pytest.mark.parametrize("task", SETS)
def test_no_train_question_is_a_test_question(task):
    def questions(name, seed):
        count = (
            100 if task == "structure" else 40
        )  # of structure there are few questions, many would be in both
        return {(state.question, repr(state.problem)) for state in BlocksSet(name, count, seed)}

    train = set().union(*(questions(f"{task}-train", seed) for seed in (0, 1)))
    test = set().union(*(questions(name, seed) for name in SETS[task] for seed in (0, 1)))
    assert train and test and not train & test


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_hash_splits_train_from_test_whatever_the_seed(name, seed):
    for i in range(15):
        assert dataset.in_test(BlocksSet(name, 15, seed)[i].problem) == (
            not name.endswith("-train")
        )


@pytest.mark.parametrize("task", SETS)
def test_validation_questions_are_like_those_of_training_and_in_no_table(task):
    found = states(f"{task}-val", 100)
    train = {repr(state.problem) for state in states(f"{task}-train", 400)}
    seen = sum(repr(state.problem) in train for state in found)
    # Of structure there are few questions: some are in both.
    assert seen <= (10 if task == "structure" else 0)
    for state in found:
        assert not dataset.in_test(state.problem)
    assert {state.part for state in found} == {state.part for state in states(f"{task}-id", 100)}


def test_the_tests_share_of_all_questions_is_as_stated():
    rng = random.Random(0)
    share = sum(dataset.in_test(counting.Counting.sample(rng, "train")) for _ in range(2000)) / 2000
    assert share == pytest.approx(dataset.TEST_SHARE, abs=0.04)  # four standard deviations


@pytest.mark.parametrize(
    "name", ["counting", "counting-left", "counting-train-x", "nothing", "nothing-train", ""]
)
def test_an_unknown_set_is_an_error_that_names_the_known_ones(name):
    with pytest.raises(ValueError, match="counting-train.*transformation-right"):
        BlocksSet(name, 3)


@pytest.mark.parametrize("index", [-1, 3, 99])
def test_an_index_outside_the_set_is_an_error(index):
    with pytest.raises(IndexError, match=f"counting-id has 3 states.*{index}"):
        BlocksSet("counting-id", 3)[index]
    assert (
        len(list(BlocksSet("counting-id", 3))) == len(BlocksSet("counting-id", 3)) == 3
    )  # loops end by that error


def test_every_figure_is_asked_about_in_every_way():
    asked = {
        (state.problem.asks, state.problem.figure.shape) for state in states("structure-train", 300)
    }
    assert asked == {
        *itertools.product(["sides", "area"], ["square", "rectangle", "triangle", "l-shape"]),
        *itertools.product(["perimeter"], ["square", "rectangle", "l-shape"]),
        ("missing", "strip"),
    }


# ----------------------------------------------------------------------------------------- counting


def matches(thing: Object, words: str) -> bool:
    """Whether an object is a "large red cube"; an "object" may be any."""
    return set(words.split()) - {"object"} <= {thing.size, thing.color, thing.shape}


def parse_counting(question: str) -> tuple[list[str], str, int, int]:
    """What is removed, what is counted, the factor and what is added, by the question's words."""
    sentences = [sentence.strip() for sentence in re.split(r"[.?]", question) if sentence.strip()]

    def after(start: str) -> list[str]:
        return [s.removeprefix(start) for s in sentences if s.startswith(start)]

    removed, counted = after("remove every "), after("count every ")
    counted += ["object"] * sentences.count("how many are left")
    times, added = [int(n) for n in after("times ")], [int(n) for n in after("add ")]
    assert len(removed) + len(counted) + len(times) + len(added) == len(sentences)  # all was read
    assert len(counted) == 1 and max(len(removed), len(times), len(added)) <= 1
    return removed, counted[0], sum(times) or 1, sum(added)


def counted_by_words(state) -> tuple[int, int]:
    """How many objects match, and the answer, by the question's words and the scene."""
    removed, counted, times, add = parse_counting(state.question)
    left = state.problem.objects
    for words in removed:
        left = [thing for thing in left if not matches(thing, words)]
    count = sum(matches(thing, counted) for thing in left)
    return count, count * times + add


@pytest.mark.parametrize("name", ["counting-train", *SETS["counting"]])
def test_counting_answers_are_right(name):
    for state in states(name):
        assert state.answer == str(counted_by_words(state)[1]), state.question


@pytest.mark.parametrize("name, sizes", [
    ("counting-train", {3, 4, 5, 6}), ("counting-id", {3, 4, 5, 6}), ("counting-ood", {7, 8}),
])  # fmt: skip
def test_ood_scenes_are_larger_and_their_questions_the_same(name, sizes):
    kinds = set()
    for state in states(name, 200):
        assert len({thing.cell for thing in state.problem.objects}) == len(state.problem.objects)
        removed, counted, times, add = parse_counting(state.question)
        kinds.add((len(removed), times > 1, add > 0))
    assert {len(state.problem.objects) for state in states(name, 200)} == sizes
    # Count or count what is left: one step; as it is, times k, plus m, or both.
    assert kinds == {*itertools.product((0, 1), (False, True), (False, True))}


@pytest.mark.parametrize("name", ["counting-train", *SETS["counting"]])
def test_half_of_the_questions_are_arithmetic_on_the_count(name):
    parts = {"one-step": 0, "two-step": 0}
    for state in states(name, 400):
        removed, counted, times, add = parse_counting(state.question)
        parts[state.part] += 1
        # What the base has learnt: counting, removing, and adding to a plain count.
        known = times == 1 and not (removed and add)
        assert state.part == ("one-step" if known else "two-step")
        if not known:  # the arithmetic matters
            assert counted_by_words(state)[0] > 0
    assert parts["two-step"] == pytest.approx(200, abs=40)  # four standard deviations


@pytest.mark.parametrize("name", ["counting-train", *SETS["counting"]])
def test_the_careful_thought_goes_through_every_object_to_the_answer(name):
    for state in states(name):
        removed, counted, times, add = parse_counting(state.question)
        asked = set(" ".join([counted, *removed]).split())
        words, count = state.problem.think("careful").split(), 0
        for thing in state.problem.objects:
            # Of its looks, what the question asks about, and nothing that it does not.
            look = [(thing.size, SIZES), (thing.color, tuple(COLORS)), (thing.shape, SHAPES)]
            step = [thing.cell, *(word for word, kind in look if asked & set(kind))]
            if any(matches(thing, gone) for gone in removed):
                step += ["gone"]
            elif matches(thing, counted):
                count += 1
                step += ["left" if counted == "object" else "yes", str(count)]
            else:
                step += ["no"]
            assert words[: len(step)] == step, state.question
            words = words[len(step) :]
        steps = [str(count)]
        steps += [f"times {times} is {count * times}"] if times > 1 else []
        steps += [f"plus {add} is {count * times + add}"] if add else []
        assert " ".join(words) == (" ".join(steps) if len(steps) > 1 else f"total {count}")


def test_the_quick_thought_of_a_count_does_not_depend_on_what_is_seen():
    assert {state.problem.think("quick") for state in states("counting-id")} == {"at a glance"}


# ---------------------------------------------------------------------------------------- structure


def edges(corners: list[tuple[int, int]]):
    return zip(corners, corners[1:] + corners[:1], strict=True)


def area(corners: list[tuple[int, int]]) -> float:
    """Row by row of unit height. Corners are on whole heights: halfway up is a row's mean width."""
    total = 0.0
    for row in range(min(y for _, y in corners), max(y for _, y in corners)):
        middle, crossings = row + 0.5, []
        for (x1, y1), (x2, y2) in edges(corners):
            if (y1 < middle) != (y2 < middle):
                crossings.append(x1 + (x2 - x1) * (middle - y1) / (y2 - y1))
        crossings.sort()
        total += sum(
            right - left for left, right in zip(crossings[::2], crossings[1::2], strict=True)
        )
    return round(total, 6)  # whole or half, but for the rounding of slopes


def perimeter(corners: list[tuple[int, int]]) -> int:
    steps = [(abs(x2 - x1), abs(y2 - y1)) for (x1, y1), (x2, y2) in edges(corners)]
    assert all(
        min(step) == 0 < max(step) for step in steps
    )  # it is asked of figures with right angles only
    return sum(map(max, steps))


def sides(corners: list[tuple[int, int]]) -> int:
    """Real corners: where the direction changes."""
    around = zip(corners[-1:] + corners[:-1], corners, corners[1:] + corners[:1], strict=True)
    return sum(
        (x2 - x1) * (y3 - y2) != (x3 - x2) * (y2 - y1) for (x1, y1), (x2, y2), (x3, y3) in around
    )


def structure_value(state) -> float:
    corners, question = state.problem.figure.corners(), state.question
    if "how many sides" in question:
        return sides(corners)
    if "what is the perimeter" in question:
        return perimeter(corners)
    if "what is the area" in question:
        return area(corners)
    given = int(
        re.search(
            r"the area of the rectangle is (\d+) \. how long is the missing side \?", question
        )[1]
    )
    bottom = [x for x, y in corners if y == 0]  # the one side that the picture shows
    return given / (max(bottom) - min(bottom))


@pytest.mark.parametrize("name", ["structure-train", *SETS["structure"]])
def test_structure_answers_and_thoughts_are_right(name):
    for state in states(name, 200):
        value = structure_value(state)
        choices = dict(
            re.findall(r"([A-D]) (\d+)", state.question.partition("choose a letter :")[2])
        )
        right = (
            [letter for letter, choice in choices.items() if float(choice) == value]
            if choices
            else [f"{value:g}"]
        )
        assert [state.answer] == right, state.question
        assert state.kind == ("discrete" if choices else "math")
        assert (
            len(set(choices.values())) == len(choices)
            and sorted(choices) == list("ABCD")[: len(choices)]
        )
        end = f" is {value:g}" + (f" choose {state.answer}" if choices else "")
        assert state.thought.endswith(end) and state.problem.think("quick").endswith(end)


def part_of(state) -> str:
    """By picture, corners and words, in which way a question is unlike those of training."""
    corners = state.problem.figure.corners()
    if state.images[0] != draw_figure(state.problem.figure):
        return "aside"
    if "choose" in state.question:
        return "letters"
    rising = sides(corners) == 4 and any(
        x1 != x2 and y1 != y2 for (x1, y1), (x2, y2) in edges(corners)
    )
    if sides(corners) == 8 or rising:
        return "unseen"
    lengths = [max(coordinates) - min(coordinates) for coordinates in zip(*corners, strict=True)]
    bottom = max(x for x, y in corners if y == 0) - min(x for x, y in corners if y == 0)
    if bottom < lengths[0]:
        return "turned"  # in training a triangle or l-shape stands on its longest side
    return "larger" if max(lengths) == 7 else ""


def test_each_structure_question_is_of_the_part_that_it_names():
    for name in ("structure-train", "structure-id"):
        assert {(state.part, part_of(state)) for state in states(name, 200)} == {("", "")}
    found = {part: 0 for part in structure.PARTS}
    for state in states("structure-ood", 400):
        assert state.part == part_of(state)
        assert (state.part == "larger") == (max(vars_of(state)) == 7), state.problem
        found[state.part] += 1
    assert all(44 < count < 116 for count in found.values()), found  # 80 of each are expected


def test_a_picture_from_aside_is_moved_by_two_pixels():
    moved = {-2: 0, 2: 0}
    for state in states("structure-ood", 200):
        if state.part == "aside":
            aside = state.problem.aside
            moved[aside] += 1
            assert dataset.in_test(replace(state.problem, aside=0))  # as it is without the shift
            straight = np.asarray(draw_figure(state.problem.figure))
            seen = np.asarray(state.images[0])
            columns = np.clip(np.arange(64) - aside, 0, 63)
            assert (seen == straight[:, columns]).all()
    assert min(moved.values()) > 5


def test_kin_differ_in_colour_place_or_mirroring_alone():
    problem = states("structure-id", 1)[0].problem
    figure = problem.figure
    for same in (dict(color="red"), dict(mirrored=not figure.mirrored), dict(x=0, y=0)):
        assert replace(problem, figure=replace(figure, **same)).kin == problem.kin
    for other in (dict(width=figure.width + 1), dict(height=7), dict(turned=True)):
        assert replace(problem, figure=replace(figure, **other)).kin != problem.kin
    assert replace(problem, asks="sides").kin != replace(problem, asks="area").kin
    assert dataset.kin_of("structure-id-0-0") == problem.kin
    assert dataset.kin_of("counting-id-0-0") == "counting-id-0-0"  # nothing is near another
    for other in ("super-clevr-17", "structure-id-17", "structure-id-a-b"):
        assert dataset.kin_of(other) == other  # of other data


def test_the_readme_says_how_many_test_questions_have_a_twin_in_training():
    trained = {state.problem.kin for state in BlocksSet("structure-train", 3200)}
    twins, asked = Counter(), Counter()
    for name in ("structure-id", "structure-ood"):
        for state in BlocksSet(name, 1000):
            asked[state.part] += 1
            twins[state.part] += state.problem.kin in trained
    said = " ".join((ROOT / "blocks" / "README.md").read_text().split())
    assert f"{twins['']:,} of the first 1,000 questions of structure-id" in said
    assert f"{twins['aside']} of the {asked['aside']} of `aside`" in said
    assert sum(twins.values()) == twins[""] + twins["aside"]  # "the other parts have none"


def vars_of(state) -> tuple[int, int]:
    return state.problem.figure.width, state.problem.figure.height


def figures(count: int, *shapes: str) -> list[Figure]:
    rng = random.Random(0)
    return [Figure.sample(rng, shapes) for _ in range(count)]


@pytest.mark.parametrize(
    "shape", ["square", "rectangle", "triangle", "l-shape", "t-shape", "trapezoid"]
)
def test_the_picture_covers_the_figures_unit_squares_and_no_others(shape):
    for figure in figures(6, shape):
        # What differs between two colours is the figure, whatever paper, grid and light look like.
        red, blue = (
            np.asarray(draw_figure(replace(figure, color=c))).astype(int) for c in ("red", "blue")
        )
        drawn = (
            np.abs(red - blue).max(axis=-1) > 30
        )  # not the faint ringing of scaling the picture down
        assert figure.is_proper()
        corners = [(figure.x + x, figure.y + y) for x, y in figure.corners()]
        for x, y in itertools.product(range(8), range(8)):
            # By its share of the unit square, on a fine lattice; cut ones are neither in nor out.
            points = [(x + (i + 0.51) / 8, y + (j + 0.52) / 8) for i in range(8) for j in range(8)]
            share = sum(inside(point, corners) for point in points) / 64
            centre = drawn[64 - (y + 1) * 8 + 3 : 64 - y * 8 - 3, x * 8 + 3 : x * 8 + 5]
            if share in (0, 1):
                assert (centre == bool(share)).all(), (figure, x, y)


def inside(point: tuple[float, float], corners: list[tuple[int, int]]) -> bool:
    """A ray to the right crosses the outline an odd number of times."""
    (x, y), odd = point, False
    for (x1, y1), (x2, y2) in edges(corners):
        odd ^= (y1 > y) != (y2 > y) and x < x1 + (x2 - x1) * (y - y1) / (y2 - y1)
    return odd


def test_the_picture_of_a_strip_shows_its_width_and_not_the_missing_side():
    shown = {}
    for width, height in itertools.product((3, 4, 5), (2, 4, 6)):
        shown.setdefault(width, set()).add(draw_figure(Figure("strip", width, height)).tobytes())
    assert all(len(pictures) == 1 for pictures in shown.values())
    assert len(set.union(*shown.values())) == 3


# ----------------------------------------------------------------------------------- transformation


COMPASS = {"left": "W", "right": "E", "front": "S", "behind": "N"}


def step(cell: str, value: str) -> str:
    """The cell one step away: columns a-d from left to right, rows 1-4 from back to front."""
    compass = "".join(COMPASS[word] for word in value.split("_"))
    column = ord(cell[0]) + compass.count("E") - compass.count("W")
    return chr(column) + str(int(cell[1]) + compass.count("S") - compass.count("N"))


def parse_calls(answer: str) -> list[tuple[str, int, str]]:
    calls = re.findall(r"change_(\w+) \( (\d+) , (\w+) \)", answer)
    assert " ".join(f"change_{f} ( {i} , {value} )" for f, i, value in calls) == answer
    return [(f, int(i), value) for f, i, value in calls]


def difference(old: Object, new: Object) -> float:
    """How many functions turn one object into another; infinite where it would have to leap."""
    reach = {old.cell, *(step(old.cell, value) for value in scenes.DIRECTIONS)}
    leap = np.inf if new.cell not in reach else 0
    return leap + sum(
        getattr(old, name) != getattr(new, name) for name in ("cell", "size", "color", "shape")
    )


@pytest.mark.parametrize("name", ["transformation-train", *SETS["transformation"]])
def test_the_answers_functions_turn_before_into_after(name):
    lengths = set()
    for state in states(name):
        things, calls = (
            [dict(vars(thing)) for thing in state.problem.before],
            parse_calls(state.answer),
        )
        for function, i, value in calls:
            key = "cell" if function == "position" else function
            new = step(things[i]["cell"], value) if function == "position" else value
            assert new != things[i][key]  # no function does nothing
            things[i][key] = new
        assert [Object(**thing) for thing in things] == list(state.problem.after), state.answer
        cells = {thing["cell"] for thing in things}
        assert len(cells) == len(things) and cells <= set(scenes.CELLS)
        lengths.add(len(calls))
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["transformation-train", *SETS["transformation"]])
def test_no_other_account_of_the_change_is_as_short(name):
    for state in states(name):
        before, after = state.problem.before, state.problem.after
        assert len({(thing.size, thing.color, thing.shape) for thing in before}) == len(
            before
        )  # named by their looks
        lengths = sorted(
            sum(map(difference, before, order)) for order in itertools.permutations(after)
        )
        assert lengths[0] == len(parse_calls(state.answer)) < lengths[1]


@pytest.mark.parametrize("name", ["transformation-train", *SETS["transformation"]])
def test_a_thought_tells_each_objects_change(name):
    for state in states(name, 30):
        for style in STYLES:
            told = re.split(
                r" (?=\d+ [a-d]\d )", state.problem.think(style)
            )  # only an object's number stands before a cell
            for i, (old, new) in enumerate(
                zip(state.problem.before, state.problem.after, strict=True)
            ):
                looks = [
                    (getattr(old, name), getattr(new, name))
                    for name in ("cell", "size", "color", "shape")
                ]
                seen = re.sub(r" change_\w+ \( .*? \)", "", told[i]).split()
                assert seen == [
                    str(i),
                    *(word for pair in looks for word in pair[style == "quick" :]),
                ]
            assert re.findall(r"change_\w+ \( .*? \)", " ".join(told)) == re.findall(
                r"change_\w+ \( .*? \)", state.answer
            )
            assert len(told) == len(state.problem.before)


@pytest.mark.parametrize("side, shift", [("id", 0), ("left", 2), ("right", -2)])
def test_the_second_picture_is_the_scene_a_little_aside(side, shift):
    for state in states(f"transformation-{side}", 20):
        first, second = state.images
        assert first.size == second.size == (64, 64) and first.mode == "RGB"
        assert first == draw_scene(state.problem.before)
        straight, seen = np.asarray(draw_scene(state.problem.after)), np.asarray(second)
        for column in range(64):  # what leaves the picture is lost, its edge is continued
            assert (seen[:, column] == straight[:, min(max(column - shift, 0), 63)]).all()


def test_a_question_does_not_tell_from_where_the_second_picture_is_seen():
    asked = set()
    for state in states("transformation-id", 10):
        for view in ("center", "left", "right"):
            problem = replace(state.problem, view=view)
            asked.add((problem.question(), problem.answer(), problem.think("careful")))
    assert len(asked) == 10


def test_each_change_is_noticed_or_overlooked_by_itself():
    for state in states("transformation-id", 20):
        changes = state.problem.functions()
        readings = state.problem.noticed(0.7)
        assert len(readings) == 2 ** len(changes)
        for seen, probability in readings:
            told = seen.functions()
            assert [call for call in changes if call in told] == told  # some of them, in order
            missed = len(changes) - len(told)
            assert probability == pytest.approx(0.7 ** len(told) * 0.3**missed)
            assert seen.answer() == (" ".join(told) or "nothing")
        assert len({seen.think("quick") for seen, _ in readings}) == len(readings)


def test_each_look_has_a_picture_of_its_own():
    looks = [sprite(*look) for look in itertools.product(SHAPES, COLORS, SIZES)]
    for one, other in itertools.combinations(looks, 2):
        shown = [sprite[..., :3] * (sprite[..., 3:] / 255.0) for sprite in (one, other)]
        assert np.abs(shown[0] - shown[1]).max() > 20  # visible, not a rounding


# ---------------------------------------------------------------------------------- words, mistakes


def test_every_word_is_in_the_vocabulary_once():
    words = dataset.vocabulary()
    assert len(set(words)) == len(words)
    used = {"user", "assistant", "<think>", "</think>", "<answer>", "</answer>", "nothing"}
    for name in ALL:
        for state in states(name):
            seen = [state.problem, *mistakes(state.problem)]
            told = [
                text for s in seen for text in (s.answer(), s.describe(), *map(s.think, STYLES))
            ]
            used.update(" ".join([state.question, state.request, state.thought, *told]).split())
    assert not used - set(words)


@pytest.mark.parametrize("name", ALL)
def test_the_truth_and_both_ways_to_think_earn_full_reward(name):
    for state in states(name, 40):
        assert (
            accuracy_reward(f"<answer> {state.answer} </answer>", state.answer, state.kind) == 1.0
        )
        assert state.thought == state.problem.think("careful")
        for style in STYLES:
            assert (
                reward(
                    response(state.problem.think(style), state.problem.answer()),
                    state.answer,
                    state.kind,
                )
                == 2.0
            )


@pytest.mark.parametrize("name", ALL)
def test_mistakes_are_plausible_distinct_and_never_right(name):
    for state in states(name, 200 if "structure" in name else 40):
        seen = mistakes(state.problem)
        assert seen and len(set(seen)) == len(seen)
        for mistake in seen:
            # By the reward: a length that is 3 % off counts as right.
            assert (
                accuracy_reward(f"<answer> {mistake.answer()} </answer>", state.answer, state.kind)
                < 1.0
            ), mistake
            # It is the picture that was misperceived, not the question.
            assert mistake.question() == state.question or state.problem.asks == "missing"


@pytest.mark.parametrize("width, height, notch", [(6, 4, (1, 1)), (6, 5, (1, 1)), (4, 6, (1, 1))])
def test_an_area_that_is_nearly_right_is_no_mistake(width, height, notch):
    # Overlooking a notch of 1 in 24 is within the 5 % that the reward forgives.
    problem = structure.Structure(Figure("l-shape", width, height, notch), "area")
    answers = [mistake.answer() for mistake in mistakes(problem)]
    assert answers and all(
        accuracy_reward(f"<answer> {a} </answer>", problem.answer(), "math") < 1.0 for a in answers
    )


@pytest.mark.parametrize("arguments, says", [
    ([], "--show"), (["--sow", "x.png"], "--show"),
    (["--show", "{tmp}/nowhere/x.png"], "cannot write {tmp}/nowhere/x.png: No such file"),
    (["--show", "{tmp}"], "Is a directory"),
    (["--show", "{tmp}/" + 300 * "x"], "File name too long"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["blocks.sheet", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("blocks.sheet: error: ") and says.format(tmp=tmp_path) in said


def test_the_sheet_of_examples_is_a_picture(tmp_path):
    show(str(tmp_path / "sheet.png"), per_set=2, zoom=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG" and len(sheet.getcolors(1 << 24)) > 100
