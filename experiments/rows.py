"""The rows of the tables: Table 1, all methods at equal budgets, the search of their learning
rates, the ablation, SFT before RL."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import ekipl
from blocks.scripted import is_scripted
from experts.roster import expert_specs
from training.console import UserError

ANY_EXPERT = ("--ties", "any_expert")


@dataclass
class Row:
    """A row of a table: its name, and what trains it.

    program: ekipl.py, sft.py, or "" where `model` is evaluated as it is. after: the row whose model
    it starts from. listed: whether it stands in the table. request: what evaluation asks for in
    place of the usual words. rate: the row whose learning rate it takes; "" for its own.
    """

    name: str
    program: str = ""
    flags: tuple[str, ...] = ()
    model: str = ""
    after: str = ""
    listed: bool = True
    request: str = ""
    rate: str = ""


def table1(config: ekipl.Config, stage1: int) -> list[Row]:
    """The methods of Table 1 (Section 4.1, "Baselines").

    stage1: questions of Reason-RFT's first stage; its second one has the rest, but for the paper's
    structure task, which has all. With the paper's data zero-shot and ANS-SFT have prompts of their
    own, as in Reason-RFT.
    """
    real = config.data != "blocks"
    rest = () if real and config.task == "structure" else ("--skip", str(stage1))
    zero_shot, answer = (("--mode", "answer"), "bare") if real else ((), "answer")
    experts = expert_specs(config.experts, offline=True)
    rows = [Row(short(expert), model=expert) for expert in experts]
    rows += [
        Row("Zero-shot", flags=zero_shot, model=config.start),
        Row("ANS-SFT", "sft.py", ("--method", answer)),
        Row("CoT-SFT", "sft.py"),
        Row("Stage-1", "sft.py", ("--limit", str(stage1)), listed=False),
        Row("Reason-RFT-Zero", "ekipl.py", ("--experts", "none")),
        Row("Reason-RFT", "ekipl.py", ("--experts", "none", *rest), after="Stage-1"),
    ]
    if experts:
        rows.append(Row("Vision-EKIPL", "ekipl.py"))
        rows.append(Row("Vision-EKIPL-after-SFT", "ekipl.py", rest, after="Stage-1"))
    return rows


def methods(config: ekipl.Config, stage1: int) -> list[Row]:
    """What a reviewer would put beside Vision-EKIPL in the blocks world, at budgets that compare.

    All see the same questions once and train on at most G actions of each. RFT is rejection-
    sampling fine-tuning: SFT on experts' right samples. Vision-EKIPL, RFT and distillation ask each
    expert for N actions a question; RFT-EXPERT one expert alone; "early" and RFT-then-GRPO ask in
    the first 60 % of the steps; -after-SFT after stage 1. The rows of two stages have two
    schedules of the learning rate, and the first one's model, itself a row, as the KL's reference.
    "any", "reversed": does the order in which the experts are named matter? "all": nothing is
    dropped. "3-epochs": three passes over the same samples. "2-updates", "4-updates": so many steps
    of AdamW on each batch; EXPERT-4-updates with one expert. Other papers' losses and gates are in
    `neighbour_rows`, other means over tokens in `token_rows`.
    """
    if config.data != "blocks" or config.experts == "none":
        raise UserError("the list of methods is for the blocks world, and needs --experts")
    if config.epochs > 1 or config.skip or config.limit:
        raise UserError("the list of methods shares questions out: no --epochs, --skip, --limit")
    experts, early = expert_specs(config.experts, offline=True), round(0.6 * config.steps)
    taught, first = str(early * config.batch_size), ("--limit", str(stage1))
    half = ("--method", "rft", "--limit", taught)
    candidates = ("--num-samples", str(config.num_samples * (len(experts) + 1)))
    alone = ("--experts", "none")
    rows = [Row(short(expert), model=expert) for expert in experts]
    rows += [
        Row("base", model=config.start),
        Row("base-check", model=config.start, request="check ."),
        Row("ANS-SFT", "sft.py", ("--method", "answer")),
        Row("CoT-SFT", "sft.py"),
        Row("distillation", "sft.py", ("--method", "distil")),
        Row("RFT", "sft.py", ("--method", "rft")),
    ]
    for expert in experts:
        flags = ("--method", "rft", "--experts", expert)
        rows.append(Row(f"RFT-{short(expert)}", "sft.py", flags))
    for row in [row for row in rows if row.name == "CoT-SFT" or "rft" in row.flags]:
        thrice = (*row.flags, "--epochs", "3")
        rows.append(Row(f"{row.name}-3-epochs", "sft.py", thrice, rate=row.name))
    rows += [
        Row("GRPO", "ekipl.py", alone),
        Row("GRPO-best", "ekipl.py", (*alone, *candidates), rate="GRPO"),
        Row("GRPO-2-updates", "ekipl.py", (*alone, "--updates-per-batch", "2"), rate="GRPO"),
        Row("Stage-1", "sft.py", first, rate="CoT-SFT"),
        Row("SFT-then-GRPO", "ekipl.py", (*alone, "--skip", str(stage1)), after="Stage-1"),
        Row("RFT-first", "sft.py", half, rate="RFT"),
        Row("RFT-then-GRPO", "ekipl.py", (*alone, "--skip", taught), after="RFT-first"),
    ]
    rows += ekipl_rows(experts, str(early), str(stage1), candidates[1])
    return rows + neighbour_rows() + token_rows(experts, str(stage1))


def ekipl_rows(experts: list[str], early: str, stage1: str, candidates: str) -> list[Row]:
    """Vision-EKIPL and what may be changed in it without other data."""
    backwards = ("--experts", ",".join(experts[::-1]))
    leaving, everything = ("--expert-steps", early), ("--group-size", candidates)
    name, several = "Vision-EKIPL", ("--updates-per-batch", "4")
    rows = [
        Row(name, "ekipl.py"),
        Row(f"{name}-early", "ekipl.py", leaving),
        Row(f"{name}-any", "ekipl.py", ANY_EXPERT, rate=name),
        Row(f"{name}-any-early", "ekipl.py", (*ANY_EXPERT, *leaving), rate=f"{name}-early"),
        Row(f"{name}-reversed", "ekipl.py", backwards, rate=name),
        Row(f"{name}-all", "ekipl.py", everything, rate=name),
        Row(f"{name}-2-updates", "ekipl.py", ("--updates-per-batch", "2"), rate=name),
        Row(f"{name}-4-updates", "ekipl.py", several, rate=name),
        Row(f"{name}-after-SFT", "ekipl.py", ("--skip", stage1), after="Stage-1"),
    ]
    for expert in experts:
        alone = (*several, "--experts", expert)
        rows.append(Row(f"{name}-{short(expert)}-4-updates", "ekipl.py", alone, rate=name))
    return rows


def neighbour_rows() -> list[Row]:
    """The methods next door (training/README.md), with the groups of GRPO or Vision-EKIPL.

    LUFFY and RL-PLUS have, as their authors' scripts, no KL, no std and Dr. GRPO's constant; so
    "constant" tells what their losses change. "unsolved" is when ReLIFT imitates.
    """
    constant, name = ("--loss-mean", "constant", "--no-advantage-std"), "Vision-EKIPL"
    theirs = (*constant, "--beta", "0")
    return [
        Row("Dr-GRPO", "ekipl.py", ("--experts", "none", *constant), rate="GRPO"),
        Row("LUFFY", "ekipl.py", ("--expert-loss", "luffy", *theirs)),
        Row("RL-PLUS", "ekipl.py", ("--expert-loss", "rl-plus", *theirs)),
        Row(f"{name}-unsolved", "ekipl.py", ("--experts-when", "unsolved"), rate=name),
        Row(f"{name}-constant", "ekipl.py", theirs),
    ]


def token_rows(experts: list[str], stage1: str) -> list[Row]:
    """DAPO's mean over all tokens of the batch, as SFT has it, with Vision-EKIPL and with RL alone;
    and RFT, on all experts and on each, with RL's mean within actions.

    "any" and "reversed": does the order of the experts matter there too?
    """
    token, name = ("--loss-mean", "token"), "Vision-EKIPL-token"
    alone = ("--experts", "none", *token)
    backwards = ("--experts", ",".join(experts[::-1]), *token)
    several = ("--updates-per-batch", "4", *token)
    within = ("--method", "rft", "--loss-mean", "action")
    rows = [
        Row(name, "ekipl.py", token),
        Row("Vision-EKIPL-any-token", "ekipl.py", (*token, *ANY_EXPERT), rate=name),
        Row("Vision-EKIPL-reversed-token", "ekipl.py", backwards, rate=name),
        Row(f"{name}-4-updates", "ekipl.py", several, rate=name),
        Row("GRPO-token", "ekipl.py", alone),
        Row("SFT-then-GRPO-token", "ekipl.py", (*alone, "--skip", stage1), after="Stage-1"),
        Row("RFT-action", "sft.py", within),
    ]
    for expert in experts:
        flags = (*within, "--experts", expert)
        rows.append(Row(f"RFT-{short(expert)}-action", "sft.py", flags, rate="RFT-action"))
    return rows


RATES = ("0.00025", "0.0005", "0.001", "0.002", "0.004")


def rates(config: ekipl.Config, stage1: int) -> list[Row]:
    """Every method that has a learning rate of its own, with five of them: NAME-lrRATE.

    First stages are trained for those that start from them, and are in no table.
    """
    rows, made = [], methods(config, stage1)
    first = {row.after for row in made}
    for row in made:
        if row.name in first:
            rows.append(replace(row, listed=False))
        elif row.program and not row.rate:
            for rate in RATES:
                flags = (*row.flags, "--lr", rate)
                rows.append(replace(row, name=f"{row.name}-lr{rate}", flags=flags))
    return rows


def with_best_rates(rows: list[Row], file: Path | None) -> list[Row]:
    """The rows, each with the learning rate that is best for it in the results of `rates`.

    Rows that have one, or of methods that were not searched, stay as they are. UserError for a file
    that cannot be read.
    """
    if file is None:
        return rows
    try:
        found = json.loads(file.read_text())
        best = {name: max(accuracy, key=accuracy.get) for name, accuracy in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--rates {file} is not what the list of rates writes: {error}") from None
    ready = []
    for row in rows:
        rate = best.get(row.rate or row.name)
        if row.program and rate and "--lr" not in row.flags:
            row = replace(row, flags=(*row.flags, "--lr", rate))
        ready.append(row)
    return ready


def chosen(rows: list[Row], names: str) -> list[Row]:
    """The rows of these comma-separated names, and those that they start from; all for "".

    GRPO also means GRPO-lr0.001 and so on.
    """
    if not names:
        return rows
    known, wanted = {row.name: row for row in rows}, set()
    for name in names.split(","):
        searched = [row.name for row in rows if row.name.rpartition("-lr")[0] == name]
        wanted.update(searched or [name])
    if unknown := wanted - known.keys():
        raise UserError(f"no row {min(unknown)}; there are {', '.join(known)}")
    wanted |= {known[name].after for name in wanted}
    return [row for row in rows if row.name in wanted]


def short(expert: str) -> str:
    """An expert's name without the address of its server, or a scripted one's own accuracy."""
    name = expert.partition("@")[0]
    return name.partition(":")[0] if is_scripted(name) else name


def ablation(config: ekipl.Config, stage1: int) -> list[Row]:
    """What the paper never varied: one setting of Vision-EKIPL at a time.

    B and C need random ties: they are to be compared with ties-random.
    """
    experts = expert_specs(config.experts, offline=True)
    if not experts:
        raise UserError("the ablation varies Vision-EKIPL, which needs --experts")
    changes = {
        "Vision-EKIPL": (),
        "estimator-is": ("--estimator", "is"),
        "estimator-snis": ("--estimator", "snis"),
        "ties-random": ("--ties", "random"),
        "advantage-selected": ("--advantage", "selected"),
        "selection-random": ("--selection", "random"),
        "N-2": ("--num-samples", "2", "--group-size", "6"),
        "N-4": ("--num-samples", "4"),
        "N-16": ("--num-samples", "16"),
        "beta-0": ("--beta", "0"),
        "beta-0.04": ("--beta", "0.04"),  # the paper's
    }
    for expert in experts:
        changes[f"expert-{short(expert)}"] = ("--experts", expert)
    return [Row(name, "ekipl.py", flags, rate="Vision-EKIPL") for name, flags in changes.items()]


def stages(config: ekipl.Config, stage1: int) -> list[Row]:
    """SFT before RL: GRPO after first stages of several sizes, so that SFT-then-GRPO is seen at its
    best, and Vision-EKIPL after the usual one, with each expert alone.
    """
    rows = []
    for size in (stage1 * 2 // 5, stage1, stage1 * 8 // 5, stage1 * 2):
        first, flags = f"Stage-1-{size}", ("--experts", "none", "--skip", str(size))
        rows.append(Row(first, "sft.py", ("--limit", str(size)), listed=False))
        rows.append(Row(f"Reason-RFT-{size}", "ekipl.py", flags, after=first))
    for expert in expert_specs(config.experts, offline=True):
        name = f"Vision-EKIPL-{stage1}-{short(expert)}"
        flags = ("--experts", expert, "--skip", str(stage1))
        rows.append(Row(name, "ekipl.py", flags, after=f"Stage-1-{stage1}"))
    return rows


LISTS = {
    "table1": table1,
    "methods": methods,
    "rates": rates,
    "ablation": ablation,
    "stages": stages,
}
