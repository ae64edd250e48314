"""Records as states, what is left out and why, hostile archives, interrupted downloads."""

import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
from PIL import Image

import rewards
from blocks.dataset import BlocksSet
from data import download, image_check, pictures, reading, sets
from data.download import prepare, unpack
from data.pictures import ImageFiles
from data.reason_rft import ReasonRFTSet
from data.sets import training_states
from data.state import MODES, State
from policy import Policy
from training.console import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = dict(
    task="counting",
    data_cache="",
    states=12,
    seed=0,
    skip=0,
    limit=0,
    fraction=1.0,
    epochs=1,
    batch_size=2,
    eval_states=5,
)


def settings(directory, cache, **changes):
    return SimpleNamespace(
        **{**SETTINGS, "data": str(directory), "data_cache": str(cache), **changes}
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The miniature, unpacked."""
    return miniature.make(tmp_path_factory.mktemp("reason-rft"), zipped=False)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("name", reading.FILES)
def test_every_file_of_the_real_layout_becomes_states(directory, name):
    questions = ReasonRFTSet(name, directory)
    assert len(questions) == 12 and questions.name == name
    for i in range(12):
        state = questions[i]
        assert len(state.images) == (2 if "transformation" in name else 1)
        assert all(image.mode == "RGB" and image.size == (40, 32) for image in state.images)
        assert state.thought == ("count every red object" if "train" in name else "")
        target = f"<think>{state.thought or 'x'}</think><answer>{state.answer}</answer>"
        assert rewards.reward(target, state.answer, state.kind) == 2.0
    assert len({questions[i].id for i in range(12)}) == 12
    kinds = {questions[i].kind for i in range(12)}
    assert (
        kinds
        == {
            "counting": {"discrete"},
            "structure": {"discrete", "math"},
            "transformation": {"function"},
        }[name.split("-")[0]]
    )


def test_what_cannot_be_used_is_left_out_and_told(directory):
    questions = ReasonRFTSet("counting-train", directory)
    assert sorted(record["reason"].split(":")[0] for record in questions.left_out) == sorted(
        miniature.BROKEN
    )
    records = json.loads((directory / reading.FILES["counting-train"]).read_text())
    for left_out in questions.left_out:
        change = miniature.BROKEN[left_out["reason"].split(":")[0]]
        record = records[left_out["record"]]
        assert record == change if isinstance(change, str) else change.items() <= record.items()
    report = questions.report()
    assert f"12 of {12 + len(miniature.BROKEN)} records" in report and all(
        f"1 {reason}" in report for reason in miniature.BROKEN
    )


@pytest.mark.parametrize("task, answer, kind", [
    ("counting", "3", "discrete"), ("counting", "-2.0", "discrete"), ("counting", "three", None),
    ("counting", "A", None), ("counting", "nan", None),
    ("structure", "B", "discrete"), ("structure", "(D)", "discrete"),
    ("structure", "E", "discrete"), ("structure", "b", "discrete"),
    ("structure", "(f).", "discrete"),
    ("structure", "2\\sqrt{3}", "math"), ("structure", "½", "math"), ("structure", "9米", "math"),
    ("structure", "（B）", "discrete"),
    ("counting", "1,000", "discrete"), ("counting", "１２", "discrete"), ("counting", "1,00", None),
    ("counting", "true", None),
    ("structure", "12 cm", "math"), ("structure", "\\frac{1}{2}", "math"), ("structure", "x", None),
    ("structure", "", None),
    ("structure", "3</answer>", None),
    ("transformation", "change_size(0, small)", "function"),
    ("transformation", "['change_size(0, \"small\")'; change_shape(3,'cube')]", "function"),
    ("transformation", "change_size(0, huge)", None), ("transformation", "paint(0, red)", None),
    ("transformation", "nothing", None),
    ("transformation", "change_size(0, small), change_color(1)", None),
    ("transformation", ", ".join(f"change_size({i}, small)" for i in range(5)), None),
])  # fmt: skip
def test_the_form_of_an_answer_decides_how_it_is_judged(task, answer, kind):
    if kind:
        assert reading.kind_of(answer, task) == kind
    else:
        with pytest.raises(reading.Unusable):
            reading.kind_of(answer, task)


@pytest.mark.parametrize("cot, thought", [
    ("bare", "bare"), (" <think> a\nb </think> ", "a\nb"),
    ("<think>a</think>\n<answer>3</answer>", "a"), ("a <answer>3</answer>", "a"),
    ("a </think> b", ""), ("<think>a", ""), ("<think>a</think> b <think>c</think>", ""), ("", ""),
    (None, ""), (3, ""),
])  # fmt: skip
def test_a_thought_loses_its_tags_or_is_not_used(cot, thought):
    assert reading.thought_of(cot) == thought


def test_where_thoughts_are_needed_records_without_one_are_left_out(tmp_path):
    directory = miniature.make(tmp_path, zipped=False, broken=False)
    file = directory / reading.FILES["structure-train"]
    records = json.loads(file.read_text())
    records[2]["cot"] = "a </think> b"
    file.write_text(json.dumps(records))
    assert len(ReasonRFTSet("structure-train", directory)) == 12
    questions = ReasonRFTSet("structure-train", directory, thoughts=True)
    assert [record["reason"] for record in questions.left_out] == [
        "no usable thought"
    ] and questions.left_out[0]["record"] == 2


def test_the_order_is_fixed_and_a_record_left_out_does_not_change_it(directory, tmp_path):
    ids = [
        state.id for state in map(ReasonRFTSet("structure-train", directory).__getitem__, range(12))
    ]
    assert ids == [
        state.id for state in map(ReasonRFTSet("structure-train", directory).__getitem__, range(12))
    ]
    assert ids != sorted(ids, key=lambda id: int(id.split("-")[-1]))  # no longer as in the file
    other = miniature.make(tmp_path, zipped=False)
    file = other / reading.FILES["structure-train"]
    records = json.loads(file.read_text())
    records[4]["answer"] = records[4]["solution"] = "none"
    file.write_text(json.dumps(records))
    assert [ReasonRFTSet("structure-train", other)[i].id for i in range(11)] == [
        id for id in ids if id != "structure-train-4"
    ]


def changed(tmp_path, change, name="counting-train", count=8) -> Path:
    """The miniature with `count` records in each file, those of that set after change(records)."""
    directory = miniature.make(tmp_path / "data", size=count, zipped=False, broken=False)
    file = directory / reading.FILES[name]
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))
    return directory


def every(**values):
    """A change of every record: a value may be a function of the record."""

    def change(records):
        for record in records:
            record |= {k: v(record) if callable(v) else v for k, v in values.items()}

    return change


def truth(record) -> str:
    return record.get("answer") or record.get("solution")


TAKEN = {
    "in tags": every(answer=lambda r: f"<answer> {truth(r)} </answer>"),
    "in tags, with a thought": every(
        answer=lambda r: f"<think> a </think>\n<answer>\n{truth(r)}\n</answer>"
    ),
    "null beside a solution": every(solution=truth, answer=None),
    "blank beside a solution": every(solution=truth, answer=" "),
    "empty tags beside a solution": every(solution=truth, answer="<answer></answer>"),
    "an empty list beside a solution": every(solution=truth, answer=[]),
    "a list": every(answer=lambda r: [truth(r)]),
    "a number": every(answer=lambda r: int(truth(r))),
    "a list of a number": every(answer=lambda r: [float(truth(r))]),
    "{path}": every(image=lambda r: {"path": r["image"]}),
    "a list of {path}": every(image=lambda r: [{"bytes": None, "path": r["image"]}]),
    "a list of a path": every(image=lambda r: [r["image"]]),
    "backslashes": every(image=lambda r: r["image"].replace("/", "\\")),
    "within the set": every(image=lambda r: f"counting/../{r['image']}"),
    "a list of a question": every(problem=lambda r: [r["problem"]]),
}


@pytest.mark.parametrize("form", TAKEN)
def test_a_record_is_taken_in_each_form_that_reason_rft_takes(tmp_path, form):
    directory = changed(tmp_path, TAKEN[form])
    questions = ReasonRFTSet("counting-train", directory)
    assert len(questions) == 8 and not questions.left_out
    for state in map(questions.__getitem__, range(8)):
        number = int(state.id.split("-")[-1])
        assert float(state.answer) == number and state.question.endswith(f"? {number}")
        assert list(state.images)[0].size == (40, 32)


@pytest.mark.parametrize("relative", [False, True])
def test_an_absolute_path_into_the_set_is_taken_and_one_out_of_it_is_not(
    tmp_path, monkeypatch, relative
):
    images = tmp_path / "data" / "images" / "train_images"

    def change(records):
        for record in records:
            record["image"] = str(images / record["image"])
        (tmp_path / "secret.png").write_bytes(miniature.png(1))
        records[3]["image"] = str(tmp_path / "secret.png")
        records[4]["image"] = str(images / "counting" / "nowhere.png")

    directory = changed(tmp_path, change)
    monkeypatch.chdir(tmp_path)
    questions = ReasonRFTSet("counting-train", Path("data") if relative else directory)
    assert len(questions) == 6 and list(questions[0].images)
    assert [
        (record["record"], record["reason"].split(":")[0]) for record in questions.left_out
    ] == [
        (3, "image outside the data set"),
        (4, "missing image"),
    ]


def test_a_link_out_of_the_data_set_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for i in range(2):
        (outside / f"{i}.png").write_bytes(miniature.png(i))

    def change(records):
        for i, place in enumerate(["counting/link.png", "folder/1.png", "../out.png"]):
            records[i]["image"] = place
        records[3]["image"] = "counting/inner.png"

    directory = changed(tmp_path, change)
    images = directory / "images" / "train_images"
    (images / "counting" / "link.png").symlink_to(outside / "0.png")
    (images / "folder").symlink_to(outside)
    (images.parent / "out.png").symlink_to(outside / "0.png")
    (images / "counting" / "inner.png").symlink_to("5.png")
    questions = ReasonRFTSet("counting-train", directory)
    assert {(r["record"], r["reason"].split(":")[0]) for r in questions.left_out} == {
        (i, "image outside the data set") for i in range(3)
    }


def test_the_folder_of_images_may_be_a_link_to_another_disk(tmp_path):
    directory = changed(tmp_path, lambda records: None)
    (directory / "images").rename(tmp_path / "disk")
    (directory / "images").symlink_to(tmp_path / "disk")
    assert len(ReasonRFTSet("counting-train", directory)) == 8


@pytest.mark.parametrize("answer, as_read", [
    ("change_position(0, front-left)", "change_position(0, front_left)"),
    ("change_position(0, 'Behind-Right')", "change_position(0, 'Behind_Right')"),
    ("change_position(0, behind left)", "change_position(0, behind_left)"),
    ("change_size(0, small), change_size(0, small)", "change_size(0, small)"),
    (
        "change_position(1, left); Change_Position(1, 'left'); change_size(0, small)",
        "change_position(1, left), change_size(0, small)",
    ),
    (
        ["change_size(0, small)", "change_color(1, red)"],
        "change_size(0, small), change_color(1, red)",
    ),
    (
        ", ".join(f"change_size({i % 2}, small)" for i in range(6)),
        "change_size(0, small), change_size(1, small)",
    ),
    ("change_size(0, small), change_size(0, small), paint(0)", None),
    ("change_position(0, front-up)", None),
])  # fmt: skip
def test_a_sequence_is_read_as_the_prompt_and_the_rewards_spell_it(tmp_path, answer, as_read):
    directory = changed(
        tmp_path, lambda records: records[2].update(answer=answer), "transformation-train", 4
    )
    questions = ReasonRFTSet("transformation-train", directory)
    read = {state.id: state for state in map(questions.__getitem__, range(len(questions)))}
    state = read.get("transformation-train-2")
    if as_read is None:
        assert state is None and "unknown form" in questions.left_out[0]["reason"]
    else:
        assert state.answer == as_read
        said = f"<answer>{state.answer}</answer>"
        assert rewards.accuracy_reward(said, state.answer, "function") == 1


@pytest.mark.parametrize("change, reason", [
    (dict(image="A" * 300), "missing image: 'A"),
    (dict(image="A" * 5000), "missing image: 'A"),
    (dict(image="/9j/" + "A/b+" * 2000), "image outside the data set: '/9j/"),
    (dict(image="data:image/png;base64,AAAA"), "missing image: 'data:"),
    (dict(image="a\0b"), "missing image"),
    (dict(image="\ud83d.png"), "missing image"),
    (dict(image="https://host/x.png"), "missing image"),
    (dict(image={"bytes": "AAAA", "path": None}), "no image"),
    (dict(image=[["counting/0.png"]]), "no image"),
    (dict(image="counting"), "missing image: 'counting'"),
    (dict(problem="how many ? " * 100_000), "question too long: 1099999 characters"),
    (dict(problem=["how many", "are there ?"]), "no question"),
    (dict(problem=float("nan")), "no question"),
    (dict(answer=float("nan")), "unknown form of answer: 'nan'"),
    (dict(answer=True, solution=None), "no answer"),
    (dict(answer={"value": 3}, solution=None), "no answer"),
    (dict(answer=["3", ["4"]], solution=None), "no answer"),
    (dict(answer="9" * 5000), "unknown form of answer: '9"),
    (dict(answer="3\ud83d"), "unknown form of answer: '3"),
])  # fmt: skip
@pytest.mark.parametrize("id", [float("nan"), ["x"] * 999, "\ud83d" * 300, 7])
def test_a_record_that_cannot_be_used_is_one_line_and_never_ends_the_run(
    tmp_path, change, reason, id
):
    directory = changed(tmp_path, lambda records: records[2].update(change, id=id))
    questions = ReasonRFTSet("counting-train", directory)
    (left_out,) = questions.left_out
    assert len(questions) == 7 and left_out["record"] == 2
    assert left_out["reason"].startswith(reason) and len(left_out["reason"]) < 200
    assert len(json.dumps(left_out, allow_nan=False)) < 2500
    left_out["reason"].encode()
    assert left_out["id"] == 7 or id != 7


def test_a_number_too_long_for_python_is_one_record(tmp_path):
    directory = changed(tmp_path, lambda records: records[2].update(answer="DIGITS"))
    file = directory / reading.FILES["counting-train"]
    file.write_text(file.read_text().replace('"DIGITS"', "9" * 5000))
    assert len(ReasonRFTSet("counting-train", directory)) == 7


@pytest.mark.parametrize("text", ["red \ud83d", "\udc00 red", "a \ud83d b \udc00 c"])
def test_half_a_surrogate_pair_in_a_text_is_repaired(tmp_path, text):
    change = every(problem=text, cot=f"thought {text}")
    questions = ReasonRFTSet("counting-train", changed(tmp_path, change))
    state = questions[0]
    assert "\ufffd" in state.question and "\ufffd" in state.thought
    assert state.question.encode() and state.thought.encode()
    Policy.load(ROOT / "blocks" / "tiny").encode([state])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_file_is_read_in_every_encoding_of_unicode(tmp_path, encoding):
    directory = changed(tmp_path, every(problem="wie viele rote Würfel ? ６"))
    file = directory / reading.FILES["counting-train"]
    file.write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    questions = ReasonRFTSet("counting-train", directory)
    assert len(questions) == 8 and questions[0].question == "wie viele rote Würfel ? ６"


@pytest.mark.parametrize("seen", ["[]", "3", '{"x": 3}', "{", "[" * 99999, b"\xff", "old"])
def test_a_damaged_list_of_checked_images_is_made_anew(tmp_path, seen):
    directory, cache = changed(tmp_path, lambda records: None), tmp_path / "cache"
    ReasonRFTSet("counting-train", directory, cache=cache)
    (file,) = cache.glob("counting-train-*.json")
    whole = json.loads(file.read_text())
    if seen == "old":  # without sizes
        seen = json.dumps({path: entry[:2] for path, entry in whole.items()})
    file.write_bytes(seen if isinstance(seen, bytes) else seen.encode())
    assert len(ReasonRFTSet("counting-train", directory, cache=cache)) == 8
    assert whole.items() <= json.loads(file.read_text()).items()


# ------------------------------------------------------------------------------------------- images


def test_an_image_is_opened_when_it_is_used_and_closed_again(directory, monkeypatch):
    opened, open_image = [], Image.open
    state = ReasonRFTSet("transformation-id", directory)[0]
    monkeypatch.setattr(
        Image, "open", lambda path, *rest: opened.append(open_image(path, *rest)) or opened[-1]
    )
    assert len(state.images) == 2 and state.messages() and not opened
    list(state.images)
    assert len(opened) == 2 and all(getattr(image, "fp", None) is None for image in opened)


def test_an_image_that_disappears_while_training_is_told_in_a_line(tmp_path):
    images = ImageFiles([tmp_path / "gone.png"])
    with pytest.raises(UserError) as error:
        list(images)
    assert "gone.png" in one_line(error)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pictures.open_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


def test_an_image_that_the_processor_would_refuse_is_found_before(tmp_path, random_model_dir):
    for width, fits in ((1600, True), (1608, False)):
        path = tmp_path / f"{width}.png"
        Image.new("RGB", (width, 8)).save(path)
        assert (pictures.look_into(path)[0] is None) == fits
        state = State("0", ImageFiles([path]), "how many ?", "1", "discrete")
        if fits:
            Policy.load(random_model_dir).encode([state])
        else:
            with pytest.raises(ValueError):
                Policy.load(random_model_dir).encode([state])


def test_images_are_looked_into_once_and_again_when_they_change(tmp_path, monkeypatch):
    other = miniature.make(tmp_path / "data", zipped=False)
    looked, look_into = [], pictures.look_into
    monkeypatch.setattr(
        image_check, "look_into", lambda path: looked.append(path.name) or look_into(path)
    )
    for times in (1, 2):
        questions = ReasonRFTSet("counting-train", other, cache=tmp_path / "cache")
        assert len(looked) == 13 and len(questions) == 12
    (other / "images/train_images/counting/broken.png").write_bytes(miniature.png(5))  # mended
    assert len(ReasonRFTSet("counting-train", other, cache=tmp_path / "cache")) == 13
    assert looked[13:] == ["broken.png"]


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["counting-id", "structure-id", "transformation-id"])
def test_a_prompt_is_one_turn_with_the_images_first_and_asks_for_what_the_mode_says(
    directory, name, mode
):
    questions = ReasonRFTSet(name, directory, mode)
    for state in map(questions.__getitem__, range(len(questions))):
        (message,) = state.messages()
        *images, text = message["content"]
        assert (
            message["role"] == "user"
            and all(part == {"type": "image"} for part in images)
            and len(images) == len(state.images)
        )
        text = text["text"]
        if mode == "bare":  # Reason-RFT's ANS-SFT
            assert text == state.question
            continue
        assert (
            text.index(state.question) < text.index(state.request)
            and "<answer> and </answer>" in text
        )
        assert ("<think>" in text) == (mode == "reason")
        form = {
            "counting": "a number",
            "structure": "a letter, a number or an expression",
            "transformation": "a sequence of functions",
        }[name.split("-")[0]]
        assert form in state.request
        rules = [
            f"{function}(object_id, value): {', '.join(values)}"
            for function, values in reading.FUNCTIONS.items()
        ]
        assert all((rule in text) == ("transformation" in name) for rule in rules)
        if "transformation" in name:
            assert text.index(rules[-1]) < text.index(state.question)
            assert "('object_id', 'shape', 'size', 'color', 'material')" in text


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_does_not_depend_on_the_truth(directory, mode):
    """A model that is told "a letter" where the truth is one has half of the answer."""
    requests = {
        state.request
        for state in map(ReasonRFTSet("structure-id", directory, mode).__getitem__, range(12))
    }
    assert len(requests) == 1


def test_an_answer_in_mode_bare_is_read_without_tags(directory):
    asked = {mode: ReasonRFTSet("counting-id", directory, mode)[0] for mode in MODES}
    assert (
        asked["bare"].reading("3") == "<answer>3</answer>" and asked["answer"].reading("3") == "3"
    )
    assert asked["bare"].reading("<answer>3</answer>") == "<answer>3</answer>"
    for mode, right in (("reason", 0), ("answer", 0), ("bare", 1)):
        state = asked[mode]
        said = state.reading(state.answer)
        assert rewards.accuracy_reward(said, state.answer, state.kind) == right


# -------------------------------------------------------------------------------- the sets of a run


def test_both_worlds_have_one_interface(directory, tmp_path):
    for source in ("blocks", directory):
        for mode in MODES:
            questions, order = training_states(settings(source, tmp_path), mode)
            assert (
                len(questions) == 12
                and sorted(order) == list(range(12))
                and isinstance(questions[3], State)
            )
            assert questions[3].mode == mode and questions.name == "counting-train"
        tests = sets.test_sets(settings(source, tmp_path))
        assert {name: len(states) for name, states in tests.items()} == {
            "counting-id": 5,
            "counting-ood": 5,
        }


@pytest.mark.parametrize("source", ["blocks", "real"])
def test_a_share_is_part_of_every_larger_share_and_skipped_states_are_not_asked(
    directory, tmp_path, source
):
    def ids(**changes):
        questions, order = training_states(
            settings("blocks" if source == "blocks" else directory, tmp_path, **changes)
        )
        return [questions[i].id for i in range(len(questions))]

    everything = ids()
    assert (
        ids(limit=4) == everything[:4]
        and ids(fraction=0.5) == everything[:6]
        and ids(fraction=0.5, limit=5) == everything[:5]
    )
    assert ids(skip=4) == everything[4:] and ids(skip=4, fraction=0.5) == everything[4:8]
    with pytest.raises(UserError) as error:
        ids(skip=11)
    assert "less than one batch" in one_line(error)


def test_every_epoch_asks_everything_once_in_an_order_of_the_seed(tmp_path):
    _, order = training_states(settings("blocks", tmp_path, epochs=3))
    epochs = [order[i : i + 12] for i in (0, 12, 24)]
    assert (
        all(sorted(epoch) == list(range(12)) for epoch in epochs)
        and len(set(map(tuple, epochs))) == 3
    )
    assert (
        order
        == training_states(settings("blocks", tmp_path, epochs=3))[1]
        != training_states(settings("blocks", tmp_path, epochs=3, seed=1))[1]
    )


def test_the_blocks_world_asks_for_the_answer_alone_in_words_that_tiny_knows():
    state = BlocksSet("counting-id", 1, mode="answer")[0]
    words = state.messages()[0]["content"][-1]["text"].split()
    known = set(Policy.load(ROOT / "blocks" / "tiny").tokenizer.get_vocab())
    assert state.request == "answer ." and set(words) <= known
    assert BlocksSet("counting-id", 1)[0].request == "think , then answer ."


# ----------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("prefix", ["", "train_images/", "images/train_images/"])
def test_an_archive_is_unpacked_whatever_folder_its_names_begin_with(tmp_path, prefix):
    directory = miniature.make(tmp_path / "data", prefix=prefix)
    assert (
        prepare(str(directory), ["counting-train", "counting-id"], tmp_path / "cache") == directory
    )
    assert (
        len(ReasonRFTSet("counting-train", directory)) == 12
        and len(ReasonRFTSet("counting-id", directory)) == 12
    )
    assert sorted(path.name for path in (directory / "images").iterdir()) == [
        "test_images",
        "train_images",
    ]


def archive_of(path: Path, *names: str, content: bytes = b"x" * 50) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "/evil.png",
        "a/../../../evil.png",
        "..\\evil.png",
        "\\evil.png",
        "\\\\host\\share\\evil.png",
        "a\\..\\..\\evil.png",
        "C:/evil.png",
        "C:\\evil.png",
        "train_images/../../evil.png",
        "train_images",
    ],
)
def test_a_name_that_leads_out_of_the_archive_stops_it_before_anything_is_written(tmp_path, name):
    archive = archive_of(tmp_path / "train_images.zip", "train_images/good.png", name)
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "deep" / "images" / "train_images")
    assert "not unpacked" in one_line(error)
    assert [path.name for path in tmp_path.rglob("*")] == ["train_images.zip"]


def test_a_link_in_an_archive_is_no_link_on_the_disk(tmp_path):
    with zipfile.ZipFile(tmp_path / "train_images.zip", "w") as archive:
        link = zipfile.ZipInfo("train_images/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    unpack(tmp_path / "train_images.zip", tmp_path / "train_images")
    unpacked = tmp_path / "train_images/link"
    assert not unpacked.is_symlink() and unpacked.read_text() == "/etc/passwd"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    archive = archive_of(tmp_path / "train_images.zip", "a.png", content=b"\0" * 5_000_000)
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "images")
    assert "no archive of images" in one_line(error) and not (tmp_path / "images").exists()


def test_an_archive_that_lies_about_its_sizes_writes_no_more_than_it_said(tmp_path):
    archive = archive_of(tmp_path / "train_images.zip", "a.png", content=b"\0" * 5_000_000)
    lied = archive.read_bytes().replace(
        (5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")
    )
    archive.write_bytes(lied)
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "images")
    assert "broken" in one_line(error) and not (tmp_path / "images").exists()
    assert sum(path.stat().st_size for path in (tmp_path / "images.tmp").rglob("*.png")) <= 100


@pytest.mark.parametrize("prefix", ["", "train_images\\", "images\\train_images\\"])
def test_an_archive_made_on_windows_is_unpacked(tmp_path, prefix):
    directory = miniature.make(tmp_path / "data")
    archive = directory / "train_images.zip"
    with zipfile.ZipFile(archive) as file:
        content = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(archive, "w") as file:
        for name in [prefix + "counting/", *content]:  # folders have entries of their own
            entry = zipfile.ZipInfo("x")
            entry.filename = prefix + name.removeprefix("train_images/").replace("/", "\\")
            if name not in content:
                entry.filename = prefix + "counting\\"
            file.writestr(entry, content.get(name, b""))
    prepare(str(directory), ["counting-train"], tmp_path / "cache")
    assert len(ReasonRFTSet("counting-train", directory)) == 12


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_an_archive_cut_short_is_told(tmp_path, keep):
    archive = archive_of(tmp_path / "train_images.zip", *(f"{i}.png" for i in range(9)))
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "images")
    assert "get it again" in one_line(error) and not (tmp_path / "images").exists()


def test_unpacking_that_was_interrupted_begins_anew(tmp_path, monkeypatch):
    directory, copy, copied = miniature.make(tmp_path / "data"), download.shutil.copyfileobj, []

    def dies(*arguments):
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(copy(*arguments))

    monkeypatch.setattr(download.shutil, "copyfileobj", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(directory), ["counting-train"], tmp_path / "cache")
    assert not (directory / "images/train_images").exists()
    (directory / "images/train_images.tmp/left behind.png").write_bytes(b"")
    monkeypatch.undo()
    prepare(str(directory), ["counting-train"], tmp_path / "cache")
    assert len(ReasonRFTSet("counting-train", directory)) == 12
    assert not list((directory / "images").rglob("left behind.png")) and [
        p.name for p in (directory / "images").iterdir()
    ] == ["train_images"]


def test_an_archive_is_unpacked_once(tmp_path, monkeypatch):
    directory = miniature.make(tmp_path / "data")
    for _ in range(2):
        prepare(str(directory), ["counting-train"], tmp_path / "cache")
        monkeypatch.setattr(download, "unpack", lambda *arguments: pytest.fail("again"))


@pytest.mark.parametrize("spoil, says", [
    (lambda path: path.unlink(), "has no train_jsons/A3"),
    (lambda path: path.write_text("[{"), "cannot read"),
    (lambda path: path.write_bytes(b"\xff\xfe[]"), "cannot read"),
    (lambda path: path.write_text("{}"), "no list"),
    (lambda path: path.write_text("[]"), "empty"),
    (lambda path: path.write_text("[3]"), "no record"),
])  # fmt: skip
def test_a_data_set_that_cannot_be_used_is_told_in_a_line(tmp_path, spoil, says):
    directory = miniature.make(tmp_path / "data")
    spoil(directory / reading.FILES["counting-train"])
    with pytest.raises(UserError) as error:
        sets.load_set("counting-train", settings(directory, tmp_path / "cache"))
    assert says in one_line(error)


@pytest.mark.parametrize("source", ["blocks", "real"])
@pytest.mark.parametrize("name", ["counting", "counting-none", "nothing-train", "", "../x"])
def test_an_unknown_set_is_told_in_a_line(directory, tmp_path, source, name):
    config = settings("blocks" if source == "blocks" else directory, tmp_path)
    with pytest.raises(UserError) as error:
        sets.load_set(name, config)
    assert repr(name) in one_line(error) and "counting-id" in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--data-cache", "~/x"], ["--data", "~/x", "--data-cache", "x"], []]
)
def test_no_home_is_told_in_a_line(tmp_path, monkeypatch, capsys, arguments):
    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", lambda self: nobody(self) if "~" in str(self) else self)
    monkeypatch.chdir(tmp_path)
    assert "no home directory" in told(monkeypatch, capsys, arguments)


@pytest.mark.parametrize("arguments, says", [
    (["--task", "all"], "--task"), (["--what"], "--what"),
    (["--data", "{tmp}/nowhere"], "no data at"), (["--data", "{tmp}"], "has no"),
    (["--data-cache", "{tmp}/file"], "cannot write"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "file").write_text("")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    arguments = (
        arguments
        if "--data-cache" in arguments
        else [*arguments, "--data-cache", str(tmp_path / "c")]
    )
    assert says in told(monkeypatch, capsys, arguments)


def told(monkeypatch, capsys, arguments) -> str:
    """The one line of the program before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["data.download", *arguments])
    with pytest.raises(SystemExit) as stop:
        download.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("data.download: error: ")
    return said.err


def test_no_directory_is_told_in_a_line(tmp_path):
    with pytest.raises(UserError) as error:
        sets.load_set("counting-train", settings(tmp_path / "nowhere", tmp_path / "cache"))
    assert "nowhere" in one_line(error)


# ------------------------------------------------------------------------------------- the download


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub as huggingface_hub sees it, from a directory; can break off within a file."""

    protocol_version = "HTTP/1.1"
    directory: Path
    break_off: set
    served: list

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        name = self.path.split("/resolve/main/")[-1].split("?")[0].replace("%2F", "/")
        file = self.directory / name
        if "/resolve/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.served.append((name, start))
            if name in self.break_off:
                self.wfile.write(content[start : len(content) // 2])
                self.close_connection = True
                return self.connection.close()
            self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    handler = type(
        "Served",
        (Hub,),
        dict(directory=miniature.make(tmp_path / "hub"), break_off=set(), served=[]),
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(tmp_path, endpoint: str) -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [
        sys.executable,
        "-m",
        "data.download",
        "--task",
        "counting",
        "--data-cache",
        str(tmp_path / "cache"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_a_download_fetches_what_the_task_needs_and_nothing_twice(tmp_path, hub):
    handler, endpoint = hub
    done = fetch(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    assert (
        "counting-train: 12 of 22 records" in done.stdout
        and "counting-ood: 12 of 12" in done.stdout
    )
    assert "train_images.zip" in done.stderr  # the bar
    assert {name for name, _ in handler.served} == {
        "train_images.zip",
        "test_images.zip",
        *(f for n, f in reading.FILES.items() if "counting" in n),
    }
    handler.served.clear()
    assert (
        fetch(tmp_path, "http://127.0.0.1:9").stdout == done.stdout and not handler.served
    )  # without a network


def test_a_download_that_breaks_off_is_told_and_goes_on_where_it_was(tmp_path, hub):
    handler, endpoint = hub
    with zipfile.ZipFile(handler.directory / "train_images.zip", "a") as archive:
        archive.writestr("train_images/noise.bin", os.urandom(24_000_000))
    handler.break_off.add("train_images.zip")
    done = fetch(tmp_path, endpoint)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("data.download: error: cannot download train_images.zip")
        and "try again" in last
    )
    handler.break_off.clear()
    handler.served.clear()
    assert fetch(tmp_path, endpoint).returncode == 0
    begun = [start for name, start in handler.served if name == "train_images.zip"]
    assert len(begun) == 1 and begun[0] >= 10_000_000
    assert not list((tmp_path / "cache").rglob("*.part"))
