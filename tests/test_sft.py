"""sft.py: what is learnt, gradients that do not depend on how the batch is split, exact resume, and
the same commands on real data."""

import dataclasses
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

import miniature
import pytest
import torch
import torch.nn.functional as F
from conftest import in_two_processes
from test_ekipl import CPU, states_of_two_sizes, stopped_in_the_step_after, timeless, weights

import ekipl
import rewards
import sft
from blocks.dataset import BlocksSet
from data import reading, sets
from data.reason_rft import ReasonRFTSet
from data.state import State
from policy import Policy
from sampling import Action, Group
from sft import Config
from training import presets, rundir, storage
from training.checkpointing import checkpoints
from training.distributed import World
from training.settings import TASKS, learning_rate
from training.steplog import StepLog

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    states=24,
    batch_size=4,
    micro_batch=3,
    eval_every=3,
    eval_states=2,
    save_every=2,
    lr=1e-3,
    name="run",
)


def small(tmp_path, **changes) -> Config:
    return Config(**{**SMALL, "runs": str(tmp_path), **changes})


def flags(**settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


# ----------------------------------------------------------------------------------------- the loss


class DoublePolicy(Policy):
    """Computes in float64, where what is left of a difference is no rounding of float32 (gradients
    here are as large as 2)."""

    @classmethod
    def load(cls, path) -> Policy:
        torch.set_default_dtype(torch.float64)
        try:
            return super().load(path, dtype=torch.float64)
        finally:
            torch.set_default_dtype(torch.float32)

    def forward(self, batch):
        torch.set_default_dtype(torch.float64)
        try:
            return super().forward(batch)
        finally:
            torch.set_default_dtype(torch.float32)

    def _token_logp(self, hidden, ids):
        logits = self.model.get_output_embeddings()(hidden) / self.temperature
        return (
            logits.index_fill(1, self.suppressed_ids, -torch.inf)
            .log_softmax(1)
            .gather(1, ids[:, None])[:, 0]
        )


def assert_same_gradient(left: dict, right: dict, atol: float = 1e-8) -> None:
    assert left.keys() == right.keys() and any(
        gradient.abs().max() > 0.1 for gradient in right.values()
    )
    for name in left:
        assert right[name].dtype == torch.float64
        torch.testing.assert_close(
            torch.as_tensor(left[name]),
            right[name],
            atol=atol,
            rtol=0,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def fixed_examples(policy: Policy, count: int, ragged: bool = False) -> list[Group]:
    """Seeded targets of 1 to 12 tokens, the same in every process.

    ragged: several of a state, but none of every second one, so that the second of two processes
    has no target at all.
    """
    words = [
        t
        for t in range(len(policy.tokenizer))
        if t not in set(policy.suppressed_ids.tolist()) | {policy.eos_id}
    ]
    made = []
    for i, prompt in enumerate(policy.encode(states_of_two_sizes(count))):
        generator, actions = torch.Generator().manual_seed(i), []
        for _ in range(4):
            length = int(torch.randint(0, 12, (), generator=generator))
            chosen = torch.randint(len(words), (length,), generator=generator)
            actions.append(Action([words[j] for j in chosen] + [policy.eos_id], "", ""))
        kept = [0] if not ragged else [[2, 0], [], [1], []][i % 4]
        made.append(Group(prompt.state, prompt, actions, kept=kept))
    return made


def gradient_of(
    model_dir,
    world: World,
    micro_batch: int,
    count: int,
    ragged: bool = False,
    loss_mean: str = "token",
) -> tuple[dict, dict]:
    """The gradient that one update on this process's share of `fixed_examples` leaves, before any
    clipping, and what it reports."""
    policy = DoublePolicy.load(model_dir)
    learner = world.data_parallel(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    told = sft.update(
        Config(micro_batch=micro_batch, max_grad_norm=1e9, loss_mean=loss_mean),
        learner,
        optimizer,
        world.shard(fixed_examples(policy, count, ragged)),
        world,
        lr=0.0,
    )
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}, told


def gradient_here(
    model_dir, micro_batch: int, count: int, ragged: bool, loss_mean: str
) -> tuple[dict, dict]:
    """In one of two processes; arrays, since tensors would be handed over in shared memory."""
    world = World.join("cpu")
    gradient, told = gradient_of(model_dir, world, micro_batch, count, ragged, loss_mean)
    return {name: value.numpy() for name, value in gradient.items()}, told


def train_here(arguments: list[str]) -> str:
    """In one of two processes: the command; what it says on stderr."""
    with redirect_stderr(io.StringIO()) as said:
        sft.run(arguments)
    return said.getvalue()


@pytest.fixture(scope="module")
def whole_batch(random_model_dir):
    return gradient_of(random_model_dir, CPU, 6, 6)


@pytest.mark.parametrize(
    "ragged, loss_mean", [(False, "token"), (True, "token"), (False, "action"), (True, "action")]
)
def test_the_loss_is_the_mean_over_all_target_tokens_or_over_targets(
    random_model_dir, ragged, loss_mean
):
    """Against Hugging Face's own forward pass, one sequence at a time."""
    policy = DoublePolicy.load(random_model_dir)
    pairs, nats, tokens = [], [], 0
    for group in fixed_examples(policy, 6, ragged):
        pairs += [(group.state, target) for target in group.kept_tokens]
    for state, target in pairs:
        inputs = policy.processor(
            text=[policy.prompt_text(state)], images=list(state.images), return_tensors="pt"
        )
        ids = torch.cat([inputs["input_ids"][0], torch.tensor(target)])[None]
        kinds = F.pad(inputs["mm_token_type_ids"], (0, len(target)))
        logits = policy.model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=kinds,
        ).logits[0, -len(target) - 1 : -1]
        logits = logits.index_fill(1, policy.suppressed_ids, -torch.inf)
        nats.append(F.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        tokens += len(target)
    loss = sum(nats) / tokens
    if loss_mean == "action":
        of_targets = zip(nats, pairs, strict=True)
        loss = sum(nat / len(target) for nat, (_, target) in of_targets) / len(pairs)
    loss.backward()
    gradient, told = gradient_of(random_model_dir, CPU, 4, 6, ragged, loss_mean)
    found = {name: parameter.grad for name, parameter in policy.named_parameters()}
    # Norms are float32 even here: the gradients of targets that share a prompt are rounded as one.
    assert_same_gradient(found, gradient, atol=1e-6 if ragged else 1e-8)
    assert told["loss"] == pytest.approx(loss.item(), abs=1e-5) and told["target_tokens"] == tokens


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(random_model_dir, whole_batch, micro_batch):
    gradient, told = gradient_of(random_model_dir, CPU, micro_batch, 6)
    assert_same_gradient(gradient, whole_batch[0])
    assert told == pytest.approx(whole_batch[1])


@pytest.mark.parametrize(
    "count, micro_batch, ragged, loss_mean",
    [(6, 1, False, "token"), (5, 2, False, "token"), (5, 2, True, "token"), (5, 2, True, "action")],
)  # 5: one process has an example more than the other
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(
    random_model_dir, count, micro_batch, ragged, loss_mean
):
    one, alone = gradient_of(random_model_dir, CPU, count, count, ragged, loss_mean)
    arguments = (random_model_dir, micro_batch, count, ragged, loss_mean)
    for gradient, told in in_two_processes(gradient_here, *arguments):
        assert_same_gradient(gradient, one)
        assert told == pytest.approx(alone)


# ----------------------------------------------------------------------------------- what is learnt


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return miniature.make(tmp_path_factory.mktemp("reason-rft"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("source", ["blocks", "real"])
def test_a_target_earns_the_full_reward_and_ends_with_eos(directory, tmp_path, task, source):
    policy = Policy.load(ROOT / "blocks" / "tiny")
    config = Config(
        task=task,
        data="blocks" if source == "blocks" else str(directory),
        data_cache=str(tmp_path),
        states=6,
        batch_size=2,
        limit=6,
    )
    for method, mode in sft.METHODS.items():
        questions, _ = sets.training_states(config, mode)
        states = [questions[i] for i in range(6)]
        for state, example in zip(states, sft.examples(policy, states, method, 200), strict=True):
            (target,) = example.kept_actions
            text = sft.target_text(state, method)
            assert rewards.accuracy_reward(
                state.reading(text), state.answer, state.kind
            ) == 1 and rewards.format_reward(text) == (method == "cot")
            # Reason-RFT's own reward reads it too, of several lines as it is, but no blanks within
            # calls.
            spaced = source == "blocks" and state.kind == "function"
            legacy = rewards.accuracy_reward(text, state.answer, state.kind, legacy=True)
            assert legacy == (0 if spaced else 1)
            assert (
                target.tokens[-1] == policy.eos_id
                and target.tokens.count(policy.eos_id) == 1
                and not target.truncated
            )
            if source == "blocks":  # tiny knows every word
                assert policy.tokenizer.decode(target.tokens, skip_special_tokens=True) == " ".join(
                    text.split()
                )
            assert ("<think>" in text) == (method == "cot")
            asked = state.messages()[0]["content"][-1]["text"]
            assert ("think" in asked.removeprefix(state.question)) == (method == "cot")
            assert (asked == state.question) == (method == "bare") == ("<answer>" not in text)


def test_reason_rfts_targets():
    state = State("0", (), "how many ?", "3", "discrete", thought="one\ntwo")
    assert sft.target_text(state, "cot") == "<think>\none\ntwo\n</think>\n<answer>\n3\n</answer>"
    assert sft.target_text(state, "answer") == "<answer>\n3\n</answer>"
    assert sft.target_text(state, "bare") == "3"
    with pytest.raises(ValueError, match="no thought"):
        sft.target_text(dataclasses.replace(state, thought=""), "cot")


def test_a_long_target_is_cut_and_counted():
    policy = Policy.load(ROOT / "blocks" / "tiny")
    state = BlocksSet("counting-train", 1)[0]
    (whole,) = sft.examples(policy, [state], "cot", 200)[0].kept_actions
    (cut,) = sft.examples(policy, [state], "cot", 7)[0].kept_actions
    assert cut.truncated and cut.tokens == whole.tokens[:7]
    (fits,) = sft.examples(policy, [state], "cot", len(whole.tokens))[0].kept_actions
    assert not fits.truncated and fits.tokens == whole.tokens


def test_special_tokens_in_a_target_are_left_out():
    policy = Policy.load(ROOT / "blocks" / "tiny")
    state = dataclasses.replace(
        BlocksSet("counting-train", 1)[0],
        thought="a1 <|image_pad|> cube <|im_end|> gone unheard-of",
    )
    (example,) = sft.examples(policy, [state], "cot", 200)[0].kept_actions
    assert policy.tokenizer.decode(
        example.tokens[:-1]
    ).split() == "<think> a1 cube gone </think> <answer>".split() + [state.answer, "</answer>"]


# ------------------------------------------------------------------- the vision tower left as it is


def moved(before: dict, after: dict) -> set[str]:
    """The names of the weights that are no longer what they were."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def vision(names) -> set[str]:
    return {name for name in names if ".visual." in name}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("module", [sft, ekipl])
def test_a_frozen_vision_tower_stays_to_the_bit_and_all_else_learns(
    tmp_path, module, checkpointing
):
    frozen = dict(
        states=8,
        batch_size=4,
        micro_batch=3,
        eval_every=0,
        lr=1e-2,
        weight_decay=0.1,
        runs=str(tmp_path),
        name="run",
        freeze_vision=True,
        gradient_checkpointing=checkpointing,
    )
    if module is ekipl:
        frozen |= dict(num_samples=2, group_size=3, max_new_tokens=12, beta=0.04)
    path = module.train(module.Config(**frozen, rollout="transformers"), None, CPU)
    before, after = Policy.load(ROOT / "blocks" / "tiny").state_dict(), weights(path)
    changed = moved(before, after)
    assert any("merger" in name for name in vision(before))
    assert not vision(changed) and changed >= {name for name in before if ".layers." in name}
    saved = torch.load(path / "model" / "trainer.pt", weights_only=True)["optimizer"]["state"]
    trained = [
        n for n, _ in Policy.load(ROOT / "blocks" / "tiny").named_parameters() if not vision([n])
    ]
    assert len(saved) == len(trained)  # no moments of what does not learn


def test_freezing_does_not_change_the_gradient_of_the_rest(random_model_dir, whole_batch):
    policy = DoublePolicy.load(random_model_dir)
    policy.freeze_vision()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    config = Config(micro_batch=2, max_grad_norm=1e9)
    sft.update(config, policy, optimizer, fixed_examples(policy, 6), CPU, lr=0.0)
    left = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    right = {n: g for n, g in whole_batch[0].items() if not vision([n])}
    assert_same_gradient({name: left[name] for name in left}, right)


def test_a_frozen_run_resumes_to_the_bit(tmp_path):
    settings = dict(freeze_vision=True, warmup_steps=4, eval_every=0)
    whole = sft.train(small(tmp_path, **settings, name="whole"), None, CPU)
    with stopped_in_the_step_after(3):
        sft.train(small(tmp_path, **settings), None, CPU)
    path = sft.train(*sft.parse(["--resume", str(tmp_path / "run")]), CPU)
    assert timeless(path) == timeless(whole) and not moved(weights(path), weights(whole))


@pytest.mark.parametrize(
    "parallel, checkpointing", [("ddp", False), ("fsdp", False), ("fsdp", True)]
)
def test_two_processes_leave_a_frozen_vision_tower_as_one_does(tmp_path, parallel, checkpointing):
    frozen = {**SMALL, "states": 8, "freeze_vision": "", "parallel": parallel, "runs": tmp_path}
    arguments = [a.removesuffix("=") for a in flags(**frozen)] + ["--rollout=transformers"]
    arguments += ["--gradient-checkpointing"] if checkpointing else []
    in_two_processes(train_here, arguments)
    one = small(tmp_path, states=8, name="one", freeze_vision=True, rollout="transformers")
    before = Policy.load(ROOT / "blocks" / "tiny").state_dict()
    alone, shared = weights(sft.train(one, None, CPU)), weights(tmp_path / "run")
    assert not vision(moved(before, shared)) and moved(before, shared) == moved(before, alone)
    for name in alone:
        torch.testing.assert_close(
            shared[name], alone[name], atol=2e-3, rtol=0
        )  # two steps of 1e-3
    layout = [sorted(p.name for p in (tmp_path / n / "model").iterdir()) for n in ("run", "one")]
    assert layout[0] == layout[1]


@pytest.mark.parametrize("steps", [4, 100, 150])
def test_warm_up_takes_its_number_of_steps_whatever_there_are(steps):
    config = Config(states=4 * steps, batch_size=4, lr=1.0, warmup=0.5, warmup_steps=100)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert rates[:100] == pytest.approx([(i + 1) / 100 for i in range(min(100, steps))])
    assert rates[100:] == sorted(rates[100:], reverse=True) and all(0 < rate <= 1 for rate in rates)


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return sft.train(small(tmp_path_factory.mktemp("runs")), None, CPU)


def test_a_run_leaves_what_it_says(finished):
    records = storage.read(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(7))
    assert [r["step"] for r in records if "eval/counting-id" in r] == [0, 3, 6]
    assert all(
        record["loss"] > 0 and record["grad_norm"] > 0 and record["truncated"] == 0
        for record in records[1:]
    )
    assert records[-1]["loss"] < records[1]["loss"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG") and len(
        checkpoints(finished)
    ) == 1


@pytest.mark.parametrize(
    "stop_after", [3, 4]
)  # in the middle of two checkpoints, and right after one
def test_a_resumed_run_equals_one_never_stopped_to_the_bit(finished, tmp_path, stop_after):
    with stopped_in_the_step_after(stop_after):
        sft.train(small(tmp_path), None, CPU)
    torch.rand(7)
    path = sft.train(*sft.parse(["--resume", str(tmp_path / "run")]), CPU)
    assert timeless(path) == timeless(finished)
    left, right = weights(path), weights(finished)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_train_and_leave_one_log(tmp_path):
    in_two_processes(train_here, flags(**{**SMALL, "states": 8, "runs": tmp_path}))
    records = storage.read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    one = storage.read(
        sft.train(small(tmp_path, states=8, name="one"), None, CPU) / "metrics.jsonl"
    )
    for record, alone in zip(records[1:], one[1:], strict=True):
        assert (
            record["loss"] == pytest.approx(alone["loss"], rel=1e-4)
            and record["target_tokens"] == alone["target_tokens"]
        )


# ----------------------------------------------------------------- the presets' commands, shortened


SHORT = dict(
    model="tiny",
    limit=8,
    batch_size=4,
    micro_batch=2,
    max_new_tokens=8,
    eval_every=2,
    eval_states=2,
    save_every=0,
    name="run",
)
REAL = [name for name in presets.PRESETS if not name.startswith("blocks")]


def command(monkeypatch, module, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.main()


def test_there_is_a_preset_for_every_task_and_size_of_the_paper():
    assert (
        REAL
        == [f"{task}-{size}" for task in TASKS for size in ("2b", "7b")]
        == [name for name in sft.PRESETS if not name.startswith("blocks")]
    )
    for preset, settings in presets.PRESETS.items():
        config, learnt = ekipl.parse(["--preset", preset])[0], sft.parse(["--preset", preset])[0]
        assert (
            config.task
            == learnt.task
            == (preset.split("-")[0] if preset in REAL else settings.get("task", "counting"))
        )
        if preset in REAL:
            assert (
                config.num_samples == config.group_size == 8
                and config.beta == 0.04
                and preset[-2:].upper() in config.model
            )
            assert config.epochs == (5 if config.task == "structure" else 1)
            assert learnt.freeze_vision and not config.freeze_vision
            assert learnt.max_pixels == 262144 and config.max_pixels == 480000
            assert learnt.warmup_steps == 100 and config.warmup_steps == 0


@pytest.mark.parametrize("preset", REAL[::2])
@pytest.mark.parametrize("method", sft.METHODS)
def test_sft_runs_on_real_data_and_rl_goes_on_from_it(
    monkeypatch, directory, tmp_path, capsys, preset, method
):
    real = dict(
        SHORT, preset=preset, data=directory, data_cache=tmp_path / "cache", runs=tmp_path, epochs=1
    )
    command(monkeypatch, sft, flags(**real, method=method))
    told = capsys.readouterr()
    assert (
        f"{preset.split('-')[0]}-train: 12 of {22 if 'counting' in preset else 12} records"
        in told.err
    )
    path = tmp_path / "run"
    records = storage.read(path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2] and all(
        name in records[0]
        for name in (f"eval/{n}" for n in reading.FILES if preset[:5] in n and "train" not in n)
    )
    left_out = storage.read(path / "left_out.jsonl")
    assert len(left_out) == (len(miniature.BROKEN) if "counting" in preset else 0)
    if method == "cot":  # Reason-RFT: stage 2 on the rest
        rl = dict(
            real,
            model=path / "model",
            name="rl",
            skip=8,
            limit=4,
            experts="none",
            num_samples=2,
            group_size=2,
        )
        command(monkeypatch, ekipl, flags(**rl))
        assert [record["step"] for record in storage.read(tmp_path / "rl" / "metrics.jsonl")] == [
            0,
            1,
        ]
        first = {record["state"] for record in storage.read(tmp_path / "rl" / "samples.jsonl")}
        questions = ReasonRFTSet(f"{preset.split('-')[0]}-train", directory)
        assert first <= {questions[i].id for i in range(8, 12)}


def test_rl_on_real_data_resumes_to_the_bit(directory, tmp_path, monkeypatch):
    real = dict(
        SHORT,
        preset="structure-2b",
        data=directory,
        data_cache=tmp_path / "cache",
        runs=tmp_path,
        epochs=2,
        experts="none",
        num_samples=2,
        group_size=2,
        save_every=2,
        eval_every=0,
        rollout="transformers",
    )
    whole = ekipl.train(ekipl.parse(flags(**real))[0], None, CPU)
    write = StepLog.write

    def stop(self, record, *groups):
        write(self, record, *groups)
        if record["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepLog, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        ekipl.train(ekipl.parse(flags(**dict(real, name="stopped")))[0], None, CPU)
    monkeypatch.setattr(StepLog, "write", write)
    path = ekipl.train(*ekipl.parse(["--resume", str(tmp_path / "stopped")]), CPU)
    assert timeless(path) == timeless(whole) and storage.read(
        path / "samples.jsonl"
    ) == storage.read(whole / "samples.jsonl")
    left, right = weights(path), weights(whole)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_share_real_data(directory, tmp_path):
    real = dict(
        SHORT,
        preset="transformation-2b",
        data=directory,
        data_cache=tmp_path / "cache",
        runs=tmp_path,
        eval_every=0,
    )
    said = "".join(in_two_processes(train_here, flags(**real)))
    assert said.count("transformation-train: 12 of 12 records") == 1
    assert [record["step"] for record in storage.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


# ----------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        (sft, ["--method", "best"], "method"),
        (sft, ["--lr", "0"], "--lr"),
        (sft, ["--expert-steps", "3"], "--expert-steps"),  # of RL
        (sft, ["--method", "rft", "--experts", "none"], "--experts"),
        (sft, ["--method", "distil", "--group-size", "0"], "--group-size"),
        (sft, ["--method", "rft", "--data", "{tmp}/thoughtless"], "choose other --experts"),
        (ekipl, ["--expert-steps", "-1"], "--expert-steps"),
        (sft, ["--data", "{tmp}/nowhere"], "nowhere"),
        (sft, ["--data", "{tmp}"], "has no train_jsons"),
        (sft, ["--fraction", "1.5"], "--fraction"),
        (sft, ["--limit", "3"], "less than one batch"),
        (sft, ["--skip", "5000"], "less than one batch"),
        (sft, ["--warmup-steps", "-1"], "--warmup-steps"),
        (
            sft,
            ["--data-cache", "~nobody-of-that-name/x", "--data", "{tmp}/thoughtless"],
            "no home directory",
        ),
        (sft, ["--min-pixels", "9", "--max-pixels", "8"], "--min-pixels"),
        (sft, ["--resume", "{tmp}/rl"], "another program"),
        (sft, ["--data", "{tmp}/thoughtless", "--eval-every", "0"], "no usable thought"),
        (ekipl, ["--data", "{tmp}"], "scripted expert 'careful'"),
        (ekipl, ["--data", "{tmp}/nowhere", "--experts", "none"], "nowhere"),
        (ekipl, ["--fraction", "nan"], "--fraction"),
        (ekipl, ["--skip", "-1"], "--skip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(
    tmp_path, monkeypatch, capsys, module, arguments, says
):
    rundir.create(str(tmp_path), "rl", dataclasses.asdict(ekipl.Config()))
    thoughtless = miniature.make(tmp_path / "thoughtless", broken=False)
    file = thoughtless / reading.FILES["counting-train"]
    file.write_text(file.read_text().replace('"cot"', '"cut"'))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments] + (
        [] if "--resume" in arguments else ["--runs", str(tmp_path / "runs")]
    )
    if not {"--resume", "--data-cache"} & set(arguments):
        arguments += ["--data-cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, module, arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith(f"{module.__name__}.py: error:") and says in error and "\n" not in error
    assert not (tmp_path / "runs").exists()
