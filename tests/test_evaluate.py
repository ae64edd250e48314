"""evaluate.py: Pass@k is what drawing k answers gives, accuracy is Table 1's, exact is what is wholly right."""

import sys
from itertools import combinations
from types import SimpleNamespace

import pytest

import evaluate
from evaluate import answer_greedily, pass_at_k, score
from sampling import Action


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize("n, c, k, expected", [
    (1, 0, 1, 0.0), (1, 1, 1, 1.0), (8, 0, 8, 0.0), (8, 1, 8, 1.0), (8, 3, 6, 1.0), (8, 2, 1, 0.25),
    (1000, 1, 500, 0.5), (4000, 4, 2000, 0.9375),  # binomials beyond what a float holds
])  # fmt: skip
def test_pass_at_k_at_the_edges(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-3 if n == 4000 else 1e-12)


@pytest.mark.parametrize("n, c, k", [(4, -1, 1), (4, 5, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1), (0, 0, 0)])
def test_pass_at_k_refuses_what_is_no_draw(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_score_of_a_worked_example():
    two_calls = "change_color ( 0 , red ) change_size ( 1 , small )"
    nearly = two_calls.replace("small", "large")
    asked = [
        ("3", "discrete", "<think> 3 </think> <answer> 3 </answer>", 10, False),  # right
        ("3", "discrete", "<answer> 4 </answer>", 4, False),  # wrong, and in no format
        ("100", "math", "<think> so </think> <answer> 110 </answer>", 8, False),  # 10 % off: three quarters
        # One call right, of the other all but the value: Reason-RFT's test score is 0.75, its reward 0.5.
        (two_calls, "function", f"<think> so </think> <answer> {nearly} </answer>", 12, False),
        (two_calls, "function", "<think> so", 16, True),
    ]
    states = [SimpleNamespace(answer=answer, kind=kind) for answer, kind, *_ in asked]
    actions = [Action([7] * tokens, text, "policy", truncated) for _, _, text, tokens, truncated in asked]
    assert score(states, actions) == pytest.approx({
        "accuracy": (1 + 0 + 0.75 + 0.75 + 0) / 5,
        "exact": 1 / 5,  # only the first
        "format": 3 / 5,
        "tokens": 50 / 5,
        "truncated": 1 / 5,
    })  # fmt: skip


def test_score_wants_one_action_for_each_state():
    with pytest.raises(ValueError):
        score([SimpleNamespace(answer="3", kind="math")] * 2, [Action([1], "3", "policy")])


@pytest.mark.parametrize("batch", [1, 3, 7, 50])
def test_greedy_answers_come_in_the_order_of_the_states(batch):
    sizes = []

    def greedy(prompts):
        sizes.append(len(prompts))
        return [f"answer to {prompt}" for prompt in prompts]

    policy = SimpleNamespace(encode=lambda states: [f"prompt {state}" for state in states])
    sampler = SimpleNamespace(policy=policy, greedy=greedy)
    assert answer_greedily(sampler, list(range(7)), batch) == [f"answer to prompt {i}" for i in range(7)]
    assert max(sizes) <= batch


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_the_command_prints_a_line_for_each_set(random_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.torch.cuda, "is_available", lambda: False)
    names = ["counting-id", "transformation-left"]
    run(monkeypatch, random_model_dir, "--sets", *names, "--states", 2, "--samples", 3, "--max-new-tokens", 3)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == "set accuracy exact format tokens pass@1 pass@2".split()
    assert [line.split()[0] for line in lines] == names
    for line in lines:
        accuracy, exact, form, tokens, *passes = map(float, line.split()[1:])
        assert 1 <= tokens <= 3 and not any([accuracy, exact, form, *passes])  # a random model knows nothing


@pytest.mark.parametrize("model, names, message", [
    ("random", "counting-left", "no set 'counting-left'"),
    ("empty", "counting-id", "cannot load a vision-language model"),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(
    random_model_dir, tmp_path, monkeypatch, capsys, model, names, message
):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, random_model_dir if model == "random" else tmp_path, "--sets", names)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert stopped.value.code == 2 and line.startswith("evaluate.py: error: ") and message in line
