"""Sets of the blocks world: small rendered scenes with questions, answers and thoughts.

Three tasks with the names and splits of the paper's benchmark (Section 4.1). A set is a name such
as "counting-train" or "structure-ood"; its i-th question follows from the name, i and the seed, so
that sets need no files and a resumed run needs no position but i. A hash of question and scene
keeps train and test apart: one share of all possible questions is for testing, with every seed.
"""

import hashlib
import random
from dataclasses import dataclass

from blocks.counting import Counting
from blocks.mistakes import mistakes
from blocks.scenes import CELLS, COLORS, DIRECTIONS, SHAPES, SIZES
from blocks.structure import Structure
from blocks.transformation import FUNCTIONS, Transformation
from data.state import SET_NAMES, State

TASKS = {"counting": Counting, "structure": Structure, "transformation": Transformation}
Problem = Counting | Structure | Transformation
TEST_SHARE = 0.2  # of all possible questions


@dataclass(frozen=True)
class BlocksState(State):
    """A question of the blocks world; only the world and its scripted experts see `problem`."""

    set_name: str = ""
    problem: Problem = None

    @property
    def request(self) -> str:
        """Shorter than for real data: tiny/ knows these words only."""
        return self.ask or ("think , then answer ." if self.mode == "reason" else "answer .")


class BlocksSet:
    """The set of that name, `size` states long: `BlocksSet("counting-train", 1000)[17]`.

    name: "TASK-SPLIT" with a task of `SETS` and the split "train", "val" (other questions of the
    kind that is trained on), "id" or one of its OOD splits. seed: another seed gives other
    questions of the same kind; all but training keeps seed 0, so that runs can be compared. mode:
    of the prompts, see data/state.py.
    """

    def __init__(self, name: str, size: int, seed: int = 0, mode: str = "reason"):
        if name not in SET_NAMES:
            known = ", ".join(SET_NAMES)
            raise ValueError(f"no set '{name}' in the blocks world; there are {known}")
        self.name, self.size, self.seed, self.mode = name, size, seed, mode
        task, split = name.split("-")
        self.task, self.split = TASKS[task], "train" if split == "val" else split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> BlocksState:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} states, there is no state {index}")
        rng = random.Random(f"{self.name} {self.seed} {index}")
        while True:
            problem = self.task.sample(rng, self.split)
            # A question without a plausible mistake is skipped.
            if in_test(problem) == (self.split != "train") and mistakes(problem):
                break
        return BlocksState(
            id=f"{self.name}-{self.seed}-{index}",
            images=problem.images(),
            question=problem.question(),
            answer=problem.answer(),
            kind=problem.kind,
            thought=problem.think("careful"),
            mode=self.mode,
            part=problem.part,
            set_name=self.name,
            problem=problem,
        )


def kin_of(id: str) -> str:
    """Equal for questions that are nearly the same (Structure.kin); the id itself where none are.

    id: of a state, of this world or of other data.
    """
    name, *numbers = id.rsplit("-", 2)
    task = TASKS.get(name.partition("-")[0])
    ours = name in SET_NAMES and all(number.isdecimal() for number in numbers)
    if not ours or not hasattr(task, "kin"):
        return id
    seed, index = map(int, numbers)
    return BlocksSet(name, index + 1, seed)[index].problem.kin


def in_test(problem: Problem) -> bool:
    """Whether this question about this scene belongs to the test sets, by a hash of both."""
    digest = hashlib.sha256(repr(problem).encode()).digest()
    return digest[0] < 256 * TEST_SHARE


def vocabulary() -> list[str]:
    """Every word of the world, in a fixed order: the vocabulary of tiny/."""
    words = """
        <think> </think> <answer> </answer> user assistant
        think , then answer describe check list . ? : ( )
        how many are there left remove all add object objects
        total plus minus times divided by is yes no
        what the of figure does have sides perimeter area rectangle missing side long
        choose a letter width height notch half twice
        square triangle l-shape t-shape trapezoid strip at glance
        changed nothing second first A B C D
    """.split()
    words += [*SHAPES, "every", "count", "gone", *SIZES, *COLORS, *CELLS, *DIRECTIONS]
    words += FUNCTIONS.values()
    words += [str(number) for number in range(85)]
    return list(dict.fromkeys(words))
