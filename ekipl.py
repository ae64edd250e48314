"""Vision-EKIPL: GRPO whose groups hold the best actions of the policy and of external experts (paper, Sections 3.2 and 4.1).

    python ekipl.py                                      # the blocks world on a laptop: minutes, no GPU, no key
    python ekipl.py --experts none                       # plain GRPO
    torchrun --nproc_per_node 8 ekipl.py ...             # the same over 8 processes, one GPU each
    python ekipl.py --resume runs/NAME                   # goes on exactly where the last checkpoint was

One step:

    states -> N actions of the policy + N of each expert (Eq 4-6) -> rewards (Eq 7) -> top G -> advantages (Eq 1)
           -> log-probs of the kept actions, policy and reference -> loss (Eq 2, 3; estimator A, B or C) -> AdamW

The batch is global: `batch_size` states a step over all processes. The loss is a sum over groups, divided by the number of
groups in the global batch before any micro-batching, so that micro-batches, accumulation and processes do not change the gradient.
Every random number follows from seed, step and process, never from what happened before; so a run that is resumed with as many
processes is the run never stopped.

Departures from the paper, and readings of what it leaves open, are in README.md ("Where the paper is silent").
"""

import argparse
import dataclasses
import math
import os
import pickle
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import curves
import grpo
import runs
from blocks import SETS, BlocksSet
from distributed import World
from evaluate import answer_greedily, score
from experts import api_counts, api_metrics, expert_specs, make_experts, parse_price, run_ahead, try_out
from metrics import step_metrics, summary, transcripts
from policy import PackedBatch, Policy, pack
from runs import UserError
from sampling import ROLLOUTS, Group, Sampler, add_expert_logps, autocast, make_sampler, select, total_groups

HERE = Path(__file__).resolve().parent
AHEAD = 2  # steps that requests to APIs run ahead of the training


# ---------------------------------------------------------------------------------------------- settings


def option(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """All settings of a run. Each is a flag of the command line; a preset sets several."""

    preset: str = option("blocks", "settings to start from; other flags change them")
    name: str = option("", "the run's directory under --runs (default: the preset, date and time)")
    runs: str = option("runs", "where run directories are made")
    seed: int = option(0, "of everything random: questions, order, sampling")
    # what is trained, on what
    model: str = option("tiny", "policy and reference: a directory in Hugging Face layout or a hub id; 'tiny' comes with this code")
    task: str = option("counting", "the task of the blocks world", tuple(SETS))
    states: int = option(3840, "questions in the training set")
    epochs: int = option(1, "passes over the training set")
    # the total group (Eq 4-6) and what is kept of it
    experts: str = option(
        "careful,quick",
        "experts, comma-separated: careful, quick (scripted); openai:MODEL, gemini:MODEL, openai:MODEL@http://host:port/v1 (keys from "
        "OPENAI_API_KEY and GEMINI_API_KEY); 'none' is plain GRPO",
    )
    num_samples: int = option(8, "N: actions drawn from the policy and from each expert, a state")
    group_size: int = option(8, "G: actions kept, a state; at most N x (experts + 1)")
    selection: str = option("top", "which G are kept: the best, or any (a control)", ("top", "random"))
    ties: str = option(
        "auto",
        "which of equal rewards are kept first: the policy's (paper's Fig. 4), or any. auto: any for the estimators is and snis, "
        "whose weights take the kept for a fair sample of the best; else the policy's",
        ("auto", "policy_first", "random"),
    )
    max_new_tokens: int = option(80, "length limit of an action, in tokens")
    temperature: float = option(1.0, "of sampling and of scoring: the policy is softmax(logits / temperature)")
    # experts behind an API
    cache: str = option("experts.sqlite", "file that keeps every answer of an API, for all runs; nothing in it is paid for again")
    offline: bool = option(False, "answers of APIs come from the cache alone; a missing one ends the run")
    expert_tokens: int = option(512, "length limit of an API's answer, in its own tokens")
    expert_requests: int = option(8, "requests to an API at a time, in each process")
    expert_deadline: float = option(60.0, "seconds a step waits for an API; a state without answer goes on with the policy's actions alone")
    expert_failures: int = option(5, "failures in a row after which an API is left alone for two minutes")
    price: str = option("", "USD for a million tokens of the API experts, input,output; default: the table of apis.py")
    # the objective (Eq 1-3, A.2)
    advantage: str = option(
        "candidates",
        "whose mean and std Eq 1 takes: of all M candidates, or of the G selected (then a group of perfect actions teaches nothing)",
        ("candidates", "selected"),
    )
    estimator: str = option(
        "uncorrected",
        "A.7: uncorrected (A) is the paper's, is (B) weights each action by pi_old/q, snis (C) normalises the weights; B and C "
        "are faithful to the policy's own distribution, and so remove most of what experts teach",
        grpo.ESTIMATORS,
    )
    clip_eps: float = option(0.2, "epsilon of Eq 3: how far the ratio may move")
    beta: float = option(0.01, "weight of the KL term of Eq 3 (paper: 0.04); 0 loads no reference")
    updates_per_batch: int = option(1, "gradient steps on each batch of actions; with 1 the ratio is always 1 and nothing is clipped")
    # the optimizer
    batch_size: int = option(64, "states a step, over all processes")
    micro_batch: int = option(16, "states per forward pass of a process; smaller needs less memory, the gradient is the same")
    lr: float = option(5e-4, "peak learning rate (AdamW; linear warm-up, then cosine to 0)")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    # the machine
    device: str = option("auto", "where to compute; auto is a GPU if there is one", ("auto", "cpu", "cuda"))
    rollout: str = option("auto", "what generates the policy's actions; auto: vLLM where it can run, else transformers", ROLLOUTS)
    parity_every: int = option(20, "compare vLLM's log-probabilities with the policy's at the first step and every so many; 0: never")
    gpu_memory_utilization: float = option(0.0, "share of the GPU that vLLM may take while it generates; 0: what training will leave")
    max_model_len: int = option(0, "vLLM's limit for prompt and action, in tokens; 0: from the pixel limits and --max-new-tokens")
    bf16: bool = option(True, "on a GPU, compute in bfloat16 (autocast; weights stay float32)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    # what is measured and kept
    eval_every: int = option(20, "greedy evaluation on the task's test sets every so many steps, and before the first and after the last; 0: never")
    eval_states: int = option(200, "questions of each test set in an evaluation")
    save_every: int = option(20, "checkpoint every so many steps and after the last; 0: after the last only")
    log_groups: int = option(2, "whole groups a step that go to samples.jsonl")

    @property
    def steps(self) -> int:
        return self.states * self.epochs // self.batch_size


PRESETS = {
    "blocks": {},
    "blocks-structure": {"task": "structure", "max_new_tokens": 48},
    "blocks-transformation": {"task": "transformation", "max_new_tokens": 96},
}


def parse(argv: list[str]) -> tuple[Config, Path | None]:
    """The settings that the command line asks for, and the run to resume if it does."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (--help explains every flag)")

    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--resume", metavar="RUN", help="go on with an earlier run, with its own settings")
    for setting in dataclasses.fields(Config):
        flag, text, choices = "--" + setting.name.replace("_", "-"), setting.metadata["help"], setting.metadata["choices"]
        choices = tuple(PRESETS) if setting.name == "preset" else choices
        text = f"{text} (default: {setting.default})" if setting.default != "" else text
        if setting.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, type=setting.type, choices=choices or None, default=None, help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    if (resume := given.pop("resume", None)) is not None:
        if given:
            raise UserError(f"--resume goes on with the run's own settings: leave out --{next(iter(given)).replace('_', '-')}")
        stored = runs.read_config(Path(resume))
        if set(stored) != {setting.name for setting in dataclasses.fields(Config)}:
            raise UserError(f"{resume} was made by another version of this program: its settings have other names")
        for setting in dataclasses.fields(Config):
            value, kinds = stored[setting.name], (int, float) if setting.type is float else (setting.type,)
            choices = setting.metadata["choices"]
            if type(value) not in kinds or (choices and value not in choices):
                raise UserError(f"{resume}/config.json: {setting.name} cannot be {value!r}")
        return Config(**stored), Path(resume)
    preset = given.get("preset", Config.preset)
    return Config(**{**PRESETS[preset], **given, "preset": preset}), None


def check(config: Config, world: int, resuming: bool) -> None:
    """UserError for settings that cannot work, before anything is loaded."""
    try:
        experts = expert_specs(config.experts, config.offline)
        parse_price(config.price)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.estimator != "uncorrected" and (silent := [name for name in experts if name.startswith("gemini:")]):
        raise UserError(f"--estimator {config.estimator} needs every expert's density, and {silent[0]} tells none: use --estimator uncorrected")
    for name in (
        "states", "epochs", "num_samples", "group_size", "batch_size", "micro_batch", "max_new_tokens", "updates_per_batch",
        "expert_tokens", "expert_requests", "expert_failures",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    for name in ("lr", "temperature", "max_grad_norm", "expert_deadline"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}")
    for name in ("beta", "clip_eps", "warmup", "weight_decay", "eval_every", "save_every", "log_groups", "parity_every", "max_model_len", "gpu_memory_utilization"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or above, not {getattr(config, name)}")
    if config.gpu_memory_utilization >= 1:
        raise UserError("--gpu-memory-utilization is a share of the GPU, below 1")
    if config.warmup > 1:
        raise UserError("--warmup is a share of the steps, at most 1")
    candidates = config.num_samples * (len(experts) + 1)
    if config.group_size > candidates:
        raise UserError(
            f"--group-size {config.group_size} is more than the {candidates} candidates of a state "
            f"(--num-samples {config.num_samples} x {len(experts) + 1} sources)"
        )
    if config.eval_every and config.eval_states < world:
        raise UserError(f"--eval-states must be at least 1 for each of {world} processes; --eval-every 0 evaluates never")
    if config.batch_size < world:
        raise UserError(f"--batch-size {config.batch_size} leaves some of {world} processes without a state")
    if config.steps < 1:
        raise UserError(f"{config.states} states x {config.epochs} epochs are less than one batch of {config.batch_size}")
    if config.name and not resuming:
        runs.must_be_new(Path(config.runs) / config.name)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU here")


# ---------------------------------------------------------------------------------------------- the run's directory


def open_run(config: Config, resume: Path | None, world: World) -> Path:
    """Makes the run's directory, in the first process; all of them raise what it raised."""
    path, problem = resume, None
    if world.rank == 0 and resume is None:
        try:
            path = runs.create(config.runs, config.name or f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3], dataclasses.asdict(config))
        except UserError as error:
            problem = str(error)
    path, problem = world.agree((path, problem))
    if problem:
        raise UserError(problem)
    return path


# ---------------------------------------------------------------------------------------------- the update


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to 0 (Section 4.1). step: from 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


@dataclass
class MicroBatch:
    """Some groups of a batch, packed, with what does not change over the updates: pi_old, pi_ref, advantages and weights."""

    groups: list[Group]
    packed: PackedBatch
    advantages: torch.Tensor  # (B, G)
    ref_logp: torch.Tensor | None  # (B, G, T)
    old_logp: torch.Tensor | None = None  # (B, G, T); None until the policy has scored the batch for the first time
    log_weights: torch.Tensor | None = None  # (B, G), log w_S


def padded(rows: list[list], fill) -> torch.Tensor:
    """Rows of different lengths as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def log_weights(groups: list[Group], old_logp: torch.Tensor, g: int) -> torch.Tensor | None:
    """log w_S = log pi_old - log q_S of each kept action (A.5), (B, G); 0 for an absent one; None if a density is unknown."""
    if any(group.expert_logps is None for group in groups):
        return None
    policy_logp = old_logp.sum(-1).double().cpu()  # (B, G), whole actions
    result = torch.zeros(policy_logp.shape)
    for row, group in enumerate(groups):
        own = policy_logp[row, : len(group.kept)]  # (G,)
        experts = torch.tensor(group.expert_logps, dtype=torch.float64).reshape(len(own), len(group.mixture) - 1)  # (G, m)
        proposal = grpo.mixture_logp(torch.cat([own[:, None], experts], dim=1), group.mixture)  # (G,) log q
        kept_share = grpo.selection_probability(group.rewards, min(g, len(group.actions)))  # q(S)
        proposal = grpo.selected_proposal_logp(proposal, kept_share)  # (G,) log q_S
        result[row, : len(own)] = grpo.log_importance_weights(own, proposal)
    return result.to(old_logp.device)


def update(config: Config, policy, reference: Policy | None, optimizer, groups: list[Group], world: World, lr: float) -> dict:
    """Eq 2 and 3 on the kept actions of this process's groups; `updates_per_batch` steps of AdamW.

    policy: a Policy, or DistributedDataParallel around one. Returns per-group rows of what was measured in the last update, the
    loss (of this process's groups, over the global number of groups) and the norm of the gradient before clipping.
    """
    device, total = world.device, config.batch_size
    order = sorted(range(len(groups)), key=lambda i: sum(len(action.tokens) for action in groups[i].kept_actions))
    batches = []
    for start in range(0, len(order), config.micro_batch):  # similar lengths together: less padding
        chosen = [groups[i] for i in order[start : start + config.micro_batch]]
        packed = pack([group.prompt for group in chosen], [[a.tokens for a in group.kept_actions] for group in chosen]).to(device)
        with torch.no_grad(), autocast(device, config.bf16):
            ref_logp = reference(packed) if reference is not None else None
        batches.append(MicroBatch(chosen, packed, padded([group.advantages for group in chosen], 0.0).to(device), ref_logp))

    rows, loss_sum, norms = {}, 0.0, []
    for group in optimizer.param_groups:
        group["lr"] = lr
    for _ in range(config.updates_per_batch):
        optimizer.zero_grad(set_to_none=True)
        if config.updates_per_batch > 1 and batches[0].old_logp is None:  # pi_old is the policy before the first update
            with torch.no_grad(), autocast(device, config.bf16):
                for batch in batches:
                    batch.old_logp = policy(batch.packed)
        for i, batch in enumerate(batches):
            # Gradients are averaged over the processes in the last backward pass only.
            quiet = policy.no_sync() if world.size > 1 and i < len(batches) - 1 else nullcontext()
            with quiet:
                with autocast(device, config.bf16):
                    logp = policy(batch.packed)  # (B, G, T)
                if batch.old_logp is None:  # one update: pi_old is pi_theta, and the ratio is 1 with a gradient
                    batch.old_logp = logp.detach()
                if batch.log_weights is None:
                    batch.log_weights = log_weights(batch.groups, batch.old_logp, config.group_size)
                if config.estimator != "uncorrected" and batch.log_weights is None:
                    raise UserError(f"--estimator {config.estimator} needs every expert's density, and one of {config.experts} tells none")
                loss, stats = grpo.ekipl_loss(
                    logp, batch.old_logp, batch.ref_logp, batch.packed.action_mask, batch.advantages,
                    estimator=config.estimator, log_weights=batch.log_weights, clip_eps=config.clip_eps, beta=config.beta,
                )  # fmt: skip
                (loss * world.size / total).backward()  # DDP takes the mean over processes; the loss is a sum over groups
            loss_sum += loss.item() / total / config.updates_per_batch
            measure(rows, batch, stats)
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)))
        if not math.isfinite(norms[-1]):
            raise RuntimeError(f"the gradient is not finite (norm {norms[-1]}): lower --lr")
        optimizer.step()
    return {"rows": [rows[id(group)] for group in groups], "loss": loss_sum, "grad_norm": sum(norms) / len(norms)}


def measure(rows: dict[int, dict], batch: MicroBatch, stats: dict[str, torch.Tensor]) -> None:
    """Adds to `rows`, by group, what the last update saw: (G,) lists for grpo.diagnostics."""
    weights = batch.log_weights.exp() if batch.log_weights is not None else None
    for b, group in enumerate(batch.groups):
        n = len(group.kept)
        rows[id(group)] = {name: values[b, :n].tolist() for name, values in stats.items()}
        rows[id(group)]["weights"] = weights[b, :n].tolist() if weights is not None else None


# ---------------------------------------------------------------------------------------------- the run


def evaluate(sampler: Sampler, sets: dict[str, list], world: World) -> dict[str, float]:
    """Greedy accuracy on each test set, shared among the processes."""
    result = {}
    for name, states in sets.items():
        share = world.mine(states)
        actions = world.gather(answer_greedily(sampler, share))
        result[f"eval/{name}"] = score(states, actions)["accuracy"]
    return result


def training_states(config: Config) -> tuple[BlocksSet, list[int]]:
    """The questions of a run, and the order in which it asks them, over all epochs."""
    order = [i for epoch in range(config.epochs) for i in random.Random(f"{config.seed} order {epoch}").sample(range(config.states), config.states)]
    return BlocksSet(f"{config.task}-train", config.states, config.seed), order


def train(config: Config, resume: Path | None, world: World) -> Path:
    """The whole run: returns its directory. Its last checkpoint is runs/NAME/model."""
    if world.device.type == "cpu":  # else threads add up the gradients of one tensor in whatever order they come
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    questions, order = training_states(config)

    def asked(step: int) -> list:
        """This process's states of a step."""
        return [questions[i] for i in world.mine(order[step * config.batch_size : (step + 1) * config.batch_size])]

    experts = make_experts(config.experts, config, densities=config.estimator != "uncorrected")
    try_out(experts, lambda: asked(0)[0], config.num_samples)
    start = 0
    model = str(HERE / "tiny") if config.model == "tiny" else config.model
    try:
        load = dict(temperature=config.temperature)
        policy = Policy.load(
            runs.last_checkpoint(resume) if resume else model, gradient_checkpointing=config.gradient_checkpointing, **load
        ).to(world.device)
        reference = Policy.load(model, **load).to(world.device).requires_grad_(False) if config.beta else None
    except ValueError as error:
        raise UserError(str(error)) from None
    path = open_run(config, resume, world)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    if resume:
        try:  # to the CPU first: Adam's step counters have to stay there
            trainer = torch.load(runs.last_checkpoint(resume) / "trainer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(trainer["optimizer"])
            start, processes = trainer["step"], trainer["processes"]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
            raise UserError(f"{resume}: its checkpoint has no usable trainer.pt") from None
        if world.rank == 0:
            if processes != world.size:
                print(f"{resume} was made by {processes} processes and goes on with {world.size}: with other samples than had it never stopped", file=sys.stderr)
            for file in ("metrics.jsonl", "samples.jsonl"):
                runs.forget_after(path / file, start)
    learner = policy
    if world.size > 1:
        learner = DistributedDataParallel(policy, broadcast_buffers=False)

    sampler = make_sampler(
        config.rollout, policy, model, config.max_new_tokens, bf16=config.bf16,
        gpu_memory_utilization=config.gpu_memory_utilization, max_model_len=config.max_model_len,
    )  # fmt: skip
    tests = {name: BlocksSet(name, config.eval_states) for name in SETS[config.task]} if config.eval_every else {}
    tests = {name: [test[i] for i in range(len(test))] for name, test in tests.items()}
    ties = config.ties if config.ties != "auto" else ("policy_first" if config.estimator == "uncorrected" else "random")

    bar = tqdm(total=config.steps, initial=start, desc=path.name, disable=world.rank > 0, dynamic_ncols=True)
    if start == 0 and config.eval_every:
        record = {"step": 0, "states": 0, **evaluate(sampler, tests, world)}
        log(path, [record], [], bar, world)
    for step in range(start, config.steps):
        clock = [time.perf_counter()]
        # ---- states
        states = asked(step)
        for ahead in range(step if step == start else step + AHEAD, min(step + AHEAD + 1, config.steps)):
            run_ahead(experts, lambda: asked(ahead), config.num_samples)
        # ---- actions and their rewards (Eq 4-7)
        seed = random.Random(f"{config.seed} {step} {world.rank}").getrandbits(62)
        expert_seed = random.Random(f"{config.seed} {step}").getrandbits(62)
        groups = total_groups(states, sampler, experts, config.num_samples, seed, expert_seed)
        sampler.sleep()
        parity = sampler.check_parity(groups) if config.parity_every and (step == start or step % config.parity_every == 0) else {}
        # ---- the top G, and their advantages (Eq 1)
        select(groups, config.group_size, config.advantage, ties, config.selection, random.Random(seed))
        add_expert_logps(groups, experts)
        clock.append(time.perf_counter())
        # ---- the update (Eq 2, 3)
        lr = learning_rate(config, step)
        updated = update(config, learner, reference, optimizer, groups, world, lr)
        clock.append(time.perf_counter())
        sampler.sync_weights()
        clock.append(time.perf_counter())
        # ---- evaluate, log, save
        last = step + 1 == config.steps
        record = {"step": step + 1, "states": (step + 1) * config.batch_size}
        record |= step_metrics(world.gather(summary(groups, updated)))
        record |= {"loss": sum(world.gather([updated["loss"]])), "grad_norm": updated["grad_norm"], "lr": lr}
        record |= api_metrics(world.gather([api_counts(experts)]))
        record |= {"seconds/rollout": clock[1] - clock[0], "seconds/update": clock[2] - clock[1], "seconds/sync": clock[3] - clock[2]}
        record |= parity
        if config.eval_every and ((step + 1) % config.eval_every == 0 or last):
            record |= evaluate(sampler, tests, world)
            record["seconds/evaluation"] = time.perf_counter() - clock[3]
        log(path, [record], transcripts(step + 1, groups[: config.log_groups]), bar, world)
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            if world.rank == 0:
                runs.save_checkpoint(path, step + 1, policy, optimizer, world.size)
                curves.draw({path.name: runs.read(path / "metrics.jsonl")}, path / "curves.png")
            world.agree(None)  # nobody runs ahead of a checkpoint
    bar.close()
    sampler.close()
    if world.rank == 0 and start == config.steps:  # killed after the last checkpoint, perhaps before the picture
        curves.draw({path.name: runs.read(path / "metrics.jsonl")}, path / "curves.png")
    return path


def log(path: Path, records: list[dict], groups: list[dict], bar: tqdm, world: World) -> None:
    """Writes the step's records, in the first process, and moves the bar."""
    if world.rank > 0:
        return
    runs.append(path / "metrics.jsonl", records)
    runs.append(path / "samples.jsonl", groups)
    for record in records:
        if evaluated := {name.removeprefix("eval/"): f"{100 * value:.1f}" for name, value in record.items() if name.startswith("eval/")}:
            bar.write(f"step {record['step']}: greedy accuracy " + "  ".join(f"{name} {value}" for name, value in evaluated.items()))
        if "reward" in record:
            bar.set_postfix({
                "reward": f"{record['reward']:.2f}", "accuracy": f"{record['accuracy']:.2f}",
                "experts": f"{record['expert_share']:.2f}", "dead": f"{record['dead_groups']:.2f}", "kl": f"{record['kl']:.2f}",
            }, refresh=False)  # fmt: skip
            bar.update(1)


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    transformers_logging.disable_progress_bar()  # of loading and saving: one bar is enough
    try:
        config, resume = parse(sys.argv[1:])
        check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)
        world = World.join(config.device)
        path = train(config, resume, world)
    except UserError as error:
        if rank > 0:
            time.sleep(10)  # the first process tells, and torchrun ends the others; who is alone with the mistake tells it
        print(f"ekipl.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print("\nstopped; --resume RUN goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        print(f"done: {path}/curves.png shows the run, {path}/samples.jsonl its groups, {path}/model is the model")


if __name__ == "__main__":
    main()
