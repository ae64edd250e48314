"""experts/README.md is true: its costs follow from the prices, and its commands can be given."""

import re
from pathlib import Path

import pytest

import ekipl
import sft
from experts import api_expert, apis, collect
from training.presets import PRESETS
from training.settings import parse

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "experts" / "README.md").read_text()
COMMANDS = re.findall(r"^python (-m \S+|\S+\.py) (.*?) +#", PAGE, re.MULTILINE)


def test_what_the_experts_cost_follows_from_the_price_table():
    table = r"^\| (?:task|counting|structure|transformation) \| (?:states|[\d,]+) \|.*$"
    header, *rows = re.findall(table, PAGE, re.MULTILINE)
    models = [cell.strip() for cell in header.split("|")[4:-2]]
    assert len(rows) == 3 and len(models) == 4 and apis.PRICES_OF in PAGE
    for row in rows:
        cells = [int(cell.strip().replace(",", "")) for cell in row.split("|")[2:-1]]
        states, prompt, *costs = cells
        answers = states * 8 * 200
        expected = [apis.dollars(apis.price_of(m), states * prompt, answers) for m in models]
        # the prompt paid N times
        expected.append(apis.dollars(apis.price_of("gpt-4o"), states * 8 * prompt, answers))
        assert costs == [round(value) for value in expected]


@pytest.mark.parametrize("program, flags", COMMANDS, ids=str)
def test_its_commands_can_be_given(program, flags):
    if program in ("ekipl.py", "sft.py"):
        {"ekipl.py": ekipl, "sft.py": sft}[program].parse(flags.split())
        return
    assert program == "-m experts.collect"  # the other program of this page
    if flags.startswith("stats "):
        assert collect.parser().parse_args(flags.split()).cache == "experts.sqlite"
        return
    _, rest = collect.parser().parse_known_args(["collect", *flags.split()])
    config, _ = parse(collect.CollectSettings, PRESETS, "", rest)
    assert config.experts == "openai:gpt-4o"


def test_every_metric_of_its_table_and_every_constant_exists():
    metrics = set(re.findall(r"`api/(\w+)`", PAGE))
    code = (ROOT / "experts" / "api_expert.py").read_text()
    roster = (ROOT / "experts" / "roster.py").read_text()
    assert metrics and all(name in code + roster for name in metrics)
    assert "left alone for two minutes" in PAGE and api_expert.PAUSE == 120
    assert all(hasattr(apis, name) for name in re.findall(r"`([A-Z]+)`", PAGE))
