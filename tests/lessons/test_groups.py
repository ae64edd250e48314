"""The page of a run: what it shows, in a real browser, and that hostile text in it does nothing."""

import base64
import dataclasses
import io
import json
import random
import shutil
import socket
import sys
from pathlib import Path

import miniature
import pytest
from PIL import Image

import ekipl
from blocks import BlocksSet
from data.reading import FILES, read_records
from data.state import State
from lessons import groups
from sampling import Action, Group, give_rewards, select
from training import rundir, storage

HOSTILE = (
    "</script><script>window.ran = 1</script><img src='http://127.0.0.1:9/x' onerror='ran = 1'>"
    "<!-- <script> \"'`&lt; &amp; \u2028 \\u003c {{DATA}} {{HASH}} <svg onload=ran=1> </div>"
    + "W"
    * 300
)
RIGHT, WRONG = "<think> b1 cube yes 1 </think> <answer> {} </answer>", "<answer> none </answer>"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
STEPS = 30


def group_of(state: State, expert: str) -> Group:
    """Eight actions, five of them kept: two of the best, one in the middle, two of the worst; two
    of those that are not kept are equal."""
    right = RIGHT.format(state.answer)
    texts = {"policy": [right, WRONG, HOSTILE, WRONG, WRONG]}
    texts[expert] = [right, RIGHT.format("none"), WRONG]
    actions = []
    for source, those in texts.items():
        actions += [Action([5], text, source) for text in those]
    group = Group(state, None, actions)
    give_rewards([group])
    select([group], 5, "candidates", "policy_first", "top", random.Random(0))
    return group


def write_run(path: Path, asked: list[State], expert: str = "careful", **settings) -> Path:
    """Settings and groups of a run that asks one question a step."""
    config = ekipl.Config(runs=str(path.parent), name=path.name, **settings)
    rundir.create(path.parent, path.name, dataclasses.asdict(config))
    for step, state in enumerate(asked, 1):
        storage.append(path / "samples.jsonl", [group_of(state, expert).transcript(step)])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "<b>a run"
    questions = BlocksSet("counting-train", 100, seed=3)
    write_run(path, [questions[i] for i in range(STEPS)], HOSTILE[:60], states=100, seed=3)
    records = [{"step": step, "states": step, "reward": 1.0} for step in range(1, STEPS + 1)]
    storage.append(path / "metrics.jsonl", records)
    return path


@pytest.fixture(scope="module")
def address(run, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    groups.run([str(run), "--out", str(out)])
    return out.as_uri()


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium")
    if not program:
        pytest.skip("there is no browser here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright==1.65.2")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page at 1,400 pixels; `page.asked` lists the addresses that it asks for."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    yield page
    assert not page.errors
    page.close()


def shown_steps(page) -> list[int]:
    return [int(text) for text in page.locator("select option:checked").all_text_contents()]


def shown_texts(page) -> list[str]:
    """The texts of all actions that are shown; equal ones share a card."""
    texts = []
    for card in page.locator(".action").all():
        times = card.locator(".times")
        count = int(times.text_content().removeprefix(" × ")) if times.count() else 1
        texts += count * [card.locator(".text").text_content()]
    return texts


def actions_of(run: Path, steps: list[int]) -> list[dict]:
    return [
        action
        for group in storage.read(run / "samples.jsonl")
        if group["step"] in steps
        for action in group["actions"]
    ]


# ------------------------------------------------------------------------------- in the browser


def test_a_models_text_is_shown_as_it_is_and_does_nothing(page, address):
    texts = shown_texts(page)
    assert texts.count(HOSTILE) == 3 and len(texts) == 3 * 8  # in each column
    assert page.locator(".text *, .question :not(b), h1 *").count() == 0
    assert page.locator("h1").text_content() == "Groups of <b>a run"
    assert page.evaluate("typeof ran") == "undefined"
    asked = [url for url in page.asked if not url.startswith("data:")]
    assert asked == [address]


def test_the_pages_policy_lets_nothing_run_or_load_even_if_markup_came_into_it(page):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        page.evaluate(
            "html => document.body.append(document.createRange().createContextualFragment(html))",
            f"<script>ran = 1</script><img src='{place}/x'><img src=data:, onerror='ran = 1'>",
        )
        with pytest.raises(TimeoutError):
            server.accept()
    assert page.evaluate("typeof ran") == "undefined"


@pytest.mark.parametrize(
    "label, stays",
    [
        ("policy", lambda action: action["source"] != "policy"),
        (HOSTILE[:60], lambda action: action["source"] == "policy"),
        ("kept", lambda action: not action["kept"]),
        ("not kept", lambda action: action["kept"]),
        ("right", lambda action: action["accuracy"] < 1),
        ("wrong", lambda action: action["accuracy"] == 1),
    ],
    ids=["policy", "expert", "kept", "not kept", "right", "wrong"],
)
def test_a_filter_leaves_the_actions_that_it_does_not_name(page, run, label, stays):
    box = page.get_by_role("checkbox", name=label, exact=True)
    box.uncheck()
    actions = actions_of(run, shown_steps(page))
    left = [action for action in actions if stays(action)]
    assert 0 < len(left) < len(actions)
    assert sorted(shown_texts(page)) == sorted(action["text"] for action in left)
    assert f"{len(left)} of {len(actions)} actions" in page.locator("#count").text_content()
    box.check()
    assert len(shown_texts(page)) == len(actions)


def test_arrow_keys_move_the_framed_column_through_the_steps_and_stop_at_the_ends(page):
    steps = [int(text) for text in page.locator("select").first.locator("option").all_inner_texts()]
    first, middle, last = shown_steps(page)
    assert (first, last) == (1, STEPS) and len(steps) == groups.MOST_STEPS
    page.keyboard.press("ArrowRight")
    assert shown_steps(page) == [1, steps[steps.index(middle) + 1], STEPS]
    for _ in steps:
        page.keyboard.press("ArrowLeft")
    assert shown_steps(page) == [1, 1, STEPS]
    page.locator("select").first.focus()  # as Tab does: this column is framed now
    page.keyboard.press("ArrowRight")
    assert shown_steps(page) == [steps[1], 1, STEPS]
    page.locator("select").last.select_option(label=str(steps[2]))
    page.get_by_role("button", name="step before").last.click()
    assert shown_steps(page) == [steps[1], 1, steps[1]]
    questions = page.locator(".question").all_text_contents()
    assert questions[0] == questions[4] != questions[2]


def test_a_bar_starts_at_the_zero_line_and_points_to_the_side_of_the_advantage(page, run):
    values = [action["advantage"] for action in actions_of(run, [1]) if action["kept"]]
    assert min(values) < 0 < max(values)
    boxes, column = [], page.locator(".step").first
    for bar in column.locator(".advantage").all():
        fill, track = bar.locator(".fill").bounding_box(), bar.locator(".track").bounding_box()
        middle = track["x"] + track["width"] / 2
        ends = (fill["x"] - middle, fill["x"] + fill["width"] - middle)
        assert min(map(abs, ends)) < 1
        boxes.append(round(2 * max(ends, key=abs) / track["width"], 2))
    largest = max(map(abs, values))
    assert sorted(boxes) == pytest.approx(sorted(value / largest for value in values), abs=0.02)
    numbers = column.locator(".number").all_text_contents()
    assert sorted(numbers) == sorted(f"{value:+.2f}".replace("-", "−") for value in values)


def test_an_action_has_its_sources_colour_its_rewards_and_whether_it_was_kept(page, run):
    cards = page.locator(".step").first.locator(".action").all()
    actions = sorted(actions_of(run, [1]), key=lambda a: (not a["kept"], -a["reward"]))
    twice = [action for action in actions if actions.count(action) > 1]
    assert len(twice) == 2
    actions.remove(twice[1])
    colors = {"policy": "rgb(31, 119, 180)", HOSTILE[:60]: "rgb(255, 127, 14)"}  # as in Figure 4
    for card, action in zip(cards, actions, strict=True):
        color = card.evaluate("element => getComputedStyle(element).borderLeftColor")
        assert color == colors[action["source"]]
        text = card.text_content()
        parts = [action[name] for name in ("format", "accuracy", "reward")]
        assert "format {:g} + accuracy {:g} = {:g}".format(*parts) in text
        assert ("not kept" in text) != action["kept"]
        assert (" × 2" in text) == (action == twice[0])


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_window_and_columns_stack_in_a_narrow_one(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tops = [column.bounding_box()["y"] for column in page.locator(".step").all()]
    assert len(set(tops)) == (1 if width == 1400 else 3)
    images = page.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.width, i.height])"
    )
    assert len(images) == 4  # a picture each, and the curves
    for true_width, true_height, width, height in images:
        assert width / height == pytest.approx(true_width / true_height, rel=0.02)


# ----------------------------------------------------------------------------------- its content


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_pictures_are_those_of_the_states(run):
    questions = BlocksSet("counting-train", 100, seed=3)
    for shown in groups.page_data(run, "1,7")["steps"]:
        (uri,) = shown["groups"][0]["pictures"]
        image = questions[shown["step"] - 1].images[0]
        found = picture(uri).resize(image.size, Image.Resampling.NEAREST)
        assert found.tobytes() == image.tobytes()


def test_a_long_run_gives_twelve_steps_evenly_spread():
    assert groups.chosen_steps(list(range(1, 6)), "") == [1, 2, 3, 4, 5]
    chosen = groups.chosen_steps(list(range(1, 1001)), "")
    assert len(chosen) == 12 and (chosen[0], chosen[-1]) == (1, 1000)
    gaps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert groups.chosen_steps(list(range(1, 1001)), "25, 1") == [1, 25]


def test_another_seed_or_world_gives_no_wrong_picture(tmp_path):
    questions = BlocksSet("counting-train", 100, seed=4)
    path = write_run(tmp_path / "run", [questions[0]], states=100, seed=3)
    (shown,) = groups.page_data(path, "")["steps"]
    assert shown["groups"][0]["pictures"].startswith("not found")


@pytest.mark.parametrize("task, pictures", [("counting", 1), ("transformation", 2)])
def test_pictures_of_reason_rft_are_shrunk_or_said_to_be_missing(tmp_path, task, pictures):
    """Record 0's is large, record 5's (transformation: second) is gone since the run."""
    data = miniature.make(tmp_path / "data", zipped=False, broken=False)
    images = data / "images" / "train_images" / task
    Image.new("RGB", (900, 600), "red").save(images / "0.png")
    (images / "5.png").unlink()
    records, states = read_records(data / FILES[f"{task}-train"]), []
    for i in (0, 2, 5, 99):  # the last: no longer in the data
        question, answer = records[i % 94]["problem"], "3"
        states.append(State(f"{task}-train-{i}", [], question, answer, "discrete"))
    settings = dict(task=task, data=str(data), data_cache=str(tmp_path / "cache"))
    run = write_run(tmp_path / "run", states, **settings)
    found = [shown["groups"][0]["pictures"] for shown in groups.page_data(run, "")["steps"]]
    assert [len(uris) for uris in found[:2]] == [pictures, pictures]
    assert found[0][0].startswith("data:image/jpeg") and picture(found[0][0]).size == (160, 107)
    small = picture(found[1][0]).resize((40, 32), Image.Resampling.NEAREST)
    assert small.tobytes() == Image.open(io.BytesIO(miniature.png(2))).tobytes()
    assert found[2] == f"not found: missing image: '{task}/5.png'"
    assert found[3] == f"not found: the data has no {task}-train-99"
    assert not (tmp_path / "cache").exists()  # nothing was downloaded or checked


def broken(change):
    def write(path: Path):
        record = json.loads((path / "samples.jsonl").read_text().splitlines()[0])
        change(record)
        (path / "samples.jsonl").write_text(json.dumps(record) + "\n")

    return write


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (lambda path: (path / "samples.jsonl").unlink(), [], "samples.jsonl: only a run of ekipl"),
        (lambda path: (path / "samples.jsonl").write_text(""), [], "holds no group"),
        (lambda path: (path / "samples.jsonl").write_text("[1\n"), [], "holds no group"),
        (broken(lambda r: r["actions"][0].pop("format")), [], "record 1 is no group"),
        (broken(lambda r: r.update(actions=[])), [], "record 1 is no group"),
        (broken(lambda r: r["actions"][0].update(reward=float("nan"))), [], "record 1 is no"),
        (lambda path: (path / "config.json").unlink(), [], "config.json is missing"),
        (lambda path: None, ["--steps", "1,9"], "no groups of step 9: they are of 1 to 2"),
        (lambda path: None, ["--steps", "last"], "--steps takes numbers"),
        (lambda path: None, ["--out", "/nowhere/page.html"], "cannot write /nowhere/page.html"),
    ],
)
def test_a_mistake_gives_one_line(tmp_path, monkeypatch, capsys, spoil, arguments, message):
    questions = BlocksSet("counting-train", 100)
    run = write_run(tmp_path / "run", [questions[0], questions[1]], states=100)
    spoil(run)
    monkeypatch.setattr(sys, "argv", ["lessons.groups", str(run), *arguments])
    with pytest.raises(SystemExit) as stop:
        groups.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("lessons.groups: error: ") and message in last
    assert not (run / "groups.html").exists()


def test_a_damaged_line_is_left_out_and_said(tmp_path, capsys):
    run = write_run(tmp_path / "run", [BlocksSet("counting-train", 9)[0]], states=9)
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 2, "state\n')
    assert "groups.html" in groups.run([str(run)]) and (run / "groups.html").is_file()
    assert "samples.jsonl: line 2 is damaged and left out" in capsys.readouterr().err
