"""The rewards (Eq 7): tables worked by hand, bugs of the original, hacks, hostile texts, fuzz."""

import itertools
import random
import re
import time

import pytest

from data.answers import KINDS, extract_answer
from rewards import (
    accuracy_reward,
    accuracy_score,
    format_reward,
    function_score,
    judge_answer,
    reward,
    wholly_right,
)

TRUTH = "change_color(0, blue) change_shape(1, cube)"


def said(answer: str) -> str:
    return f"<think>because</think><answer>{answer}</answer>"


# ---------------------------------------------------------------------------------- format and tags

# The response; its strict format and the answer read from it; its legacy format.
RESPONSES = [
    ("<think>a</think><answer>3</answer>", 1, "3", 1),
    ("<think>\na\n</think>\n<answer>\n3\n</answer>", 1, "3", 1),
    ("<think> a </think> <answer> 3 </answer>", 1, "3", 1),  # a word-level tokeniser's blanks
    (
        " \n<think>a</think><answer>3</answer>\t\n",
        1,
        "3",
        0,
    ),  # bug: outer white space fails the format
    ("<think>a < b > c </b></think><answer>3</answer>", 1, "3", 1),  # other tags are text
    ("3", 0, None, 0),
    ("", 0, None, 0),
    ("<answer>3</answer>", 0, "3", 0),  # no thought: the answer counts, the format does not
    ("a</think><answer>3</answer>", 0, "3", 0),
    ("Well. <think>a</think><answer>3</answer>", 0, "3", 0),
    ("<think>a</think> so <answer>3</answer>", 0, "3", 0),
    ("<think>a</think><think>b</think><answer>3</answer>", 0, "3", 1),
    ("<think><think>a</think></think><answer>3</answer>", 0, "3", 1),
    (
        "<think>a</think><answer>3</answer> or 4",
        0,
        None,
        0,
    ),  # bug: text after the answer is ignored
    ("<think>a</think><answer>3", 0, None, 0),
    ("<think>a</think>3</answer>", 0, None, 0),
    ("<think>a<answer>3</answer>", 0, None, 0),  # a thought that never ends
    ("<think>a<answer>3</answer></think>", 0, None, 0),
    (
        "<think>a<answer>3</answer></think><answer>4</answer>",
        0,
        None,
        1,
    ),  # bug: an answer in the thought passes
    (
        "<think>a</think><answer>3</answer><answer>4</answer>",
        0,
        None,
        1,
    ),  # bug: a second answer passes
    ("<think>a</think><answer><answer>3</answer></answer>", 0, None, 1),
    ("<think>a</think><answer>3<answer>3</answer>", 0, None, 1),
    ("<think>a</think><answer><think>3</think></answer>", 0, None, 1),
    ("<think>a</think><answer>3</answer></answer>", 0, None, 1),
    ("</think><think>a</think><answer>3</answer>", 0, "3", 0),
    ("<answer>3</answer><think>a</think>", 0, None, 0),
    ("</answer>3<answer>", 0, None, 0),
    ("<think></think><answer>3</answer>", 0, "3", 1),  # bug: empty tags pass
    ("<think> \n</think><answer>3</answer>", 0, "3", 1),
    ("<think>a</think><answer></answer>", 0, None, 1),
    ("<think>a</think><answer> \n </answer>", 0, None, 1),
    ("<Think>a</Think><Answer>3</Answer>", 0, None, 0),
    ("<think>a</think><answer>3</аnswer>", 0, None, 0),  # a Cyrillic letter in the tag
]


@pytest.mark.parametrize("text, strict, answer, legacy", RESPONSES)
def test_format_and_the_answer_that_is_read(text, strict, answer, legacy):
    assert (format_reward(text), extract_answer(text), format_reward(text, legacy=True)) == (
        strict,
        answer,
        legacy,
    )
    assert accuracy_reward(text, "3", "discrete") == (answer == "3")


def test_legacy_format_is_the_original_regular_expression():
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "</answer", " ", "\n", "a"]
    seen = set()
    for _ in range(20_000):
        text = (
            "<think>"
            + "".join(rng.choices(pieces, k=rng.randint(0, 7)))
            + rng.choice(["</answer>", "", " "])
        )
        theirs = (
            re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) is not None
        )
        assert format_reward(text, legacy=True) == theirs, text
        seen.add(theirs)
    assert seen == {True, False}


# ----------------------------------------------------------------------------------------- accuracy

JUDGED = [
    # discrete, numbers: by value (bug: "3.0" differs from "3")
    ("3", "3", "discrete", 1), ("3.0", "3", "discrete", 1), ("3", "3.0", "discrete", 1),
    ("03", "3", "discrete", 1),
    (" 3 \n", "3", "discrete", 1), ("3.", "3", "discrete", 1), ("+3", "3", "discrete", 1),
    ("- 3", "-3", "discrete", 1),
    ("−3", "-3", "discrete", 1), ("1,000", "1000", "discrete", 1), ("$3$", "3", "discrete", 1),
    (r"\boxed{3}", "3", "discrete", 1), ("3e0", "3", "discrete", 1), (".5", "0.5", "discrete", 1),
    (".5", "5", "discrete", 0), ("0", "0", "discrete", 1), ("-0", "0", "discrete", 1),
    ("-3", "3", "discrete", 0),
    ("3.01", "3", "discrete", 0), ("4", "3", "discrete", 0),
    # ... and never a part of the text, a list, a calculation, or what is no number
    ("13", "3", "discrete", 0), ("3", "13", "discrete", 0), ("3 4 5", "3", "discrete", 0),
    ("1,2,3", "3", "discrete", 0), ("1,2", "12", "discrete", 0), ("3 or 4", "3", "discrete", 0),
    ("3 cubes", "3", "discrete", 0), ("4 - 1", "3", "discrete", 0), ("1 3", "13", "discrete", 0),
    ("three", "3", "discrete", 0), ("٣", "3", "discrete", 0), ("3̸", "3", "discrete", 0),
    ("nan", "3", "discrete", 0), ("inf", "3", "discrete", 0), ("1e999", "3", "discrete", 0),
    ("nan", "nan", "discrete", 0), ("-inf", "-inf", "discrete", 0),
    ("Infinity", "infinity", "discrete", 0),
    ("2e999", "1e999", "discrete", 0), ("3" + "0" * 2000, "3", "discrete", 0),
    ("0" * 2000 + "3", "3", "discrete", 0),
    # discrete, choices: by their letter
    ("B", "B", "discrete", 1), ("b", "B", "discrete", 1), ("B", "b", "discrete", 1),
    ("(B)", "B", "discrete", 1),
    ("( B )", "B", "discrete", 1), ("B.", "B", "discrete", 1), ("B)", "B", "discrete", 1),
    ("B) 12", "B", "discrete", 1), ("(B) 12 cm", "B", "discrete", 1),
    ("B: red", "B", "discrete", 1),
    (r"\text{B}", "B", "discrete", 1),
    ("B", "B) 12", "discrete", 1), ("B", "A", "discrete", 0), ("B) 12", "12", "discrete", 0),
    ("A B C D", "B", "discrete", 0), ("A, B, C, D", "A", "discrete", 0),
    ("ABCD", "A", "discrete", 0),
    ("A) 1 B) 2", "A", "discrete", 0), ("A.B", "A", "discrete", 0), ("A or B", "A", "discrete", 0),
    ("A cube", "A", "discrete", 0), ("B12", "B", "discrete", 0), ("(B", "B", "discrete", 0),
    ("", "B", "discrete", 0),
    ("А", "A", "discrete", 0),  # a Cyrillic letter
    # discrete, other texts: but for case and spaces
    ("Red  Cube", "red cube", "discrete", 1), ("red", "red cube", "discrete", 0),
    ("(1, 2)", "( 1,2 )", "discrete", 1),
    # math: values. Bugs: a truth of 0 (below), "nan", "2" read from "2\sqrt{3}", "5" from "5\pi"
    ("12", "12", "math", 1), ("12 cm", "12", "math", 1), ("12", "12 cm", "math", 1),
    ("12 cm", "12 cm", "math", 1),
    ("12 cm", "12 mm", "math", 0), ("12 units", "12 cm", "math", 1),
    (r"12\text{ cm}^2", "12", "math", 1),
    ("12 square centimeters", "12 cm", "math", 1), (r"30^\circ", "30", "math", 1),
    (r"30^{\circ}", "30°", "math", 1),
    ("30 degrees", "30", "math", 1), ("1,250", "1250", "math", 1), ("1.25e3", "1250", "math", 1),
    (r"1.25 \times 10^{3}", "1250", "math", 1), ("3/4", "0.75", "math", 1),
    (r"\frac{3}{4}", "0.75", "math", 1),
    (r"\dfrac34", "0.75", "math", 1), ("75%", "0.75", "math", 1), (r"75\%", "75", "math", 0),
    ("3 1/2", "3.5", "math", 1), (r"3\frac{1}{2}", "3.5", "math", 1),
    (r"-3\frac{1}{2}", "-3.5", "math", 1),
    ("3 2", "6", "math", 0),
    (r"2\sqrt{3}", "3.4641", "math", 1), ("2√3", r"2\sqrt{3}", "math", 1),
    ("2sqrt(3)", r"\sqrt{12}", "math", 1),
    ("2", r"2\sqrt{3}", "math", 0), ("5", r"5\pi", "math", 0), (r"5\pi", "5", "math", 0),
    ("15.7", r"5\pi", "math", 1),
    ("5π", "15.708", "math", 1), (r"\frac{\sqrt{2}}{2}", "0.7071", "math", 1),
    ("3^2", "9", "math", 1),
    (r"2^{10}", "1024", "math", 1), (r"\boxed{\frac{1}{2}}", "0.5", "math", 1),
    ("$-\\frac{1}{2}$", "-0.5", "math", 1),
    (r"3+2\sqrt{5}", "7.472", "math", 1), (r"\frac{1}{2}\pi", "1.5708", "math", 1),
    ("2(3+4)", "14", "math", 1),
    ("-2^2", "-4", "math", 1), ("2-3-4", "-5", "math", 1), ("8/2/2", "2", "math", 1),
    ("2^3^2", "512", "math", 1),
    (r"\(12\)", "12", "math", 1), ("12 or 13", "12", "math", 0), ("12 13", "12", "math", 0),
    ("12, 13", "12", "math", 0), (r"\frac{1}{2} 3/4", "0.5", "math", 0), ("50%%", "0.5", "math", 0),
    ("about 12", "12", "math", 0), ("121", "12", "math", 0),
    ("nan", "12", "math", 0), ("inf", "12", "math", 0), ("nan", "nan", "math", 0),
    ("nan", "0", "math", 0),
    ("1e999", "12", "math", 0), ("1/0", "12", "math", 0), ("1/1e999", "0", "math", 0),
    ("0^(-1)", "0", "math", 0),
    (r"\sqrt{-4}", "2", "math", 0), ("(-8)^(1/3)", "-2", "math", 0),
    ("1e300*1e300*0", "0", "math", 0),
    ("1e308", "1e-308", "math", 0), ("-1e308", "1e308", "math", 0), ("", "12", "math", 0),
    # math, a truth without a value: a choice or a text
    ("B", "B", "math", 1), ("(b)", "B", "math", 1), ("C", "B", "math", 0), ("2", "B", "math", 0),
    ("X + 1", "x+1", "math", 1), ("x+2", "x+1", "math", 0), ("x", "x+1", "math", 0),
    ("", "", "math", 0),
    # function: matches / max(|predicted|, |truth|), times distinct / all
    (TRUTH, TRUTH, "function", 1),
    ("change_shape(1,cube)change_color(0,blue)", TRUTH, "function", 1),
    ("change_color ( 0 , blue ) ; change_shape ( 1 , cube )", TRUTH, "function", 1),
    ("change_color(0, 'blue')\n\nchange_shape(1, \"CUBE\")", TRUTH, "function", 1),
    ("change_color(0, blue)", TRUTH, "function", 1 / 2),
    ("change_color(0, blue) change_shape(1, sphere)", TRUTH, "function", 1 / 2),
    (TRUTH + " change_size(2, small)", TRUTH, "function", 2 / 3),
    # repeats cost
    ("change_color(0,blue) change_color(0,blue)", "change_color(0,blue)", "function", 1 / 2),
    (TRUTH + " change_shape(1,cube)", TRUTH, "function", 2 / 3),
    ("change_color(0,blue) " * 3 + "change_shape(1,cube)", TRUTH, "function", 1 / 2),
    ("change_color(0,blue) change_color(0,blue)", "change_color(0,blue) change_color(0,blue)",
     "function", 1 / 2),
    # no partial credit in training
    ("change_color(1, blue) change_shape(0, cube)", TRUTH, "function", 0),
    ("change_color(car, blue)", "change_color(Car,blue)", "function", 1),  # an object may be a word
    ("xchange_color(0, blue)", "change_color(0, blue)", "function", 0),
    ("blue", TRUTH, "function", 0),
    ("change_color(0, blue", TRUTH, "function", 0), ("", TRUTH, "function", 0),
    (TRUTH, "", "function", 0),
]  # fmt: skip


@pytest.mark.parametrize("predicted, answer, kind, expected", JUDGED)
def test_accuracy_worked_by_hand(predicted, answer, kind, expected):
    assert judge_answer(predicted, answer, kind) == pytest.approx(expected, abs=1e-12)
    assert accuracy_reward(said(predicted), answer, kind) == pytest.approx(expected, abs=1e-12)


# Other ways of writing an answer ("d": discrete, "m": math): right, also where it must be equal ...
WRITTEN = [
    ("３", "3", "d"), ("3。", "3", "d"), ("３．０", "3", "d"), ("3．", "3", "d"),
    ("（B）", "B", "d"),
    ("Ｂ", "B", "d"), ("B：12", "B", "d"), ("B、12", "B", "d"), ("【B】", "B", "d"),
    ("「B」", "B", "d"),
    ("B。", "B", "d"), ("[B]", "B", "d"), ("3", "３", "d"), ("B", "（B）", "d"), ("B", "Ｂ", "d"),
    ("B. 12 m", "B", "d"), ("B. 12m", "B", "d"), ("(B) 12 m²", "B", "d"),
    ("B. 3 m by 4 m", "B", "d"), ("**3**", "3", "d"), ("__3__", "3", "d"), ("*3*", "3", "d"),
    ("`3`", "3", "d"), ("**B**", "B", "d"), ("**B.** 12", "B", "d"), ("**B**. 12", "B", "d"),
    ("**12 cm**", "12", "m"), ("**12** cm", "12", "m"), ("30˚", "30", "m"), ("30º", "30", "m"),
    ("30∘", "30°", "m"), ("30⁰", "30", "m"), ("30^o", "30", "m"), ("30°.", "30", "m"),
    ("30 \\degrees", "30", "m"), ("30度", "30", "m"), ("30^{\\circ}", "３０°", "m"),
    ("30 deg", "30 degrees", "m"), ("12 centimetres", "12", "m"), ("12 centimetres", "12 cm", "m"),
    ("12 centimetre", "12 centimeters", "m"), ("12 kms", "12 kilometres", "m"),
    ("12 yd", "12", "m"), ("12 yards", "12 yd", "m"), ("12 yds.", "12 yard", "m"),
    ("12 dm", "12 decimetres", "m"), ("12 inches", "12 in.", "m"), ("12 ft", "12 feet", "m"),
    ("12 sq. cm", "12", "m"), ("12 sq cm", "12 cm²", "m"), ("12 sq.cm", "12", "m"),
    ("12 cm2", "12", "m"), ("12cm2", "12 cm^2", "m"), ("12 cm²", "12 cm2", "m"),
    ("12 cubic centimetres", "12 cm³", "m"), ("12 cu. ft", "12 ft3", "m"),
    ("12 cm squared", "12", "m"), ("12 square units", "12", "m"), ("12 sq. units", "12", "m"),
    ("12 units²", "12", "m"), ("12 ㎠", "12 cm^2", "m"), ("12㎝", "12", "m"), ("½", "0.5", "m"),
    ("3½", "3.5", "m"), ("3 ½", "3.5", "m"), ("⅔", "2/3", "m"), ("¾", "0.75", "m"),
    ("1⁄2", "0.5", "m"), ("5²", "25", "m"), ("5³", "125", "m"), ("2¹⁰", "1024", "m"),
    ("10⁻²", "0.01", "m"), ("(1+2)²", "9", "m"), ("\\cfrac{1}{2}", "0.5", "m"),
    ("\\dfrac{1}{2}", "0.5", "m"), ("\\tfrac12", "0.5", "m"), ("3\\cfrac{1}{2}", "3.5", "m"),
    ("\\sqrt[3]{8}", "2", "m"), ("∛8", "2", "m"), ("³√8", "2", "m"), ("\\sqrt[4]{16}", "2", "m"),
    ("\\sqrt[3]{-8}", "-2", "m"), ("2\\sqrt[3]{27}", "6", "m"), ("√[3]{8}", "2", "m"),
    ("cbrt(8)", "2", "m"), ("∜16", "2", "m"), ("≈ 3.14", "3.14", "m"), ("≈3.14", "3.14", "m"),
    ("\\approx 3.14", "3.14", "m"), ("~3.14", "3.14", "m"), ("x ≈ 3.14", "3.14", "m"),
    ("≒3.14", "3.14", "m"), ("x=4", "4", "m"), ("x = 4", "4", "d"), ("x＝4", "4", "m"),
    ("AB = 12 cm", "12", "m"), ("\\angle ABC = 30^\\circ", "30", "m"), ("m∠ABC = 30°", "30", "m"),
    ("=5", "5", "m"), ("=5", "5", "d"), ("= 5", "5", "m"), ("x = 4", "x=4", "m"),
    ("4", "x = 4", "m"), ("x_1 = 4", "4", "m"), ("5,", "5", "m"), ("5，", "5", "d"),
    ("5,", "5", "d"), ("5;", "5", "m"), ("1,000,", "1000", "d"), ("1/2", "1:2", "m"),
    ("1:2", "1/2", "m"), ("1 : 2", "1:2", "m"), ("1∶2", "1：2", "m"), ("0.5", "1:2", "m"),
    ("2:4", "1:2", "m"), ("\\frac{1}{2}", "1:2", "m"), ("–5", "-5", "m"), ("—5", "-5", "m"),
    ("‑5", "-5", "d"), ("−5", "-5", "d"), ("－5", "-5", "d"), ("9", "9米", "m"), ("9米", "9", "m"),
    ("9 m", "9米", "m"), ("9米", "9 米", "m"), ("9厘米", "9 cm", "m"), ("9平方厘米", "9", "m"),
    ("9平方米", "9 m²", "m"), ("30度", "30°", "m"), ("9千米", "9 km", "m"), ("9", "9立方厘米", "m"),
    ("50％", "0.5", "m"), ("50 percent", "0.5", "m"), ("𝟑", "3", "d"), ("2·3", "6", "m"),
    ("2⋅3", "6", "m"), ("\\textbf{B}", "B", "d"), ("12\\,\\textrm{cm}", "12", "m"),
    ("\u200b3", "3", "d"), ("\ufeffB", "B", "d"),
    ("½π", "\\frac{\\pi}{2}", "m"), ("5²√2", "25√2", "m"), ("5𝜋", "5π", "m"),
]  # fmt: skip
# ... and what is near them, which is wrong.
NEAR = [
    ("A or B", "A", "d"), ("A or B", "B", "d"), ("B) 12 C) 13", "B", "d"),
    ("B）12 C）13", "B", "d"),
    ("3 or 4", "3", "d"), ("3 or 4", "3", "m"), ("B. A", "B", "d"), ("B. A", "A", "d"),
    ("B、A", "B", "d"), ("B: A", "B", "d"), ("A、B", "A", "d"), ("A，B", "A", "d"),
    ("12 m", "12 cm", "m"), ("12米", "12 cm", "m"), ("12厘米", "12 m", "m"),
    ("12 m²", "12 cm²", "m"),
    ("12 yd", "12 ft", "m"), ("12 dm", "12 cm", "m"), ("12 km", "12 m", "m"),
    ("12千米", "12米", "m"),
    ("12毫米", "12米", "m"), ("30 rad", "30°", "m"), ("30 cm", "30°", "m"), ("３４", "3", "d"),
    ("３４", "4", "d"), ("3、4", "3", "d"), ("3、4", "3.4", "m"), ("3，4", "3", "d"),
    ("6", "6√2", "m"),
    ("6√2", "6", "m"), ("6", "6\\sqrt[3]{2}", "m"), ("2", "\\sqrt[3]{2}", "m"),
    ("2", "2\\sqrt[3]{3}", "m"), ("8", "\\sqrt[3]{8}", "m"), ("3", "\\sqrt[3]{8}", "m"),
    ("5²", "5", "m"), ("5²", "52", "m"), ("5²", "2", "m"), ("5²", "52", "d"), ("3½", "31", "m"),
    ("3½", "0.5", "m"), ("3½", "15.5", "m"), ("½", "1", "m"), ("½", "2", "m"), ("½", "12", "m"),
    ("5¹⁰", "5", "m"), ("5³", "53", "m"), ("**3** or **4**", "3", "d"), ("**3** **4**", "3", "d"),
    ("**3**4", "3", "d"), ("2**3", "23", "m"), ("2**3", "6", "m"), ("2**3**2", "2", "m"),
    ("*3", "3", "d"), ("3*", "3", "d"), ("_3", "3", "d"), ("x=4", "x=5", "m"), ("x=4", "5", "m"),
    ("y=4", "x=4", "m"), ("x=4, y=5", "4", "m"), ("x=4 or 5", "4", "m"), ("x=4x", "4", "m"),
    ("2x=4", "4", "m"), ("x+1=4", "4", "m"), ("x=y=4", "4", "m"), ("4=x", "4", "m"),
    ("==4", "4", "m"), ("x≠4", "4", "m"), ("x<4", "4", "m"), ("x>4", "4", "m"), ("x≤4", "4", "m"),
    ("≥4", "4", "m"), ("=", "4", "m"), ("x=", "4", "m"), ("3=4", "4", "m"), ("2:1", "1:2", "m"),
    ("1:2:3", "1:2", "m"), ("1:2:3", "0.1667", "m"), ("1:2", "12", "m"), ("1:2", "1", "m"),
    ("1:2", "2", "m"), ("1:0", "1", "m"), ("3:4", "3", "m"), ("5,6", "5", "m"), ("5, 6", "5", "d"),
    ("5,,6", "5", "m"), ("–5", "5", "m"), ("5–", "5", "m"), ("5—6", "5", "m"), ("--5", "-5", "m"),
    ("about 12", "12", "m"), ("≈ 3 or 4", "3", "m"), ("≈ 12 ≈ 13", "12", "m"),
    ("between 3 and 4", "3", "m"), ("30°C", "30", "m"), ("30°30'", '30', 'm'), ("9米8", "9", "m"),
    ("9米 8米", "9", "m"), ("9光年", "9", "m"), ("12 sq. sq. cm", "12", "m"),
    ("12 cm or 13 cm", "12", "m"), ("12 cm 3", "12", "m"), ("12 cm4", "12", "m"),
    ("3 cubes", "3", "d"), ("3个", "3", "d"), ("B. 12 m C", "B", "d"),
    ("B. 12 m or C. 13 m", "B", "d"), ("B or C. 12 m", "B", "d"), ("B12 m", "B", "d"),
    ("m", "B", "d"), ("B. M", "B", "d"), ("٣", "3", "d"), ("三", "3", "d"), ("3̸", "3", "d"),
    ("А", "A", "d"), ("nan", "nan", "m"), ("ｎａｎ", "ｎａｎ", "m"), ("ｉｎｆ", "ｉｎｆ", "d"),
    ("1e999", "12", "m"),
]  # fmt: skip
KIND = {"d": "discrete", "m": "math"}


@pytest.mark.parametrize("predicted, answer, kind", WRITTEN)
def test_a_right_answer_is_right_however_it_is_written(predicted, answer, kind):
    assert judge_answer(predicted, answer, KIND[kind]) == 1
    assert accuracy_reward(said(predicted), answer, KIND[kind]) == 1
    assert accuracy_score(said(predicted), answer, KIND[kind]) == 1


@pytest.mark.parametrize("predicted, answer, kind", NEAR)
def test_what_is_near_a_right_answer_is_wrong(predicted, answer, kind):
    assert judge_answer(predicted, answer, KIND[kind]) == 0
    assert accuracy_score(said(predicted), answer, KIND[kind]) == 0


def test_a_truth_is_right_for_itself():
    for predicted, answer, kind in WRITTEN:
        for text in (predicted, answer):
            assert judge_answer(text, text, KIND[kind]) == 1, text
            assert wholly_right(said(text), text, KIND[kind]), text


@pytest.mark.parametrize("predicted, answer, kind, expected", [
    ("60", "60", "math", 1), ("57", "60", "math", 0), ("62", "60", "math", 0),
    ("66", "60", "math", 0),
    ("60.0 cm", "60", "math", 1), ("120/2", "60", "math", 1), ("60.01", "60", "math", 0),
    ("60 m", "60 cm", "math", 0),
    ("3.4641016", r"2\sqrt{3}", "math", 1), ("3.46", r"2\sqrt{3}", "math", 0),
    ("0.0", "0", "math", 1), ("1e-7", "0", "math", 1),
    ("0.01", "0", "math", 0), ("1e308", "-1e308", "math", 0), ("B", "B", "discrete", 1),
    ("3.0", "3", "discrete", 1),
    ("4", "3", "discrete", 0), ("x+1", "X + 1", "math", 1), ("nan", "nan", "math", 0),
    ("f(0,b)", "f(0,a)", "function", 0.5),
    ("f(0,a)", "f(0,a)", "function", 1),  # the partial credit of TRANCE
])  # fmt: skip
def test_the_accuracy_of_evaluation_is_right_or_wrong_but_for_sequences(
    predicted, answer, kind, expected
):
    assert accuracy_score(said(predicted), answer, kind) == expected
    assert wholly_right(said(predicted), answer, kind) == (expected == 1)
    assert accuracy_score(predicted, answer, kind) == 0  # no tags, no answer


def test_exact_wants_every_call_once():
    assert accuracy_score(said("f(0,a) f(0,a)"), "f(0,a)", "function") == 1
    assert not wholly_right(said("f(0,a) f(0,a)"), "f(0,a)", "function")
    assert not wholly_right(said("f(0,a) f(1,a)"), "f(0,a)", "function")


@pytest.mark.parametrize("truth", [100.0, -100.0, 3e-9, 7e200])
@pytest.mark.parametrize("error, expected", [(0, 1), (0.04, 1), (0.05, 1),
                                             (0.0875, 0.5 + 0.5 * 0.5**0.5), (0.125, 0.5),
                                             (0.1625, 0.5 - 0.5 * 0.5**0.5), (0.2, 0), (0.21, 0),
                                             (2, 0)])  # fmt: skip
@pytest.mark.parametrize("side", [1, -1])
def test_math_falls_as_half_a_cosine_between_5_and_20_percent(truth, error, expected, side):
    predicted = repr(truth * (1 + side * error))
    assert judge_answer(predicted, repr(truth), "math") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("predicted, expected", [("0", 1), ("0.0", 1), ("-0", 1), ("0 cm", 1),
                                                 ("1e-7", 1),
                                                 ("-1e-7", 1), ("1e-5", 0), ("0.05", 0),
                                                 ("-1", 0)])  # fmt: skip
def test_math_with_truth_zero_asks_for_zero(predicted, expected):
    assert judge_answer(predicted, "0", "math") == expected


def test_function_reads_neither_the_thought_nor_past_the_answer_but_all_its_lines():
    assert accuracy_reward(f"<think>{TRUTH}</think><answer>none</answer>", TRUTH, "function") == 0
    assert accuracy_reward(f"<think>{TRUTH}</think>", TRUTH, "function") == 0
    lines = TRUTH.replace(") ", ")\n")
    text = f"<think>change_size(3, big)</think><answer>\n{lines}\n</answer>"
    assert accuracy_reward(text, TRUTH, "function") == 1


@pytest.mark.parametrize("side", ["front", "behind"])
@pytest.mark.parametrize("turn", ["left", "right"])
def test_a_direction_may_have_a_hyphen_or_a_blank_for_its_underscore(side, turn):
    truth = f"change_position(0, {side}_{turn}), change_color(1, red)"
    for between in ("_", "-", " ", "  ", "\n"):
        for direction in (f"{side}{between}{turn}", f"'{side.upper()}{between}{turn}'"):
            text = f"change_position(0, {direction}), change_color(1, red)"
            assert judge_answer(text, truth, "function") == 1, text
            assert reward(said(text), truth, "function") == 2
            assert function_score(said(text), truth) == 1
    for other in (f"{side}{turn}", f"{turn}-{side}", f"{side}--{turn}", side, turn):
        text = f"change_position(0, {other}), change_color(1, red)"
        assert judge_answer(text, truth, "function") < 1, text
    hyphen = said(truth.replace(f"{side}_{turn}", f"{side}-{turn}"))
    assert accuracy_reward(hyphen, truth, "function", legacy=True) < 1  # as in the original


def test_listing_every_call_earns_less_than_one_right_call():
    every = " ".join(
        f"change_color({i},{c})" for i in range(10) for c in ("red", "blue", "green", "gray")
    )
    assert judge_answer(every, "change_color(0,blue)", "function") == pytest.approx(1 / 40)
    assert function_score(said(every), "change_color(0,blue)") == pytest.approx(1 / 40)


@pytest.mark.parametrize("legacy", [False, True])
def test_reward_is_format_plus_accuracy(legacy):
    cases = [(said("3"), 2), ("<answer>3</answer>", 1), (said("4"), 1), ("4", 0)]
    cases += [(" " + said("3"), 1 if legacy else 2), (said("3.0"), 1 if legacy else 2)]
    assert [reward(text, "3", "discrete", legacy=legacy) for text, _ in cases] == [
        total for _, total in cases
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_an_unknown_kind_is_a_mistake_of_the_program(legacy):
    for text in (said("3"), ""):
        with pytest.raises(ValueError, match="kind"):
            accuracy_reward(text, "3", "maths", legacy=legacy)
        with pytest.raises(ValueError, match="kind"):
            reward(text, "3", "", legacy=legacy)
    with pytest.raises(ValueError, match="kind"):
        judge_answer("3", "3", "maths")


# ------------------------------------------------------------------------------------------- legacy

LEGACY = [
    (said("3"), "3", "discrete", 1), (said(" 3 "), "3", "discrete", 1),
    (said("3.0"), "3", "discrete", 0),
    (said("b"), "B", "discrete", 0), (said("3"), "<answer>3</answer>", "discrete", 1),
    ("3", "3", "discrete", 1),
    ("<answer>3</answer><answer>4</answer>", "3", "discrete", 1),
    (said("3") + " or 4", "3", "discrete", 1),
    ("<answer>4<answer>3</answer>", "4<answer>3", "discrete", 1), (said(""), "", "discrete", 1),
    ("<think>a<answer>3</answer></think><answer>4</answer>", "3", "discrete", 1),
    ("<think>\na\n</think>\n<answer>\n3\n</answer>", "3", "discrete", 1),  # the target of sft.py
    ("<answer>\n3\n4\n</answer>", "3", "discrete", 0), ("3\n", "3", "discrete", 1),
    (said("\nB"), "B", "discrete", 1),
    (said("1.02"), "1", "math", 0), (said("0"), "0", "math", 1), (said("nan"), "nan", "math", 1),
    (said(TRUTH), TRUTH, "function", 1), (said(TRUTH + TRUTH), TRUTH, "function", 1 / 2),
    (said(TRUTH.replace("blue", "'blue'")), TRUTH, "function", 1),
    (said("change_color ( 0 , blue )"), "change_color(0, blue)", "function", 0),
    (said("change_color(0, blue )"), "change_color(0, blue)", "function", 0),
    (said("Change_color(0,blue)"), "change_color(0,blue)", "function", 0),
    (said(""), TRUTH, "function", 0),
    (f"<think>{TRUTH}</think><answer>\nnone\n</answer>", TRUTH, "function", 0),
    (TRUTH, TRUTH, "function", 1),
    ("<think>a</think>\n<answer>\n" + TRUTH.replace(" c", "\nc") + "\n</answer>", TRUTH,
     "function", 1),
]  # fmt: skip


@pytest.mark.parametrize("text, answer, kind, expected", LEGACY)
def test_legacy_gives_the_numbers_of_the_original(text, answer, kind, expected):
    assert accuracy_reward(text, answer, kind, legacy=True) == pytest.approx(expected)


# ----------------------------------------------------------------------------------- partial credit


@pytest.mark.parametrize("predicted, answer, expected", [
    ("f(0,a)", "f(0,a)", 1), ("f(0,b)", "f(0,a)", 1 / 2), ("f(1,a)", "f(0,a)", 1 / 2),
    ("f(1,b)", "f(0,a)", 1 / 4),
    ("g(0,a)", "f(0,a)", 0), ("f(0,a) f(0,a)", "f(0,a)", 1), ("f(0,a) g(1,b)", "f(0,a)", 1 / 2),
    ("f(0,a)", "f(0,a) f(0,b)", 1 / 2), ("f(0,b) g(2,c)", "f(0,a) g(1,b)", (1 / 2 + 1 / 4) / 2),
    ("F ( 0 , 'A' )", "f(0,a)", 1), ("", "f(0,a)", 0), ("f(0,a)", "", 0), ("none", "none", 0),
])  # fmt: skip
def test_partial_credit_worked_by_hand(predicted, answer, expected):
    assert function_score(said(predicted), answer) == pytest.approx(expected)


def test_partial_credit_is_the_best_pairing_where_the_greedy_one_is_not():
    # f(0,a) may be paired with f(0,c) by its object, f(1,a) by its value; f(0,b) with f(0,c) only.
    assert function_score(said("f(0,a) f(0,b)"), "f(0,c) f(1,a)") == pytest.approx(1 / 2)
    assert function_score(said("f(0,a) f(0,b)"), "f(0,c) f(1,a)", legacy=True) == pytest.approx(
        (1 / 2 + 1 / 4) / 2
    )


def test_the_legacy_score_of_a_sequence_reads_an_answer_on_one_line_only():
    text = f"<think>{TRUTH}</think><answer>\nnone\n</answer>"  # ... and else the thought as well
    assert function_score(text, TRUTH, legacy=True) == 1 and function_score(text, TRUTH) == 0


@pytest.mark.parametrize("predicted, answer, expected", [
    ("f(0,a)", "f(0,a)", 1), ("f(0,b)", "f(0,a)", 1 / 2), ("f(1,a)", "f(0,a)", 1 / 2),
    ("f(1,b)", "f(0,a)", 1 / 4),
    # f(0,a) takes the first call of its object, and leaves f(1,c) its value, or not.
    ("f(0,a) f(1,c)", "f(0,b) f(0,c)", 1 / 2),
    ("f(0,a) f(1,c)", "f(0,c) f(0,b)", (1 / 2 + 1 / 4) / 2),
])  # fmt: skip
def test_legacy_partial_credit_worked_by_hand(predicted, answer, expected):
    assert function_score(said(predicted), answer, legacy=True) == pytest.approx(expected)


def brute_force(predicted: list, truth: list) -> float:
    def worth(p, t):
        return 0 if p[0] != t[0] else (0.25, 0.5, 1)[(p[1] == t[1]) + (p[2] == t[2])]

    small, large = sorted((predicted, truth), key=len)
    pairings = itertools.permutations(large, len(small))
    return max(sum(map(worth, small, pairing)) for pairing in pairings) / len(large)


def test_partial_credit_equals_brute_force_whatever_the_order_and_legacy_is_never_above():
    rng = random.Random(1)
    calls = list(itertools.product("fg", "012", "abc"))

    def write(sequence):
        return " ".join(f"{name}({obj}, {value})" for name, obj, value in sequence)

    below = 0
    for _ in range(1500):
        predicted, truth = (rng.sample(calls, rng.randint(1, 5)) for _ in range(2))
        text, answer = said(write(predicted)), write(truth)
        score = function_score(text, answer)
        assert score == pytest.approx(brute_force(predicted, truth)), (text, answer)
        accuracy = accuracy_reward(text, answer, "function")
        for _ in range(3):
            rng.shuffle(predicted), rng.shuffle(truth)
            assert function_score(said(write(predicted)), write(truth)) == score
            assert accuracy_reward(said(write(predicted)), write(truth), "function") == accuracy
        greedy = function_score(text, answer, legacy=True)
        assert greedy <= score + 1e-12
        below += greedy < score - 1e-12
    assert below > 0


# ------------------------------------------------------------------------------------ hostile texts

N = 100_000
HOSTILE = {
    "nested tags": "<think>" * 5000
    + "</think>" * 5000
    + "<answer>" * 3000
    + "3"
    + "</answer>" * 3000,
    "unclosed thoughts": "<think>" * N,
    "unclosed answers": "<answer>" * N,
    "unclosed answers on lines": "<think>" + "<answer>\n" * N + "</answer>",
    "closed thoughts": "<think>" + "</think>" * N + "</answer>",
    "thoughts that close and answers that do not": "<think>" + "</think><answer>" * N + "</answer",
    "many answers": "<think>a</think>" + "<answer>3</answer>" * N,
    "long white space between the tags": "<think>a</think>"
    + " " * 1_000_000
    + "x<answer>3</answer>",
    "white space after every thought": "<think>" + ("</think>" + " " * 500) * 1000 + "</answer>",
    "long white space in the answer": said("B" + " \n" * 200_000 + ")"),
    "long word": said("a" * 30_000),
    "long argument": said("f(" + "a" * 30_000),
    "open calls": said("f(" * 300_000),
    "calls with long white space": said(("f(0," + " " * 500) * 1000),
    "a call with long white space": said("f(0," + " " * 1_000_000 + "'"),
    "a call with long quotes": said("f(" + "'" * 1_000_000 + "0,1)"),
    "10,000 calls": said(" ".join(f"f({i},{i % 7})" for i in range(10_000))),
    "one call 10,000 times": said("f(0,a)" * 10_000),
    "fractions 10,000 deep": said(r"\frac{1}{" * 10_000 + "1" + "}" * 10_000),
    "fractions as deep as fit": said(r"\frac{1}{" * 90 + "1" + "}" * 90),
    "brackets 10,000 deep": said("(" * 10_000 + "1" + ")" * 10_000),
    "brackets as deep as fit": said("(" * 490 + "1" + ")" * 490),
    "roots as deep as fit": said("√" * 999 + "1"),
    "signs": said("-" * 999 + "1"),
    "powers": said("9" + "^9" * 490),
    "9^9^9^9": said("9^9^9^9"),
    "huge exponent": said("1e999999"),
    "huge digits": said("9" * 1_000_000),
    "digits and dots": said("1." * 100_000),
    "commas": said("1,000" * 100),
    "boxed boxes": said(r"\boxed{" * 100 + "3" + "}" * 100),
    "text in text": said(r"\text{" * 160 + "}" * 20),
    "blanks within 1000 characters": said(r"\ " * 490),
    "zeros": said("0" * 900 + "x"),
    "lone surrogates": said("\ud800 3 \udfff") + "\ud800",
    "surrogate answer": said("\udc80"),
    "nul": said("\0"),
    "nul around": "\0" + said("3\0"),
    "a megabyte": "x" * 1_000_000,
    "unicode digits": said("٣ ３ ³ ⅓ 三 ௧"),
    "not a number": said("nan"),
    "case that grows": said("İ" * 100_000),
    "combining": said("3" + "\u0338" * 100_000),
    "signs that grow": said("⅔㎨" * 500),
    "roots of roots": said(r"\sqrt[" * 160 + "3" + "]{8}" * 20),
    "raised": said("³" * 999),
    "raised apart": said("³√" * 499),
    "bold within bold": said("**a" * 333),
    "names": said("x=" * 499),
    "ratios": said("1:" * 499 + "1"),
    "units": said("square " * 140 + "cm"),
}
TRUTHS = ["3", "0", "B", r"2\sqrt{3}", TRUTH, "", "\ud800", "nan", said("3")]


def numbers(text: str, answer: str) -> list[float]:
    """All that the module says of a text: each number in its range, each within a second."""
    found = []
    for legacy in (False, True):
        calls = [(format_reward, (text,)), (function_score, (text, answer))]
        for function, arguments in calls + [
            (accuracy_reward, (text, answer, kind)) for kind in KINDS
        ]:
            start = time.process_time()  # of this process: other work on the machine does not count
            number = function(*arguments, legacy=legacy)
            assert time.process_time() - start < 1, (function, arguments[1:], legacy)
            assert type(number) is float and 0 <= number <= 1, (
                number,
                function,
                text[:200],
                answer[:200],
            )  # not NaN
            found.append(number)
        found += [reward(text, answer, kind, legacy) for kind in KINDS if len(text) < 50_000]
    found += [accuracy_score(text, answer, kind) for kind in KINDS]
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_judged_in_time(name):
    for answer in (TRUTH, "3") if len(HOSTILE[name]) > 50_000 else TRUTHS:
        numbers(HOSTILE[name], answer)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_truths_are_judged_in_time(name):
    numbers(said("f(0,a) f(1,b)"), HOSTILE[name])


def test_ten_thousand_calls_against_ten_thousand_are_scored_in_time():
    text, answer = (" ".join(f"f({i},{j * i})" for i in range(10_000)) for j in (0, 1))
    for score in numbers(said(text), answer)[1::5]:
        assert 0 <= score < 1
    assert function_score(said(text), answer) > 0.25


def test_random_fragments_never_raise_and_stay_in_range():
    rng = random.Random(2)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "3", "12", ",", ".", "-",
              "+", "*", "/", "^",
              "%", "(", ")", "{", "}", "[", "]", "\\frac", "\\frac{1}{2}", "\\sqrt", "√", "\\pi",
              "π", "\\boxed{",
              "\\text{", "$", "\\", "^\\circ", "°", "cm", "²", "e5", "e999", "nan", "inf", "B",
              "b)", "f(0,a)", "f(0,",
              "'", '"', "_", "0", "1e308", "\0", "\ud800", "３", "é", "**", "\\times", "\\left(",
              "\\,", "{,}", "½", "⁰", "³", "√", "√[", "∛", "x=",
              "≈", "：", "（", "。", "–", "米", "平方", "㎠", "\\sqrt[3]", "\\cfrac", "m ", "`",
              ":",
              "𝟑"]  # fmt: skip
    seen = set()
    for _ in range(3000):
        inner = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        text = said(inner) if rng.random() < 0.7 else inner + rng.choice(["", "</answer>"])
        truth = "".join(rng.choices(pieces[4:], k=rng.randint(0, 6)))
        seen.update(numbers(text, rng.choice([truth, inner, *TRUTHS])))
    assert {0.0, 1.0, 2.0} <= seen and max(seen) == 2.0


def test_a_number_is_right_for_itself():
    rng = random.Random(3)
    for _ in range(1000):
        tiny_or_huge = rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300)
        for value in (rng.randint(-999, 999), rng.uniform(-9, 9), tiny_or_huge):
            for kind in ("discrete", "math"):
                assert reward(said(f" {value!r} "), repr(value), kind) == 2
