"""The training loop: gradients that do not depend on how the batch is split, exact resume, and
errors told in one line."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import held_elsewhere, in_two_processes
from PIL import Image
from safetensors.torch import load_file, save_file

import ekipl
import sampling
from data.state import State
from ekipl import Config
from policy import Policy
from sampling import Action, Group, select
from training import checkpointing, console, curves, settings, storage
from training.console import UserError
from training.distributed import World
from training.metrics import step_metrics
from training.steplog import StepLog

ROOT = Path(__file__).resolve().parent.parent
CPU = World(0, 1, torch.device("cpu"))
# A whole run in a second or two.
SMALL = dict(
    states=24,
    batch_size=4,
    num_samples=2,
    group_size=3,
    micro_batch=2,
    max_new_tokens=12,
    eval_every=3,
    eval_states=4,
    save_every=2,
    lr=1e-3,
    name="run",
    rollout="transformers",
)


def small(tmp_path, **changes) -> Config:
    return Config(**{**SMALL, "runs": str(tmp_path), **changes})


def states_of_two_sizes(count: int) -> list[State]:
    """Every second one has two pictures."""
    sizes = [[(32, 32)], [(64, 32), (32, 48)]]
    return [
        State(
            str(i),
            tuple(
                Image.linear_gradient("L").rotate(37 * i).resize(size).convert("RGB")
                for size in sizes[i % 2]
            ),
            "how many red cubes ?",
            "1",
            "discrete",
        )
        for i in range(count)
    ]


def fixed_groups(policy: Policy, count: int, ragged: bool = False) -> list[Group]:
    """Groups with seeded actions, rewards and expert densities, the same in every process."""
    states = states_of_two_sizes(count)
    groups = []
    for i, (state, prompt) in enumerate(zip(states, policy.encode(states), strict=True)):
        generator = torch.Generator().manual_seed(i)
        words = [
            t
            for t in range(len(policy.tokenizer))
            if t not in set(policy.suppressed_ids.tolist()) | {policy.eos_id}
        ]
        sources = ["policy"] * 3 + ["careful"] * 3
        if ragged and i % 3 == 0:  # this state's expert did not answer
            sources = ["policy"] * 3
        actions = []
        for source in sources:
            length = int(torch.randint(1, 9, (), generator=generator))
            chosen = torch.randint(len(words), (length,), generator=generator)
            actions.append(Action([words[j] for j in chosen] + [policy.eos_id], "", source))
        group = Group(state, prompt, actions)
        group.format = torch.randint(0, 2, (len(actions),), generator=generator).tolist()
        group.accuracy = torch.randint(0, 2, (len(actions),), generator=generator).tolist()
        groups.append(group)
    select(groups, 4, "candidates", "policy_first", "top", random.Random(0))
    for group in groups:
        experts = [(-3.0 if a.source == "careful" else -torch.inf) for a in group.kept_actions]
        group.expert_logps = [
            [logp] if "careful" in {a.source for a in group.actions} else [] for logp in experts
        ]
    return groups


def gradient_of(
    model_dir, world: World, config: Config, count: int = 6, ragged: bool = False
) -> dict[str, torch.Tensor]:
    """The gradient that one update on this process's share of `fixed_groups` leaves, before any
    clipping."""
    policy, reference = Policy.load(model_dir), Policy.load(model_dir)
    with torch.no_grad():  # a reference that differs, so that the KL term has a gradient
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    learner = world.data_parallel(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    groups = world.shard(fixed_groups(policy, count, ragged))
    ekipl.update(config, learner, reference, optimizer, groups, world, lr=0.0)
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def gradient_here(model_dir, config: Config, count: int) -> dict:
    """In one of two processes; arrays, since tensors would be handed over in shared memory."""
    return {
        name: gradient.numpy()
        for name, gradient in gradient_of(model_dir, World.join("cpu"), config, count).items()
    }


def assert_same_gradient(left: dict, right: dict) -> None:
    assert left.keys() == right.keys() and any(g.abs().max() > 1e-3 for g in right.values())
    for name in left:
        torch.testing.assert_close(
            torch.as_tensor(left[name]),
            right[name],
            atol=1e-6,
            rtol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def update_config(**changes) -> Config:
    return Config(
        **{
            **dict(batch_size=6, micro_batch=6, group_size=4, max_grad_norm=1e9, beta=0.04),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def whole_batch_gradients(random_model_dir):
    """By estimator, one process, one micro-batch."""
    return {
        e: gradient_of(random_model_dir, CPU, update_config(estimator=e))
        for e in ("uncorrected", "is", "snis")
    }


@pytest.mark.parametrize("estimator", ["uncorrected", "is", "snis"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(
    random_model_dir, whole_batch_gradients, micro_batch, estimator
):
    config = update_config(micro_batch=micro_batch, estimator=estimator)
    assert_same_gradient(
        gradient_of(random_model_dir, CPU, config), whole_batch_gradients[estimator]
    )


def test_micro_batches_do_not_change_the_gradient_of_groups_of_different_sizes(random_model_dir):
    whole = gradient_of(random_model_dir, CPU, update_config(), ragged=True)
    assert_same_gradient(
        gradient_of(random_model_dir, CPU, update_config(micro_batch=2), ragged=True), whole
    )


@pytest.mark.parametrize("expert_loss, loss_mean", [("luffy", "token"), ("rl-plus", "constant")])
def test_micro_batches_do_not_change_the_gradient_of_the_methods_next_door(
    random_model_dir, whole_batch_gradients, expert_loss, loss_mean
):
    changes = dict(expert_loss=expert_loss, loss_mean=loss_mean)
    whole = gradient_of(random_model_dir, CPU, update_config(**changes), ragged=True)
    config = update_config(**changes, micro_batch=2)
    assert_same_gradient(gradient_of(random_model_dir, CPU, config, ragged=True), whole)
    usual = whole_batch_gradients["uncorrected"]
    assert max((whole[name] - usual[name]).abs().max() for name in usual) > 1e-3


@pytest.mark.parametrize("estimator", ["uncorrected", "is", "snis"])
def test_an_unknown_density_says_nothing_of_weights_and_stops_estimators_that_need_it(
    random_model_dir, estimator
):
    policy = Policy.load(random_model_dir)
    groups, optimizer = fixed_groups(policy, 4), torch.optim.SGD(policy.parameters(), lr=0.0)
    groups[1].expert_logps = None
    config = update_config(batch_size=4, micro_batch=1, estimator=estimator, beta=0.0)

    def update() -> None:
        ekipl.update(config, policy, None, optimizer, groups, CPU, lr=0.0)

    if estimator == "uncorrected":
        update()
        unknown = [group.measured["weights"] is None for group in groups]
        assert unknown == [False, True, False, False]
    else:
        with pytest.raises(UserError, match=f"{estimator} needs the density of every expert"):
            update()


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_says_so_and_changes_no_weight(
    random_model_dir, monkeypatch, norm
):
    policy = Policy.load(random_model_dir)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    monkeypatch.setattr(ekipl, "clip_gradients", lambda policy, limit: norm)
    config = update_config(batch_size=2, beta=0.0)
    with pytest.raises(console.UserError, match="not finite.*lower --lr"):
        ekipl.update(config, policy, None, optimizer, fixed_groups(policy, 2), CPU, lr=1.0)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_estimators_differ(whole_batch_gradients):
    name = next(iter(whole_batch_gradients["is"]))
    a, b, c = (whole_batch_gradients[e][name] for e in ("uncorrected", "is", "snis"))
    assert not torch.allclose(a, b) and not torch.allclose(a, c) and not torch.allclose(b, c)


def test_gradient_checkpointing_does_not_change_the_gradient(
    random_model_dir, whole_batch_gradients, monkeypatch
):
    load = Policy.load
    monkeypatch.setattr(Policy, "load", lambda path: load(path, gradient_checkpointing=True))
    assert_same_gradient(
        gradient_of(random_model_dir, CPU, update_config()), whole_batch_gradients["uncorrected"]
    )


def torchrun(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )


@pytest.mark.parametrize(
    "count, micro_batch, changes",
    [(6, 1, {}), (5, 2, {}), (5, 2, dict(expert_loss="luffy", loss_mean="token"))],
)  # 5: one process has a state more than the other
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(
    random_model_dir, count, micro_batch, changes
):
    one = gradient_of(random_model_dir, CPU, update_config(batch_size=count, **changes), count)
    for gradient in in_two_processes(
        gradient_here,
        random_model_dir,
        update_config(batch_size=count, micro_batch=micro_batch, **changes),
        count,
    ):
        assert_same_gradient(gradient, one)


def test_two_processes_train_and_leave_one_log(tmp_path):
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in {**SMALL, "states": 8, "runs": tmp_path}.items()
    ]
    done = torchrun("ekipl.py", *flags)
    assert done.returncode == 0, done.stderr
    records = storage.read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_no_process_hangs_when_one_raises(tmp_path):
    # The second process stops while the first waits for it.
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, sys.argv[1]); import ekipl\n"
        "sample = ekipl.total_groups\n"
        "def fails(*arguments):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('broken on purpose')\n"
        "    return sample(*arguments)\n"
        "ekipl.total_groups = fails; sys.argv = sys.argv[1:]; ekipl.main()\n"
    )
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in {**SMALL, "runs": tmp_path, "eval_every": 0}.items()
    ]
    done = torchrun(str(script), str(ROOT), *flags, timeout=300)
    assert done.returncode != 0 and "broken on purpose" in done.stderr


# ------------------------------------------------------------------------------ weights and metrics


def drawn_group(rng: random.Random, densities: dict[str, list[float]], n: int = 2) -> Group:
    """n one-token actions of each source; the reward of action a is a."""
    actions = [
        Action([a], "", source)
        for source, density in densities.items()
        for a in rng.choices(range(len(density)), density, k=n)
    ]
    rewards = [float(action.tokens[0]) for action in actions]
    return Group(None, None, actions, [0.0] * len(rewards), rewards)


@pytest.mark.parametrize("g", [1, 3, 9])  # 9: more than there are, so that all are kept
def test_where_any_are_kept_the_weights_have_the_mean_1(g):
    """E_q[w] = sum q pi_old / q = 1: what is kept at random is a fair sample of q, and w_S = w."""
    policy, expert = [0.6, 0.3, 0.1], [0.05, 0.15, 0.8]
    rng, weights = random.Random(g), []
    groups = [drawn_group(rng, {"policy": policy, "expert": expert}) for _ in range(1000)]
    select(groups, g, "candidates", "policy_first", "random", rng)
    for group in groups:
        group.expert_logps = [[math.log(expert[a.tokens[0]])] for a in group.kept_actions]
        old_logp = torch.tensor([[[math.log(policy[a.tokens[0]])] for a in group.kept_actions]])
        weights.append(sampling.group_log_weights([group], old_logp, g).exp().mean())
    weights = torch.stack(weights)
    error = weights.std() / len(weights) ** 0.5
    assert 0 < error < 0.03 and abs(weights.mean() - 1) < 4 * error


def test_step_metrics_take_ess_by_state_and_tell_where_all_advantages_are_equal():
    def of_group(advantages: list[float], weights: list[float]) -> dict:
        n = len(advantages)
        told = {name: [1.0] * n for name in ("format", "accuracy", "tokens", "objective", "kl")}
        return {
            **told,
            "sources": ["policy"] * n,
            "truncated": [False] * n,
            "clip_fraction": [0.0] * n,
            "kept": list(range(n)),
            "advantages": advantages,
            "weights": weights,
        }

    dead, same, apart = [0.0, 0.0], [0.7, 0.7, 0.7], [0.7, 0.7, 0.2, -1.0]
    groups = [of_group(dead, [2, 2]), of_group(same, [1, 0, 0]), of_group(apart, [3, 3, 3, 0])]
    found = step_metrics(groups)
    assert found["dead_groups"] == pytest.approx(1 / 3)
    assert found["equal_advantages"] == pytest.approx(2 / 3)
    assert found["negative"] == pytest.approx(1 / 9)  # of nine kept actions one
    assert found["ess"] == pytest.approx((2 + 1 + 3) / 3)
    assert found["ess_share"] == pytest.approx((1 + 1 / 3 + 3 / 4) / 3)
    groups[1]["weights"] = None  # one density unknown: nothing is said of any weight
    assert "ess" not in step_metrics(groups) and step_metrics(groups)["equal_advantages"] > 0


# --------------------------------------------------------------------------------------- whole runs


def weights(path: Path) -> dict[str, torch.Tensor]:
    return Policy.load(path / "model").state_dict()


def timeless(path: Path) -> list[dict]:
    return [
        {k: v for k, v in r.items() if not k.startswith("seconds/")}
        for r in storage.read(path / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return ekipl.train(small(tmp_path_factory.mktemp("runs")), None, CPU)


def test_a_run_leaves_what_it_says(finished):
    assert json.loads((finished / "config.json").read_text())["states"] == 24
    records = storage.read(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(7))
    names = (
        "reward accuracy format expert_share dead_groups equal_advantages reward_std ess ess_share "
        "kl clip_fraction loss grad_norm lr tokens"
    ).split()
    assert all(name in record for record in records[1:] for name in names)
    assert [r["step"] for r in records if "eval/counting-id" in r] == [0, 3, 6]
    phases = (
        "preprocessing rollout experts rewards selection packing reference forward backward "
        "optimizer sync logging"
    ).split()
    for record in records[1:]:
        timed = [key.removeprefix("seconds/") for key in record if key.startswith("seconds/")]
        assert sorted(timed) == sorted(
            phases + ["evaluation"] * (record["step"] in (3, 6))
        ) and all(record[f"seconds/{phase}"] >= 0 for phase in phases)
    group = storage.read(finished / "samples.jsonl")[0]
    assert len(group["actions"]) == 6 and sum(action["kept"] for action in group["actions"]) == 3
    assert {action["source"] for action in group["actions"]} == {"policy", "careful", "quick"}
    assert all(
        (finished / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "time.png")
    )
    assert not list(finished.glob("*.tmp")) and len(checkpointing.checkpoints(finished)) == 1
    Policy.load(finished / "model")


@contextmanager
def stopped_in_the_step_after(step: int):
    """A training run inside is interrupted in that step, when it is logged and not yet saved."""
    write = StepLog.write

    def stop(self, record, *groups):
        write(self, record, *groups)
        if record["step"] == step + 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepLog, "write", stop)
        yield


@pytest.mark.parametrize(
    "stop_after", [3, 4]
)  # in the middle of two checkpoints, and right after one
def test_a_resumed_run_equals_one_never_stopped_to_the_bit(finished, tmp_path, stop_after):
    with stopped_in_the_step_after(stop_after):
        ekipl.train(small(tmp_path), None, CPU)
    torch.rand(7)  # the random state of the process that resumes is another one
    stored, path = ekipl.parse(["--resume", str(tmp_path / "run")])
    ekipl.train(stored, path, CPU)
    assert timeless(path) == timeless(finished)
    assert storage.read(path / "samples.jsonl") == storage.read(finished / "samples.jsonl")
    left, right = weights(path), weights(finished)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_resuming_with_other_processes_says_that_the_samples_differ(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    file = checkpointing.last_checkpoint(path) / "trainer.pt"
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert "processes" not in capsys.readouterr().err
    torch.save(torch.load(file, weights_only=True) | {"processes": 4}, file)
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert "made by 4 processes and goes on with 1" in capsys.readouterr().err


def test_resuming_with_other_threads_says_that_sums_are_rounded_otherwise(
    finished, tmp_path, capsys
):
    path = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    file = checkpointing.last_checkpoint(path) / "trainer.pt"
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert "threads" not in capsys.readouterr().err
    trainer = torch.load(file, weights_only=True)
    assert trainer["threads"] == torch.get_num_threads()
    torch.save(trainer | {"threads": 64}, file)
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    said = [line for line in capsys.readouterr().err.splitlines() if "threads" in line]
    assert len(said) == 1 and "64 threads" in said[0] and "OMP_NUM_THREADS=64" in said[0]


def broken_moment(trainer: dict, checkpoint: Path) -> None:
    trainer["optimizer"]["state"][1]["exp_avg_sq"].view(-1)[3] = float("inf")


def broken_counter(trainer: dict, checkpoint: Path) -> None:
    trainer["optimizer"]["state"][0]["step"] = torch.tensor(float("nan"))


def misshapen_moment(trainer: dict, checkpoint: Path) -> None:
    trainer["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)


def broken_weight(trainer: dict, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def no_step(trainer: dict, checkpoint: Path) -> None:
    trainer["step"] = "six"


@pytest.mark.parametrize(
    "damage", [broken_moment, broken_counter, misshapen_moment, broken_weight, no_step]
)
def test_no_run_goes_on_from_a_checkpoint_that_is_broken_inside(finished, tmp_path, damage):
    path = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    checkpoint = checkpointing.last_checkpoint(path)
    trainer = torch.load(checkpoint / "trainer.pt", weights_only=True)
    damage(trainer, checkpoint)
    torch.save(trainer, checkpoint / "trainer.pt")
    before = {file: file.read_bytes() for file in path.glob("*.jsonl")}
    with pytest.raises(console.UserError) as error:
        ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert before == {file: file.read_bytes() for file in path.glob("*.jsonl")}


def test_a_run_has_one_trainer(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    with held_elsewhere(path), pytest.raises(console.UserError, match="another process"):
        ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)


def test_a_resumed_run_makes_model_what_its_newest_checkpoint_is(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")  # with what the link points to
    assert not (path / "model").is_symlink()
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert (path / "model").resolve() == checkpointing.last_checkpoint(path).resolve()
    (path / "model").unlink()
    ekipl.train(*ekipl.parse(["--resume", str(path)]), CPU)
    assert (path / "model").resolve() == checkpointing.last_checkpoint(path).resolve()


def test_a_run_goes_on_without_pictures(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves.plt.Figure, "savefig", full)
    path = ekipl.train(small(tmp_path, eval_every=0), None, CPU)
    assert storage.read(path / "metrics.jsonl")[-1]["step"] == 6
    assert "without its pictures" in capsys.readouterr().err


def test_a_killed_run_leaves_a_usable_checkpoint(tmp_path):
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in {
            **SMALL,
            "states": 4000,
            "save_every": 1,
            "eval_every": 0,
            "runs": tmp_path,
        }.items()
    ]
    process = subprocess.Popen(
        [sys.executable, "ekipl.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 90
    while not checkpointing.checkpoints(tmp_path / "run") and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = checkpointing.last_checkpoint(tmp_path / "run")
    Policy.load(last)
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    assert trainer["step"] == int(last.name.split("-")[1])
    assert storage.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= trainer["step"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(experts="none", group_size=2),
        dict(experts="quick", advantage="selected"),
        dict(estimator="is"),
        dict(estimator="snis", ties="policy_first"),
        dict(selection="random", beta=0.0),
        dict(expert_loss="luffy", beta=0.0),
        dict(expert_loss="rl-plus", experts_when="unsolved"),
        dict(loss_mean="token"),
        dict(loss_mean="constant", advantage_std=False),
        dict(updates_per_batch=4, lr=3e-2),
        dict(task="structure"),
        dict(task="transformation", max_new_tokens=80, gradient_checkpointing=True),
    ],
    ids=str,
)
def test_every_method_runs(tmp_path, changes):
    path = ekipl.train(small(tmp_path, states=8, eval_every=0, **changes), None, CPU)
    records = storage.read(path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert (
        all(record["grad_norm"] > 0 for record in records) or changes.get("advantage") == "selected"
    )
    sources = {
        action["source"]
        for group in storage.read(path / "samples.jsonl")
        for action in group["actions"]
    }
    assert sources == {"policy", *changes.get("experts", "careful,quick").split(",")} - {"none"}
    if "updates_per_batch" in changes:
        assert max(record["clip_fraction"] for record in records) > 0
    if changes == dict(estimator="is"):
        assert all(record["weight_q95"] <= 3 + 1e-6 for record in records)  # w <= m + 1 (A.5)


def test_the_learning_rate_warms_up_then_falls_as_a_cosine():
    config = Config(states=100 * 4, batch_size=4, lr=1.0, warmup=0.1)
    rates = [settings.learning_rate(config, step) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == pytest.approx(1.0)
        and max(rates) == pytest.approx(1.0)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 0.001


def test_an_epoch_sees_every_question_once(tmp_path, monkeypatch):
    seen, sample = [], sampling.total_groups
    monkeypatch.setattr(
        ekipl,
        "total_groups",
        lambda states, *rest: seen.extend(s.id for s in states) or sample(states, *rest),
    )
    ekipl.train(small(tmp_path, states=8, epochs=2, eval_every=0), None, CPU)
    assert (
        len(seen) == 16
        and len(set(seen)) == 8
        and set(seen[:8]) == set(seen[8:])
        and seen[:8] != seen[8:]
    )


# ----------------------------------------------------------------------------- mistakes of the user


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        ekipl.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for setting in dataclasses.fields(Config):
        assert f"--{setting.name.replace('_', '-')}" in text and setting.metadata["help"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--preset", "nope"], "preset"),
        (["--nope", "1"], "--nope"),
        (["--lr", "fast"], "lr"),
        (["--lr", "nan"], "--lr"),
        (["--estimator", "best"], "estimator"),
        (["--expert-loss", "luffy", "--experts", "none"], "--expert-loss luffy is about experts"),
        (["--experts-when", "unsolved", "--experts", "none"], "--experts-when unsolved is about"),
        (["--tracker", "wandb", "--group-size", "99"], "--group-size 99 is more than"),
        (["--expert-loss", "rl-plus", "--estimator", "is"], "no weights for --expert-loss rl-plus"),
        (["--loss-mean", "token", "--estimator", "snis"], "use --loss-mean action"),
        (["--experts-when", "unsolved", "--estimator", "is"], "no weights for --experts-when"),
        (["--experts", "gpt-9"], "gpt-9"),
        (["--group-size", "25"], "24 candidates"),
        (["--states", "0"], "--states"),
        (["--states", "10"], "batch"),
        (["--batch-size", "0"], "--batch-size"),
        (["--beta", "-1"], "--beta"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--runs", "{file}"], "cannot make"),
        (["--name", "taken"], "exists"),
        (["--resume", "{runs}/missing"], "no run"),
        (["--resume", "{runs}/taken"], "no run of this program"),
        (["--resume", "{runs}/foreign"], "another version"),
        (["--resume", "{runs}/unsaved"], "before its first checkpoint"),
        (["--resume", "{runs}/unsaved", "--lr", "1"], "leave out --lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    for name, config in (
        ("taken", None),
        ("foreign", {"a": 1}),
        ("unsaved", dataclasses.asdict(Config())),
    ):
        (tmp_path / name).mkdir()
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    arguments = [argument.format(file=tmp_path / "file", runs=tmp_path) for argument in arguments]
    if "--runs" not in arguments and "--resume" not in arguments:
        arguments += ["--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ekipl.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        ekipl.main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert (
        error.startswith("ekipl.py: error:")
        and says in error
        and "\n" not in error
        and "Traceback" not in error
    )
