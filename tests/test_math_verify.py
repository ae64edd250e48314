"""The legacy test score is Reason-RFT's: equal text or math-verify's verdict."""

import json
import re
import threading
import time

import pytest

pytest.importorskip("math_verify", reason="math-verify is installed for --legacy alone")

import evaluate
from data.predictions import Prediction
from evaluate import score_predictions
from rewards import accuracy_score, wholly_right


def theirs(content: str, sol: str) -> float:
    """Reason-RFT's score of counting and geometry, said again in a few lines."""
    from math_verify import parse, verify

    found = re.search(r"<answer>(.*?)</answer>", content, re.DOTALL)
    answer = (found.group(1) if found else content).strip()
    return float(answer == sol or verify(parse(answer), parse(sol)))


# The response, the truth, and its score worked by hand; the lenient ones are theirs.
SCORED = [
    ("<answer>3</answer>", "3", 1), ("<answer>3.0</answer>", "3", 1),
    ("<answer>\n3\n</answer>", "3", 1),
    ("3", "3", 1), ("3 cubes", "3", 1), ("<answer>3 cubes</answer>", "3", 1),
    ("The answer is 3.", "3", 1),
    ("<think>\n2 + 2\n</think>\n<answer>\n4\n</answer>", "4", 1), ("<answer>4</answer>", "3", 0),
    ("", "3", 0),
    ("<answer>60</answer>", "60", 1), ("<answer>57</answer>", "60", 0),
    ("<answer>62</answer>", "60", 0),
    ("<answer>66</answer>", "60", 0), ("<answer>1/2</answer>", "0.5", 1),
    (r"<answer>$\frac{1}{2}$</answer>", "0.5", 1),
    ("<answer>B</answer>", "B", 1), ("<answer>b</answer>", "B", 0), ("B", "B", 1),
    ("<answer>nan</answer>", "3", 0),
    ("<answer>2</answer>", r"2\sqrt{3}", 1), ("<answer>5</answer><answer>3</answer>", "3", 0),
]  # fmt: skip


@pytest.mark.parametrize("text, answer, expected", SCORED)
def test_the_legacy_score_is_reason_rfts(text, answer, expected):
    for kind in ("discrete", "math"):
        assert accuracy_score(text, answer, kind, legacy=True) == expected == theirs(text, answer)
        assert wholly_right(text, answer, kind, legacy=True) == (expected == 1)


def test_accuracy_exact_and_pass_at_k_are_scored_alike():
    said = [
        Prediction(str(i), "60", "math", f"<answer>{text}</answer>", 1, False, ["60.0", text])
        for i, text in enumerate(("60.0", "57", "62", "66"))
    ]
    found = score_predictions(said, [1, 2], legacy=True)
    assert (found["accuracy"], found["exact"], found["pass@1"], found["pass@2"]) == (
        0.25, 0.25, (1 + 3 * 0.5) / 4, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", ["9^9^9^9", "(" * 3000 + "1" + ")" * 3000, "1+" * 3000, "$" * 5000, "\ud800", "\0"]
)
def test_hostile_answers_are_wrong_in_bounded_time(text):
    start = time.time()
    assert accuracy_score(text, "3", "math", legacy=True) == 0
    assert time.time() - start < 60  # their time-outs are 5 s for each of three steps


def test_another_thread_is_refused_since_its_answers_would_all_be_wrong():
    raised = []

    def score():
        try:
            accuracy_score(
                "17.0", "17", "math", legacy=True
            )  # asked nowhere else: no verdict is kept
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert "main thread" in raised[0]


def test_saved_predictions_are_scored_so_by_a_flag(tmp_path, monkeypatch, capsys):
    record = dict(id="a", answer="3", kind="discrete", text="3 cubes", tokens=2, truncated=False)
    (tmp_path / "counting-id.jsonl").write_text(json.dumps(record) + "\n")
    for flags, accuracy in (([], "0.0"), (["--legacy"], "100.0")):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "score", str(tmp_path), *flags])
        evaluate.main()
        assert capsys.readouterr().out.splitlines()[1].split()[2] == accuracy
