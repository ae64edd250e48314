"""evaluate.py: Pass@k is the share of draws, accuracy is Table 1's, exact is wholly right."""

import dataclasses
import json
import random
import shutil
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
import torch
from conftest import in_two_processes
from fake_api import KEY, Server

import evaluate
from blocks.dataset import BlocksSet
from data.legacy import MATH_VERIFY
from data.predictions import Prediction
from data.state import State
from evaluate import interval, pass_at_k, predictions_of, score_predictions
from experiments import report
from experts.answering import ExpertAnswers
from policy import Policy
from rewards import accuracy_reward
from rollouts import asking
from rollouts.answering import ModelAnswers, answer_greedily
from rollouts.transformers_sampler import TransformersSampler
from sampling import Action, Sample
from training import console, storage
from training.distributed import World

ROOT = Path(__file__).resolve().parent.parent


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(
                    sum(map(any, draws)) / len(draws), abs=1e-12
                )


@pytest.mark.parametrize(
    "n, c, k, expected",
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (8, 3, 6, 1.0),
        (8, 2, 1, 0.25),
        (1000, 1, 500, 0.5),
        (4000, 4, 2000, 0.9375),  # binomials beyond what a float holds
    ],
)
def test_pass_at_k_at_the_edges(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-3 if n == 4000 else 1e-12)


@pytest.mark.parametrize(
    "n, c, k", [(4, -1, 1), (4, 5, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1), (0, 0, 0)]
)
def test_pass_at_k_refuses_what_is_no_draw(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_score_of_a_worked_example():
    two_calls = "change_color ( 0 , red ) change_size ( 1 , small )"
    nearly = two_calls.replace("small", "large")
    asked = [
        ("3", "discrete", "<think> 3 </think> <answer> 3 </answer>", 10, False),  # right
        ("3", "discrete", "<answer> 4 </answer>", 4, False),  # wrong, and in no format
        # 10 % off: wrong, whatever its reward.
        ("100", "math", "<think> so </think> <answer> 110 </answer>", 8, False),
        # One call right, of the other all but the value: the test score is 0.75, the reward 0.5.
        (two_calls, "function", f"<think> so </think> <answer> {nearly} </answer>", 12, False),
        (two_calls, "function", "<think> so", 16, True),
    ]
    states = [State("", (), "", answer, kind) for answer, kind, *_ in asked]
    actions = [
        Action([7] * tokens, text, "policy", truncated) for _, _, text, tokens, truncated in asked
    ]
    found = score_predictions(predictions_of(states, actions))
    assert {
        name: found[name] for name in ("accuracy", "exact", "format", "tokens", "truncated")
    } == pytest.approx(
        {
            "accuracy": (1 + 0 + 0 + 0.75 + 0) / 5,
            "exact": 1 / 5,  # only the first
            "format": 3 / 5,
            "tokens": 50 / 5,
            "truncated": 1 / 5,
        }
    )


def test_score_wants_one_action_for_each_state():
    with pytest.raises(ValueError):
        predictions_of([State("", (), "", "3", "math")] * 2, [Action([1], "3", "policy")])


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_greedy_answers_come_in_the_order_of_the_states(batch):
    sizes = []

    def greedy(prompts):
        sizes.append(len(prompts))
        return [f"answer to {prompt}" for prompt in prompts]

    policy = SimpleNamespace(encode=lambda states: [f"prompt {state}" for state in states])
    sampler = SimpleNamespace(policy=policy, greedy=greedy)
    assert answer_greedily(sampler, list(range(7)), batch) == [
        f"answer to prompt {i}" for i in range(7)
    ]
    assert max(sizes) <= batch


@pytest.mark.parametrize(
    "n, right, low, high",
    [
        (10, 0, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (100, 50, 0.4038, 0.5962),
        (20, 3, 0.0524, 0.3604),
    ],
)
def test_the_interval_of_rights_and_wrongs_is_wilsons(n, right, low, high):
    assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(
        (low, high), abs=1e-3
    )  # published values of Wilson's


def test_the_interval_holds_the_mean_95_times_of_100():
    rng = random.Random(0)
    for draw, truth in (
        (lambda: float(rng.random() < 0.3), 0.3),
        (lambda: rng.choice([0.0, 0.25, 0.5, 1.0]), 0.4375),
    ):
        held = 0
        for _ in range(2000):
            low, high = interval([draw() for _ in range(80)])
            held += low <= truth <= high
        assert 0.93 < held / 2000 < 0.97


def test_samples_count_for_pass_at_k_and_the_answer_for_accuracy():
    right, wrong = (f"<think> so </think> <answer> {answer} </answer>" for answer in "34")
    said = [
        Prediction("a", "3", "discrete", right, 5, False, [right, wrong, wrong, wrong]),
        Prediction("b", "3", "discrete", wrong, 5, False, [wrong] * 4),
    ]
    found = score_predictions(said, [1, 2, 4])
    assert (found["accuracy"], found["pass@1"], found["pass@2"], found["pass@4"]) == pytest.approx(
        (0.5, 0.125, 0.25, 0.5)
    )


@pytest.mark.parametrize("answer, accuracy", [("60", 1), ("57", 0), ("62", 0), ("66", 0)])
def test_a_quantity_is_right_or_wrong_where_its_reward_is_between(answer, accuracy):
    text = f"<answer>{answer}</answer>"
    said = Prediction("a", "60", "math", text, 5, False, [text, "none"])
    found = score_predictions([said], [1, 2])
    assert (found["accuracy"], found["exact"], found["pass@1"], found["pass@2"]) == (
        accuracy,
        accuracy,
        accuracy / 2,
        accuracy,
    )
    assert accuracy_reward(text, "60", "math") > 0.5


def test_legacy_asks_no_math_verify_of_sequences_nor_of_equal_text():
    said = [
        Prediction("a", "3", "discrete", "<think>\nso\n</think>\n<answer>\n3\n</answer>", 5, False),
        Prediction("b", "f(0, a)", "function", "<answer>f(0, b)</answer>", 5, False),
    ]
    found = score_predictions(said, legacy=True)
    assert (found["accuracy"], found["exact"]) == (0.75, 0.5)


def test_partial_credit_is_for_function_sequences_only():
    truth = "change_color ( 0 , red )"
    said = Prediction(
        "a",
        truth,
        "function",
        f"<think> so </think> <answer> {truth.replace('red', 'blue')} </answer>",
        5,
        False,
    )
    found = score_predictions([said])
    assert (found["accuracy"], found["exact"]) == (0.5, 0.0)


def run(monkeypatch, *arguments) -> None:
    """Runs evaluate.py or, for its two commands, experiments.report."""
    program = report if arguments[0] in report.COMMANDS else evaluate
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program.main()


def evaluate_here(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *arguments)


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


COMMAND = """
    --sets counting-id transformation-left --states 6 --pass-k 1,3 --max-new-tokens 3
    --rollout transformers
""".split()


@pytest.fixture(scope="module")
def predictions(random_model_dir, tmp_path_factory):
    """A directory of predictions of the random model."""
    out = tmp_path_factory.mktemp("predictions")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, random_model_dir, *COMMAND, "--out", out)
    return out


def test_the_command_prints_a_line_for_each_set_and_saves_what_was_said(
    random_model_dir, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, random_model_dir, *COMMAND, "--out", tmp_path)
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert (
        "accuracy" in head and head.split()[-2:] == ["pass@1", "pass@2"] and str(tmp_path) in last
    )
    parts = ["counting-id", "counting-id/one-step", "counting-id/two-step"]
    assert [line.split()[0] for line in lines] == [*parts, "transformation-left"]
    truncated = head.replace("95 % interval", "low to high").split().index("truncated")
    for line in (lines[0], lines[3]):
        assert line.split()[1:3] == ["6", "0.0"]  # a random model knows nothing
        said = lines_of(tmp_path / f"{line.split()[0]}.jsonl")
        assert line.split()[truncated] == f"{100 * sum(r['truncated'] for r in said) / 6:.1f}"
    said = lines_of(tmp_path / "counting-id.jsonl")
    assert [record["id"] for record in said] == [f"counting-id-0-{i}" for i in range(6)]
    assert all(len(record["samples"]) == 3 and 1 <= record["tokens"] <= 3 for record in said)


def test_answers_to_the_questions_of_another_world_are_not_continued(
    random_model_dir, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, random_model_dir, *COMMAND, "--out", tmp_path)
    file = tmp_path / "counting-id.jsonl"
    records = lines_of(file)
    records[2]["answer"] = "77"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, random_model_dir, *COMMAND, "--out", tmp_path)
    assert stop.value.code == 2 and "answers other questions" in capsys.readouterr().err


def test_what_is_said_depends_on_the_question_alone(predictions, random_model_dir):
    policy = Policy.load(random_model_dir)
    answers = ModelAnswers(TransformersSampler(policy, 3), 0.0, 3)
    expected = lines_of(predictions / "counting-id.jsonl")
    states = [BlocksSet("counting-id", 6)[i] for i in range(6)]
    for batches in ([states[i : i + 1] for i in range(6)], [states[4:], states[1:4], states[:1]]):
        said = {p.id: dataclasses.asdict(p) for batch in batches for p in answers(batch)}
        assert [said[record["id"]] for record in expected] == expected
    (twin,) = answers(
        [dataclasses.replace(states[0], id="twin")]
    )  # each question has random numbers of its own
    assert twin.text == expected[0]["text"] and twin.samples != expected[0]["samples"]


@pytest.mark.parametrize("cut", [0, 150, 700])
def test_an_evaluation_that_was_stopped_goes_on_to_the_same(
    predictions, random_model_dir, tmp_path, monkeypatch, capsys, cut
):
    shutil.copytree(predictions, tmp_path / "here")
    file = tmp_path / "here" / "counting-id.jsonl"
    file.write_text(file.read_text()[:cut])  # killed in the middle of a line
    run(monkeypatch, random_model_dir, *COMMAND, "--out", tmp_path / "here")
    assert file.read_text() == (predictions / "counting-id.jsonl").read_text()


def test_two_processes_say_what_one_says(predictions, random_model_dir, tmp_path):
    in_two_processes(evaluate_here, random_model_dir, *COMMAND, "--out", tmp_path)
    for name in ("counting-id", "transformation-left"):
        assert lines_of(tmp_path / f"{name}.jsonl") == lines_of(predictions / f"{name}.jsonl")


def test_saved_predictions_are_scored_again_without_a_model(predictions, monkeypatch, capsys):
    monkeypatch.setattr(Policy, "load", None)
    run(monkeypatch, "score", predictions)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        "counting-id",
        "counting-id/one-step",
        "counting-id/two-step",
        "transformation-left",
    ]


@pytest.mark.parametrize(
    "command", ["score {predictions}", "{random}", "table {predictions} --out t"]
)
def test_legacy_without_math_verify_is_told_before_anything_is_asked(
    predictions, random_model_dir, monkeypatch, capsys, command
):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    monkeypatch.setattr(Policy, "load", None)
    places = dict(predictions=predictions, random=random_model_dir)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *command.format(**places).split(), "--legacy")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"pip install '{MATH_VERIFY}'" in line


def test_math_verify_is_pinned_in_one_version():
    for file in ("requirements.txt", "data/README.md", ".ci/run"):
        assert MATH_VERIFY in (ROOT / file).read_text(), file


def a_run(place, model, **config):
    """A run's directory as evaluate.py needs it: `model` in it, and its settings."""
    place.mkdir()
    (place / "model").symlink_to(model)
    (place / "metrics.jsonl").write_text("")
    settings = dict(
        data="blocks",
        data_cache="c",
        task="transformation",
        max_new_tokens=2,
        min_pixels=0,
        max_pixels=900,
        method="answer",
    )
    (place / "config.json").write_text(json.dumps(settings | config))
    return place / "model"


def test_a_runs_model_is_asked_as_the_run_says(random_model_dir, tmp_path, monkeypatch, capsys):
    model = a_run(tmp_path / "run", random_model_dir)
    run(monkeypatch, model, "--states", 2, "--rollout", "transformers")
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[1:-1]] == [
        "transformation-id",
        "transformation-left",
        "transformation-right",
    ]
    used = json.loads((tmp_path / "run" / "predictions" / "settings.json").read_text())
    asked = {
        name: used[name] for name in ("data", "mode", "max_new_tokens", "min_pixels", "max_pixels")
    }
    assert asked == dict(
        data="blocks", mode="answer", max_new_tokens=2, min_pixels=None, max_pixels=900
    )
    (told,) = [line for line in said.err.splitlines() if "config.json" in line]
    for flag in (
        "--data blocks",
        "--sets transformation-id",
        "--mode answer",
        "--max-new-tokens 2",
        "--max-pixels 900",
    ):
        assert flag in told


def settled(place, *flags) -> tuple:
    """The flags of a model at `place` after `asking.settle`, and the lines that it returns."""
    parser = console.Parser()
    asking.add_flags(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.place = str(place)
    return args, asking.settle(args)


def test_a_flag_or_a_protocol_counts_more_than_the_run(random_model_dir, tmp_path):
    def beside_a_run(*flags, **config):
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return settled(a_run(place, random_model_dir, **config), *flags)

    args, told = beside_a_run("--sets", "counting-id", "--max-new-tokens", 7)
    assert (args.sets, args.max_new_tokens, args.max_pixels) == (["counting-id"], 7, 900)
    assert "--sets" not in told[0] and "--max-new-tokens" not in told[0]
    args, told = beside_a_run("--protocol", "reason-rft")
    asked = (args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.states)
    assert asked == (768, 0.1, 0.9, 50, None) and "reason-rft" in told[0] and len(told) == 2
    given = "--temperature", 0.0, "--max-new-tokens", 9
    args, _ = beside_a_run("--protocol", "reason-rft", *given)
    assert (args.max_new_tokens, args.temperature, args.top_p) == (9, 0.0, 0.9)
    for method, mode in (("cot", "reason"), ("bare", "bare")):
        assert beside_a_run(method=method)[0].mode == mode
    for bad in (
        dict(data=3),
        dict(task="cooking"),
        dict(max_new_tokens="7"),
        dict(max_pixels=None),
    ):
        with pytest.raises(console.UserError, match=next(iter(bad))):
            beside_a_run(**bad)


def test_a_model_without_a_run_is_asked_by_default(random_model_dir):
    args, told = settled(random_model_dir)
    assert told == []
    assert {name: getattr(args, name) for name in asking.DEFAULTS} == asking.DEFAULTS


def test_the_answer_that_counts_may_be_drawn_from_the_likeliest_tokens(random_model_dir):
    policy = Policy.load(random_model_dir)
    sampler = TransformersSampler(policy, 3)
    states = [BlocksSet("counting-id", 4)[i] for i in range(4)]
    greedy = [p.text for p in ModelAnswers(sampler, 0.0, 2)(states)]
    plain = ModelAnswers(sampler, 1.0, 2)(states)
    assert [p.text for p in plain] != greedy
    for settings in (dict(top_k=1), dict(top_p=1e-9)):
        said = ModelAnswers(sampler, 1.0, 2, **settings)(states)
        assert [p.text for p in said] == greedy
        assert [p.samples for p in said] == [p.samples for p in plain]  # Pass@k's, from all tokens
    assert (sampler.top_p, sampler.top_k, policy.temperature) == (1.0, 0, 1.0)  # as training wants


def test_an_expert_is_evaluated_like_a_model(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "careful", "--sets", "counting-id", "--states", 400, "--out", tmp_path)
    line = capsys.readouterr().out.splitlines()[1].split()
    assert float(line[2]) == pytest.approx(68.1, abs=9)  # Table 1's, within four standard errors


def test_a_question_that_an_expert_does_not_answer_is_asked_again(tmp_path):
    class Sulking:
        name, quiet = "sulking", True

        def sample(self, states, n, seed):
            return [
                []
                if self.quiet and i % 2
                else [Sample("<think> 3 </think> <answer> 3 </answer>")] * n
                for i, _ in enumerate(states)
            ]

    expert, states, file = (
        Sulking(),
        [BlocksSet("counting-id", 5)[i] for i in range(5)],
        tmp_path / "counting-id.jsonl",
    )
    alone = World(0, 1, torch.device("cpu"))
    evaluate.predict(ExpertAnswers(expert, 2), states, file, alone)
    assert len(lines_of(file)) == 3
    expert.quiet = False
    evaluate.predict(ExpertAnswers(expert, 2), states, file, alone)
    assert sorted(record["id"] for record in lines_of(file)) == [state.id for state in states]


def test_a_table_of_runs(predictions, tmp_path, monkeypatch, capsys):
    for name, right in (("A-seed0", 2), ("A-seed1", 4), ("B", 6)):
        (tmp_path / name / "predictions").mkdir(parents=True)
        said = lines_of(predictions / "counting-id.jsonl")
        for i, record in enumerate(said):
            answer = record["answer"] if i < right else "none"
            record["text"] = f"<think> so </think> <answer> {answer} </answer>"
            record["part"] = ""
        (tmp_path / name / "predictions" / "counting-id.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in said)
        )
    runs = [tmp_path / name for name in ("A-seed0", "A-seed1", "B")]
    run(monkeypatch, "table", *runs, "--out", tmp_path / "table")
    text = (tmp_path / "table.md").read_text()
    assert (
        "| A | 50.0 ± 23.6 |" in text
        and "| B | 100.0 |" in text
        and "A,counting-id,0.50000,0.23570,2" in (tmp_path / "table.csv").read_text()
    )
    assert text.strip() == capsys.readouterr().out.strip()
    other = tmp_path / "other" / "B" / "predictions"  # the same method on another set
    other.mkdir(parents=True)
    shutil.copy(
        tmp_path / "A-seed0" / "predictions" / "counting-id.jsonl", other / "counting-ood.jsonl"
    )
    run(monkeypatch, "table", tmp_path / "B", tmp_path / "other" / "B", "--out", tmp_path / "table")
    assert "| B | 100.0 | 33.3 | 66.7 |" in (tmp_path / "table.md").read_text()


def test_the_figures_of_committed_runs(predictions, tmp_path, monkeypatch, capsys):
    committed = ROOT / "experiments" / "results" / "counting"
    for name in ("Vision-EKIPL-seed0", "GRPO-seed0"):
        (tmp_path / name).mkdir()
        shutil.copy(committed / f"{name}.jsonl", tmp_path / name / "metrics.jsonl")
    shutil.copytree(predictions, tmp_path / "Vision-EKIPL-seed0" / "predictions")
    runs = [tmp_path / name for name in ("Vision-EKIPL-seed0", "GRPO-seed0")]
    run(monkeypatch, "figures", *runs, "--out", tmp_path / "figures")
    assert "counting-id: Vision-EKIPL reaches the end of GRPO" in capsys.readouterr().out
    for number in (3, 4, 5):
        assert (tmp_path / "figures" / f"figure{number}.png").read_bytes().startswith(b"\x89PNG")


def test_reason_rft_is_evaluated_by_the_same_command(
    random_model_dir, tmp_path, monkeypatch, capsys
):
    data = miniature.make(tmp_path / "data", size=5)
    out = tmp_path / "predictions"
    sets = ["counting-id", "transformation-left"]
    command = [random_model_dir, "--data", data, "--sets", *sets]
    command += "--mode answer --max-new-tokens 3".split()
    run(monkeypatch, *command, "--out", out, "--data-cache", tmp_path / "c")
    said = capsys.readouterr()
    assert [len(storage.read(out / f"{name}.jsonl")) for name in sets] == [
        5,
        5,
    ] and "counting-id: 5 of 5 records" in said.err
    truths = {p["kind"]: p["answer"] for name in sets for p in storage.read(out / f"{name}.jsonl")}
    assert truths.keys() == {"discrete", "function"} and truths["function"].startswith("change_")
    run(monkeypatch, *command, "--states", 2, "--out", tmp_path / "two")
    assert len(storage.read(tmp_path / "two" / "counting-id.jsonl")) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("{random} --sets counting-left", "no set 'counting-left'"),
        ("{empty} SETS", "cannot load a vision-language model"),
        ("{random} --pass-k 1,zero", "--pass-k"),
        ("{random} --pass-k 0", "--pass-k"),
        ("{random} --states 0", "--states"),
        ("{random} --top-p 0", "--top-p"),
        ("{random} --top-k -1", "--top-k"),
        ("{random} --protocol theirs", "--protocol"),
        ("{random} --data {empty} SETS", "has no test_jsons"),
        ("nobody SETS", "nobody"),
        ("careful SETS --data {empty}", "knows the blocks world only"),
        ("{random} SETS --max-new-tokens 7 --out {predictions}", "max_new_tokens (3, not 7)"),
        ("score {empty}", "no predictions in"),
        ("table {empty} --out {empty}/t", "no predictions in"),
        ("figures {empty} --out {empty}/f", "none of these"),
        ("--nope", "required"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    random_model_dir, predictions, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = dict(random=random_model_dir, empty=tmp_path, predictions=predictions)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments.format(**places).replace("SETS", "--sets counting-id").split())
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("[transformers]", "Loading weights"))
    ]
    program = "experiments.report" if arguments.split()[0] in report.COMMANDS else "evaluate.py"
    assert stopped.value.code == 2 and line.startswith(f"{program}: error: ") and message in line


def test_an_apis_answers_have_the_length_that_a_flag_gives(tmp_path, monkeypatch):
    """A model that thinks needs more than the default, in an evaluation as in training."""
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    server = Server(["good"])
    flags = ["--sets", "counting-id", "--states", 2, "--cache", tmp_path / "c.sqlite"]
    run(monkeypatch, server.openai, *flags, "--out", tmp_path / "o", "--expert-tokens", 4096)
    server.close()
    assert {request["max_completion_tokens"] for request in server.bodies} == {4096}
