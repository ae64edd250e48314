"""The walk through one step: its claims, its numbers against independent ones, its notebook."""

import ast
import json
import math
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, eager_logits

import grpo
from lessons import notebook, pictures
from policy import Policy

WALK = ROOT / "lessons" / "one_step.py"
CELLS = notebook.notebook(WALK.read_text())["cells"]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """All names of the walk, run as a script; `folder` is where it ran."""
    folder, threads = tmp_path_factory.mktemp("walk"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        torch.set_num_threads(1)
        names = runpy.run_path(str(WALK), run_name="__main__")
        torch.set_num_threads(threads)
    return SimpleNamespace(**names, folder=folder)


@pytest.fixture(scope="module")
def base(walk):
    """The policy as it was before the step."""
    return Policy.load(walk.config.start)


def logps(policy: Policy, state, tokens: list[int]) -> torch.Tensor:
    """(T,) log-probs by transformers alone: one action on its own, eager attention."""
    logits = eager_logits(policy, state, tokens)
    logits[:, policy.suppressed_ids] = -math.inf
    return logits.log_softmax(-1)[range(len(tokens)), tokens]


def stopped(walk, g: int) -> list[str]:
    """The words of a kept action that the clip stops in a second update."""
    words = walk.policy.tokenizer.convert_ids_to_tokens(walk.group.kept_actions[g].tokens)
    up = float(walk.advantages[0, g]) > 0
    pairs = zip(words, walk.ratio[g].tolist(), strict=False)
    return [word for word, ratio in pairs if (ratio > 1.2 if up else ratio < 0.8)]


def rights(walk, source: str) -> int:
    pairs = zip(walk.group.actions, walk.group.accuracy, strict=True)
    return sum(right for action, right in pairs if action.source == source)


def glances(walk, source: str) -> list[bool]:
    return [
        "at a glance" in action.text for action in walk.group.actions if action.source == source
    ]


def near(values, *expected: float) -> bool:
    """Equal as printed, with two decimals."""
    values = [round(float(value), 2) for value in values]
    return values == list(expected)


# What a bullet of the walk says -> whether it is so. Numbers after the step of AdamW, which
# magnifies rounding, have room.
CLAIMS = {
    "The scene has three objects, one of them a large sphere, so the answer is 1.": lambda w: (
        [thing.shape for thing in w.state.problem.objects].count("sphere") == 1
        and len(w.state.problem.objects) == 3
        and w.state.question == "count every large sphere ."
        and w.state.answer == "1"
    ),
    "The prompt has 33 tokens, and 16 of them are the picture.": lambda w: (
        (len(w.prompt.input_ids), w.image_tokens) == (33, 16)
    ),
    "M is 12: four of the policy, of `careful` and of `quick`.": lambda w: (
        [action.source for action in w.group.actions]
        == ["policy"] * 4 + ["careful"] * 4 + ["quick"] * 4
    ),
    'The policy thinks "at a glance", as `quick` does; only `careful` shows how it found its '
    "answer.": lambda w: (
        glances(w, "policy") == [True, True, True, False]  # the last one thinks nothing
        and all(glances(w, "quick"))
        and not any(glances(w, "careful"))
    ),
    "Policy and experts are right once each; the policy's last action, a bare number, gets "
    "nothing.": lambda w: (
        [rights(w, source) for source in pictures.COLORS] == [1, 1, 1]
        and w.group.actions[3].text == "3"
        and w.group.rewards[3] == 0
    ),
    "Kept: the right action of each source, and of the eight with R = 1 the policy's first.": (
        lambda w: (
            w.group.kept == [2, 6, 8, 0]
            and [w.group.actions[i].source for i in w.group.kept[:3]] == list(pictures.COLORS)
            and w.group.rewards.count(1) == 8
            and w.group.rewards.index(1) == 0
        )
    ),
    "By all M the right ones get +1.44 and the wrong one -0.29.": lambda w: near(
        w.readings["candidates"][0], 1.44, 1.44, 1.44, -0.29
    ),
    "By the selected G it is +0.50 and -1.50, a sum of 0; four right ones would teach nothing.": (
        lambda w: (
            near(w.readings["selected"][0], 0.5, 0.5, 0.5, -1.5)
            and not grpo.group_advantages([2.0] * 4).any()
        )
    ),
    "Policy and `quick` wrote the same right action, so the row holds three actions, not four.": (
        lambda w: (
            w.group.kept_tokens[0] == w.group.kept_tokens[2] and len(w.packed.layout.action_at) == 3
        )
    ),
    "Once in 14 million the policy would write what `careful` wrote: a weight of 0.0000003.": (
        lambda w: (
            round(math.exp(-float(w.old_logp[0, 1].sum())) / 1e6) == 14
            and round(float(w.weights[0, 1]), 7) == 3e-7
        )
    ),
    "The same text has the same weight, 1.08, whether the policy or `quick` wrote it.": lambda w: (
        near(w.weights[0, [0, 2]], 1.08, 1.08)
    ),
    "So of four kept actions 2.98 are left; Eq 10 bounds the error of A by 0.52, going by these "
    "four.": lambda w: near([w.ess, w.bound], 2.98, 0.52),
    "By the selected G the loss of A is 0, and the norm of its gradient is 1.13.": lambda w: near(
        [abs(w.losses["A", "selected"]), w.norms["A", "selected"]], 0.0, 1.13
    ),
    "By all M the losses are -1.01 (A), -0.69 (B) and -0.80 (C).": lambda w: near(
        [w.losses[letter, "candidates"] for letter in "ABC"], -1.01, -0.69, -0.8
    ),
    "B and C leave `careful`'s action out, the only one that shows how to count.": lambda w: (
        w.group.kept_actions[1].source == "careful"
        and float(w.weights[0, 1] / w.weights[0].sum()) < 1e-6
        and ["at a glance" in action.text for action in w.group.kept_actions]
        == [True, False, True, True]
    ),
    "The clip stops one token of each action: the digit of a glance, and the listing's first "
    "word.": lambda w: [stopped(w, g) for g in range(4)] == [["1"], ["b1"], ["1"], ["0"]],
    "That word is over ten thousand times as likely now; once it is written, the rest was known.": (
        lambda w: (
            3e3 < float(w.ratio[1, 1]) < 2e5
            and float(w.old_logp[0, 1].sum() - w.old_logp[0, 1, 1]) > -1.0
        )
    ),
    "So the KL to the policy before the step is largest for `careful`'s action.": lambda w: (
        int(w.second["kl"][0].argmax()) == 1
    ),
    "The right glance has become likelier and the wrong one rarer, though one word tells them "
    "apart.": lambda w: (
        float(w.new_logp[0, 0].sum() - w.old_logp[0, 0].sum()) > 0.2
        and float(w.new_logp[0, 3].sum() - w.old_logp[0, 3].sum()) < -0.2
        and sum(a != b for a, b in zip(w.group.kept_tokens[0], w.group.kept_tokens[3])) == 1
    ),
    "The listing now comes once in some hundreds: soon it will be among the policy's own "
    "samples.": lambda w: 100 < math.exp(-float(w.new_logp[0, 1].sum())) < 1500,
    "Of 64 samples half were right, now three quarters are; the greedy answer was right before.": (
        lambda w: (
            len(w.asked["before"][1]) == len(w.asked["after"][1]) == 64
            and abs(w.right["before"] - 32) < 5
            and abs(w.right["after"] - 48) < 7
            and "<answer> 1 </answer>" in w.asked["before"][0].text
        )
    ),
}


def bullets() -> list[str]:
    found = []
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            found += re.findall(r"^- (.*(?:\n  .*)*)", "".join(cell["source"]), re.MULTILINE)
    return found


def test_every_bullet_has_a_check_and_every_chapter_a_bullet():
    assert bullets() == list(CLAIMS)
    chapters = [cell for cell in CELLS[2:] if cell["cell_type"] == "markdown"]
    assert all("\n- " in "".join(cell["source"]) for cell in chapters)


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_bullet_says_is_so(walk, claim):
    assert CLAIMS[claim](walk)


def test_advantages_are_those_of_paper_and_pencil(walk):
    rewards = walk.group.rewards
    for name, compared in (("candidates", rewards), ("selected", [2.0, 2.0, 2.0, 1.0])):
        mean, std = statistics.mean(compared), statistics.stdev(compared)
        by_hand = [(rewards[i] - mean) / (std + 1e-4) for i in walk.group.kept]
        assert walk.readings[name][0].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_weights_ess_and_bound_are_those_of_the_densities(walk, base):
    group, policy_logp = walk.group, []
    for g, action in enumerate(group.kept_actions):
        with torch.no_grad():
            plain = logps(base, walk.state, action.tokens)
        assert torch.allclose(walk.old_logp[0, g, : len(plain)], plain, atol=1e-4)
        policy_logp.append(float(plain.sum()))
    survival = sum(reward >= 1 for reward in group.rewards) / 12
    w = []
    for own, action in zip(policy_logp, group.kept_actions, strict=True):
        others = [expert.density(walk.state).get(action.text, 0.0) for expert in walk.experts]
        w.append(survival * math.exp(own) / ((math.exp(own) + sum(others)) / 3))
    assert walk.weights[0].tolist() == pytest.approx(w, rel=1e-3)
    assert walk.ess == pytest.approx(sum(w) ** 2 / sum(x * x for x in w), rel=1e-4)
    variation = sum(abs(1 - x) for x in w) / 4 / 2
    assert walk.bound == pytest.approx(2 * max(map(abs, group.advantages)) * variation, rel=1e-3)


@pytest.mark.parametrize("letter", "ABC")
@pytest.mark.parametrize("reading", ["candidates", "selected"])
def test_a_gradient_is_that_of_a_plain_forward_without_packing(walk, base, letter, reading):
    w = walk.weights[0]
    shares = {"A": torch.ones(4) / 4, "B": w / 4, "C": w / w.sum()}[letter]
    loss = 0.0  # at ratio 1 the gradient of the ratio is that of the log-prob
    for g, tokens in enumerate(walk.group.kept_tokens):
        logp = logps(base, walk.state, tokens)
        ratio = (logp - logp.detach()).exp()
        loss = loss - shares[g] * walk.readings[reading][0, g] * ratio.mean()
    gradients = torch.autograd.grad(loss, [p for p in base.parameters() if p.requires_grad])
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert walk.losses[letter, reading] == pytest.approx(loss.item(), abs=1e-5)
    assert walk.norms[letter, reading] == pytest.approx(norm, rel=1e-3)


def test_in_the_first_update_ratios_are_1_and_only_advantages_are_left(walk):
    assert not walk.first["kl"].any() and not walk.first["clip_fraction"].any()
    assert torch.equal(walk.first["objective"], walk.advantages)
    assert walk.losses["A", "candidates"] == pytest.approx(-float(walk.advantages.mean()))


def test_the_picture_of_attention_is_what_a_token_depends_on(walk):
    lengths = [33, *(len(tokens) for tokens in dict.fromkeys(map(tuple, walk.group.kept_tokens)))]
    part = [k for k, length in enumerate(lengths) for _ in range(length)]
    seen = pictures.seen_by(walk.packed.layout)
    for i, j in torch.cartesian_prod(torch.arange(len(part)), torch.arange(len(part))).tolist():
        assert bool(seen[i, j]) == (j <= i and part[j] in (0, part[i])), (i, j)


def test_a_script_leaves_its_pictures(walk):
    for name in ("state", "attention", "ratio"):
        assert (walk.folder / "runs/lessons/one_step" / f"{name}.png").stat().st_size > 3000


def test_the_walk_starts_in_its_own_folder_as_in_the_root(walk):
    """As a notebook or `python lessons/one_step.py` does: its first cell finds the project."""
    code = next("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    finds, _, imports = code.partition("import grpo")
    finds = re.sub(r"^(import torch|from transformers) ?.*$", "", finds, flags=re.MULTILINE)  # slow
    program = f"{finds}\nimport importlib.util as u\nprint(u.find_spec('grpo').origin)"
    for folder in (ROOT, ROOT / "lessons"):
        out = subprocess.run(
            [sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True
        )
        assert Path(out.stdout.strip()) == ROOT / "grpo.py", out.stderr
    assert "from lessons import pictures" in imports


# ----------------------------------------------------------------------------------- the notebook


def test_the_notebook_has_all_cells_in_order(tmp_path, monkeypatch):
    out = tmp_path / "walk.ipynb"
    monkeypatch.setattr("sys.argv", ["lessons.notebook", "--out", str(out)])
    notebook.main()
    made = json.loads(out.read_text())
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    kinds, lines = [], []
    for cell in made["cells"]:
        source = "".join(cell["source"])
        kinds.append(cell["cell_type"])
        if cell["cell_type"] == "code":
            ast.parse(source)
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            lines += source.splitlines()
        else:
            assert "outputs" not in cell and not source.startswith(" ")
            lines += [f"# {line}".rstrip() for line in source.splitlines()]
    assert kinds == ["markdown", "code"] * 11 == [cell["cell_type"] for cell in CELLS]
    text = [line for line in WALK.read_text().splitlines() if not line.startswith("# %%")]
    assert [line for line in lines if line] == [line for line in text if line]
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])


def test_what_stands_before_the_first_mark_is_a_cell_and_percent_signs_in_code_are_none():
    cells = notebook.notebook('"""Doc."""\n# %% [markdown]\n# a\n# %%\nx = 5 # %% 3\n')["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ['"""Doc."""', "a", "x = 5 # %% 3"]


@pytest.mark.parametrize("name", ["nowhere.py", "binary.py"])
def test_a_file_that_is_none_gives_one_line(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / name), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        notebook.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
