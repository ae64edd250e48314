"""Exercises: every blank and every wrong solution fails its tests, every original passes them, and
the student's file is what is tested."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT

from lessons import blank, check, exercises
from lessons.exercises import BLANK, EXERCISES, blank_of, read, split
from training.console import UserError

REQUIRED = """group_advantages clipped_objective kl_to_reference mixture_logp importance_weights
snis_estimate effective_sample_size select_top_g format_reward pass_at_k pack""".split()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------- what the repository's tests say of each


class Outcome:
    """A pytest plugin that keeps what failed, and how."""

    def __init__(self):
        self.ran, self.errors = 0, []

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"

    def pytest_exception_interact(self, call):
        self.errors.append(call.excinfo.type.__name__)


def outcome(name: str, source: str, base) -> Outcome:
    """Runs an exercise's tests in this process, on that function of this source.

    The function object stays, and with it all that was imported: its code alone is another.
    """
    exercise, made = EXERCISES[name], Outcome()
    module = importlib.import_module(exercise.module)
    changed = {"__name__": module.__name__}
    exec(compile(source, exercise.file, "exec"), changed)
    options = [*check.OPTIONS, f"--basetemp={base}", "-p", "no:faulthandler"]
    imported = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(module, name), "__code__", changed[name].__code__)
        code = pytest.main([*shlex.split(exercise.tests), *options], [made])
    sys.modules.update(imported)  # it imports conftest.py anew: other tests have the first one
    assert code == (1 if made.errors else 0) and made.ran + len(made.errors) > 0
    return made


@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_and_the_wrong_ones_fail_and_the_original_passes(name, tmp_path):
    exercise = EXERCISES[name]
    before, head, body, after = split(exercise.solution, name)
    assert not outcome(name, exercise.solution, tmp_path / "right").errors
    assert outcome(name, before + head + blank_of(body) + after, tmp_path / "blank").errors
    assert len(exercise.wrong) >= 2
    for wrong in exercise.wrong:
        assert body.count(wrong.was) == 1, wrong.was
        source = before + head + body.replace(wrong.was, wrong.now) + after
        errors = outcome(name, source, tmp_path / "wrong").errors
        # By what it computes: not because it does not run.
        assert errors and not {"NameError", "AttributeError", "TypeError"} & set(errors), wrong.now


def test_tests_of_an_exercise_leave_what_other_tests_have_imported(tmp_path):
    before = {name: sys.modules[name] for name in ("conftest", "test_blank")}
    assert not outcome("pack", EXERCISES["pack"].solution, tmp_path).errors
    assert before == {name: sys.modules[name] for name in before}


def test_every_exercise_has_a_place_a_hint_and_effects():
    assert set(REQUIRED) <= set(EXERCISES)
    lines = blank.listing().splitlines()
    for name, exercise in EXERCISES.items():
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert exercise.file in line and exercise.equation in line and exercise.difficulty in line
        assert exercise.difficulty in ("easy", "medium", "hard")
        told = blank.run(["--wrong", name])
        for wrong in exercise.wrong:
            assert wrong.was in told and wrong.now in told and len(wrong.effect) > 50
        hint = blank.run(["--hint", name])
        assert len(hint) > 50 and hint.split() == exercise.hint.split()


# ----------------------------------------------------------------------------------------- the copy


@pytest.mark.parametrize("name", EXERCISES)
def test_a_blank_changes_the_functions_body_alone(name, tmp_path):
    exercise = EXERCISES[name]
    told = blank.run([name, "--out", str(tmp_path)])
    made, own = (path / exercise.file for path in (tmp_path, ROOT))
    was, now = own.read_bytes().splitlines(True), made.read_bytes().splitlines(True)
    blanked = blank_of(split(exercise.solution, name)[2]).encode().splitlines(True)
    at = min(i for i, line in enumerate(now) if line != was[i])
    assert f"{made}, line {at + 1}:" in told and f"lessons.check {name} --out {tmp_path}" in told
    cut = len(was) - len(now) + len(blanked)  # lines of the body
    assert now == [*was[:at], *blanked, *was[at + cut :]]
    before, after = ({f.name: f for f in functions(path)} for path in (own, made))
    assert ast.get_docstring(before[name]) == ast.get_docstring(after[name]) is not None
    assert ast.dump(before[name].args) == ast.dump(after[name].args)
    assert ast.unparse(after[name].body[1:]) == "raise NotImplementedError"
    for other in before.keys() - {name}:
        assert ast.dump(before[other]) == ast.dump(after[other])


def test_a_blank_names_the_errors_that_its_tests_want():
    _, _, body, _ = split(EXERCISES["select_top_g"].solution, "select_top_g")
    made = blank_of(body)
    assert made.count("raise ValueError") == 2 and "cannot keep {g} of {len(rewards)}" in made
    assert made.index("cannot keep") < made.index("selection is top or random")
    assert "rng" not in made and made.endswith(BLANK)  # nothing else of the solution


def functions(path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def test_line_ends_and_odd_separators_stay_as_they_are():
    source = "a = 1\r\n\x0c\r\ndef f(x):\r\n    'd\u2028'\r\n    return x\r\n\r\nb = 2"
    before, head, body, after = split(source, "f")
    assert before + head + body + after == source
    assert (body, after) == ("    return x\r\n", "\r\nb = 2")


def test_a_second_blank_keeps_what_is_written_and_the_first(tmp_path):
    def write(name: str, body: str):
        before, head, _, after = split(read(copy), name)
        copy.write_text(before + head + body + after)

    copy, out = tmp_path / "grpo.py", ["--out", str(tmp_path)]
    blank.run(["clipped_objective", *out])
    blank.run(["kl_to_reference", *out])
    write("kl_to_reference", "    return 7\n")
    blank.run(["mixture_logp", *out])
    blank.run(["clipped_objective", *out])  # blank already
    for name, body in (
        ("clipped_objective", BLANK),
        ("kl_to_reference", "    return 7\n"),
        ("mixture_logp", blank_of(split(EXERCISES["mixture_logp"].solution, "mixture_logp")[2])),
    ):
        assert split(read(copy), name)[2] == body
    before = copy.read_bytes()
    with pytest.raises(UserError, match="your own kl_to_reference: --again"):
        blank.run(["kl_to_reference", *out])
    assert copy.read_bytes() == before
    blank.run(["kl_to_reference", *out, "--again"])
    assert split(read(copy), "kl_to_reference")[2] == BLANK
    write("kl_to_reference", split(EXERCISES["kl_to_reference"].solution, "kl_to_reference")[2])
    assert read(copy).count(BLANK) == 2  # all else is the repository's again


# ----------------------------------------------------------------------------- as a student runs it


def tell(module: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"lessons.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_student_fills_a_blank(tmp_path):
    """Another blank of the file, which the tests need, is no hindrance."""
    out, copy = ("--out", tmp_path / "my own"), tmp_path / "my own" / "grpo.py"
    assert not tell("blank", "kl_to_reference", *out).returncode
    made = tell("blank", "clipped_objective", *out)
    assert (made.returncode, made.stderr) == (0, "")
    assert f"lessons.check clipped_objective --out '{tmp_path}/my own'" in made.stdout
    told = tell("check", "clipped_objective", *out)
    assert (told.returncode, told.stderr) == (1, "")
    assert "E   NotImplementedError" in told.stdout and f"{shown(copy)}:" in told.stdout
    assert told.stdout.endswith("python -m lessons.blank --hint clipped_objective\n")
    written = """\
    ratio, advantage = _real(ratio), _real(advantage)
    low, high = 1 - clip_eps, 1 + clip_eps
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
"""
    before, head, _, after = split(read(copy), "clipped_objective")
    copy.write_text(before + head + written + after)
    told = tell("check", "clipped_objective", *out)
    assert told.returncode == 0, told.stdout
    assert "passes its 24 tests" in told.stdout and "--wrong clipped_objective" in told.stdout


def shown(path: Path) -> str:
    """What pytest shows of a path wherever the repository lies: it may be told from there."""
    return "/".join(path.parts[-2:])


def forked(log: Path, *arguments) -> int:
    """As `tell("check", ...)`, in a fork that has the libraries loaded and nothing of the project.
    Returns the exit code; what it prints is in the log."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout, sys.argv = open(1, "w", closefd=False), ["check", *map(str, arguments)]
        ours = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("*/"))} | {"conftest"}
        for name in list(sys.modules):
            if name.split(".")[0] in ours or name.startswith("test_"):
                del sys.modules[name]
        importlib.import_module("lessons.check").main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def test_a_module_that_conftest_imports_is_the_students_too(tmp_path):
    blank.run(["pack", "--out", str(tmp_path)])
    assert forked(tmp_path / "log", "pack", "--out", tmp_path) == 1
    said = (tmp_path / "log").read_text()
    assert re.search(rf"{shown(tmp_path)}/policy.py:\d+: in pack\n", said), said
    (tmp_path / "policy.py").write_text(EXERCISES["pack"].solution)
    assert forked(tmp_path / "log", "pack", "--out", tmp_path) == 0


@pytest.mark.parametrize("code, passed", [(0, 3), (1, 3), (0, 0), (5, 0)])
def test_right_is_what_passes_every_test_and_at_least_one(code, passed, monkeypatch, capsys):
    def pytest_main(arguments, plugins):
        plugins[0].passed = passed
        return code

    monkeypatch.setattr(pytest, "main", pytest_main)
    monkeypatch.setattr(check, "load", lambda *_: ModuleType("grpo"))
    if (code, passed) == (0, 3):
        assert "group_advantages in mine/grpo.py passes its 3 tests" in check.run(
            ["group_advantages"]
        )
        return
    with pytest.raises(SystemExit, match="1"):
        check.run(["group_advantages"])
    assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["module", "function"])
def test_a_check_that_would_test_the_repositorys_own_function_stops(what, tmp_path, monkeypatch):
    own = importlib.import_module("grpo")
    theirs = ModuleType("grpo")
    theirs.__file__ = "mine/grpo.py"
    theirs.group_advantages = lambda rewards: rewards
    item = SimpleNamespace(module=ModuleType("test_x"), nodeid="test_x.py::test")
    monkeypatch.setitem(sys.modules, "grpo", theirs)
    watch, session = check.Watch(theirs, "group_advantages"), SimpleNamespace(items=[item])
    watch.pytest_collection_finish(session)
    item.module.grpo = theirs
    watch.pytest_collection_finish(session)
    if what == "module":
        item.module.grpo = own
    else:
        item.module.group_advantages = own.group_advantages
    with pytest.raises(pytest.UsageError, match="does not test mine/grpo.py"):
        watch.pytest_collection_finish(session)
    item.module = ModuleType("test_x")
    monkeypatch.setitem(sys.modules, "grpo", own)  # what a later import would get
    with pytest.raises(pytest.UsageError, match="does not test mine/grpo.py"):
        watch.pytest_collection_finish(session)


# ----------------------------------------------------------------------------------------- mistakes


def spoiled(change) -> None:
    """A copy of grpo.py with a blank, in mine/, of which something is changed."""
    file = Path("mine/grpo.py")
    blank.run(["group_advantages"])
    change(file)


MISTAKES = {  # what is done to mine/ beforehand, the command, what the line says
    "unknown": (None, blank, ["advantages"], "no exercise 'advantages': there are format_reward"),
    "unknown hint": (None, blank, ["--hint", "x"], "no exercise 'x'"),
    "unknown wrong": (None, blank, ["--wrong", "x"], "no exercise 'x'"),
    "unknown check": (None, check, ["x"], "no exercise 'x'"),
    "no name": (None, blank, [], "--list shows them"),
    "nothing made": (None, check, ["pack"], "no mine/policy.py: python -m lessons.blank pack"),
    "the repository": (None, blank, ["pack", "--out", "."], "repository's own"),
    "a file in the way": (
        lambda: Path("mine").write_text(""),
        blank,
        ["pack"],
        "mine: File exists",
    ),
    "a directory in the way": (
        lambda: Path("mine/policy.py").mkdir(parents=True),
        blank,
        ["pack"],
        "mine/policy.py: Is a directory",
    ),
    "no Python": (
        lambda: spoiled(lambda file: file.write_text("def f(:")),
        check,
        ["group_advantages"],
        "mine/grpo.py, line 1: invalid syntax",
    ),
    "no text": (
        lambda: spoiled(lambda file: file.write_bytes(b"\xff\xfe")),
        blank,
        ["kl_to_reference"],
        "mine/grpo.py is not Python in UTF-8",
    ),
    "no such function": (
        lambda: spoiled(lambda file: file.write_text("import torch\n")),
        check,
        ["group_advantages"],
        "mine/grpo.py has no function group_advantages",
    ),
    "a name of nothing": (
        lambda: spoiled(lambda file: file.write_text(file.read_text() + "oops\n")),
        check,
        ["group_advantages"],
        "mine/grpo.py does not run: NameError: name 'oops' is not defined",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(kind, tmp_path, monkeypatch, capsys):
    before, module, arguments, says = MISTAKES[kind]
    for name in ("rewards", "grpo", "policy"):
        (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    monkeypatch.setattr(blank, "ROOT", tmp_path)
    if before:
        before()
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as stop:
        module.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert says in line


@pytest.mark.parametrize("module", [blank, check])
def test_elsewhere_than_at_the_root_it_says_where_to_go(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"cd {ROOT}$"):
        module.run(["group_advantages"])
    assert not list(tmp_path.iterdir())


def test_git_ruff_and_pytest_leave_mine_alone():
    assert "mine/" in (ROOT / ".gitignore").read_text().split()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["ruff"]["extend-exclude"] == ["mine"]
    assert settings["pytest"]["ini_options"]["testpaths"] == ["tests"]
