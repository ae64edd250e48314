"""--help and mistakes on the command line are answered before the slow imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["ekipl.py", "sft.py", "evaluate.py", "experts/collect.py"]
# Runs a program as the shell does and says what it has imported.
RUN = """
import runpy, sys
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    slow = {"torch", "transformers", "vllm", "openai", "matplotlib", "wandb"} & sys.modules.keys()
    print("slow:", *sorted(slow))
"""


def run(program: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, program, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_slow(program):
    result = run(program, "--help")
    assert result.returncode == 0 and "usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "slow:"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "flags", [["--no-such-flag"], ["--max-new-tokens", "many"], ["--rollout", "magic"]], ids=str
)
def test_a_wrong_flag_imports_nothing_slow(program, flags):
    if program == "evaluate.py":
        flags = ["tiny", *flags]
    result = run(program, *flags)
    assert result.returncode == 2 and result.stdout.splitlines() == ["slow:"]
    assert result.stderr.count("\n") == 1 and flags[-1] in result.stderr
    assert ": error: " in result.stderr and "--help" in result.stderr


@pytest.mark.parametrize("program", ["ekipl.py", "sft.py"])
@pytest.mark.parametrize(
    "flags", [["--batch-size", "0"], ["--lora-rank", "-1"], ["--fraction", "2"]], ids=str
)
def test_a_value_that_makes_no_sense_imports_nothing_slow(program, flags):
    result = run(program, *flags)
    assert result.returncode == 2 and result.stdout.splitlines() == ["slow:"]
    assert result.stderr.count("\n") == 1 and flags[0] in result.stderr


def test_wrong_flags_of_evaluates_other_command_too():
    result = run("evaluate.py", "score")
    assert result.returncode == 2 and result.stdout.splitlines() == ["slow:"]
    assert "directory" in result.stderr
