"""--experts-when unsolved: experts join where none of the policy's own actions is right."""

import pytest
from test_ekipl import CPU
from test_expert_steps import small

import ekipl
from experts.roster import drop_where_solved
from sampling import Action, Group
from training import storage

SOURCES = ["policy", "policy", "careful", "quick"]


@pytest.mark.parametrize(
    "accuracy, joined",
    [
        ([0, 0, 1, 0], True),
        ([0, 1, 1, 0], False),
        ([1, 0, 0, 0], False),
        ([0.9, 0, 1, 1], True),  # nearly right is not right
    ],
)
def test_experts_join_where_no_action_of_the_policy_is_right(accuracy, joined):
    actions = [Action([i], str(i), source) for i, source in enumerate(SOURCES)]
    group = Group(None, None, actions, [1.0, 0.0, 1.0, 1.0], list(accuracy))
    drop_where_solved([group])
    kept = 4 if joined else 2
    assert [action.source for action in group.actions] == SOURCES[:kept]
    assert group.rewards == [f + a for f, a in zip([1, 0, 1, 1], accuracy, strict=True)][:kept]
    assert group.mixture == ([0.5, 0.25, 0.25] if joined else [1.0])


def test_a_format_is_no_solution():
    actions = [Action([i], str(i), source) for i, source in enumerate(SOURCES)]
    group = Group(None, None, actions, [1.0] * 4, [0.0] * 4)
    drop_where_solved([group])
    assert len(group.actions) == 4


def test_a_run_asks_experts_for_its_unsolved_questions_only(tmp_path):
    changes = dict(experts_when="unsolved", states=8, num_samples=4, max_new_tokens=80)
    path = ekipl.train(small(tmp_path, **changes), None, CPU)
    joined = []
    for group in storage.read(path / "samples.jsonl"):
        own = [action for action in group["actions"] if action["source"] == "policy"]
        joined.append(len(group["actions"]) > len(own) == 4)
        assert joined[-1] == all(action["accuracy"] < 1 for action in own)
    assert len(joined) == 8 and 0 < sum(joined) < 8
