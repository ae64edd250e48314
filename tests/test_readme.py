"""The READMEs say what is so: the map from equations to lines, files, commands and their flags."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]
PAGES += sorted(ROOT.glob("experiments/*/README.md"))
MAP = re.findall(
    r"^\| (.+?) \| .*?\[([\w/]+\.py):(\d+)\]\(([\w/]+\.py)#L(\d+)\) \| `(\w+)", README, re.MULTILINE
)
MADE = {  # files that a run leaves behind
    "metrics.jsonl", "samples.jsonl", "left_out.jsonl", "config.json", "curves.png", "time.png",
    "trainer.pt", "sheet.png", "compare.png", "gpu-check.json",
}  # fmt: skip


def test_the_map_holds_every_equation_of_the_paper():
    equations = " ".join(row[0] for row in MAP)
    for number in range(1, 11):
        assert re.search(rf"\bEq {number}\b", equations), f"no line for Eq {number}"
    for section in ("A.2", "A.3", "A.4", "A.5", "A.6"):
        assert section in equations


@pytest.mark.parametrize("row", MAP, ids=lambda row: f"{row[0]}: {row[5]}")
def test_an_equation_stands_at_its_line(row):
    _, file, line, link, link_line, name = row
    lines = (ROOT / file).read_text().splitlines()
    now = [i for i, text in enumerate(lines, 1) if re.search(rf"(def|class) {name}\b", text)]
    assert (link, link_line) == (file, line)
    assert now == [int(line)], f"{name} is at {file}:{now}"


def named_lines() -> list[tuple[Path, str, str, str]]:
    """(page, name, file, line) of every link of a name in code to a line."""
    found = []
    for page in PAGES:
        links = re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)", page.read_text())
        found += [(page, *link) for link in links]
    return found


@pytest.mark.parametrize("page, name, file, line", named_lines())
def test_a_name_that_is_linked_stands_at_its_line(page, name, file, line):
    lines = (page.parent / file).read_text().splitlines()
    now = [i for i, text in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", text)]
    assert now == [int(line)], f"{name} is at {file}:{now}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_link_of_a_page_exists(page):
    text = page.read_text()
    for name in re.findall(r"`([\w/.-]+\.(?:py|txt|png|csv|json|jsonl))`", text):
        places = (ROOT / name, page.parent / name)
        if "NAME" in name:
            continue
        assert name.split("/")[-1] in MADE or any(place.exists() for place in places), name
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of our programs in a page's bash blocks and code spans: ekipl.py, or a
    module."""
    found, text = [], page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in [*blocks, *re.findall(r"`((?:python|torchrun) [^`]+)`", text)]:
        for line in block.splitlines():
            for part in re.split(r"[;&|]+", line.split("  #")[0].split("# ")[0]):
                words = shlex.split(part)
                names = [i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
                if "python" in words and words[words.index("python") + 1 :][:1] == ["-m"]:
                    at = words.index("python") + 2
                    found.append((words[at], words[at + 1 :]))
                elif names and {"python", "torchrun"} & set(words):
                    found.append((words[names[0]], words[names[0] + 1 :]))
    # lessons.one_step: cells without flags
    others = ("pytest", "venv", "experiments.benchmarks.NAME", "lessons.one_step")
    return [(program, rest) for program, rest in found if program not in others]


COMMANDS = [
    pytest.param(program, rest, id=f"{page.parent.name}: {program} {' '.join(rest)}"[:90])
    for page in PAGES
    for program, rest in commands(page)
]


@pytest.mark.parametrize("program, arguments", COMMANDS)
def test_a_command_uses_flags_and_presets_that_exist(program, arguments, capsys, monkeypatch):
    module = importlib.import_module(program.removesuffix(".py"))
    if not hasattr(module, "main"):  # a folder
        module = importlib.import_module(f"{program}.__main__")
    subcommand = [word for word in arguments[:1] if re.fullmatch("[a-z0-9]+", word)]
    for words in ([*subcommand, "--help"], ["--help"]):  # the first word may be a model or a file
        monkeypatch.setattr("sys.argv", [program, *words])
        with pytest.raises(SystemExit):
            module.main()
        known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
        unknown = [word for word in arguments if word.startswith("--") and word not in known]
        if not unknown:
            break
    if program in ("experts.collect", "experiments.sweep"):  # they take a run's flags as well
        import ekipl

        settings = vars(ekipl.Config())
        unknown = [word for word in unknown if word[2:].replace("-", "_") not in settings]
    assert not unknown
    if "--preset" in arguments and "$task" not in arguments:
        presets = importlib.import_module("sft" if program == "sft.py" else "training.presets")
        assert arguments[arguments.index("--preset") + 1] in presets.PRESETS
