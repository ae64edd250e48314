"""Trackers: the real packages get a run's figures, groups and pictures; without one none is
imported, and a broken one does not end a run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import ekipl
from training import storage, trackers
from training.console import UserError
from training.distributed import World
from training.steplog import StepLog
from training.trackers import COLUMNS, Tracker

ACTION = dict(source="careful", text="<b>3</b> | x", reward=2.0, kept=True, advantage=0.5)
RECORD = {"step": 5, "states": 320, "loss": 0.25, "kl": 1.5, "eval/counting-id": 0.5}
SHORT = "--states 8 --batch-size 4 --num-samples 2 --group-size 2 --micro-batch 4 --eval-states 2"


def config(kind: str, steps: int = 5) -> ekipl.Config:
    return ekipl.Config(tracker=kind, states=64 * steps)


class FakeGroup:
    """As sampling.Group for the log: a transcript, and a state with pictures."""

    def __init__(self, side: int = 900):
        self.state = SimpleNamespace(images=[Image.new("RGB", (side, 300), "red")])

    def transcript(self, step: int) -> dict:
        return dict(step=step, state="s", question="how many ?", answer="3", actions=[ACTION] * 2)


def log_of(kind: str, path: Path, done: int = 0) -> StepLog:
    path.mkdir(exist_ok=True)
    storage.hold(path, "")
    return StepLog(config(kind), path, done, World.join("cpu"))


def events(path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(path / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_tensorboard_gets_figures_groups_and_pictures(tmp_path):
    log = log_of("tensorboard", tmp_path / "run")
    for step in range(1, 6):
        log.write(RECORD | {"step": step}, [FakeGroup()])
    Image.new("RGB", (40, 20)).save(tmp_path / "run" / "curves.png")
    log.close()
    found = events(tmp_path / "run")
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(i, 0.25) for i in range(1, 6)]
    assert {"kl", "states", "eval/counting-id"} <= set(found.Tags()["scalars"])
    (first, *_) = found.Tensors("groups/text_summary")
    rows = [json.loads(line) for line in first.tensor_proto.string_val[0].decode().splitlines()]
    assert rows == [dict(zip(COLUMNS, ("how many ?", "3", *ACTION.values()), strict=True))] * 2
    assert found.Images("questions/0")[0].width == trackers.LARGEST
    assert found.Images("curves")[0].width == 40


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    log = log_of("tensorboard", tmp_path / "run")
    for step in range(1, 5):
        log.write(RECORD | {"step": step})
    log.tracker.close()  # killed; the last checkpoint is that of step 2
    storage.let_go(tmp_path / "run")
    log = log_of("tensorboard", tmp_path / "run", done=2)
    for step in range(3, 6):
        log.write(RECORD | {"step": step, "loss": 9.0})
    log.close()
    values = [(e.step, e.value) for e in events(tmp_path / "run").Scalars("loss")]
    assert values == [(1, 0.25), (2, 0.25), (3, 9.0), (4, 9.0), (5, 9.0)]


def test_groups_are_told_with_an_evaluation_and_after_the_last_step_alone(tmp_path):
    log, told = log_of("none", tmp_path / "run"), []
    log.tracker.target = SimpleNamespace(
        figures=lambda figures, step: None,
        groups=lambda groups, pictures, step: told.append((step, len(groups), len(pictures))),
        close=lambda: None,
    )
    plain = {key: value for key, value in RECORD.items() if "eval" not in key}
    log.write(RECORD | {"step": 0})
    log.write(plain | {"step": 1}, [FakeGroup()])
    log.write(RECORD | {"step": 2}, [FakeGroup(), FakeGroup()])
    log.write(plain | {"step": 5}, [FakeGroup()])
    log.close()
    assert told == [(2, 2, 2), (5, 1, 1)]
    assert len(storage.read(tmp_path / "run" / "samples.jsonl")) == 4  # all of them


def test_wandb_gets_them_too_and_goes_on_as_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for done in (0, 1):  # killed after two steps, of which the second is made again
        log = log_of("wandb", tmp_path / "run", done)
        log.write(RECORD | {"step": done + 1}, [FakeGroup()])
        log.write({"step": done + 2, "loss": 0.5})
        run = log.tracker.target.run
        ids.append(run.id)
        assert run.project == "vision-ekipl" and run.name == "run"
        assert run.config["group_size"] == 8
        assert run.summary["loss"] == 0.5 and run.summary["kl"] == 1.5
        assert run.summary["step"] == done + 2
        assert run.summary["groups"]["ncols"] == len(COLUMNS)
        log.close()
    assert ids[0] == ids[1] and wandb.run is None


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    log = log_of("none", tmp_path / "run")

    def broken(*_):
        raise RuntimeError("no route to host")

    log.tracker.target = SimpleNamespace(figures=broken, groups=broken, close=broken)
    log.write(RECORD, [FakeGroup()])
    log.write(RECORD | {"step": 6}, [FakeGroup()])
    log.close()
    assert capsys.readouterr().err.count("goes on without --tracker") == 1
    assert len(storage.read(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("kind, module", [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_one_line(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"^--tracker {kind}: pip install {kind}$"):
        Tracker(config(kind), tmp_path, 0)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_told_before_anything_is_loaded(kind, monkeypatch):
    ekipl.check(config(kind), 1, resuming=False)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=f"^--tracker {kind} is not installed: pip install {kind}$"):
        ekipl.check(config(kind), 1, resuming=False)


@pytest.mark.parametrize("done", [0, 3])
def test_a_tracker_that_cannot_start_is_one_line_and_leaves_no_new_run(tmp_path, done):
    path = tmp_path / "run"
    path.mkdir()
    (path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match="^--tracker tensorboard does not start: "):
        log_of("tensorboard", path, done)
    assert path.exists() == (done > 0)  # an earlier run's steps are not lost


def test_other_processes_have_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "broadcast", lambda self, value: (None, None))
    (tmp_path / "run").mkdir()
    log = StepLog(config("tensorboard"), tmp_path / "run", 0, World(1, 2, torch.device("cpu")))
    log.write(RECORD, [FakeGroup()])
    assert log.tracker is None and not list((tmp_path / "run").iterdir())


def test_pictures_are_opened_for_a_tracker_alone_and_a_broken_one_ends_no_run(tmp_path, capsys):
    class Broken(FakeGroup):
        @property
        def state(self):
            raise OSError("truncated picture")

        @state.setter
        def state(self, value):
            pass

    log, told = log_of("none", tmp_path / "run"), []
    log.write(RECORD, [Broken()])
    told_so = capsys.readouterr().err
    assert "truncated picture" not in told_so and "goes on without" not in told_so
    log.tracker.target = SimpleNamespace(
        figures=lambda figures, step: told.append(step),
        groups=lambda *_: told.append("groups"),
        close=lambda: None,
    )
    log.write(RECORD | {"step": 6}, [Broken()])
    log.close()
    assert told == [6] and capsys.readouterr().err.count("truncated picture") == 1


def test_without_a_tracker_neither_package_is_imported_and_with_one_a_run_reports(tmp_path):
    code = (
        "import sys, ekipl\n"
        "for kind in ('none', 'tensorboard'):\n"
        "    ekipl.run([*sys.argv[1:], '--name', kind, '--tracker', kind])\n"
        "    print([name for name in ('tensorboard', 'wandb') if name in sys.modules])\n"
    )
    flags = [*SHORT.split(), "--runs", str(tmp_path), "--rollout", "transformers"]
    told = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    found = [line for line in told.stdout.splitlines() if line.startswith("[")]
    assert found == ["[]", "['tensorboard']"], told.stdout + told.stderr
    history = storage.read(tmp_path / "tensorboard" / "metrics.jsonl")
    found = events(tmp_path / "tensorboard")
    for name in ("loss", "kl", "expert_share"):
        told = [e.value for e in found.Scalars(name)]
        assert told == pytest.approx([r[name] for r in history if name in r])
    assert {"curves", "time", "questions/0"} <= set(found.Tags()["images"])
