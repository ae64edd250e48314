"""The exercises of exercises.toml, and a function's place in a file: found by ast, edited as text.

The solution of an exercise is the function in the repository; so is the head, its signature and
docstring.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from training.console import UserError

ROOT = Path(__file__).resolve().parent.parent
BLANK = "    raise NotImplementedError\n"
OUT = "mine"  # where the copies are, unless --out says otherwise


@dataclass(frozen=True)
class Wrong:
    """A wrong solution: `now` in place of `was` in the right one; and what it does to a run."""

    was: str
    now: str
    effect: str


@dataclass(frozen=True)
class Exercise:
    """A function to write. tests: arguments of pytest, one string, as on a command line."""

    name: str
    file: str
    equation: str
    difficulty: str
    tests: str
    hint: str
    wrong: tuple[Wrong, ...]

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py")

    @property
    def solution(self) -> str:
        """The whole file as it is in the repository."""
        return read(ROOT / self.file)


def read(file: Path) -> str:
    """A file's text with its own line ends. UserError if Python cannot read it."""
    try:
        text = file.read_bytes().decode()
        ast.parse(text, str(file))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from None
    except ValueError:
        raise UserError(f"{file} is not Python in UTF-8") from None
    return text


def split(source: str, name: str) -> tuple[str, str, str, str]:
    """Four texts that join to the source: before the function, its head, its body, after it.

    The head ends with the docstring, which every exercise has. LookupError if there is no such
    function at the top level.
    """
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    if not found:
        raise LookupError(name)
    node = found[-1]  # the one that counts
    lines = re.split(r"(?<=\n)", source)
    cuts = (0, node.lineno - 1, node.body[0].end_lineno, node.end_lineno, len(lines))
    return tuple("".join(lines[start:end]) for start, end in zip(cuts, cuts[1:]))


def blank_of(body: str) -> str:
    """What stands in the place of a body: its errors, whose words the tests want, and a raise."""
    lines, errors = body.splitlines(), []
    nodes = ast.walk(ast.parse(f"def blank():\n{body}"))
    raises = [node for node in nodes if isinstance(node, ast.Raise)]
    for node in sorted(raises, key=lambda node: node.lineno):
        for line in lines[node.lineno - 2 : node.end_lineno - 1]:  # the first line is "def"
            errors.append(f"    # {line}\n")
    head = ["    # Its errors, when the docstring says so:\n"] if errors else []
    return "".join([*head, *errors, BLANK])


def split_mine(file: Path, name: str) -> tuple[str, str, str, str]:
    """`split` of a student's file. UserError if the function is not in it."""
    try:
        return split(read(file), name)
    except LookupError:
        raise UserError(f"{file} has no function {name}: move it away and blank it again") from None


def load() -> dict[str, Exercise]:
    exercises = {}
    for name, fields in tomllib.loads((ROOT / "lessons" / "exercises.toml").read_text()).items():
        texts = {key: " ".join(value.split()) for key, value in fields.items() if key != "wrong"}
        wrong = []
        for one in fields["wrong"]:
            wrong.append(Wrong(one["was"], one["now"], " ".join(one["effect"].split())))
        exercises[name] = Exercise(name, **texts, wrong=tuple(wrong))
    return exercises


EXERCISES = load()


def named(name: str) -> Exercise:
    """UserError if there is no such exercise, or if we are not where the tests are."""
    if name not in EXERCISES:
        raise UserError(f"no exercise {name!r}: there are {', '.join(EXERCISES)}")
    if Path.cwd().resolve() != ROOT:
        raise UserError(f"not at the repository's root: cd {ROOT}")
    return EXERCISES[name]
