"""Prompts that are too long for the model, and no others, are left out before training."""

import json
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import ekipl
import evaluate
import sft
from data import lengths, predictions, reading, reason_rft, sets
from data.lengths import Room, room_of
from data.reason_rft import ReasonRFTSet
from data.state import MODES, State
from experts import collect
from policy import Policy
from rollouts import answering
from rollouts.choice import why_no_engine
from sampling import Action
from training import console, storage
from training.distributed import World

ROOT = Path(__file__).resolve().parents[2]
CPU = World(0, 1, torch.device("cpu"))
LONG = "how many red objects are there ? "  # of 8 words
SHORT = dict(
    experts="none", batch_size=4, num_samples=2, group_size=2, max_new_tokens=8, beta=0.0,
    name="run", eval_states=4, save_every=0,
)  # fmt: skip


def world(tmp_path, repeats: dict[str, dict[int, int]], size: int = 12) -> Path:
    """The miniature, with some questions, by set and number, so many times as long."""
    directory = miniature.make(tmp_path / "data", size=size, zipped=False, broken=False)
    for name, changes in repeats.items():
        file = directory / reading.FILES[name]
        records = json.loads(file.read_text())
        for i, times in changes.items():
            records[i]["problem"] = LONG * times
        file.write_text(json.dumps(records))
    return directory


# ----------------------------------------------------------------------------------------- how long


@pytest.mark.parametrize(
    "pixels", [{}, dict(max_pixels=1024), dict(min_pixels=9000, max_pixels=20000)], ids=str
)
def test_a_prompt_is_as_long_as_the_policys(random_model_dir, pixels):
    for model in (random_model_dir, ROOT / "blocks" / "tiny"):
        policy, room = Policy.load(model, **pixels), Room(model, 8, **pixels)
        for sizes in (
            [],
            [(40, 32)],
            [(1, 1)],
            [(640, 480), (24, 20)],
            [(1600, 8)],
            [(8, 1500)],
            [(65, 63)],
        ):
            images = tuple(Image.new("RGB", size) for size in sizes)
            for kind in ("discrete", "function"):
                state = State(
                    "0", images, "how many red cubes ?", "1", kind, rules=reason_rft.RULES
                )
                (prompt,) = policy.encode([state])
                counted = room.text_tokens(state) - len(sizes) + sum(map(room.image_tokens, sizes))
                assert counted == len(prompt.input_ids)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "½ ３ （B）",
        "שּׁ" * 9,
        "\U0001d160" * 9,
        "é" * 9,
        "日本" * 9,
        "\ufffd\0 \u200b",
        "👩‍👩‍👧" * 3,
    ],
)
def test_no_text_has_more_tokens_than_the_bytes_that_are_counted(monkeypatch, text):
    """Against a tokenizer of single bytes, the worst that byte-level BPE can do."""
    worst = Tokenizer(
        models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    worst.normalizer, worst.decoder = normalizers.NFC(), decoders.ByteLevel()
    worst.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = len(worst.encode(text).ids)
    assert tokens == len(unicodedata.normalize("NFC", text).encode())
    room = Room("Qwen/Qwen2-VL-2B-Instruct", 8)
    state = State("0", (), text, "1", "discrete", mode="bare")
    assert room.problem(state, []) is None and room.longest == tokens + lengths.TEMPLATE + 8


def test_only_a_prompt_that_may_be_too_long_is_tokenised(monkeypatch):
    """And of the paper's models nothing is loaded for the others."""
    room = Room("Qwen/Qwen2-VL-7B-Instruct", 512, max_pixels=480000)
    monkeypatch.setattr(
        "transformers.AutoProcessor.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    state = State("0", (), "how many ? " * 100, "1", "function", rules=reason_rft.RULES)
    assert room.problem(state, [(480, 320), (4000, 3000)]) is None
    assert 1224 < room.longest < 4096 + 512


@pytest.mark.parametrize("limit", [0, 300, 5000])
def test_the_limit_is_the_smaller_of_the_models_and_the_flags(random_model_dir, limit):
    room, longest = Room(random_model_dir, 8, limit), 0
    for words in (10, 200, 400, 1900, 2040, 3000):
        state = State("0", (), " ".join(["how"] * words), "1", "discrete")
        needed = room.text_tokens(state) + 8
        problem = room.problem(state, [])
        assert (problem is None) == (needed <= min(limit or 2048, 2048))
        if problem:
            knows = "--max-model-len 300" if limit == 300 else "the 2048 that the model knows"
            assert (
                problem
                == f"question too long: {needed - 8} tokens and a response of 8, more than {knows}"
            )
        else:
            longest = max(longest, needed)
    assert longest <= room.longest <= (limit if limit == 300 else 2048)


def test_a_response_needs_room_as_well(random_model_dir):
    state = State("0", (), " ".join(["how"] * 1800), "1", "discrete")
    assert Room(random_model_dir, 8).problem(state, []) is None
    assert "a response of 500" in Room(random_model_dir, 500).problem(state, [])


@pytest.mark.parametrize("model", ["nowhere/at-all", "{tmp}", "{tmp}/broken"])
def test_a_model_that_cannot_be_loaded_is_for_the_policy_to_tell(tmp_path, monkeypatch, model):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    state = State("0", (), "how " * 9999, "1", "discrete")
    assert Room(model.format(tmp=tmp_path), 8).problem(state, []) is None


# ------------------------------------------------------------------------- left out before training


LEFT_OUT = {"counting-train": {9: 400}, "counting-id": {3: 400}, "counting-ood": {0: 999, 1: 999}}
ENGINES = ["transformers", *([] if why_no_engine(CPU.device) else ["vllm"])]


@pytest.mark.parametrize("rollout", ENGINES)
def test_too_long_questions_are_left_out_of_every_set_and_listed(tmp_path, rollout, capsys):
    directory = world(tmp_path, LEFT_OUT)
    flags = dict(
        SHORT, data=directory, data_cache=tmp_path / "cache", runs=tmp_path, rollout=rollout
    )
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    path = ekipl.train(ekipl.parse(argv)[0], None, CPU)
    left_out = storage.read(path / "left_out.jsonl")
    assert {(r["set"], r["record"]) for r in left_out} == {
        (name, i) for name, changes in LEFT_OUT.items() for i in changes
    }
    assert all(r["reason"].startswith("question too long: ") for r in left_out)
    said = capsys.readouterr().err
    assert "counting-train: 11 of 12 records; left out: 1 question too long" in said
    assert "counting-ood: 10 of 12 records; left out: 2 question too long" in said
    assert [r["step"] for r in storage.read(path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("method", sft.METHODS)
def test_sft_leaves_them_out_as_well(tmp_path, method):
    directory = world(tmp_path, LEFT_OUT)
    config = sft.Config(
        data=str(directory), data_cache=str(tmp_path / "c"), runs=str(tmp_path), method=method,
        batch_size=4, max_new_tokens=8,
        eval_states=2, rollout="transformers", name="run",
    )  # fmt: skip
    left_out = storage.read(sft.train(config, None, CPU) / "left_out.jsonl")
    assert [r["set"] for r in left_out] == ["counting-train", "counting-id", *["counting-ood"] * 2]


@pytest.mark.skipif("vllm" not in ENGINES, reason="no engine can run here")
def test_vllm_holds_what_the_model_knows_though_it_is_longer_than_usual(tmp_path, random_model_dir):
    """1,600 words are more than the engine's 1,024 for words, and fit the model's 2,048."""
    directory = world(tmp_path, {"counting-train": {2: 200, 9: 400}}, size=9 + 1)
    flags = dict(
        SHORT, data=directory, data_cache=tmp_path / "cache", runs=tmp_path, rollout="vllm",
        model=random_model_dir, eval_every=0,
        batch_size=9, parity_every=0,
    )  # fmt: skip
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    path = ekipl.train(ekipl.parse(argv)[0], None, CPU)
    assert [r["record"] for r in storage.read(path / "left_out.jsonl")] == [9]
    assert len(storage.read(path / "metrics.jsonl")) == 1  # all nine others in one step


def test_collect_asks_for_what_training_will_ask(tmp_path):
    directory = world(tmp_path, LEFT_OUT)
    flags = dict(SHORT, data=directory, data_cache=tmp_path / "cache")
    config = ekipl.parse([f"--{k.replace('_', '-')}={v}" for k, v in flags.items()])[0]
    questions, order = sets.training_states(config, room=room_of(config, config.start))
    asked = [state.id for state in collect.states_to_ask(config)]
    assert asked == [questions[i].id for i in order] and len(asked) == 11


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_leaves_them_out_and_reads_bare_answers(tmp_path, monkeypatch, capsys, mode):
    """With a policy that says the truth as its mode asks for it."""
    directory, out = world(tmp_path, LEFT_OUT), tmp_path / "out"

    def answers(self, states):
        tagged = {
            "reason": "<think>a</think><answer>{}</answer>",
            "answer": "<answer>{}</answer>",
            "bare": "{}",
        }
        said = [s.reading(tagged[s.mode].format(s.answer)) for s in states]
        return [
            predictions.Prediction(s.id, s.answer, s.kind, t, 1, False)
            for s, t in zip(states, said, strict=True)
        ]

    monkeypatch.setattr(answering.ModelAnswers, "__call__", answers)
    flags = [
        "--data",
        directory,
        "--data-cache",
        tmp_path / "c",
        "--rollout",
        "transformers",
        "--mode",
        mode,
        "--out",
        out,
    ]
    flags = [ROOT / "blocks" / "tiny", "--sets", "counting-id", "counting-ood", *flags]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    said = capsys.readouterr()
    assert "counting-ood: 10 of 12 records; left out: 2 question too long" in said.err
    assert len(storage.read(out / "counting-id.jsonl")) == 11
    found = predictions.read_predictions(out)
    assert all(evaluate.score_predictions(ps)["accuracy"] == 1 for ps in found.values())


def test_a_bare_answer_counts_while_training_too():
    state = State("0", (), "how many ?", "3", "discrete", mode="bare")
    for text, right in (("3", 1), ("4", 0), ("", 0), ("<answer>3</answer>", 1)):
        said = evaluate.predictions_of([state], [Action([1], text, "policy")])
        assert evaluate.score_predictions(said)["accuracy"] == right


@pytest.mark.parametrize(
    "name, says", [("counting-train", "training set"), ("counting", "no set 'counting'")]
)
@pytest.mark.parametrize("source", ["blocks", "real"])
def test_evaluation_of_no_test_set_is_told_in_a_line(
    tmp_path, monkeypatch, capsys, source, name, says
):
    directory = world(tmp_path, {})
    flags = [
        ROOT / "blocks" / "tiny",
        "--sets",
        name,
        "--data",
        "blocks" if source == "blocks" else directory,
    ]
    flags += ["--out", tmp_path / "out", "--data-cache", tmp_path / "c"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and says in said


def test_a_set_of_nothing_but_long_questions_is_told_in_a_line(tmp_path):
    directory = world(tmp_path, {"counting-train": dict.fromkeys(range(12), 400)})
    config = SimpleNamespace(data=str(directory), data_cache=str(tmp_path / "c"))
    with pytest.raises(console.UserError, match="can be used: question too long: "):
        sets.load_set("counting-train", config, room=Room(ROOT / "blocks" / "tiny", 8))


def test_without_room_to_keep_to_nothing_is_measured(tmp_path):
    directory = world(tmp_path, LEFT_OUT)
    assert len(ReasonRFTSet("counting-train", directory)) == 12
