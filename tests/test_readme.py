"""The README says what is so: its map from equations to lines, its commands, its files."""

import dataclasses
import re
from pathlib import Path

import pytest

import ekipl
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAP = re.findall(
    r"^\| (.+?) \| .*?\[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) \| `(\w+)", README, re.MULTILINE
)


def test_the_map_holds_every_equation_of_the_paper():
    equations = " ".join(row[0] for row in MAP)
    for number in range(1, 11):
        assert re.search(rf"\bEq {number}\b", equations), f"no line for Eq {number}"
    for section in ("A.2", "A.3", "A.4", "A.5"):
        assert section in equations


@pytest.mark.parametrize("row", MAP, ids=lambda row: f"{row[0]}: {row[5]}")
def test_an_equation_stands_at_its_line(row):
    _, file, line, link, link_line, name = row
    lines = (ROOT / file).read_text().splitlines()
    now = [i for i, text in enumerate(lines, 1) if re.search(rf"(def|class) {name}\b", text)]
    assert (link, link_line) == (file, line)
    assert now == [int(line)], f"{name} is at {file}:{now}"


def test_every_file_it_names_exists_and_every_module_is_named():
    for name in re.findall(r"`([\w/.-]+\.(?:py|txt|png|csv|jsonl))`", README):
        made = name.split("/")[-1] in {
            "metrics.jsonl",
            "samples.jsonl",
            "curves.png",
            "time.png",
            "sheet.png",
            "compare.png",
            "config.json",
            "left_out.jsonl",
        }
        assert made or (ROOT / name).exists(), name
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in README


@pytest.mark.parametrize(
    "module, files", [(ekipl, "ekipl|experts"), (sft, "sft")], ids=["ekipl", "sft"]
)
def test_its_commands_use_flags_and_presets_that_exist(module, files):
    flags = {
        f"--{setting.name.replace('_', '-')}" for setting in dataclasses.fields(module.Config)
    } | {"--resume", "--help"}
    flags |= (
        {"--dry-run", "--budget"} if module is ekipl else set()
    )  # of experts.py collect, which takes ekipl.py's as well
    commands = re.findall(
        rf"^\S*(?:python|torchrun).*?\b(?:{files})\.py(.*?)(?:#.*)?$", README, re.MULTILINE
    )
    assert commands
    for command in commands:
        for flag in re.findall(r"--[a-z][\w-]*", command):
            assert flag in flags or flag.replace("--no-", "--") in flags, flag
        for preset in re.findall(r"--preset (\S+)", command):
            assert preset in module.PRESETS
