"""The benchmarks' own logic, at the smallest size; TRL is not needed."""

import dataclasses
import json
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ekipl
import policy

ROOT = Path(__file__).resolve().parents[2]
from experiments.benchmarks import (
    against_trl,
    gains,
    gpu_check,
    growth,
    law,
    measuring,
    processes,
    rollout,
    sides,
    trl_side,
    workload,
)
from rollouts import transformers_sampler

SMALL = dataclasses.replace(
    workload.WORKLOADS["tiny"], states=2, micro_batch=1, group_size=3, action_tokens=4
)


class Threaded(sides.Worker):
    """A side in a thread: a process takes seconds to import what is here already."""

    def __init__(self, side, work, path, steps, threads):
        self.connection, theirs = Pipe()
        self.process = threading.Thread(
            target=sides.serve, args=(side, work, path, steps, threads, theirs)
        )
        self.process.start()
        self.connection.recv()


@pytest.fixture
def in_threads(monkeypatch, one_thread):
    for module in (against_trl, growth):
        monkeypatch.setattr(module, "Worker", Threaded)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "model"
    workload.save_model(SMALL, path)
    return path


def test_ours_and_the_plain_forward_take_turns_and_make_the_same_steps(in_threads, small_model):
    records = against_trl.take_turns(
        SMALL, small_model, ["ours", "plain"], 2, 1, together=True, profile=True
    )
    kinds = ["warm-up", "time", "time", "memory", "profile"]
    assert {side: [record["kind"] for record in made] for side, made in records.items()} == {
        "ours": kinds,
        "plain": kinds,
    }
    assert records["ours"][0]["logp"].shape == (2, 3, 4)
    same = against_trl.agreement(records)["plain"]
    assert same["logp"] < 1e-4 and same["grad_norm"] < 1e-4
    profile = against_trl.profile_table(records)
    assert "aten::addmm" in profile or "aten::mm" in profile
    result = measuring.machine() | against_trl.summary(SMALL, small_model, records, 50, "cpu")
    low, middle, high = (
        result["ratios"]["plain"]["train"][name] for name in ("min", "median", "max")
    )
    assert 0 < low <= middle <= high
    assert "| plain | " in against_trl.table(result)


class FakeTrainer:
    """The methods of TRL's trainer that its side replaces; a log-prob is the token's number."""

    def __init__(self):
        self.accelerator = SimpleNamespace(backward=lambda loss: loss)

    def _generate_single_turn(self):
        return [[0] * SMALL.action_tokens], None

    def _generate(self):
        return self._generate_single_turn()

    def _get_per_token_logps_and_entropies(self, model, input_ids):
        return input_ids[:, -SMALL.action_tokens :].float(), None

    def compute_loss(self, rows):
        return self._get_per_token_logps_and_entropies(None, rows)

    def _clip_grad_norm(self, model):
        return 2.0


def test_trls_side_trains_on_the_fixed_actions_and_reports_them_in_order():
    kept = []
    turns = SimpleNamespace(
        begin=lambda kind: measuring.Recorder("cpu", kind),
        end=lambda recorder, *figures: kept.append((recorder.record(), *figures)),
    )
    tokenizer = workload.AutoProcessor.from_pretrained(workload.TINY).tokenizer
    tokens, trainer = workload.make_actions(SMALL, tokenizer), FakeTrainer()
    turn = trl_side.Turn(["time"], turns, tokens)
    turn.watch(trainer, SMALL)
    turn.on_step_begin(None, SimpleNamespace(global_step=0), None)
    rows, _ = trainer._generate()
    assert rows == [*tokens[0], *tokens[1]]
    trainer.compute_loss(torch.tensor(rows[::-1]))  # the trainer shuffles
    trainer.accelerator.backward(0.0)
    trainer._clip_grad_norm(None)
    turn.on_pre_optimizer_step()
    turn.on_optimizer_step()
    turn.on_step_end(None, SimpleNamespace(global_step=1), None)
    ((record, logps, norm),) = kept
    assert torch.equal(logps, torch.tensor(tokens).float()) and norm == 2.0
    assert record["seconds"].keys() == {"rollout", "train", "step"}


def test_sides_that_do_not_compute_the_same_are_told(small_model):
    record = {"grad_norm": 1.0, "logp": torch.zeros(2, 3, 4).numpy()}
    other = {"grad_norm": 1.1, "logp": record["logp"] - 0.5}
    assert against_trl.agreement({"ours": [record], "plain": [other]})["plain"] == pytest.approx(
        {"logp": 0.5, "grad_norm": 0.1}
    )


def test_growth_writes_figures_and_a_picture(in_threads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "BASE", dataclasses.replace(SMALL, states=1, rollout=False))
    out = tmp_path / "growth.json"
    flags = "--model tiny --runs 1 --threads 1 --group-size 1 3 --vocabulary --action-tokens"
    flags = [*flags.split(), "--image-tokens", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["growth.py", *flags])
    growth.main()
    points = json.loads(out.read_text())["axes"]["group_size"]
    assert [(point["value"], point["side"]) for point in points] == [
        (1, "ours"),
        (1, "plain"),
        (3, "ours"),
        (3, "plain"),
    ]
    assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in points)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "of the law" in capsys.readouterr().out


def test_a_group_passes_prompt_and_picture_once_or_g_times():
    config, work = (
        workload.empty_model(workload.TINY).config,
        dataclasses.replace(SMALL, states=1, group_size=2, action_tokens=2),
    )
    once, repeated = (law.step_cost(work, config, 3, times) for times in (False, True))
    assert (once.tokens, once.pairs, once.patches) == (
        3 + 4,
        6 + 2 * (4 + 5),
        64,
    )  # prompt 1 + 2 + 3; an action's tokens see 4 and 5
    assert (repeated.tokens, repeated.pairs, repeated.patches) == (10, 2 * 15, 128)  # 1 + ... + 5
    once, repeated = (
        law.step_cost(dataclasses.replace(work, group_size=1), config, 3, times)
        for times in (False, True)
    )
    assert once == repeated


def test_the_law_counts_the_operations_of_a_real_forward_pass(small_model):
    work = dataclasses.replace(SMALL, states=1, micro_batch=1, group_size=1, action_tokens=64)
    model = workload.Qwen2VLForConditionalGeneration.from_pretrained(
        small_model, dtype=torch.float32, attn_implementation="eager"
    )
    processor = workload.AutoProcessor.from_pretrained(small_model)
    state, actions = (
        workload.make_states(work, processor)[0],
        torch.tensor(workload.make_actions(work, processor.tokenizer)[0]),
    )
    inputs = workload.inputs_of([state], processor)
    P, T = inputs["input_ids"].shape[1], work.action_tokens
    inputs["input_ids"] = torch.cat([inputs["input_ids"], actions], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, T))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=T)
    text_config, cost = (
        model.config.text_config,
        law.step_cost(work, model.config, P, repeated=False),
    )
    above_diagonal = (
        P + T
    ) ** 2 - cost.pairs  # eager attention computes them, and throws them away
    expected = (
        cost.flops / 4
        + text_config.num_hidden_layers * 4 * text_config.hidden_size * above_diagonal
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_fit_finds_the_constants_of_points_that_follow_the_law():
    made = ((1e9, 100), (4e9, 300), (9e9, 500))
    points = [
        {"seconds": 0.5 + flops / 2e9, "bytes": 3 * held, "flops": flops, "law_bytes": held}
        for flops, held in made
    ]
    fitted = growth.fit(points)
    assert fitted == pytest.approx({"constant": 0.5, "rate": 2e9, "factor": 3.0})
    expected = {"seconds": 2.5, "bytes": 900}
    assert growth.law(points[1], fitted) == pytest.approx(expected)


def test_every_action_has_its_tokens_and_ends_with_eos_and_no_group_is_dead():
    tokenizer = workload.AutoProcessor.from_pretrained(workload.TINY).tokenizer
    actions = workload.make_actions(SMALL, tokenizer)
    assert [[len(action) for action in group] for group in actions] == [[4] * 3] * 2
    for action in (action for group in actions for action in group):
        assert action[-1] == tokenizer.eos_token_id
        assert not set(action[:-1]) & set(tokenizer.all_special_ids)
    assert all(len(set(group)) > 1 for group in workload.make_rewards(SMALL))


@pytest.mark.parametrize("name", ["mid", "2b"])
def test_the_made_models_have_the_sizes_that_are_told(name):
    config = workload.made_config(
        workload.WORKLOADS[name], workload.AutoProcessor.from_pretrained(workload.TINY).tokenizer
    )
    with torch.device("meta"):
        model = workload.Qwen2VLForConditionalGeneration(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(
        {"mid": 32.85, "2b": 2209}[name], rel=0.001
    )  # Qwen2-VL-2B: 2.21 billion


def test_pictures_that_cannot_be_square_are_refused():
    with pytest.raises(ValueError, match="square"):
        workload.save_model(dataclasses.replace(SMALL, image_tokens=15), Path("nowhere"))


def test_the_tables_of_its_readme_are_those_of_the_committed_figures():
    readme = (ROOT / "experiments" / "benchmarks" / "README.md").read_text()
    for file in (ROOT / "experiments" / "benchmarks").glob("*.json"):
        result = json.loads(file.read_text())
        if "sides" in result:
            for line in against_trl.table(result).splitlines():
                assert line in readme, file.name


def test_every_measure_can_be_taken_away_and_the_gradient_stays_the_same(one_thread):
    config, _ = ekipl.parse(
        ["--batch-size", "4", "--num-samples", "3", "--group-size", "4", "--max-new-tokens", "12"]
    )
    step = gains.Step(config, 1)
    rows = gains.measure(step, 1)  # raises if a variant's gradient differs
    assert [row["measure"] for row in rows] == [*gains.ROLLOUT, *gains.UPDATE] and all(
        row["ratio"]["min"] > 0 for row in rows
    )
    assert (
        transformers_sampler.HalfFinished is not gains.NeverEarly and policy.pack is policy.pack
    )  # and put back


def test_what_gains_takes_away_is_gone(one_thread):
    config, _ = ekipl.parse(
        ["--batch-size", "4", "--num-samples", "3", "--group-size", "4", "--max-new-tokens", "12"]
    )
    step = gains.Step(config, 1)
    prompts, actions = [group.prompt for group in step.groups[:2]], [[[1, 2], [1, 2], [1, 3]]] * 2
    once, each, own = (
        pack(prompts, actions)
        for pack in (policy.pack, gains.pack_with_equal_actions, gains.pack_with_own_prompts)
    )
    P = sum(len(prompt.input_ids) for prompt in prompts)
    assert [len(batch.input_ids) for batch in (once, each, own)] == [P + 8, P + 12, 3 * P + 12]
    assert all(
        torch.allclose(step.policy(once), step.policy(batch), atol=1e-5) for batch in (each, own)
    )


def test_processes_share_a_batch_and_are_compared_with_others_that_share_nothing(
    tmp_path, monkeypatch, capsys
):
    started = []

    class Run:
        """A process that has written its metrics."""

        returncode = 0

        def __init__(self, command, **kwargs):
            started.append(" ".join(map(str, command)))
            value = {"one": 4.0, "shared": 2.5, "apart": 2.0}[
                command[command.index("--name") + 1].split("-")[0]
            ]
            record = {"loss": 0.0, "seconds/rollout": value, "seconds/logging": 9.0}
            path = (
                Path(command[command.index("--runs") + 1])
                / command[command.index("--name") + 1]
                / "metrics.jsonl"
            )
            path.parent.mkdir(parents=True)
            path.write_text(
                "".join(
                    json.dumps(r) + "\n"
                    for r in [{"eval/a": 1}, {**record, "seconds/rollout": 99.0}, record]
                )
            )

        def communicate(self):
            return "", ""

    monkeypatch.setattr(processes.subprocess, "Popen", Run)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "processes.py",
            "--turns",
            "2",
            "--batch-size",
            "8",
            "--steps",
            "3",
            "--out",
            str(tmp_path / "out.json"),
            "--lr",
            "0",
        ],
    )
    processes.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["speed_up"]["median"] == 1.6 and result["efficiency"]["median"] == 0.8
    assert ["nproc_per_node 2" in command for command in started] == [False, True, False, False] * 2
    assert [command.split("--batch-size ")[1].split()[0] for command in started] == [
        "8",
        "8",
        "4",
        "4",
    ] * 2
    assert all("--lr 0" in command and "--eval-every 0" in command for command in started)


HERE = ROOT / "experiments" / "benchmarks"
SAID = (HERE / "README.md").read_text()


@pytest.mark.parametrize("name", ["tiny", "mid"])
def test_the_readmes_tables_are_those_of_the_committed_figures(name):
    result = json.loads((HERE / f"{name}-cpu.json").read_text())
    assert against_trl.table(result) in SAID
    assert (
        result["agreement"]["trl"]["logp"] < 1e-4 and result["agreement"]["trl"]["grad_norm"] < 1e-5
    )
    train, rollout = (
        [result["ratios"][side][phase]["median"] for side in ("trl", "plain")]
        for phase in ("train", "rollout")
    )
    memory = [result["sides"][side]["peak_gb"]["train"] for side in ("ours", "trl", "plain")]
    short = (
        " | ".join(f"{value:.2f}" for value in (*train, *rollout))
        + " | "
        + ", ".join(f"{value:.2f}" for value in memory)
        + " GB"
    )
    assert short in (ROOT / "experiments" / "README.md").read_text()


def test_the_training_step_of_the_mid_case_is_three_times_as_fast_as_trls():
    ratios = json.loads((HERE / "mid-cpu.json").read_text())["ratios"][
        "trl"
    ]  # a committed figure: nothing is timed here
    assert ratios["train"]["min"] >= 3 and ratios["rollout"]["min"] >= 1


def test_the_readmes_other_figures_are_those_of_the_committed_files():
    for name in ("gains", "gains-transformation"):
        assert gains.table(json.loads((HERE / f"{name}-cpu.json").read_text())["rows"]) in SAID
    result = json.loads((HERE / "processes-cpu.json").read_text())
    for name in ("speed_up", "efficiency"):
        assert (
            f"{result[name]['median']:.2f} ({result[name]['min']:.2f} to {result[name]['max']:.2f})"
            in SAID
        )
    assert (
        f"{result['speed_up']['median']:.2f} times as fast as one"
        in (ROOT / "experiments" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        (against_trl, "--sides theirs", "no side theirs"),
        (against_trl, "--runs 0", "--runs"),
        (growth, "", "--out"),
        (growth, "--out x --sides theirs", "--sides"),
        (gains, "--preset x", "--preset"),
        (gains, "--runs 0", "--runs"),
        (processes, "--turns x", "--turns"),
        (processes, "--processes 0", "--processes"),
        (rollout, "--prompts 0", "at least 1"),
        (gpu_check, "--x", "--x"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, module, arguments, says):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and says in line
    assert line.startswith(f"{module.__name__}: error: ")


ENGINE = {
    "device": "cuda",
    "dtype": "bfloat16",
    "tolerance": 0.1,
    "start, s": 60.0,
    "parity": [0.02, 0.03],
    "sync, s": [1.0, 1.1],
    "rollout, tokens/s": 9000.0,
    "update, bytes": 10e9,
    "planned, bytes": 11e9,
    "before the engine": 20e9,
    "with the engine": 60e9,
    "awake": 62e9,
    "asleep": 23e9,
}
RESUMED = {
    "stopped": 130,
    "resumed": 0,
    "records": [{"step": i, "parity": 0.02} for i in range(1, gpu_check.STEPS + 1)],
    "last": ["done"],
}
FAULTS = {
    "parity": {"parity": [0.02, 0.2]},
    "peak": {"update, bytes": 12e9},
    "sleep": {"asleep": 40e9},
}


def test_the_check_on_a_gpu_judges_parity_peak_and_sleep():
    assert all(check.holds is not False for check in gpu_check.engine_checks(ENGINE))
    for word, change in FAULTS.items():
        wrong = [c.name for c in gpu_check.engine_checks({**ENGINE, **change}) if c.holds is False]
        assert len(wrong) == 1 and word in wrong[0]


def test_the_check_on_a_gpu_judges_a_resumed_run():
    assert all(check.holds is not False for check in gpu_check.resume_checks(RESUMED))
    lost = {**RESUMED, "resumed": 1, "records": RESUMED["records"][:2], "last": ["error: no room"]}
    wrong = [check for check in gpu_check.resume_checks(lost) if check.holds is False]
    assert [check.name for check in wrong] == ["and resumed"] and "no room" in wrong[0].found


def test_a_part_that_fails_is_reported_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "engine_part", gpu_check.used)  # no world: an error
    monkeypatch.setattr(gpu_check, "resume_part", lambda *_: RESUMED)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check.py", "--model", "tiny", "--out", str(tmp_path / "x")]
    )
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    text, figures = (tmp_path / "x.md").read_text(), json.loads((tmp_path / "x.json").read_text())
    assert text.count("**fails**") == 1 and "| engine | TypeError: " in text
    assert "| and resumed | steps [1, 2, 3, 4, 5, 6] | all 6 | holds |" in text
    assert "| TRL | not installed: left out" in text
    assert [check["holds"] for check in figures["checks"]] == [False, True, True, None, None]


def test_the_planned_peak_of_the_check_is_the_plans_without_what_is_there(small_model):
    config, _ = ekipl.parse(gpu_check.flags_of(SMALL, small_model))
    small = policy.Policy.load(small_model)
    prompt = small.encode(workload.make_states(SMALL, small.processor))[0]
    size = sum(parameter.numel() for parameter in small.parameters())
    assert (
        gpu_check.planned(config, small, prompt, SMALL) >= 8 * size
    )  # gradients, and roots in the step
