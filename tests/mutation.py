"""Mutants of the core: small faults, one at a time, that the tests have to notice.

    python tests/mutation.py --seed 0 --count 300             # all six modules: an hour or two
    python tests/mutation.py grpo --start 40 --count 20       # some of one module's

A mutant is a module of which one operator, comparison, constant, branch, argument, call or
statement was changed. Its tests (TESTS, the fastest first) run in a copy of the project, in a
process forked off one that has the libraries loaded. It is killed if a test fails or takes longer
than LIMIT; survivors are printed. Exit code 1 if more than one in twenty survives.
"""

import argparse
import ast
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 150  # seconds of CPU for the tests of a mutant, and ten times as many in all
TESTS = {  # of each module, in order
    "grpo": [
        "test_details.py",
        "test_grpo.py",
        "test_independent_loop.py",
        "experiments/test_estimators.py",
    ],
    "sampling": ["test_details.py", "test_sampling.py", "test_independent_loop.py"],
    "policy": ["test_details.py", "test_policy.py", "test_sampling.py", "test_independent_loop.py"],
    "attention": ["test_details.py", "test_policy.py", "test_sampling.py"],
    "rewards": ["test_rewards.py", "test_details.py", "test_math_verify.py"],
    "ekipl": [
        "test_details.py",
        "test_independent_loop.py",
        "test_ekipl.py",
        "-k=plain or gradient or mean_1 or _says_",
    ],
}
ONLY = {"ekipl": {"MicroBatch", "micro_batches", "update", "loss_of"}}  # of a module these parts
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
NAMES = {"min": "max", "amax": "amin", "sum": "mean", "repeat_interleave": "repeat", "any": "all"}
NAMES |= {other: name for name, other in NAMES.items()}
# Calls without which nothing runs, devices and stopwatches: no faults worth a test.
TRIVIAL = set("len range enumerate zip map id list dict set tuple str print append items".split())
TRIVIAL |= set("lap to cpu device strict getattr isinstance".split())
SYMMETRIC = set("max min transpose".split())  # the order of two arguments means nothing


def name_of(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def changes(node: ast.AST):
    """(its description, the node in its place) for each mutant of this node."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", type(node)(**{**vars(node), "op": OPERATORS[type(node.op)]()})
    elif isinstance(node, ast.Compare):
        ops = [OPERATORS[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.UnaryOp):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        flipped = not node.value if isinstance(node.value, bool) else 2 * node.value or 1
        yield "constant", ast.Constant(flipped)
    elif isinstance(node, ast.If):
        yield "condition", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.IfExp):
        yield "branches", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Expr | ast.Raise | ast.AugAssign | ast.Continue | ast.Break):
        if name_of(getattr(getattr(node, "value", None), "func", None)) != "lap":
            yield "statement", ast.Pass()
    elif isinstance(node, ast.Attribute | ast.Name) and name_of(node) in NAMES:
        field = "attr" if isinstance(node, ast.Attribute) else "id"
        yield "name", type(node)(**{**vars(node), field: NAMES[name_of(node)]})
    elif isinstance(node, ast.Call):
        name = name_of(node.func)
        for i, keyword in enumerate(node.keywords if name not in TRIVIAL else ()):
            if keyword.arg not in TRIVIAL:
                rest = node.keywords[:i] + node.keywords[i + 1 :]
                yield f"without {keyword.arg}", ast.Call(node.func, node.args, rest)
        if name not in TRIVIAL and isinstance(node.func, ast.Attribute):
            yield f"without .{name}", node.func.value
        if name not in TRIVIAL and node.args:
            yield f"without {name}", node.args[0]
        starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        if len(node.args) > 1 and not starred and name not in SYMMETRIC:
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            yield "arguments swapped", ast.Call(node.func, swapped, node.keywords)


def places(parent: ast.AST, only: set[str] = frozenset()):
    """(parent, field, index) of what may change: no annotation, decorator, docstring, message."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "exc", "cause"):
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            told = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if told or not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.keyword) and node.arg in TRIVIAL:
                continue
            if isinstance(parent, ast.Module) and only and getattr(node, "name", "") not in only:
                continue
            if name_of(getattr(node, "test", None)) != "TYPE_CHECKING":
                yield parent, field, i if isinstance(value, list) else None
                yield from places(node)


def mutants(module: str) -> list[tuple[str, str, str]]:
    """(module, description, source) of all mutants of a module."""
    tree, made = ast.parse((ROOT / f"{module}.py").read_text()), []
    for parent, field, index in list(places(tree, ONLY.get(module, frozenset()))):
        holder, key = (vars(parent), field) if index is None else (getattr(parent, field), index)
        node = holder[key]
        for what, other in changes(node):
            holder[key] = other
            source = ast.unparse(ast.fix_missing_locations(tree))
            line, now = (ast.unparse(n).splitlines()[0][:70] for n in (node, other))
            made.append((module, f"{module}.py:{node.lineno} {what}: {line} -> {now}", source))
        holder[key] = node
    return made


def outcome(copy: Path, module: str) -> str:
    """Runs the module's tests in a fork: "survived", "killed" or "too slow"."""
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        signal.alarm(10 * LIMIT)
        os.chdir(copy)
        os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.path[0] = str(copy)
        files = [f"tests/{name}" if name[0] != "-" else name for name in TESTS[module]]
        os._exit(int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *files])))
    status = os.waitpid(child, 0)[1]
    return "too slow" if os.WIFSIGNALED(status) else "killed" if status else "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the mutants that the tests kill.")
    parser.add_argument("modules", nargs="*", metavar="module", help=", ".join(TESTS))
    for flag, default in (("--seed", 0), ("--start", 0), ("--count", 300)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    everything = [mutant for module in args.modules or TESTS for mutant in mutants(module)]
    random.Random(args.seed).shuffle(everything)
    chosen, survivors = everything[args.start : args.start + args.count], 0
    import matplotlib.pyplot  # noqa: F401  what takes seconds, once for all
    import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401

    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "project"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for module in dict.fromkeys(m for m, *_ in chosen) if args.start == 0 else ():
            if outcome(copy, module) != "survived":
                sys.exit(f"the tests of {module}.py fail without any mutant")
        for module, what, source in chosen:
            file = copy / f"{module}.py"
            file.write_text(source)
            found = outcome(copy, module)
            shutil.copy(ROOT / file.name, file)
            survivors += found == "survived"
            print(f"{found:9} {what}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed, of {len(everything)} in all")
    sys.exit(int(20 * survivors > len(chosen)))


if __name__ == "__main__":
    main()
