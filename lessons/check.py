"""Runs the repository's tests of one exercise on the function that you wrote.

    python -m lessons.check group_advantages

It is pytest, with the exercise's file of mine/ in the place of the repository's; all other files
are the repository's, and so are other exercises of this file that are still blank.
"""

import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lessons.exercises import BLANK, EXERCISES, OUT, Exercise, named, read, split, split_mine
from training import console
from training.console import UserError

OPTIONS = "-x -q -n 0 --tb=short --show-capture=stdout --disable-warnings".split()
OPTIONS += "-p no:cacheprovider -p no:unraisableexception".split()  # nothing left, less waiting


def load(exercise: Exercise, file: Path) -> ModuleType:
    """The student's file as the module that every later import of its name gets.

    UserError if it is not there, cannot be read, or does not run.
    """
    if not file.exists():
        raise UserError(f"no {file}: python -m lessons.blank {exercise.name} makes it")
    split_mine(file, exercise.name)
    source, module = read(file), ModuleType(exercise.module)
    module.__file__ = str(file.resolve())
    sys.modules[exercise.module] = module
    try:
        exec(compile(source, module.__file__, "exec"), vars(module))
    except Exception as error:
        raise UserError(f"{file} does not run: {type(error).__name__}: {error}") from None
    for other in EXERCISES.values():
        if other.file == exercise.file and other.name != exercise.name:
            _, *theirs, _ = split_mine(file, other.name)
            if BLANK.strip() in "".join(theirs):
                _, *solution, _ = split(exercise.solution, other.name)
                exec("".join(solution), vars(module))
    return module


class Watch:
    """A pytest plugin: the tests must see the student's function, not the repository's."""

    def __init__(self, module: ModuleType, name: str):
        self.module, self.name, self.passed = module, name, 0

    def pytest_collection_finish(self, session):
        name, function = self.module.__name__, getattr(self.module, self.name)
        foreign = sys.modules.get(name) is not self.module
        for item in session.items:
            held = vars(item.module)
            other = isinstance(held.get(name), ModuleType) and held[name] is not self.module
            if foreign or other or held.get(self.name, function) is not function:
                raise pytest.UsageError(f"{item.nodeid} does not test {self.module.__file__}")

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def run(argv: list[str]) -> str:
    parser = console.Parser(prog="python -m lessons.check", description="Tests an exercise.")
    parser.add_argument("name", help="the function that you wrote")
    parser.add_argument("--out", default=OUT, help="where your copies are (default: %(default)s)")
    args = parser.parse_args(argv)
    exercise = named(args.name)
    file = Path(args.out) / exercise.file
    watch = Watch(load(exercise, file), exercise.name)
    code = pytest.main([*shlex.split(exercise.tests), *OPTIONS], [watch])
    if code or not watch.passed:
        print(f"not yet. A hint: python -m lessons.blank --hint {exercise.name}")
        sys.exit(1)
    return (
        f"{exercise.name} in {file} passes its {watch.passed} tests. How others go wrong:\n"
        f"  python -m lessons.blank --wrong {exercise.name}"
    )


def main() -> None:
    console.command("lessons.check", run)


if __name__ == "__main__":
    main()
