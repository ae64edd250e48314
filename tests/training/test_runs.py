"""Run directories, checkpoints, pictures: a run stopped at any moment leaves them whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, held_elsewhere
from PIL import Image

import ekipl
import sft
from training import checkpointing, console, curves, rundir, stopwatch, storage
from training.console import UserError


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ----------------------------------------------------------------------------- settings and records


def test_a_new_runs_settings_are_read_back(tmp_path):
    config = {"lr": 1e-6, "sets": ["counting-train"], "resume": None, "name": "grün"}
    path = rundir.create(str(tmp_path / "deep" / "runs"), "a", config)
    assert path == tmp_path / "deep" / "runs" / "a" and rundir.read_config(path) == config
    assert sorted(p.name for p in path.iterdir()) == ["config.json"]


def test_a_run_is_never_overwritten(tmp_path):
    rundir.create(str(tmp_path), "a", {"lr": 1})
    with pytest.raises(UserError) as error:
        rundir.create(str(tmp_path), "a", {"lr": 2})
    assert "--resume" in one_line(error) and "--name" in one_line(error)
    assert rundir.read_config(tmp_path / "a") == {"lr": 1}


@pytest.mark.parametrize("root", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path, root):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        rundir.create(str(tmp_path / root), "a", {})
    assert "a" in one_line(error) and (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b'{"lr": 1', b"[1, 2]", b"3", b"null", b'"text"', b"\xff\xfe"]
)
def test_settings_that_cannot_be_read_are_the_users_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        rundir.read_config(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_no_run_to_resume_is_the_users_error(tmp_path):
    with pytest.raises(UserError) as error:
        rundir.read_config(tmp_path / "missing")
    assert "missing" in one_line(error)


RECORDS = [
    {"step": 1, "reward": 0.1},
    {"step": 2, "text": "two\nlines \u2028 of ünïcode"},
    {"step": 3, "kl": None},
]


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert storage.read(path) == []
    storage.append(path, RECORDS[:1])
    storage.append(path, [])
    storage.append(path, RECORDS[1:])
    assert storage.read(path) == RECORDS and path.read_text().count("\n") == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_nan_is_written_and_nothing_of_its_batch(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    storage.append(path, RECORDS)
    with pytest.raises(ValueError):
        storage.append(path, [{"step": 4}, {"step": 5, "kl": value}])
    assert storage.read(path) == RECORDS


def test_a_line_cut_short_anywhere_is_left_out_and_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    storage.append(path, RECORDS)
    whole = path.read_bytes()
    start = whole.rstrip().rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        complete = RECORDS if end == len(whole) - 1 else RECORDS[:2]  # only the newline is missing
        assert storage.read(path) == complete
        storage.forget_after(path, 9)  # what a resumed run does first: it appends to whole lines
        storage.append(path, [{"step": 4}])
        assert storage.read(path) == [*complete, {"step": 4}]


DAMAGE = [
    b"{",
    b"\x00\x00\x00",
    b"\xff\xfe",
    b"3",
    b"null",
    b'{"reward": 1}',
    b'{"step": "x"}',
    b"[" * 9999,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda line: repr(line[:8]))
def test_a_damaged_line_costs_no_other_and_is_set_aside(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    storage.append(path, RECORDS)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n\n" + b"".join(rest))
    assert [record for record in storage.read(path) if record.get("step") in (1, 2, 3)] == RECORDS
    storage.forget_after(path, 2)
    assert storage.read(path) == RECORDS[:2]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    assert "damaged" in capsys.readouterr().err
    storage.forget_after(path, 2)
    assert storage.read(path) == RECORDS[:2] and not capsys.readouterr().err  # told once


def test_a_resumed_run_forgets_the_steps_it_will_do_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    storage.forget_after(path, 1)
    assert not path.exists()
    storage.append(path, [{"step": s, "i": i} for s in (1, 2, 3) for i in (0, 1)])
    storage.forget_after(path, 2)
    assert storage.read(path) == [{"step": s, "i": i} for s in (1, 2) for i in (0, 1)]
    storage.forget_after(path, 0)
    assert storage.read(path) == [] and path.exists()


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch, broken):
    path = tmp_path / "config.json"
    storage.write_aside(path, "old")

    def fail(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="full"):
            storage.write_aside(path, "new text")
        assert path.read_text() == "old"
    storage.write_aside(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------- checkpoints


class StubPolicy:
    """Saves one weight, as a Policy saves a model: into a directory that it makes."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)

    def step(self) -> None:
        self.weight.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, path: Path, weights: dict) -> None:
        path.mkdir()
        torch.save(weights["weight"], path / "model.bin")
        (path / "config.json").write_text("{}")


def assert_whole(path: Path, step: int) -> None:
    """A checkpoint holds the weights, the optimizer and the number of its step."""
    trainer = torch.load(path / "trainer.pt", weights_only=True)
    fresh = StubPolicy()
    fresh.optimizer.load_state_dict(trainer["optimizer"])
    assert trainer["step"] == step
    assert fresh.optimizer.state[fresh.weight]["step"] == step  # the stub makes one update a step
    assert torch.load(path / "model.bin", weights_only=True).tolist() == pytest.approx(
        [-0.1 * step] * 3, rel=0.05
    )


def save(path: Path, policy: StubPolicy, step: int) -> None:
    checkpointing.save_checkpoint(
        path, step, policy, {"weight": policy.weight.data}, policy.optimizer.state_dict()
    )


def saved(path: Path, policy: StubPolicy, step: int) -> None:
    policy.step()
    save(path, policy, step)


def test_the_newest_checkpoint_is_kept_and_linked(tmp_path):
    policy = StubPolicy()
    for step in (1, 2, 3):
        saved(tmp_path, policy, step)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step:06d}", "model"]
        assert checkpointing.last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step:06d}"
        assert_whole(checkpointing.last_checkpoint(tmp_path), step)
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "model").resolve() == checkpointing.last_checkpoint(tmp_path).resolve()


def test_the_link_survives_moving_the_run(tmp_path):
    (tmp_path / "here").mkdir()
    saved(tmp_path / "here", StubPolicy(), 1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_whole(tmp_path / "there" / "model", 1)


def save_until(path: Path, policy: StubPolicy, monkeypatch, where: tuple, call: int) -> None:
    """Saves step 2, and is killed in that call (from 0) of a function (its module and name)."""
    module, name = where
    works, calls = getattr(module, name), []

    def dies(*arguments, **options):
        calls.append(arguments)
        if len(calls) > call:
            raise KeyboardInterrupt
        return works(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        try:
            save(path, policy, 2)
        except KeyboardInterrupt:
            pass
        else:
            assert len(calls) <= call  # it has fewer of these calls, and none was to fail


@pytest.mark.parametrize(
    "where",
    [
        (StubPolicy, "save"),
        (torch, "save"),
        (os, "fsync"),
        (os, "rename"),
        (Path, "symlink_to"),
        (os, "replace"),
        (shutil, "rmtree"),
    ],
    ids=lambda where: where[1],
)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_run_killed_while_saving_keeps_a_whole_checkpoint(tmp_path, monkeypatch, where, call):
    policy = StubPolicy()
    saved(tmp_path, policy, 1)
    policy.step()
    save_until(tmp_path, policy, monkeypatch, where, call)
    last = checkpointing.last_checkpoint(tmp_path)
    assert_whole(last, 1 if last.name == "checkpoint-000001" else 2)
    linked = (tmp_path / "model").resolve()
    assert_whole(linked, 1 if linked.name == "checkpoint-000001" else 2)
    # The resumed run saves again, and clears up what lies about.
    if last.name == "checkpoint-000001":
        save(tmp_path, policy, 2)
    saved(tmp_path, policy, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000003", "model"]
    assert_whole(tmp_path / "model", 3)


def no_links(monkeypatch):
    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)


def test_without_links_model_is_a_directory_of_the_newest_weights(tmp_path, monkeypatch):
    no_links(monkeypatch)
    policy = StubPolicy()
    for step in (1, 2, 3):
        saved(tmp_path, policy, step)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step:06d}", "model"]
        assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
            "config.json",
            "model.bin",
        ]
        new, copy = tmp_path / f"checkpoint-{step:06d}", tmp_path / "model"
        assert (new / "model.bin").read_bytes() == (copy / "model.bin").read_bytes()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("there", ["directory", "file", "broken link", "nothing"])
def test_whatever_stands_in_the_place_of_model_is_replaced(tmp_path, monkeypatch, there, links):
    policy = StubPolicy()
    saved(tmp_path, policy, 1)
    model = tmp_path / "model"
    model.unlink()
    if there == "directory":  # the run was copied with what its links point to
        shutil.copytree(tmp_path / "checkpoint-000001", model)
    elif there == "file":
        model.write_text("checkpoint-000001")
    elif there == "broken link":
        model.symlink_to("checkpoint-000000")
    if not links:
        no_links(monkeypatch)
    saved(tmp_path, policy, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "model"]
    weight = torch.load(model / "model.bin", weights_only=True)
    assert model.is_symlink() == links and weight.tolist() == policy.weight.tolist()


def test_a_copy_whose_checkpoint_is_in_model_alone_can_be_resumed(tmp_path):
    saved(tmp_path, StubPolicy(), 1)
    (tmp_path / "model").unlink()
    (tmp_path / "checkpoint-000001").rename(tmp_path / "model")
    assert_whole(checkpointing.last_checkpoint(tmp_path), 1)
    (tmp_path / "model" / "trainer.pt").unlink()  # a model is no checkpoint
    with pytest.raises(UserError):
        checkpointing.last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "where",
    [(os, "rename"), (os, "replace"), (shutil, "copytree"), (shutil, "rmtree")],
    ids=lambda where: where[1],
)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_run_killed_while_saving_without_links_goes_on(tmp_path, monkeypatch, where, call):
    no_links(monkeypatch)
    policy = StubPolicy()
    saved(tmp_path, policy, 1)
    policy.step()
    save_until(tmp_path, policy, monkeypatch, where, call)
    last = checkpointing.last_checkpoint(tmp_path)
    assert_whole(last, int(last.name[-1]))
    checkpointing.publish(tmp_path)  # what resuming does first
    weights = (last / "model.bin").read_bytes()
    assert (tmp_path / "model" / "model.bin").read_bytes() == weights


def test_half_written_and_foreign_files_are_no_checkpoints(tmp_path):
    for name in (
        "checkpoint-000007.tmp",
        "checkpoint-",
        "checkpoint-best",
        "checkpoint-1.old",
        "my-checkpoint-000009",
    ):
        (tmp_path / name).mkdir()
    assert checkpointing.checkpoints(tmp_path) == []
    with pytest.raises(UserError) as error:
        checkpointing.last_checkpoint(tmp_path)
    assert str(tmp_path) in one_line(error)
    saved(tmp_path, StubPolicy(), 1)
    assert checkpointing.checkpoints(tmp_path) == [tmp_path / "checkpoint-000001"]
    assert (tmp_path / "checkpoint-best").is_dir()  # not ours to remove


def test_the_newest_is_the_one_of_the_latest_step_however_long_its_name(tmp_path):
    for step in (1_000_000, 999_999, 20):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    assert [int(p.name.split("-")[1]) for p in checkpointing.checkpoints(tmp_path)] == [
        20,
        999_999,
        1_000_000,
    ]


# ------------------------------------------------------------------------------------------- curves


def history(steps: int, *keys: str, start: int = 0) -> list[dict]:
    end = start + steps
    return [
        {"step": s, "states": 64 * s} | {key: s / end for key in keys}
        for s in range(start + 1, end + 1)
    ]


def picture(path: Path) -> bytes:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width > 300
        return image.tobytes()


NO_KL = {"step": 3, "states": 192, "kl": None}
SPARSE = [*history(2, "reward"), NO_KL, *history(2, "accuracy", "eval/counting-id", start=3)]


@pytest.mark.parametrize(
    "histories",
    [
        {"a": history(4, *curves.PANELS)},
        {
            "few": history(4, "reward", "accuracy"),
            "b": history(7, *curves.PANELS, "eval/counting-id"),
            "sparse": SPARSE,
        },
        {"nothing yet": []},
        {"one step": history(1, *curves.PANELS, "eval/counting-ood")},
        {f"run {i}": history(2, "reward") for i in range(12)},
    ],
    ids=lambda histories: next(iter(histories)),
)
def test_curves_are_drawn_whatever_was_measured(tmp_path, histories):
    curves.draw(histories, tmp_path / "curves.png")
    picture(tmp_path / "curves.png")
    assert not curves.plt.get_fignums()  # a long run must not pile up figures


def test_the_share_of_equal_advantages_is_drawn_dashed_where_a_run_tells_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves.plt, "close", figures.append)
    told = [{**record, "equal_advantages": 0.9} for record in history(3, "dead_groups")]
    curves.draw({"new": told, "older": history(3, "dead_groups")}, tmp_path / "curves.png")
    monkeypatch.undo()
    (axis,) = (a for a in figures[0].axes if a.get_title().startswith("dead groups"))
    dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [pytest.approx([0.9] * 3)]
    curves.plt.close(figures[0])


def test_each_measurement_has_its_panel_over_the_states_seen(tmp_path, monkeypatch):
    figures, keys = [], [*curves.PANELS, "eval/counting-id"]
    monkeypatch.setattr(curves.plt, "close", figures.append)
    measured = [
        {"step": s, "states": 64 * s} | {key: (s + i) / 99 for i, key in enumerate(keys)}
        for s in (1, 2, 3)
    ]
    curves.draw({"a": measured, "b": measured[:2]}, tmp_path / "curves.png")
    monkeypatch.undo()
    (figure,) = figures
    (methods,), tests = (
        figure.legends,
        figure.axes[1].get_legend(),
    )  # one for the colours of all panels, one for the dots
    assert [[text.get_text() for text in legend.get_texts()] for legend in (methods, tests)] == [
        ["a", "b"],
        ["counting-id"],
    ]
    for key, axis in zip(curves.PANELS, figure.axes, strict=True):
        lines = [list(zip(*line.get_data(), strict=True)) for line in axis.lines]
        for shown in [key, "eval/counting-id"] if key == "accuracy" else [key]:
            points = [(record["states"], record[shown]) for record in measured]
            assert points in lines and points[:2] in lines  # of both runs
    curves.plt.close(figure)


def test_the_picture_of_time_stacks_the_phases_of_each_step(tmp_path, monkeypatch):
    steps = [
        {
            "step": s,
            "loss": 0.0,
            "seconds/rollout": 3.0,
            "seconds/forward": s,
            "seconds/evaluation": 9.0,
        }
        for s in (1, 2)
    ]
    figures = []
    monkeypatch.setattr(curves.plt, "close", figures.append)
    curves.draw_time([{"step": 0, "eval/counting-id": 0.5}, *steps], tmp_path / "time.png")
    ((axis,),) = (figure.axes for figure in figures)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "rollout 66.7 %",
        "forward 33.3 %",
    ]
    assert [(bar.get_y(), bar.get_height()) for bar in axis.patches] == [
        (0, 3),
        (0, 3),
        (3, 1),
        (3, 2),
    ]


def test_a_stopwatch_gives_all_time_to_a_phase(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = stopwatch.Stopwatch(torch.device("cpu"))
    for phase in ("rollout", "forward", "rollout"):
        watch.lap(phase)
    assert watch.read() == {"seconds/rollout": 5.0, "seconds/forward": 2.0}
    watch.lap("forward")
    assert watch.read() == {"seconds/forward": 1.0}


def test_a_stopwatch_waits_for_a_gpu_only_when_it_is_read(monkeypatch):
    clock, said = iter([0.0, 1000.0, 3000.0]), []

    class Event:
        """A mark on the GPU's own time line; it knows the time once the GPU has come so far."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

        def elapsed_time(self, later):
            assert said == ["waited"] and self.stream == later.stream == "stream of cuda:1"
            return later.at - self.at

    def wait(device):
        said.append("waited")
        for _, event in watch.marks:
            event.at = next(clock)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    watch = stopwatch.Stopwatch(torch.device("cuda:1"))
    watch.lap("forward")
    watch.lap("backward")
    assert not said
    assert (
        watch.read() == {"seconds/forward": 1.0, "seconds/backward": 2.0} and len(watch.marks) == 1
    )


def test_smoothing_is_the_mean_of_the_last_values():
    assert curves.smooth([1, 2, 3, 4, 5, 6, 7], 3) == [1, 1.5, 2, 3, 4, 5, 6]
    assert curves.smooth([]) == []


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["training.curves", *map(str, arguments)])
    curves.main()


def test_the_command_draws_runs_and_files(tmp_path, monkeypatch):
    for name in ("a", "b"):
        storage.append(
            rundir.create(str(tmp_path), name, {}) / "metrics.jsonl", history(3, "reward")
        )
    run(monkeypatch, tmp_path / "a")
    picture(tmp_path / "a" / "curves.png")
    picture(tmp_path / "a" / "time.png")
    run(
        monkeypatch,
        tmp_path / "a",
        tmp_path / "b" / "metrics.jsonl",
        "--out",
        tmp_path / "both.png",
    )
    assert picture(tmp_path / "both.png") != picture(tmp_path / "a" / "curves.png")


@pytest.mark.parametrize(
    "arguments, message", [(["a", "missing"], "no metrics at"), (["a", "a"], "--out")]
)
def test_the_commands_mistakes_are_told(tmp_path, monkeypatch, capsys, arguments, message):
    storage.append(rundir.create(str(tmp_path), "a", {}) / "metrics.jsonl", history(1, "reward"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *(tmp_path / argument for argument in arguments))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_two_runs_of_one_name_are_both_drawn(tmp_path, monkeypatch):
    for root in ("one", "two"):
        steps = 3 if root == "one" else 9
        storage.append(
            rundir.create(str(tmp_path / root), "a", {}) / "metrics.jsonl", history(steps, "reward")
        )
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda histories, out: drawn.append(histories))
    run(monkeypatch, tmp_path / "one" / "a", tmp_path / "two" / "a", "--out", tmp_path / "both.png")
    assert sorted(len(records) for records in drawn[0].values()) == [3, 9]


def test_the_file_of_settings_is_json_for_people(tmp_path):
    text = (rundir.create(str(tmp_path), "a", {"lr": 1e-6, "seed": 0}) / "config.json").read_text()
    assert (
        json.loads(text) == {"lr": 1e-6, "seed": 0} and text.count("\n") == 4
    )  # a line for each setting


# ------------------------------------------------------------------------------ pictures of any run


@pytest.mark.parametrize(
    "name",
    [
        "p$x^$q",
        "$",
        r"a\$b",
        "_x",
        "\udcff",
        "100 % {x}",
        "n" * 250,
        "$\\frac{1}$-seed0",
        "a\nb",
        "r\u00fcn \u6570",
    ],
    ids=ascii,
)
def test_any_name_of_a_run_is_text_in_its_picture(tmp_path, name):
    records = history(2, "reward", "accuracy", f"eval/{name}")
    curves.draw({name: records, "other": records}, tmp_path / "c.png")
    picture(tmp_path / "c.png")


def test_names_are_shown_as_they_are():
    assert curves.shown("p$x") == r"p\$x" and curves.shown("a-seed0") == "a-seed0"
    assert not curves.shown("_x").startswith("_") and len(curves.shown("n" * 300)) < 80


def test_a_picture_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    storage.append(tmp_path / "metrics.jsonl", history(2, "reward"))
    (tmp_path / "curves.png").mkdir()
    open_figures = curves.plt.get_fignums()
    curves.draw_run(tmp_path / "metrics.jsonl", "a")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "without its pictures" in said[0] and str(tmp_path) in said[0]
    assert curves.plt.get_fignums() == open_figures


@pytest.mark.parametrize("out", ["no/such/place.png", "x.nothing", "file/x.png", "{long}.png"])
def test_a_picture_at_a_bad_place_is_one_line(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "file").write_text("")
    storage.append(rundir.create(str(tmp_path), "a", {}) / "metrics.jsonl", history(3, "reward"))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path / "a", "--out", tmp_path / out.format(long="n" * 300))
    said = capsys.readouterr().err.splitlines()
    assert (
        stopped.value.code == 2
        and len(said) == 1
        and said[0].startswith("training.curves: error: ")
    )


# ---------------------------------------------------------------------------- one process at a time


def test_a_directory_has_one_writer_and_is_free_when_it_dies(tmp_path):
    with held_elsewhere(tmp_path) as other:
        with pytest.raises(UserError) as error:
            storage.hold(tmp_path, "wait")
        assert str(tmp_path) in one_line(error) and "wait" in one_line(error)
        other.kill()
        other.wait()
        storage.hold(tmp_path, "wait")
    storage.hold(tmp_path, "wait")  # it may come back to its own
    storage.let_go(tmp_path)
    with held_elsewhere(tmp_path):
        pass


@pytest.mark.parametrize("number, goes_on", [(37, True), (13, False)])  # ENOLCK, EACCES
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path, monkeypatch, capsys, number, goes_on
):
    def refuse(self, **_):
        raise OSError(number, "refused")

    monkeypatch.setattr(storage.FileLock, "acquire", refuse)
    if goes_on:
        storage.hold(tmp_path, "wait")
        assert "no locks" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="refused"):
            storage.hold(tmp_path, "wait")


# ------------------------------------------------------------------------------- how a program ends


def ends(monkeypatch, capsys, run) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        console.command("x.py", run)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, says",
    [
        (UserError("a\nb \x1b[31m \udcff"), "a b \\x1b[31m \\udcff"),
        (UserError("n" * 9999), "nnn ... nnn"),
        (OSError(28, "No space left on device", "/d/x"), "/d/x: No space left on device"),
    ],
    ids=["odd characters", "long", "of the system"],
)
def test_a_mistake_is_one_line_of_its_own(monkeypatch, capsys, error, says):
    def run(argv):
        bar = console.tqdm(total=3)  # noqa: F841  it is open when the mistake comes
        raise error

    code, said = ends(monkeypatch, capsys, run)
    line = said.split("\r")[-1].splitlines()[-1]
    assert code == 2 and line.startswith("x.py: error: ") and says in line and len(line) < 1100


def test_what_is_no_mistake_of_the_users_keeps_its_traceback(monkeypatch, capsys):
    def run(argv):
        raise OSError("not of a file")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(OSError, match="not of a file"):
        console.command("x.py", run)


def test_a_stopped_program_says_how_to_go_on(monkeypatch, capsys):
    def run(argv):
        raise KeyboardInterrupt

    code, said = ends(monkeypatch, capsys, run)
    assert code == 130 and "the same command goes on" in said


def test_a_reader_that_goes_away_is_no_error():
    code = "from training import console; console.command('x.py', lambda argv: '\\n' * 10**6)"
    cat = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    cat.stdout.readline()
    cat.stdout.close()
    assert cat.stderr.read() == b"" and cat.wait() == 1


def test_a_user_without_name_and_home_gets_a_place_for_caches(tmp_path, monkeypatch):
    def nobody(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(console.tempfile, "tempdir", str(tmp_path))
    console.find_home()
    home = Path("~").expanduser()
    assert (
        home.parent == tmp_path
        and home.is_dir()
        and console.getpass.getuser() == os.environ["USER"]
    )
    console.find_home()
    assert Path("~").expanduser() == home


@pytest.mark.parametrize("program", [ekipl, sft])
def test_a_run_that_starts_from_anothers_newest_checkpoint_keeps_to_it(program, tmp_path):
    """`model` moves on while that run does; the KL term's reference must not, when this resumes."""
    (tmp_path / "checkpoint-000025").mkdir()
    (tmp_path / "model").symlink_to("checkpoint-000025")
    config, _ = program.parse(["--model", str(tmp_path / "model")])
    assert config.model == str(tmp_path / "checkpoint-000025")
    for name in ("tiny", str(tmp_path / "checkpoint-000025"), "Qwen/Qwen2-VL-2B-Instruct"):
        assert program.parse(["--model", name])[0].model == name
