"""The sheet: a page of the size that is promised, with the walk's numbers as they are now."""

import importlib
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from PIL import Image

from lessons import sheet

COMMITTED = ROOT / "lessons"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The folder of a sheet drawn by the command."""
    out = tmp_path_factory.mktemp("sheet") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        patch.setattr("sys.argv", ["lessons.sheet", "--out", str(out)])
        sheet.main()
    assert sorted(path.name for path in out.parent.iterdir()) == ["new"]  # of the walk, nothing
    return out


@pytest.fixture(scope="module")
def walk(drawn):
    return importlib.import_module("lessons.one_step")


def texts(svg: Path) -> list[str]:
    """The texts of a picture, in the order in which they were drawn."""
    found = []
    for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"):
        found.append("".join(element.itertext()).replace("\u2212", "-").strip())
    return found


def numbers_before_the_step(walk) -> list[str]:
    """Words and numbers of the walk that the page must have, each as often as in this list."""
    group, wanted = walk.group, []
    for action in group.actions:
        wanted += [action.source, re.findall(r"[^<>]*\d", action.text)[-1].split()[-1]]
    for values in walk.readings.values():
        wanted += [f"{value:+.2f}" for value in values[0].tolist()]
    wanted += [f"{logp:.2f}" for logp in walk.old_logp[0].sum(-1).tolist()]
    wanted += [f"{w:.3g}" for w in walk.weights[0].tolist()]
    wanted += [f"{value:+z.2f}" for value in walk.losses.values()]
    wanted += [f"{value:.2f}" for value in walk.norms.values()]
    return [*wanted, f"{walk.ess:.2f}", f"{walk.bound:.2f}"]


def lacking(svg: Path, wanted: list[str]) -> set[str]:
    """What of `wanted` a picture does not have, or not as often."""
    words = " ".join(texts(svg)).split()
    return {word for word in wanted if words.count(word) < wanted.count(word)}


def test_the_page_has_the_numbers_of_the_walk(drawn, walk):
    after = [f"{logp:.2f}" for logp in walk.new_logp[0].sum(-1).tolist()]
    after += [f"{kl:.3f}" for kl in walk.second["kl"][0].tolist()]
    after += [f"{share:.0%}" for share in walk.second["clip_fraction"][0].tolist()]
    after += [f"{count:.0f}" for count in walk.right.values()]
    assert not lacking(drawn / "one_step.svg", numbers_before_the_step(walk) + after)


def test_a_row_of_the_group_is_one_action_with_its_own_rewards(drawn, walk):
    found, group = texts(drawn / "one_step.svg"), walk.group
    for i, action in enumerate(group.actions):
        said = action.text.replace("<think> ", "").replace(" </answer>", "")
        said = said.replace("</think> <answer>", "\u2192")
        at = [k for k, text in enumerate(found) if text == said]
        rows = [found[k - 2 : k + 4] for k in at]
        parts = [f"{part[i]:.0f}" for part in (group.format, group.accuracy, group.rewards)]
        assert [str(i), action.source, said, *parts] in rows
        if i in group.kept:
            at = [k for k in at if found[k - 2] == str(i)]
            assert found[at[0] + 4] == f"\u2713 {group.kept.index(i) + 1}"


def test_a_row_of_the_losses_is_one_estimator_by_all_m_and_by_the_selected_g(drawn, walk):
    found = texts(drawn / "one_step.svg")
    for letter in "ABC":
        row = []
        for reading in ("candidates", "selected"):
            row.append(f"{walk.losses[letter, reading]:+z.2f}")
            row.append(f"{walk.norms[letter, reading]:.2f}")
        at = found.index(letter)
        assert found[at + 2 : at + 6] == row


def test_every_equation_of_the_objective_is_named(drawn):
    page = " ".join(texts(drawn / "one_step.svg"))
    for name in ("Eq 1", "Eq 2", "Eq 3", "Eq 4, 5, 6", "Eq 7", "Eq 8, 9", "Eq 10", "A.2"):
        assert name in page


@pytest.mark.parametrize("folder", ["drawn", COMMITTED], ids=["drawn", "committed"])
def test_it_is_a_landscape_a4_and_small(folder, drawn):
    folder = drawn if folder == "drawn" else folder
    with Image.open(folder / "one_step.png") as picture:
        assert picture.size == (1753, 1240)  # 297 x 210 mm at 150 dots an inch
    assert (folder / "one_step.png").stat().st_size < 400_000
    assert (folder / "one_step.svg").stat().st_size < 300_000


def test_the_committed_page_is_that_of_the_code(walk):
    """Its texts: up to the step all; after it those that AdamW's rounding leaves as they are."""
    assert not lacking(COMMITTED / "one_step.svg", numbers_before_the_step(walk))


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["lessons.sheet", "--out", str(tmp_path / "file" / "x")])
    with pytest.raises(SystemExit) as stop:
        sheet.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "file" in error
