"""Parts of a test set are reported beside the whole; --request asks with other words."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import miniature
import pytest
import torch
from fake_api import KEY

import evaluate
from blocks.dataset import BlocksSet
from data.lengths import Room
from data.predictions import Prediction, read_predictions, with_parts
from data.state import MODES, State
from evaluate import greedy_accuracy
from experiments import figures, report
from experts.apis import request_content
from rollouts.answering import ModelAnswers
from sampling import Action
from training import curves, storage
from training.console import UserError
from training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
RIGHT, WRONG = (f"<think> so </think> <answer> {answer} </answer>" for answer in "34")
# One right of one question, none of two: the mean of the whole is not the mean of the parts.
PARTS = ("two-step", "one-step", "two-step")


def said(part: str, right: bool, name: str = "a", samples=()) -> Prediction:
    text = RIGHT if right else WRONG
    return Prediction(name, "3", "discrete", text, 5, False, list(samples), part)


def a_set(samples=()) -> list[Prediction]:
    return [said(part, part == "one-step", str(i), samples) for i, part in enumerate(PARTS)]


def saved(run, sets: dict[str, list[Prediction]]):
    """A run's directory with predictions."""
    for name, predictions in sets.items():
        (run / "predictions").mkdir(parents=True, exist_ok=True)
        records = [dataclasses.asdict(p) for p in predictions]
        storage.append(run / "predictions" / f"{name}.jsonl", records)
    return run


def ran(program, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program.main()


# -------------------------------------------------------------------------------------------- parts


def test_a_set_is_followed_by_its_parts_and_is_itself_whole():
    whole, plain, mixed = a_set(), [said("", True)], [said("", True), said("x", False)]
    found = with_parts({"counting-id": whole, "structure-id": plain, "structure-ood": mixed})
    names = ["counting-id", "counting-id/one-step", "counting-id/two-step", "structure-id"]
    assert list(found) == [*names, "structure-ood", "structure-ood/x"]
    assert found["counting-id"] == whole and found["structure-ood"] == mixed
    assert found["counting-id/one-step"] == [whole[1]]
    assert found["counting-id/two-step"] == [whole[0], whole[2]]
    assert found["structure-ood/x"] == mixed[1:]


def test_a_training_evaluation_has_a_figure_for_each_part():
    states = [State(str(i), (), "q", "3", "discrete", part=part) for i, part in enumerate(PARTS)]
    plain = [dataclasses.replace(state, part="") for state in states]

    def greedy(prompts):
        return [Action([1], RIGHT if s.part == "one-step" else WRONG, "policy") for s in prompts]

    sampler = SimpleNamespace(policy=SimpleNamespace(encode=list), greedy=greedy)
    found = greedy_accuracy(sampler, {"counting-id": states, "counting-ood": plain}, ALONE)
    assert found == {
        "eval/counting-id": pytest.approx(1 / 3),
        "eval/counting-id/one-step": 1,
        "eval/counting-id/two-step": 0,
        "eval/counting-ood": 0,
    }


def test_a_prediction_has_the_part_of_its_state_and_keeps_it_in_the_file(tmp_path):
    state = State("a", (), "q", "3", "discrete", part="letters")
    made = Prediction.of(state, RIGHT, 5, False, [WRONG])
    assert (made.part, made.samples) == ("letters", [WRONG])
    evaluate.predict(lambda _: [made], [state], tmp_path / "structure-ood.jsonl", ALONE)
    assert read_predictions(tmp_path) == {"structure-ood": [made]}


def test_predictions_of_the_time_before_parts_are_read_and_have_none(tmp_path):
    record = dataclasses.asdict(said("", True))
    del record["part"]
    storage.append(tmp_path / "counting-id.jsonl", [record])
    assert read_predictions(tmp_path) == {"counting-id": [said("", True)]}


def test_a_part_that_is_no_text_is_no_prediction(tmp_path):
    record = dataclasses.asdict(said("", True)) | {"part": 3}
    storage.append(tmp_path / "counting-id.jsonl", [record])
    with pytest.raises(UserError, match="other lines than predictions"):
        read_predictions(tmp_path)


def test_the_printed_table_has_a_row_for_each_part_under_its_set(tmp_path, monkeypatch, capsys):
    sets = {"counting-ood": a_set([RIGHT, WRONG]), "transformation-right": [said("", True)]}
    run = saved(tmp_path / "run", sets)
    ran(evaluate, monkeypatch, "score", run / "predictions")
    head, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:3] for line in lines]
    assert rows == [
        ["counting-ood", "3", "33.3"],
        ["counting-ood/one-step", "1", "100.0"],
        ["counting-ood/two-step", "2", "0.0"],
        ["transformation-right", "1", "100.0"],
    ]
    ends = {line.index(row[1]) + len(row[1]) for line, row in zip(lines, rows, strict=True)}
    assert ends == {head.index("n  ") + 4}  # columns stand under each other


def test_a_table_has_the_parts_columns_after_their_sets_and_its_avg_is_of_whole_sets(
    tmp_path, monkeypatch
):
    first = {"counting-ood": [said("", True)], "counting-id": a_set()}
    runs = [saved(tmp_path / "A-seed0", first), saved(tmp_path / "A-seed1", first)]
    runs.append(saved(tmp_path / "B", {"counting-id": [said("", True)]}))
    ran(report, monkeypatch, "table", *runs, "--out", tmp_path / "t")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0] == (
        "| method | counting-id | counting-id/one-step | counting-id/two-step | counting-ood "
        "| counting AVG |"
    )
    assert lines[2] == ("| A | 33.3 ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 | 100.0 ± 0.0 | 66.7 ± 0.0 |")
    assert lines[3] == "| B | 100.0 | - | - | - | - |"
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert "A,counting-id/one-step,1.00000,0.00000,2" in rows


def records(*tests: str, share: float = 0.0) -> list[dict]:
    """Evaluations at 0, 40 and 80 states; the i-th test has (i + 1) / 10, later more."""
    found = []
    for step in range(3):
        values = {f"eval/{test}": (i + 1 + step) / 10 for i, test in enumerate(tests)}
        found.append({"step": step, "states": 40 * step, "expert_share": share} | values)
    return found


WITH = ("counting-id", "counting-id/one-step", "counting-id/two-step", "counting-ood")


def test_the_dots_of_a_run_are_those_of_parts_where_a_set_has_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves.plt, "close", drawn.append)
    histories = {"new": records(*WITH), "older": records("counting-id", "counting-ood")}
    curves.draw(histories, tmp_path / "c.png")
    monkeypatch.undo()
    (axis,) = (a for a in drawn[0].axes if a.get_title().startswith("accuracy"))
    marks = {}
    labels = axis.get_legend()
    for handle, text in zip(labels.legend_handles, labels.get_texts(), strict=True):
        marks[handle.get_marker()] = text.get_text()
    assert sorted(marks.values()) == sorted(WITH)
    colors = curves.colors_of(histories)
    dots = {}
    for line in axis.lines:
        run = next(name for name, color in colors.items() if color == line.get_color())
        dots[run, marks[line.get_marker()]] = list(line.get_ydata())
    expected = {}
    for run, names in (("new", WITH[1:]), ("older", (WITH[0], WITH[3]))):
        for name in names:
            expected[run, name] = [record[f"eval/{name}"] for record in histories[run]]
    assert dots == expected
    curves.plt.close(drawn[0])


def test_figure_3_compares_whole_sets(tmp_path):
    histories = {"ekipl": records(*WITH, share=0.5), "grpo": records(*WITH)}
    lines = figures.data_efficiency(histories, tmp_path / "3.png").splitlines()
    assert [line.split(":")[0] for line in lines] == ["counting-id", "counting-ood"]


def test_figure_5_has_whole_sets(tmp_path):
    run = saved(tmp_path / "A", {"counting-id": a_set([RIGHT, WRONG])})
    assert report.samples_of([run]) == {"counting-id": {"A": (2, [1, 1, 1])}}


def test_a_part_changes_nothing_that_is_asked():
    """What an API has answered before stays in its cache when a set is divided."""
    for state in (BlocksSet("counting-id", 1)[0], State("a", (), "how many ?", "3", "discrete")):
        named = dataclasses.replace(state, part="one-step")
        assert named.messages() == state.messages()
        assert request_content("m", named, 9) == request_content("m", state, 9)


# ------------------------------------------------------------------------------------------ request


@pytest.mark.parametrize("mode", ["reason", "answer"])
def test_other_words_follow_the_question_in_place_of_the_projects_own(mode):
    blocks = BlocksSet("counting-id", 1, mode=mode)[0]
    real = State("a", (), "how many ?", "3", "discrete", mode=mode, rules="Mind these rules.")
    for state, before in ((blocks, blocks.question), (real, "Mind these rules.\n\nhow many ?")):
        asked = dataclasses.replace(state, ask="check .")
        assert asked.request == "check ."
        assert asked.messages()[0]["content"][-1]["text"] == f"{before} check ."
        assert request_content("m", asked, 9) != request_content("m", state, 9)


@pytest.fixture
def prompts(monkeypatch):
    """The last prompt part of every state that a model is asked; it answers with the truth."""
    asked = []

    def answers(self, states):
        asked.extend(state.messages()[0]["content"][-1]["text"] for state in states)
        texts = [f"<think> so </think> <answer> {s.answer} </answer>" for s in states]
        return [Prediction.of(s, t, 1, False) for s, t in zip(states, texts, strict=True)]

    monkeypatch.setattr(ModelAnswers, "__call__", answers)
    return asked


FLAGS = "--sets counting-id counting-ood --states 3 --max-new-tokens 3 --rollout transformers"


@pytest.mark.parametrize("data", ["blocks", "real"])
def test_a_model_is_asked_with_the_words_of_request(
    random_model_dir, tmp_path, monkeypatch, capsys, prompts, data
):
    place = "blocks" if data == "blocks" else miniature.make(tmp_path / "data", size=5)
    flags = [random_model_dir, *FLAGS.split(), "--data", place, "--data-cache", tmp_path / "c"]
    ran(evaluate, monkeypatch, *flags, "--request", "check .", "--out", tmp_path / "other")
    others = prompts.copy()
    prompts.clear()
    ran(evaluate, monkeypatch, *flags, "--out", tmp_path / "own")
    assert len(others) == len(prompts) == 6
    for other, own in zip(others, prompts, strict=True):
        question = other.removesuffix(" check .")
        assert question != other and own.startswith(f"{question} ") and "answer" in own
    kept = {name: json.loads((tmp_path / name / "settings.json").read_text()) for name in
            ("other", "own")}  # fmt: skip
    assert kept["other"] == kept["own"] | {"request": "check ."} and "request" not in kept["own"]


def test_predictions_under_other_words_need_another_directory(
    random_model_dir, tmp_path, monkeypatch, capsys, prompts
):
    flags = [random_model_dir, *FLAGS.split(), "--out", tmp_path / "o"]
    ran(evaluate, monkeypatch, *flags, "--request", "check .")
    ran(evaluate, monkeypatch, *flags, "--request", "check .")  # goes on
    for other in ([], ["--request", "list ."]):
        with pytest.raises(SystemExit) as stopped:
            ran(evaluate, monkeypatch, *flags, *other)
        assert stopped.value.code == 2
        assert "with another request (check ., not " in capsys.readouterr().err


def test_an_api_is_asked_with_the_same_words(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    server = serve("good")
    flags = ["--sets", "counting-id", "--states", 2, "--cache", tmp_path / "c.sqlite"]
    flags += ["--request", "check .", "--out", tmp_path / "o"]
    ran(evaluate, monkeypatch, server.openai, *flags)
    texts = {body["messages"][0]["content"][-1]["text"] for body in server.bodies}
    states = [dataclasses.replace(s, ask="check .") for s in BlocksSet("counting-id", 2)]
    assert texts == {state.messages()[0]["content"][-1]["text"] for state in states}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bare"])
def test_room_counts_the_words_that_are_asked(random_model_dir, mode):
    state = State("0", (), "how many ?", "1", "discrete", mode=mode)
    words = " ".join(["count"] * 80)
    asked = dataclasses.replace(state, ask=words)
    length = Room(random_model_dir, 8).text_tokens(asked)
    assert length > Room(random_model_dir, 8).text_tokens(state)
    for limit, fits in ((length + 8, True), (length + 7, False)):
        room = Room(random_model_dir, 8, limit, request=words)
        assert (room.problem(state, []) is None) == fits
        assert room.longest == (length + 8 if fits else 0)


def test_records_that_longer_words_make_too_long_cannot_be_used(
    random_model_dir, tmp_path, monkeypatch, capsys, prompts
):
    data = miniature.make(tmp_path / "data", size=5)
    monkeypatch.setattr(Room, "_limits", (1000, 28, 56 * 56, 28 * 28 * 1280))
    flags = [random_model_dir, *FLAGS.split(), "--data", data, "--data-cache", tmp_path / "c"]
    ran(evaluate, monkeypatch, *flags, "--request", "count " * 200, "--out", tmp_path / "o")
    assert "left out" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        ran(evaluate, monkeypatch, *flags, "--request", "count " * 1000, "--out", tmp_path / "p")
    assert stopped.value.code == 2 and "question too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{random}", "--request", "check .", "--mode", "bare"], "mode bare"),
        (["{random}", "--request", "check .", "--protocol", "reason-rft"], "--protocol reason-rft"),
        (["{random}", "--request", "  "], "--request wants words"),
        (["{random}", "--request", "check\n."], "--request wants words"),
        (["{random}", "--request", "\udcff"], "--request wants words"),
        (["{random}", "--request", "see <|image_pad|>"], "--request holds a special token"),
        (["{random}", "--request", "count " * 40000], "--request: question too long"),
        (["careful", "--request", "check ."], "'careful' reads no prompt"),
    ],
)
def test_words_that_cannot_be_asked_are_told_in_one_line(
    random_model_dir, tmp_path, monkeypatch, capsys, arguments, message
):
    flags = [word.format(random=random_model_dir) for word in arguments]
    out = tmp_path / "o"
    with pytest.raises(SystemExit) as stopped:
        ran(evaluate, monkeypatch, *flags, "--sets", "counting-id", "--out", out)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line and not out.exists()
