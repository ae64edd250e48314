"""--expert-steps K: Vision-EKIPL for K steps, then GRPO, and no question to an API."""

import json
import shutil

import pytest
import torch
from fake_api import KEY
from test_ekipl import CPU, stopped_in_the_step_after, timeless, weights
from test_sft import flags

import ekipl
from training import storage

K = 2
SMALL = dict(
    states=16,
    batch_size=4,
    num_samples=2,
    group_size=3,
    micro_batch=2,
    max_new_tokens=12,
    eval_every=0,
    save_every=1,
    log_groups=4,
    lr=1e-3,
    name="run",
    rollout="transformers",
)


def small(tmp_path, **changes) -> ekipl.Config:
    return ekipl.Config(**{**SMALL, "runs": str(tmp_path), **changes})


def same_weights(one, other) -> bool:
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def resumed(path):
    return ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)


def groups_of(path, steps) -> list[dict]:
    return [group for group in storage.read(path / "samples.jsonl") if group["step"] in steps]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four steps, the first two with experts."""
    return ekipl.train(small(tmp_path_factory.mktemp("runs"), expert_steps=K), None, CPU)


def test_later_steps_have_no_expert(finished):
    for group in groups_of(finished, range(1, 5)):
        sources = [action["source"] for action in group["actions"]]
        kept = sum(action["kept"] for action in group["actions"])
        joined = group["step"] <= K
        assert (len(sources), kept) == ((6, 3) if joined else (2, 2))  # min(G, N)
        assert set(sources) == {"policy", *(["careful", "quick"] if joined else [])}
    for record in storage.read(finished / "metrics.jsonl"):
        assert ("accuracy/careful" in record) == (record["step"] <= K)
        assert record["expert_share"] == 0 or record["step"] <= K
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_steps_are_vision_ekipls_and_the_later_ones_grpos(finished, tmp_path):
    with stopped_in_the_step_after(K):
        ekipl.train(small(tmp_path, name="throughout"), None, CPU)
    throughout = tmp_path / "throughout"
    assert timeless(throughout)[:K] == timeless(finished)[:K]
    assert groups_of(throughout, range(1, K + 1)) == groups_of(finished, range(1, K + 1))
    assert timeless(throughout)[K] != timeless(finished)[K]
    grpo = shutil.copytree(throughout, tmp_path / "grpo", symlinks=True)
    config = json.loads((grpo / "config.json").read_text())
    (grpo / "config.json").write_text(json.dumps(config | {"experts": "none"}))
    resumed(grpo)
    assert timeless(grpo) == timeless(finished) and same_weights(grpo, finished)
    assert groups_of(grpo, range(1, 5)) == groups_of(finished, range(1, 5))


def test_a_resumed_run_equals_one_never_stopped_to_the_bit(finished, tmp_path):
    with stopped_in_the_step_after(K + 1):
        ekipl.train(small(tmp_path, expert_steps=K), None, CPU)
    path = resumed(tmp_path / "run")
    assert timeless(path) == timeless(finished) and same_weights(path, finished)


def test_more_steps_than_there_are_and_no_experts_at_all_are_allowed():
    for changes in (dict(expert_steps=10**6), dict(expert_steps=3, experts="none")):
        ekipl.check(ekipl.Config(**changes), 1, False)


def test_only_the_states_of_these_steps_are_bought(serve, tell, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    server = serve()
    bought = dict(states=16, batch_size=4, num_samples=2, experts=server.openai, expert_steps=1)
    code, out, err = tell("collect", *flags(**bought, cache=tmp_path / "c.sqlite"))
    assert code == 0 and len(server.bodies) == 4 and "bought 8 answers" in out, err
    code, out, _ = tell("collect", "--dry-run", *flags(**bought, cache=tmp_path / "none.sqlite"))
    assert code == 0 and "4 states" in out and len(server.bodies) == 4
    settings = {**bought, "save_every": 0}
    offline = small(tmp_path, **settings, cache=str(tmp_path / "c.sqlite"), offline=True)
    first = storage.read(ekipl.train(offline, None, CPU) / "metrics.jsonl")
    assert [record["api/cache_hits"] for record in first] == [8, 0, 0, 0]
    online = small(tmp_path, **settings, cache=str(tmp_path / "d.sqlite"), name="online")
    second = storage.read(ekipl.train(online, None, CPU) / "metrics.jsonl")
    assert len(server.bodies) == 8 and sum(r["api/requests"] for r in second) == 4
    assert [r["reward"] for r in first] == [r["reward"] for r in second]


def test_a_negative_number_is_told_in_one_line(tell):
    code, _, err = tell("collect", "--experts", "openai:tiny", "--expert-steps", -1, "--dry-run")
    assert code == 2 and "--expert-steps must be 0 or above" in err
