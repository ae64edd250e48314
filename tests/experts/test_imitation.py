"""SFT on experts' samples: exactly the right ones, the same in every epoch, from no expert rather
than another, and for an API's answers not a request more than RL makes."""

import random
import sys
from collections import Counter

import pytest
import torch
from conftest import agrees, in_two_processes
from fake_api import KEY
from test_ekipl import CPU, stopped_in_the_step_after, timeless, weights
from test_sft import flags, train_here

import sft
from blocks.dataset import BlocksSet
from blocks.scripted import ACCURACY
from experts import imitation
from experts.roster import make_experts
from rewards import accuracy_reward, format_reward
from sampling import Action, Group, Sample
from training import storage

NAMES = ",".join(ACCURACY)
SMALL = dict(
    method="rft",
    states=12,
    epochs=2,
    batch_size=4,
    micro_batch=2,
    num_samples=3,
    group_size=4,
    eval_every=0,
    save_every=2,
    lr=1e-3,
    weight_decay=0.1,
    name="run",
    rollout="transformers",
)


def small(tmp_path, **changes) -> sft.Config:
    return sft.Config(**{**SMALL, "runs": str(tmp_path), **changes})


def questions(task: str, count: int = 6) -> list:
    whole = BlocksSet(f"{task}-train", count)
    return [whole[i] for i in range(count)]


def is_right(state, text: str) -> bool:
    return format_reward(text) == accuracy_reward(text, state.answer, state.kind) == 1


def imitated(policy, states, experts=NAMES, **changes) -> list[Group]:
    settings = dict(method="rft", num_samples=8, group_size=10**6, max_new_tokens=10**3)
    config = sft.Config(**{**settings, **changes})
    return imitation.imitated(policy, states, make_experts(experts), config)


# --------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("task", ["counting", "structure", "transformation"])
def test_rft_learns_the_experts_right_samples_and_distil_all_as_often_as_they_write_them(
    blocks_policy, task
):
    (state,) = questions(task, 1)
    for expert in make_experts(NAMES):
        density = expert.density(state)
        right = {text: p for text, p in density.items() if is_right(state, text)}
        assert right and len(right) < len(density)
        for method, wanted in (("rft", right), ("distil", density)):
            settings = dict(method=method, num_samples=1000)
            (group,) = imitated(blocks_policy, [state], expert.name, **settings)
            learnt = Counter(action.text for action in group.kept_actions)
            learnt["left out"] = 1000 - len(group.kept)
            assert agrees(learnt, wanted | {"left out": 1 - sum(wanted.values())})


def test_no_right_sample_is_left_out_and_no_wrong_one_learnt(blocks_policy):
    states = questions("counting")
    for group in imitated(blocks_policy, states):
        assert {action.source for action in group.actions} == set(ACCURACY)
        assert len(group.actions) == 8 * len(ACCURACY)
        for i, action in enumerate(group.actions):
            assert (i in group.kept) == is_right(group.state, action.text)
    for group in imitated(blocks_policy, states, group_size=3):
        right = sum(is_right(group.state, action.text) for action in group.actions)
        assert len(group.kept) == len(set(group.kept)) == min(3, right)
        assert all(is_right(group.state, action.text) for action in group.kept_actions)


def test_a_target_is_the_action_that_rl_would_learn(blocks_policy):
    """The policy's tokens and EOS; none where the length limit cuts it."""
    states = questions("counting")
    for group in imitated(blocks_policy, states, method="distil"):
        for action in group.kept_actions:
            ids = blocks_policy.tokenizer(action.text).input_ids
            assert action.tokens == [*ids, blocks_policy.eos_id] and not action.truncated
    for group in imitated(blocks_policy, states, method="distil", max_new_tokens=5):
        assert len(group.kept) == len(group.actions)
        for action in group.actions:
            assert action.truncated and len(action.tokens) == 5
            assert blocks_policy.eos_id not in action.tokens
    assert not any(group.kept for group in imitated(blocks_policy, states, max_new_tokens=5))


def test_no_expert_is_preferred():
    """Each of the right samples is learnt equally often, whoever wrote it and wherever it stands;
    a group with any number of them gives as many as it may."""
    actions = [Action([1], "", "a")] * 3 + [Action([1], "", "b")] * 5
    group, counts = Group(None, None, actions), Counter()
    group.format, group.accuracy = [1.0] * 8, [1.0] * 8
    for seed in range(2000):
        imitation.keep(group, 2, True, random.Random(seed))
        counts.update(group.kept)
    assert sum(counts.values()) == 4000 and agrees(counts, dict.fromkeys(range(8), 1 / 8))


def test_targets_depend_on_the_seed_and_the_state_alone(blocks_policy):
    states = questions("counting")
    together = {g.state.id: g.kept_tokens for g in imitated(blocks_policy, states, group_size=2)}
    apart = {}
    for state in reversed(states):
        (group,) = imitated(blocks_policy, [state], group_size=2)
        apart[state.id] = group.kept_tokens
    assert apart == together
    other = {g.state.id: g.kept_tokens for g in imitated(blocks_policy, states, seed=1)}
    assert other != together


# ---------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, and the targets of each of its batches."""
    batches, update = [], sft.update

    def seen(config, policy, optimizer, batch, *more):
        batches.append({group.state.id: group.kept_tokens for group in batch})
        return update(config, policy, optimizer, batch, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "update", seen)
        return sft.train(small(tmp_path_factory.mktemp("runs")), None, CPU), batches


def test_every_epoch_learns_the_same_samples(finished):
    _, batches = finished
    first, second = {}, {}
    for epoch, mine in ((first, batches[:3]), (second, batches[3:])):
        for batch in mine:
            epoch |= batch
    assert len(first) == 12 and first == second


def test_a_run_tells_what_it_learnt(finished):
    path, batches = finished
    records = storage.read(path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 7))
    for record, batch in zip(records, batches, strict=True):
        targets = sum(batch.values(), [])
        assert record["trained"] == len(targets) and record["skipped"] == 0
        assert record["target_tokens"] == sum(map(len, targets))
        assert sum(record[f"share/{name}"] for name in ACCURACY) == pytest.approx(1)
        accuracies = [record[f"accuracy/{name}"] for name in ACCURACY]
        assert record["right"] <= sum(accuracies) / len(ACCURACY) + 1e-9  # as many of each
    assert records[-1]["loss"] < records[0]["loss"]
    assert (path / "curves.png").exists()


def test_a_resumed_run_equals_one_never_stopped_to_the_bit(finished, tmp_path):
    with stopped_in_the_step_after(4):  # in the second epoch
        sft.train(small(tmp_path), None, CPU)
    path = sft.train(*sft.parse(["--resume", str(tmp_path / "run")]), CPU)
    assert timeless(path) == timeless(finished[0])
    left, right = weights(path), weights(finished[0])
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_learn_what_one_does(finished, tmp_path):
    in_two_processes(train_here, flags(**{**SMALL, "runs": tmp_path}))
    shared, alone = timeless(tmp_path / "run"), timeless(finished[0])
    assert len(shared) == len(alone) == 6
    for record, expected in zip(shared, alone, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


def test_batches_without_a_target_change_no_weight_and_are_counted(tmp_path):
    config = small(tmp_path, max_new_tokens=4, epochs=1, save_every=0)
    path = sft.train(config, None, CPU)
    for record in storage.read(path / "metrics.jsonl"):
        assert (record["skipped"], record["trained"], record["target_tokens"]) == (1, 0, 0)
        assert record["loss"] == record["grad_norm"] == record["truncated"] == record["right"] == 0
    before, after = sft.Policy.load(config.start).state_dict(), weights(path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metrics_of_a_state_that_no_api_answered():
    state, answered = questions("counting", 1)[0], Group(None, None, [])
    figures = imitation.imitation_metrics([answered.summary()])
    assert figures == {"trained": 0, "skipped": 1.0, "right": 0.0}
    texts = [f"<think> so </think> <answer> {state.answer} </answer>", "no"]
    group = Group(state, None, [Action([1], text, "api") for text in texts], kept=[0])
    imitation.give_rewards([group])
    figures = imitation.imitation_metrics([answered.summary(), group.summary()])
    assert figures == {
        **{"trained": 1, "skipped": 0.0, "right": 0.5},
        **{"accuracy/api": 0.5, "share/api": 1.0},
    }


def test_an_answer_that_its_api_cut_is_learnt_without_eos(blocks_policy):
    class Cut:
        name = "cut"

        def sample(self, states, n, seed):
            return [[Sample("<think> 1", None, True)] * n for _ in states]

    config = sft.Config(method="distil", num_samples=2, max_new_tokens=50)
    for group in imitation.imitated(blocks_policy, questions("counting"), [Cut()], config):
        assert len(group.kept) == 2 and group.kept_actions[0].truncated
        assert blocks_policy.eos_id not in group.kept_actions[0].tokens


# -------------------------------------------------------------------------------------------- APIs


@pytest.fixture
def planted_key(monkeypatch):
    monkeypatch.setenv("EXPERT_API_KEY", KEY)


def test_answers_are_collected_ahead_paid_once_and_replayed_offline(
    serve, tell, tmp_path, planted_key
):
    server = serve()
    bought = dict(states=4, batch_size=2, num_samples=3, experts=server.openai)
    bought |= dict(cache=tmp_path / "c.sqlite", runs=tmp_path)
    code, _, err = tell("collect", *flags(**bought))
    assert code == 0 and len(server.bodies) == 4, err
    settings = {**SMALL, **bought, "cache": str(tmp_path / "c.sqlite"), "runs": str(tmp_path)}
    settings["method"] = "distil"
    path = sft.train(sft.Config(**settings, offline=True), None, CPU)
    assert len(server.bodies) == 4
    first = storage.read(path / "metrics.jsonl")
    assert [r["trained"] for r in first] == [6] * 4  # both epochs
    fresh = {**settings, "cache": str(tmp_path / "d.sqlite"), "name": "fresh"}
    path = sft.train(sft.Config(**fresh), None, CPU)
    second = storage.read(path / "metrics.jsonl")
    assert len(server.bodies) == 8 and sum(r["api/requests"] for r in second) == 4
    for one, other in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "trained", "right", "share/openai:tiny"):
            assert one[name] == other[name]


# ------------------------------------------------------------------------------- the other methods


@pytest.mark.parametrize("method", ["cot", "bare"])
def test_flags_of_experts_do_not_change_what_learns_from_records(tmp_path, method):
    short = dict(method=method, states=4, save_every=0)
    plain = sft.train(small(tmp_path, **short), None, CPU)
    others = dict(experts="none", num_samples=7, group_size=1, offline=True, cache="nowhere")
    flagged = sft.train(small(tmp_path, **short, **others, name="flagged"), None, CPU)
    assert timeless(plain) == timeless(flagged)
    assert not any("share" in name or "api" in name for name in timeless(plain)[0])
    left, right = weights(plain), weights(flagged)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_plan_is_that_of_the_actions_learnt():
    more = ["--group-size", "4", "--num-samples", "3"]
    cot, imitating = ["--plan", "24"], ["--plan", "24", "--method", "rft"]
    assert sft.run(cot) == sft.run(cot + more) and "1 actions of" in sft.run(cot)
    assert "4 actions of" in sft.run(imitating + more) and "8 actions of" in sft.run(imitating)


def test_real_data_needs_experts_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--preset", "counting-2b", "--method", "rft"])
    with pytest.raises(SystemExit) as stop:
        sft.main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "--experts" in error and "\n" not in error
