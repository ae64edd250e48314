"""Exercises: a copy of a file of this repository, in which you write one function yourself.

    python -m lessons.blank --list                      # the exercises
    python -m lessons.blank group_advantages            # makes mine/grpo.py with its body to write
    python -m lessons.blank --hint group_advantages
    python -m lessons.check group_advantages            # the repository's tests, on your function
    python -m lessons.blank --wrong group_advantages    # two wrong ways, what they do to a run

A second exercise of the same file goes into the copy that is there. The repository is the solution.
"""

import shlex
import textwrap
from pathlib import Path

from lessons.exercises import EXERCISES, OUT, ROOT, Exercise, blank_of, named, split, split_mine
from training import console
from training.console import UserError


def blank(exercise: Exercise, out: Path, again: bool) -> str:
    """Puts the blank into the copy, and makes the copy if there is none. Returns what to do next.

    UserError if the copy has a function of the student's own there, unless `again`.
    """
    name, file = exercise.name, out / exercise.file
    before, head, body, after = split(exercise.solution, name)
    empty = blank_of(body)
    if file.exists():
        if file.samefile(ROOT / exercise.file):
            raise UserError(f"{file} is the repository's own: give --out another directory")
        before, *theirs, after = split_mine(file, name)
        if "".join(theirs) not in (head + body, head + empty) and not again:
            raise UserError(f"{file} has your own {name}: --again throws it away for a new blank")
    out.mkdir(parents=True, exist_ok=True)
    file.write_bytes((before + head + empty + after).encode())
    line = (before + head).count("\n") + 1
    more = "" if out == Path(OUT) else f" --out {shlex.quote(str(out))}"
    return (
        f"{file}, line {line}: write the body of {name} ({exercise.equation}).\n"
        f"  python -m lessons.check {name}{more}    # is it right?\n"
        f"  python -m lessons.blank --hint {name}"
    )


def listing() -> str:
    lines = [f"{'exercise':22} {'file':12} {'equation':12} difficulty"]
    for e in EXERCISES.values():
        lines.append(f"{e.name:22} {e.file:12} {e.equation:12} {e.difficulty}")
    return "\n".join(lines)


def wrong_ways(exercise: Exercise) -> str:
    """Each wrong solution as a change of the right one, and its effect."""
    texts = []
    for wrong in exercise.wrong:
        effect = textwrap.fill(wrong.effect, 98)
        texts.append(f"in place of\n    {wrong.was}\nwrongly\n    {wrong.now}\n{effect}")
    return "\n\n".join(texts)


def run(argv: list[str]) -> str:
    parser = console.Parser(
        prog="python -m lessons.blank", description="Makes an exercise: a function to write."
    )
    parser.add_argument("name", nargs="?", help="the function to write")
    parser.add_argument("--out", default=OUT, help="where your copies are (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="blank what you wrote there")
    parser.add_argument("--list", action="store_true", help="list the exercises")
    parser.add_argument("--hint", metavar="NAME", help="a hint for this exercise")
    parser.add_argument("--wrong", metavar="NAME", help="wrong solutions: look when yours is right")
    args = parser.parse_args(argv)
    if args.list:
        return listing()
    if args.hint:
        return textwrap.fill(named(args.hint).hint, 98)
    if args.wrong:
        return wrong_ways(named(args.wrong))
    if not args.name:
        raise UserError("which exercise? --list shows them")
    return blank(named(args.name), Path(args.out), args.again)


def main() -> None:
    console.command("lessons.blank", run)


if __name__ == "__main__":
    main()
