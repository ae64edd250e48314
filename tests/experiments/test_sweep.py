"""sweep.py: every row of Table 1 by its command, nothing twice, after an interruption the rest."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_api
import miniature
import pytest
from conftest import held_elsewhere

import ekipl
import evaluate
import sft
from data.predictions import read_predictions
from data.state import SETS
from experiments import rows, sweep, tasks
from training import checkpointing, rundir, storage
from training.console import UserError

MAINS = {"ekipl.py": ekipl.main, "sft.py": sft.main, "evaluate.py": evaluate.main}
REAL = """
    --limit 2 --batch-size 2 --num-samples 1 --group-size 1 --max-new-tokens 3
    --eval-every 1 --eval-states 1 --rollout transformers
""".split()
SHORT = """
    --states 8 --batch-size 4 --max-new-tokens 6 --eval-every 4 --eval-states 2 --save-every 1
    --rollout transformers
""".split()


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, where everything is imported: `commands`. An entry in `fails`
    fails once.
    """
    said = SimpleNamespace(commands=[], fails=[])

    def run(command, stdout, **_):
        program, arguments = Path(command[1]).name, command[2:]
        said.commands.append(shlex.join([program, *arguments]))
        if fail := next((part for part in said.fails if part in said.commands[-1]), None):
            said.fails.remove(fail)
            stdout.write("ekipl.py: error: the disk is full\n")
            return SimpleNamespace(returncode=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *arguments])
            MAINS[program]()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return said


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["experiments.sweep", *map(str, arguments)])
    try:
        sweep.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_table_1_by_one_command_and_nothing_twice(here, tmp_path, monkeypatch, capsys):
    flags = "--seeds 0 --stage1 4 --test-states 4 --pass-k 1,2".split()
    arguments = ["table1", *flags, "--runs", tmp_path, *SHORT]
    here.fails.append("--name Reason-RFT-seed0")
    assert call(monkeypatch, *arguments) == 2
    assert (
        "1 of 10 runs failed, the first one: Reason-RFT-seed0: ekipl.py: error: the disk is full"
        in capsys.readouterr().err
    )
    first = list(here.commands)
    assert call(monkeypatch, *arguments) == 0
    assert [
        command.split("--name ")[-1].split()[0]
        for command in here.commands[len(first) :]
        if "--name" in command
    ] == ["Reason-RFT-seed0"]
    assert len(here.commands) == len(first) + 2  # that one, and its evaluation
    table = (tmp_path / "blocks" / "results" / "table1.md").read_text()
    rows = [
        "careful",
        "quick",
        "Zero-shot",
        "ANS-SFT",
        "CoT-SFT",
        "Reason-RFT-Zero",
        "Reason-RFT",
        "Vision-EKIPL",
        "Vision-EKIPL-after-SFT",
    ]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:11]] == rows
    for number in (3, 4, 5):
        assert (tmp_path / "blocks" / "results" / f"figure{number}.png").exists()
    whole, kept = (
        storage.read(tmp_path / "blocks" / path)
        for path in ("Vision-EKIPL-seed0/metrics.jsonl", "results/Vision-EKIPL-seed0.jsonl")
    )
    assert (
        len(kept) == len(whole)
        and kept[-1]["reward"] == pytest.approx(whole[-1]["reward"], rel=1e-4)
        and {"eval/counting-id", "share/quick"} <= set(kept[-1])
    )
    config = {row: rundir.read_config(tmp_path / "blocks" / f"{row}-seed0") for row in rows[3:]}
    assert config["ANS-SFT"]["method"] == "answer" and config["CoT-SFT"]["method"] == "cot"
    assert (
        config["Reason-RFT-Zero"]["experts"]
        == config["Reason-RFT"]["experts"]
        == "none"
        != config["Vision-EKIPL"]["experts"]
    )
    for row in ("Reason-RFT", "Vision-EKIPL-after-SFT"):  # the second stage has the rest
        start = Path(config[row]["model"])  # what the first stage's `model` points to
        assert config[row]["skip"] == 4 and start == (start.parent / "model").resolve()
        assert start.parent.name == "Stage-1-seed0"
    assert (
        json.loads(
            (tmp_path / "blocks" / "ANS-SFT-seed0" / "predictions" / "settings.json").read_text()
        )["mode"]
        == "answer"
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return miniature.make(tmp_path_factory.mktemp("reason-rft"), size=4)


@pytest.mark.parametrize("preset, images", [("counting-2b", 1), ("transformation-2b", 2)])
def test_table_1_on_real_data_with_experts_behind_apis(
    here, directory, tmp_path, monkeypatch, capsys, one_thread, preset, images
):
    monkeypatch.chdir(tmp_path)
    server = fake_api.Server(answer="<think> the API says {i} </think> <answer> 3 </answer>")
    command = f"table1 --preset {preset} --data {directory} --data-cache {tmp_path}/cache"
    command += f" --model tiny --experts {server.openai},{server.gemini}"
    command += f" --cache {tmp_path}/answers.sqlite --seeds 0 --stage1 2 --test-states 2"
    arguments = [*command.split(), "--pass-k", "1", "--runs", "runs", *REAL]
    assert call(monkeypatch, *arguments) == 0, capsys.readouterr().err
    path, task = tmp_path / "runs" / preset, preset.split("-")[0]
    trained = [
        "ANS-SFT",
        "CoT-SFT",
        "Reason-RFT-Zero",
        "Reason-RFT",
        "Vision-EKIPL",
        "Vision-EKIPL-after-SFT",
    ]
    header, _, *rows = (path / "results" / "table1.md").read_text().splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [*SETS[task], f"{task} AVG"]
    assert [row.split("|")[1].strip() for row in rows[:9]] == [
        "openai:tiny",
        "gemini:tiny",
        "Zero-shot",
        *trained,
    ]
    assert all((path / "results" / f"figure{number}.png").exists() for number in (3, 4, 5))
    for row in ["openai:tiny", "gemini:tiny", "Zero-shot", *(f"{name}-seed0" for name in trained)]:
        found = read_predictions(path / row / "predictions")
        assert list(found) == list(SETS[task]) and all(
            len(predictions) == 2 for predictions in found.values()
        ), row
    # Who learnt from whom: the experts' actions are in Vision-EKIPL's groups alone.
    sources = {
        name: {
            a["source"]
            for r in storage.read(path / f"{name}-seed0" / "samples.jsonl")
            for a in r["actions"]
        }
        for name in trained[2:]
    }
    for name, said in sources.items():
        assert said == (
            {"policy", "openai:tiny", "gemini:tiny"} if name.startswith("Vision") else {"policy"}
        )
    assert all(
        (path / f"{name}-seed0" / "left_out.jsonl").exists() == (task == "counting")
        for name in trained
    )  # there the miniature has broken records
    # Every request showed its state's pictures; no answer was asked for twice or kept elsewhere.
    asked = [body for body in server.bodies if "messages" in body]
    assert {
        sum(
            part["type"] == "image_url"
            for message in body["messages"]
            for part in message["content"]
        )
        for body in asked
    } == {images}
    assert (
        len(asked) == len({json.dumps(body, sort_keys=True) for body in asked})
        and not (tmp_path / "experts.sqlite").exists()
    )
    server.close()


def test_a_run_that_was_stopped_is_resumed_or_begun_again(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "drop_optimizer", lambda task: None)  # as of a run that is stopped
    arguments = ["ablation", "--seeds", "0", "--test-states", 2, "--runs", tmp_path, *SHORT]
    monkeypatch.setitem(
        sweep.LISTS,
        "ablation",
        lambda config, stage1: [
            rows.Row("Vision-EKIPL", "ekipl.py"),
            rows.Row("GRPO", "ekipl.py", ("--experts", "none")),
        ],
    )
    assert call(monkeypatch, *arguments) == 0
    results = tmp_path / "blocks" / "results"
    assert "| GRPO | 1 | 0.0005 | 8 | 64 | 0 | 64 | " in (results / "table.md").read_text()
    assert "| GRPO | 0.000 | " in (results / "diagnostics.md").read_text()
    here.commands.clear()
    (tmp_path / "blocks" / "Vision-EKIPL-seed0.0.done").unlink()
    (tmp_path / "blocks" / "GRPO-seed0.0.done").unlink()
    (tmp_path / "blocks" / "Vision-EKIPL-seed0" / "model").unlink()  # its checkpoint is there
    stopped = tmp_path / "blocks" / "GRPO-seed0"  # killed before its first checkpoint
    shutil.rmtree(checkpointing.last_checkpoint(stopped))
    (stopped / "model").unlink()
    assert call(monkeypatch, *arguments) == 0
    resumed, _, again, _ = here.commands  # each evaluated
    assert "--resume" in resumed and "Vision-EKIPL-seed0" in resumed and "--experts none" in again
    assert call(monkeypatch, *arguments, "--lr", "0.1") == 2  # other settings are other runs


@pytest.mark.parametrize("kept", ["checkpoint-000020", "model", "notes.txt"])
def test_nothing_but_a_stopped_run_without_checkpoint_is_removed(tmp_path, kept):
    run = tmp_path / "GRPO-seed0"
    run.mkdir()
    if kept == "notes.txt":  # somebody's own directory
        (run / kept).write_text("mine")
    else:
        (run / "config.json").write_text("{}")
        (run / kept).mkdir()
    task = sweep.Task(run.name, run, [["ekipl.py", "--name", "x"]])
    with pytest.raises(UserError):  # resumed in vain, or not touched
        sweep.carry_out(task, None, 1)
    assert (run / kept).exists()


def test_a_run_that_another_process_trains_is_not_removed(tmp_path):
    run = rundir.create(str(tmp_path), "GRPO-seed0", {})
    with held_elsewhere(run), pytest.raises(UserError, match="another process"):
        sweep.clear(run)
    assert (run / "config.json").exists()
    sweep.clear(run)
    assert not run.exists()


def test_two_sweeps_do_not_work_in_one_place(here, tmp_path, monkeypatch, capsys):
    (tmp_path / "blocks").mkdir()
    with held_elsewhere(tmp_path / "blocks"):
        assert call(monkeypatch, "table1", "--runs", tmp_path) == 2
    assert "another process writes into" in capsys.readouterr().err and not here.commands


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_threads_of_a_run_do_not_depend_on_the_jobs(tmp_path, monkeypatch, jobs):
    threads = []

    def run(command, stdout, env, **_):
        threads.append(env["OMP_NUM_THREADS"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    made = [sweep.Task(f"{i}", tmp_path / f"{i}", [["evaluate.py", "tiny"]]) for i in range(4)]
    assert sweep.carry_all_out(made, jobs, 1) == [] and threads == [sweep.THREADS] * 4


def test_the_commands_can_be_looked_at_first(here, tmp_path, monkeypatch, capsys):
    command = f"table1 --preset transformation-2b --seeds 0,1 --runs {tmp_path}"
    command += " --processes 8 --dry-run"
    assert call(monkeypatch, *command.split()) == 0
    said = capsys.readouterr().out.splitlines()
    assert not here.commands and all(
        line.startswith("torchrun --standalone --nproc_per_node 8 ") for line in said
    )
    assert sweep.program("sft.py", 8)[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "8",
        str(tasks.ROOT / "sft.py"),
    ]
    assert (
        sum("sft.py" in line for line in said) == 6
        and sum("ekipl.py" in line for line in said) == 8
    )
    assert all(
        "--data reason-rft" in line and "--max-pixels 480000" in line
        for line in said
        if "evaluate.py" in line
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("table1 --preset counting-2b", "OPENAI_API_KEY"),
        ("table1 --preset counting-2b --experts careful", "knows the blocks world only"),
        ("table1 --experts nobody --dry-run", "nobody"),
        ("table1 --seed 3", "--seed"),
        ("ablation --experts none", "--experts"),
        ("table2", "table2"),
        ("table1 --seeds one", "--seeds"),
        ("table1 --jobs 0", "--jobs"),
        ("table1 --sates 8", "--sates"),
    ],
)
def test_mistakes_are_one_line(here, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert call(monkeypatch, *arguments.split(), "--runs", tmp_path) == 2
    assert says in capsys.readouterr().err.splitlines()[-1] and not here.commands


def test_stages_share_the_questions_out_and_give_each_expert_alone_to_the_second(
    here, tmp_path, monkeypatch, capsys
):
    command = f"stages --preset blocks-transformation --seeds 0 --runs {tmp_path}"
    command += " --dry-run"
    assert call(monkeypatch, *command.split()) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "evaluate.py" not in line]
    sizes = [int(line.split("--limit ")[1].split()[0]) for line in said if "sft.py" in line]
    assert sizes == [640, 1600, 2560, 3200]  # Reason-RFT's own is the second
    second = [line for line in said if "sft.py" not in line]
    for line in second:  # what one stage learnt from, the other does not see again
        size = line.split("--skip ")[1].split()[0]
        assert f"Stage-1-{size}-seed0/model" in line
    assert [line.split("--experts ")[1].split()[0] for line in second] == ["none"] * 4 + [
        "careful",
        "quick",
    ]


@pytest.mark.parametrize("task", ["counting", "structure", "transformation"])
def test_rows_of_the_papers_data_are_reason_rfts(monkeypatch, capsys, tmp_path, task):
    """Stage 2 of structure learns from all samples; zero-shot and ANS-SFT have own prompts."""
    flags = ["--experts", "none", "--dry-run", "--runs", tmp_path]
    assert call(monkeypatch, "table1", "--preset", f"{task}-2b", "--seeds", "0", *flags) == 0
    commands = capsys.readouterr().out.splitlines()

    def of(name: str) -> list[str]:
        return [
            command
            for command in commands
            if f"/{name}-seed0" in command or f"--name {name}-seed0" in command
        ]

    second, evaluated = of("Reason-RFT")
    assert ("--skip 1600" in second) == (task != "structure") and "Stage-1-seed0/model" in second
    learnt, evaluated_bare = of("ANS-SFT")
    assert "--method bare" in learnt and "--mode bare" in evaluated_bare
    (zero_shot,) = [command for command in commands if "Qwen2-VL-2B-Instruct --sets" in command]
    assert "--mode answer" in zero_shot and "--mode" not in evaluated


def test_of_a_finished_run_the_model_stays_and_the_optimizer_goes(tmp_path, monkeypatch):
    task, model, trained = (
        sweep.Task("run", tmp_path / "run", [["sft.py"]]),
        tmp_path / "run/model",
        [],
    )

    def train(*_, **__):
        model.mkdir(parents=True)
        for name in ("model.safetensors", "trainer.pt"):
            (model / name).touch()
        trained.append(name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", train)
    sweep.carry_out(task, None, 1)
    assert [file.name for file in model.iterdir()] == ["model.safetensors"]
    (model / "trainer.pt").touch()  # as if killed between the mark and this
    sweep.carry_out(task, None, 1)
    assert [file.name for file in model.iterdir()] == ["model.safetensors"] and len(trained) == 1


def test_a_program_gets_the_flags_that_it_has_with_their_values():
    given = "--experts none --expert-steps 3 --lr=0.1 --no-offline --group-size 2".split()
    assert tasks.known("ekipl.py", given) == given
    theirs = "--experts none --lr=0.1 --no-offline --group-size 2".split()
    assert tasks.known("sft.py", given) == theirs
    assert sft.parse(theirs)[0].group_size == 2
