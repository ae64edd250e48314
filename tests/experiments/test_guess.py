"""A guess from a question's words: the commonest training answer to its form, and no picture."""

import statistics

import pytest

from blocks.dataset import BlocksSet
from data.predictions import read_predictions
from evaluate import score_predictions
from experiments import guess
from training.console import UserError


def asked(monkeypatch, *questions: tuple[str, str]) -> None:
    """The training questions and their answers."""

    class Asked:
        def __init__(self, question: str, answer: str):
            self.question, self.answer = question, answer

    monkeypatch.setattr(guess, "BlocksSet", lambda name, size: [Asked(*q) for q in questions])
    guess.answers_of.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    guess.answers_of.cache_clear()


def test_a_guess_is_the_commonest_training_answer_to_the_form_of_a_question(monkeypatch):
    plus, times = "count every cube . add 2 .", "remove every cube . times 2 . add 2 ."
    left = "remove every cube . how many are left ? add 2 ."
    one = ("count every cube . add 1 .", "4")
    asked(monkeypatch, one, *[(plus, "5")] * 2, (plus, "6"), (times, "8"), *[(left, "1")] * 3)
    assert guess.guess("counting", one[0]) == "4"  # its own number before any number
    assert guess.guess("counting", "count every red cone . add 2 .") == "5"  # in other words
    assert guess.guess("counting", "remove every small cone . times 2 . add 2 .") == "8"
    assert guess.guess("counting", "count every cube . add 3 .") == "5"  # as with any number
    assert guess.guess("counting", "how many ?") == ""  # a form never seen


def test_the_form_of_a_question_about_a_figure_is_what_it_asks_and_names():
    strip = "the area of the rectangle is {} . how long is the missing side ?"
    forms = [
        "how many sides does the figure have ?",
        "what is the perimeter of the figure ?",
        "what is the area of the figure ?",
        strip.format(12),
        strip.format(20),
    ]
    assert len(set(map(guess.form, forms))) == 5
    choice = f"{forms[1]} choose a letter : A 12 B 14 C 16 D 18"
    assert guess.form(choice) == guess.form(forms[1])


def test_drawn_answers_are_as_often_right_as_they_are_in_training(tmp_path):
    states = list(BlocksSet("counting-id", 300))
    expected = []
    for state in states:
        found = guess.answers_to("counting", state.question)
        expected.append(found[state.answer] / found.total())
    guess.run(["--sets", "counting-id", "--states", "300", "--out", str(tmp_path)])
    (predictions,) = read_predictions(tmp_path).values()
    right = [f"<answer> {p.answer} </answer>" == text for p in predictions for text in p.samples]
    assert len(right) == 300 * guess.SAMPLES
    assert statistics.fmean(right) == pytest.approx(statistics.fmean(expected), abs=0.01)
    greedy = [guess.guess("counting", state.question) == state.answer for state in states]
    assert score_predictions(predictions)["accuracy"] == pytest.approx(statistics.fmean(greedy))


def test_an_unknown_set_and_no_states_are_told(tmp_path):
    with pytest.raises(UserError, match="no set 'colors'"):
        guess.run(["--sets", "colors", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--states must be at least 1"):
        guess.run(["--states", "0", "--out", str(tmp_path)])
