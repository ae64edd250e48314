"""Every program tells a mistake of its user's in one line, with exit code 2, and nothing is lost or
left behind by it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, held_elsewhere, in_two_processes

import ekipl
import evaluate
import sft
from blocks import sheet
from data import download, predictions
from data.predictions import Prediction
from data.state import State
from experiments import estimators, report, sweep
from experts import collect, roster
from training import console, curves, distributed, rundir, storage

LONG = "n" * 300
RIGHT = Prediction("a", "3", "discrete", "<think>a</think><answer>3</answer>", 3, False)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory of things that no program can use, in which the programs run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(estimators, "study", lambda *case: [])  # seconds
    for key in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    for name, lines in {
        "none": [],
        "other": [{"id": 1}],
        "good": [dataclasses.asdict(RIGHT)],
        "null": [dataclasses.asdict(dataclasses.replace(RIGHT, text=None))],
        "kind": [dataclasses.asdict(dataclasses.replace(RIGHT, kind="x"))],
    }.items():
        (tmp_path / name).mkdir()
        storage.append(tmp_path / name / "counting-id.jsonl", lines)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    storage.append(tmp_path / "foreign.jsonl", [{"a": 1}])
    storage.append(tmp_path / "one.jsonl", [{"step": 1, "states": 4, "reward": 1.0}])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    rundir.create(str(tmp_path), "stopped", dataclasses.asdict(ekipl.Config()))
    odd = dataclasses.asdict(ekipl.Config()) | {"lr": float("nan")}
    rundir.create(str(tmp_path), "odd", odd)
    return tmp_path


def told(module, arguments: list[str], monkeypatch, capsys) -> str:
    """The one line that a program says."""
    name = module.__name__ if "." in module.__name__ else f"{module.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        module.main()
    (line,) = capsys.readouterr().err.split("\r")[-1].splitlines()  # after any progress bar
    assert stopped.value.code == 2 and line.startswith(f"{name}: error: ")
    return line


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        (ekipl, ["--name", LONG], "too long"),
        (ekipl, ["--name", f"a/{LONG}"], "too long"),
        (ekipl, ["--runs", LONG], "too long"),
        (ekipl, ["--name", "a\0b"], "null byte"),
        (ekipl, ["--name", ".."], "exists"),
        (ekipl, ["--runs", "file/x"], "file/x"),
        (ekipl, ["--states", "9" * 30], "--states"),
        (ekipl, ["--states", "9" * 5000], "--states"),
        (ekipl, ["--epochs", "9" * 8], "--epochs"),
        (ekipl, ["--eval-states", "9" * 30], "--eval-states"),
        (ekipl, ["--num-samples", "9" * 20], "--num-samples"),
        (ekipl, ["--lr", "inf"], "--lr"),
        (ekipl, ["--resume", ""], "no run"),
        (ekipl, ["--resume", LONG], "no run"),
        (ekipl, ["--resume", "odd"], "--lr"),
        (ekipl, ["a\nb"], "a b"),
        (ekipl, ["--a=\x1b[31m"], "\\x1b[31m"),
        (ekipl, ["--plan", "0x0"], "--plan"),
        (ekipl, ["--model", "file"], "file"),
        (sft, ["--name", LONG], "too long"),
        (sft, ["--resume", "stopped"], "another program"),
        (sft, ["--skip", "9" * 20], "--skip"),
        (evaluate, [], "model"),
        (evaluate, ["careful", "--sets", "x"], "'x'"),
        (evaluate, ["careful", "--sets", "counting-train"], "counting-train"),
        (evaluate, ["careful", "--pass-k", "1000000000"], "1 to 1024"),
        (evaluate, ["careful", "--pass-k", "9" * 5000], "--pass-k"),
        (evaluate, ["careful", "--pass-k", "1,,2"], "--pass-k"),
        (evaluate, ["careful", "--states", "9" * 30], "--states"),
        (evaluate, ["careful", "--out", "file"], "file"),
        (evaluate, ["careful", "--out", LONG], "too long"),
        (evaluate, [LONG], "too long"),
        (evaluate, ["score", "none"], "no answers in none"),
        (evaluate, ["score", "other"], "other lines"),
        (evaluate, ["score", "null"], "other lines"),
        (evaluate, ["score", "kind"], "other lines"),
        (evaluate, ["score", LONG], "too long"),
        (report, ["table", "none", "--out", "t"], "no answers"),
        (report, ["table", "good", "--out", "file/x"], "file/x"),
        (report, ["table", "good", "--out", LONG], "too long"),
        (report, ["figures", "none", "--out", "f"], "no answers"),
        (report, ["figures", "good", "--out", "file"], "file"),
        (sweep, [], "list"),
        (sweep, ["table1", "--seeds", "0,,1"], "--seeds"),
        (sweep, ["table1", "--runs", "file"], "file"),
        (sweep, ["table1", "--out", "file"], "file"),
        (sweep, ["table1", "--runs", LONG], "too long"),
        (sweep, ["table1", "--pass-k", "10000"], "--pass-k"),
        (sweep, ["table1", "--processes", "100"], "100 processes"),
        (sweep, ["table1", "x"], "x"),
        (download, ["x"], "x"),
        (download, ["--task", "x"], "--task"),
        (download, ["--data", "nowhere"], "nowhere"),
        (download, ["--data", LONG], "too long"),
        (download, ["--data", "empty", "--data-cache", "file"], "file"),
        (collect, [], "command"),
        (collect, ["stats"], "CACHE"),
        (collect, ["stats", "file"], "file"),
        (collect, ["verify", LONG], "too long"),
        (collect, ["--budget", "nan", "--experts", "openai:x"], "--budget"),
        (collect, ["export", "file", "x"], "x"),
        (collect, ["--offline", "--experts", "openai:x"], "--offline"),
        (sheet, [], "--show"),
        (sheet, ["--shw", "x"], "--show"),
        (sheet, ["--show", "file/x.png"], "file/x.png"),
        (curves, [], "runs"),
        (curves, ["nowhere"], "nowhere"),
        (curves, ["foreign.jsonl"], "no metrics"),
        (curves, ["bytes.jsonl"], "no metrics"),
        (curves, [LONG], "too long"),
        (curves, ["one.jsonl", "one.jsonl"], "--out"),
        (curves, ["one.jsonl", "--out", "x.nothing"], "nothing"),
        (curves, ["one.jsonl", "--out", "file/x.png"], "file/x.png"),
        (estimators, ["x"], "x"),
        (estimators, ["--out", "file/x.png"], "file"),
        (estimators, ["--out", f"{LONG}.png"], "too long"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].encode("unicode_escape").decode() if isinstance(value, list) else ""
    ),
)
def test_a_mistake_is_told_in_one_line(place, monkeypatch, capsys, module, arguments, says):
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    assert says in told(module, arguments, monkeypatch, capsys)
    assert before == {file: file.read_bytes() for file in before}


def test_an_evaluation_without_any_answer_says_so(place, monkeypatch, capsys):
    class Silent:
        name = "careful"

        def sample(self, states, n, seed):
            return [[] for _ in states]

    monkeypatch.setattr(roster, "make_experts", lambda *_, **__: [Silent()])
    arguments = ["careful", "--states", "2", "--sets", "counting-id", "--out", "silent"]
    assert "no answers" in told(evaluate, arguments, monkeypatch, capsys)


def test_a_question_counts_once(place, monkeypatch, capsys):
    file = place / "good" / "counting-id.jsonl"
    wrong = dataclasses.replace(RIGHT, text="")
    storage.append(file, [dataclasses.asdict(wrong), dataclasses.asdict(RIGHT)])
    assert predictions.read_predictions(place / "good") == {"counting-id": [RIGHT]}


def test_a_damaged_prediction_is_asked_again_and_no_other(place, capsys):
    file = place / "good" / "counting-id.jsonl"
    others = [dataclasses.replace(RIGHT, id=name) for name in "bc"]
    file.write_text(file.read_text() + '{"id": "x", "ans\n')
    storage.append(file, [dataclasses.asdict(other) for other in others])
    asked = []

    def answers(states):
        asked.extend(state.id for state in states)
        return [dataclasses.replace(RIGHT, id=state.id) for state in states]

    states = [State(name, (), "how many ?", "3", "discrete") for name in "abxc"]
    evaluate.predict(answers, states, file, distributed.World(0, 1, None))
    assert asked == ["x"]
    assert [p.id for p in predictions.read_predictions(place / "good")["counting-id"]] == list(
        "abcx"
    )


def test_an_evaluation_has_one_writer(place, monkeypatch, capsys):
    (place / "out").mkdir()
    arguments = ["careful", "--states", "2", "--sets", "counting-id", "--out", "out"]
    with held_elsewhere(place / "out"):
        line = told(evaluate, arguments, monkeypatch, capsys)
    assert "another process writes into out" in line and "--out" in line


def in_the_first_process_alone() -> str:
    world = distributed.World.join("cpu")
    try:
        assert world.first(lambda: world.rank) == 0
        world.first(lambda: rundir.read_config(Path("no/such/run")))
    except console.UserError as error:
        return str(error)


def test_what_stops_the_first_process_stops_all_with_the_same_line():
    said = in_two_processes(in_the_first_process_alone)
    assert said == ["no run to resume at no/such/run"] * 2


@pytest.mark.parametrize("program", ["data.download", "blocks.sheet", "training.curves"])
def test_programs_that_load_no_model_start_without_pytorch(program):
    code = (
        f"import sys; sys.argv = ['x', '--help']; import {program} as p\n"
        "try: p.main()\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_json_knows_no_nan_and_what_is_left_out_is_written_anyway(tmp_path):
    record = {"id": float("nan"), "record": {"x": [float("-inf"), 1.5, None, "a"]}}
    storage.append(tmp_path / "left_out.jsonl", [storage.finite(record)])
    written = json.loads((tmp_path / "left_out.jsonl").read_text())
    assert written == {"id": "nan", "record": {"x": ["-inf", 1.5, None, "a"]}}
