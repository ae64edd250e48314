"""rollouts/README.md is true: its figures are those of the code and of the two runs."""

import re
from pathlib import Path

import torch

import ekipl
from rollouts.parity import PARITY_TOLERANCE
from training import storage

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "rollouts" / "README.md").read_text()


def test_the_allowed_differences_are_those_of_the_check():
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        (allowed,) = re.findall(rf"^\| {kind} \| .* \| (\S+) \|$", PAGE, re.MULTILINE)
        assert float(allowed) == PARITY_TOLERANCE[dtype]


def test_the_accuracies_are_those_of_the_two_runs():
    found = []
    for name in ("rollout-vllm", "rollout-transformers"):
        records = storage.read(ROOT / "experiments" / "results" / f"{name}.jsonl")
        values = [100 * r["eval/counting-id"] for r in records if "eval/counting-id" in r]
        found.append((f"{values[0]:.1f}", f"{values[-1]:.1f}"))
    (text,) = re.findall(
        r"rises from ([\d.]+) to ([\d.]+) % with vLLM and to ([\d.]+) %", PAGE.replace("\n", " ")
    )
    assert found == [(text[0], text[1]), (text[0], text[2])]


def test_its_command_has_flags_that_exist():
    (flags,) = re.findall(r"python ekipl.py (.*)", PAGE)
    config, _ = ekipl.parse(flags.replace("$rollout", "vllm").split())
    assert (config.rollout, config.states, config.eval_states) == ("vllm", 3200, 200)
