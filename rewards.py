"""Rewards: how good one action is, R = R_format + R_accuracy (paper, Eq 7), each in [0, 1], by rules alone.

The paper takes both from Reason-RFT, its reference [52], which judges three kinds of answers:
  discrete   a count, or the letter of a choice: right or wrong;
  math       a quantity: full reward below 5 % of relative error, falling smoothly to none at 20 %;
  function   a sequence of calls like change_color(0, blue): the share of calls that are right.

Departures. The strict scorer, the default, closes the gaps through which a policy could earn reward without the
answer: a second or an empty <answer>, one inside the thought, text after it, "nan", a leading number, a repeated
call. It also accepts what is right but written differently: "3.0" for "3", white space around the tags, a truth of 0.
`legacy=True` gives the numbers that Reason-RFT's own training code gives, so that tables can be compared, except
that a response without <answer> is compared as text only (theirs also asks math-verify), and that ties of its greedy
partial credit, which follow Python's random string hashes, are settled by the order of the calls.

Texts come from models, so they are hostile: nothing here evaluates them, raises on them, returns anything that is not
finite, or needs more than linear time (what is not linear sees a bounded length).
"""

import math
import re

KINDS = ("discrete", "math", "function")
FULL_BELOW, NONE_ABOVE = (
    0.05,
    0.20,
)  # relative errors of "math" between which the reward falls from 1 to 0
ZERO_TOLERANCE = 1e-6  # a truth of 0 has no relative error: the prediction must be this close to it
MAX_ANSWER = 1000  # characters of an answer that is read as a number, a letter or a phrase; a longer one is wrong
MAX_ATOMS = 50  # numbers, roots, fractions and brackets of an expression that is evaluated
MAX_PARTIAL = 64  # calls of a side that partial credit pairs (TRANCE has at most 4)


# ------------------------------------------------------------------------------------------------ the rewards


def reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """Eq 7: the reward of the response `text` to a question whose true answer is `answer`, in [0, 2].

    Raises ValueError for a kind that is not in KINDS (a mistake in the program), and for no text.
    """
    return format_reward(text, legacy) + accuracy_reward(text, answer, kind, legacy)


def format_reward(text: str, legacy: bool = False) -> float:
    """R_format: 1.0 if the response is a thought and then an answer, else 0.0.

    Strict: the whole text, white space around it aside, is one <think>...</think>, white space, one
    <answer>...</answer>; neither is blank and no further tag of the four occurs anywhere.
    Legacy: `<think>.*?</think>\\s*<answer>.*?</answer>` matches the whole text, the dot matching newlines.
    """
    if legacy:
        # The same test without the regex, whose backtracking takes quadratic time on "</think><answer>" repeated.
        ends = text.startswith("<think>") and text.endswith("</answer>")
        return float(ends and re.search(r"</think>\s*<answer>", text) is not None)
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    if not (once and text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    thought, _, rest = text[len("<think>") : -len("</answer>")].partition("</think>")
    between, _, answer = rest.partition("<answer>")
    return float(bool(thought.strip() and answer.strip() and not between.strip()))


def accuracy_reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """R_accuracy: how right the answer in the response `text` is, in [0, 1].

    Strict: what `extract_answer` finds, judged by `judge_answer`; 0.0 if it finds none. The format is not asked for
    again here: an answer without a thought still earns its accuracy, as in Reason-RFT.
    Legacy: the first <answer> that opens and closes on one line, or the whole text without one, must equal the truth
    letter by letter ("discrete" and "math"), or is searched for calls ("function").
    Raises ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if not legacy:
        predicted = extract_answer(text)
        return 0.0 if predicted is None else judge_answer(predicted, answer, kind)
    if kind == "function":
        return _full_matches(_calls(_legacy_answer(text), legacy=True), _calls(answer, legacy=True))
    return float(_legacy_answer(text) == _legacy_answer(answer))


def extract_answer(text: str) -> str | None:
    """The answer of a response, stripped, or None where it is missing, blank or not the only one.

    There is one <answer> and one </answer> in the text, the text ends with the latter (white space aside), and a
    thought that was opened is closed before. What precedes, or whether there is a thought, is the format's business.
    """
    text = text.rstrip()
    if (
        text.count("<answer>") != 1
        or text.count("</answer>") != 1
        or not text.endswith("</answer>")
    ):
        return None
    before, _, answer = text.removesuffix("</answer>").partition("<answer>")
    in_thought = before.rfind("<think>") > before.rfind("</think>")
    if in_thought or "<think>" in answer or "</think>" in answer:
        return None
    return answer.strip() or None


def judge_answer(predicted: str, answer: str, kind: str) -> float:
    """How right a bare answer is, in [0, 1]: the strict rules. Use it for models that answer without tags (ANS-SFT).

    discrete: numbers by value ("3.0", "03" and "1,000" are numbers; "3 cubes", "4 - 1" and "nan" are not), choices
        by their letter ("b", "(B)", "B.", "B) 12", but no second letter on its own), other texts by `_same_text`.
    math: values by relative error, see `_band`; what has no value is judged as in discrete. See `_value`.
    function: matches / max(|predicted|, |answer|) over the sets of calls, times distinct / all predicted calls, so
        that neither more calls nor repeated ones pay.
    Raises ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if kind == "function":
        return _full_matches(_calls(predicted), _calls(answer))
    if len(predicted) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return 0.0
    predicted, answer = _clean(predicted), _clean(answer)
    read = _value if kind == "math" else _number
    truth = read(answer)
    if truth is None:
        return _same_text(predicted, answer)
    value = read(predicted)
    if value is None or (value[1] and truth[1] and value[1] != truth[1]):  # 12 mm for 12 cm
        return 0.0
    return _band(value[0], truth[0]) if kind == "math" else float(value[0] == truth[0])


def function_score(text: str, answer: str, legacy: bool = False) -> float:
    """Reason-RFT's test score of a sequence of calls, in [0, 1]: partial credit, for evaluation, not for training.

    Calls of prediction and truth are paired, each at most once: 1 for equal calls, 0.5 if function and object or
    function and value agree, 0.25 for the function alone. The sum is divided by max(|predicted|, |answer|).
    Strict: the pairing is the best one. Legacy: four greedy passes, in this order, over the legacy answer.
    """
    found = _legacy_answer(text) if legacy else extract_answer(text) or ""
    predicted, truth = (list(dict.fromkeys(_calls(part, legacy))) for part in (found, answer))
    if not predicted or not truth:
        return 0.0
    size = max(len(predicted), len(truth))
    # Pairing equal calls first loses nothing: the two pairs that it may break up are worth 0.5 each at most.
    full, predicted, truth = _pair(predicted, truth, lambda call: call)
    if legacy:
        same_object, predicted, truth = _pair(predicted, truth, lambda call: call[:2])
        same_value, predicted, truth = _pair(predicted, truth, lambda call: (call[0], call[2]))
        same_name, _, _ = _pair(predicted, truth, lambda call: call[0])
        return (full + 0.5 * (same_object + same_value) + 0.25 * same_name) / size
    # The rest: a pair of one name is worth 0.25, and 0.25 more if object or value agree. Any pairing of the second
    # sort can be completed to one with as many pairs as the names allow, so both numbers are at their best at once.
    same_name, _, _ = _pair(predicted, truth, lambda call: call[0])
    return (
        full + 0.25 * same_name + 0.25 * _most_pairs(predicted[:MAX_PARTIAL], truth[:MAX_PARTIAL])
    ) / size


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of answer {kind!r}: it is one of {', '.join(KINDS)}")


# ------------------------------------------------------------------------------------------ numbers, letters, texts

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf"({_NUMBER})|(\\(?:frac|sqrt|pi)|[^ ])"
)  # no rule takes a character that is none of ours
_UNITS = {  # every name of a unit: its first name, or "" for "units", which names none
    name: names.split()[0]
    for names in (
        "deg degree degrees", "rad radian radians", "mm millimeter millimeters", "cm centimeter centimeters",
        "m meter meters", "km kilometer kilometers", "in inch inches", "ft foot feet", "mi mile miles",
    )
    for name in names.split()
} | {"unit": "", "units": ""}  # fmt: skip
_UNIT = re.compile(
    rf"(?<![a-z\\])(?:(?:square|sq|cubic) )?({'|'.join(_UNITS)})(?: ?\^ ?\{{? ?[23] ?\}}?|[²³])?$"
)


def _band(value: float, truth: float) -> float:
    """Reason-RFT's reward of a quantity: half a cosine wave between the relative errors 0.05 and 0.20."""
    if truth == 0.0:
        return float(abs(value) <= ZERO_TOLERANCE)
    error = abs(value - truth) / abs(truth)  # may be inf, never NaN
    fall = min(max((error - FULL_BELOW) / (NONE_ABOVE - FULL_BELOW), 0.0), 1.0)
    return 0.5 * (math.cos(math.pi * fall) + 1.0)


def _clean(text: str) -> str:
    """Lower case, single spaces, without what says how a formula looks but not what it is."""
    text = re.sub(
        r"\\?\$|\\[()\[\]]", " ", text.lower().replace("−", "-")
    )  # $5$, \(5\), the typographic minus
    text = (
        re.sub(r"\\(?:left|right)(?![a-z])|\\[,!]", "", text)
        .replace("{,}", ",")
        .replace(r"\%", "%")
    )
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^ ?\{? ?\\circ ?\}?|\\degree|°", " deg", text)
    text = (
        re.sub(r"(?:\\[;: ]|~|\s)+", " ", text).strip().rstrip(" .")
    )  # the full stop, but not of ".5"
    boxed = re.fullmatch(r"\\boxed ?\{(.*)\}", text)
    return boxed.group(1).strip().rstrip(" .") if boxed else text


def _number(text: str) -> tuple[float, str] | None:
    """A number written in digits, as (value, no unit), or None; in double precision."""
    match = re.fullmatch(rf"([+-]?) ?({_NUMBER})", text)
    value = float(match.group(1) + match.group(2).replace(",", "")) if match else math.inf
    return (value, "") if math.isfinite(value) else None


def _value(text: str) -> tuple[float, str] | None:
    """A quantity as (value, unit or ""), or None if it is not one, such as "AB", "1/0", "1 or 2" or "9^9^9^9".

    Read are numbers, + - * / ^ %, fractions, mixed numbers, square roots, pi, brackets, in LaTeX or plain, and one
    unit of length or angle at the end. 50% is 0.5. A product without a sign binds like one with it: 1/2\\pi is pi/2.
    """
    unit = _UNIT.search(text)
    text = text[: unit.start()] if unit else text
    text = re.sub(
        r"\\(?:cdot|times)(?![a-z])|\*\*|[×·]", lambda sign: "^" if sign[0] == "**" else "*", text
    )
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("÷", "/").replace(r"\div", "/")
    text = re.sub(
        r"√|(?<![a-z\\])sqrt", r"\\sqrt", re.sub(r"π|(?<![a-z\\])pi(?![a-z])", r"\\pi ", text)
    )
    text = re.sub(r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}", text)  # \frac12
    text = re.sub(
        r"(?<![0-9.,^/}])([0-9]+) ?\\frac ?\{([0-9]+)\} ?\{([0-9]+)\}", r"(\1+\2/\3)", text
    )  # 3\frac{1}{2}
    text = re.sub(r"(?<![0-9.,^/}])([0-9]+) ([0-9]+) ?/ ?([0-9]+)", r"(\1+\2/\3)", text)  # 3 1/2
    try:
        return _Expression(text).value(), _UNITS[unit.group(1)] if unit else ""
    except (
        ValueError,
        ArithmeticError,
    ):  # not an expression; division by zero, overflow, root of a negative number
        return None


class _Expression:
    """Evaluates an expression in floats by recursive descent; ValueError or ArithmeticError where it has no value."""

    def __init__(self, text: str):
        self.tokens = [
            float(digits.replace(",", "")) if digits else sign
            for digits, sign in _TOKEN.findall(text)
        ]
        self.tokens = [
            None,
            *reversed(self.tokens),
        ]  # a stack, the next token last, None under them all
        self.atoms_left = MAX_ATOMS

    def value(self) -> float:
        value = self.sum()
        if self.tokens != [None]:
            raise ValueError("something follows the expression")
        return value

    def take(self, *signs: str) -> str | None:
        return self.tokens.pop() if self.tokens[-1] in signs else None

    def sum(self) -> float:
        value = self.product()
        while sign := self.take("+", "-"):
            value += self.product() if sign == "+" else -self.product()
        return _finite(value)

    def product(self) -> float:
        value = self.power()
        while True:
            if sign := self.take("*", "/"):
                value = value * self.power() if sign == "*" else value / self.power()
            elif self.tokens[-1] in ("\\frac", "\\sqrt", "\\pi", "("):  # 2\sqrt{3}, but never 2 3
                value *= self.power()
            else:
                return _finite(value)

    def power(self) -> float:
        sign = 1.0
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        value = self.atom()
        if self.take("^"):
            value = math.pow(
                value, self.power()
            )  # floats only: no huge integers, no complex numbers
        return sign * value / (100.0 if self.take("%") else 1.0)

    def atom(self) -> float:
        token = self.tokens.pop()
        self.atoms_left -= 1  # bounds the recursion
        if isinstance(token, float):
            return _finite(token)
        if token is None or self.atoms_left < 0:
            raise ValueError("not an expression, or one too long")
        if token == "\\pi":
            return math.pi
        if token == "\\sqrt":
            return math.sqrt(self.atom())
        if token == "\\frac":
            return self.atom() / self.atom()
        value = self.sum() if token in ("(", "{") else None
        if value is None or not self.take(")" if token == "(" else "}"):
            raise ValueError("not an expression")
        return value


def _finite(value: float) -> float:
    if not math.isfinite(value):  # 1e999 is inf, and would make 1/1e999 a right 0
        raise OverflowError("not finite")
    return value


def _same_text(predicted: str, answer: str) -> float:
    """Choices by their letter, other texts when equal but for spaces beside signs; "nan" and "inf" are never right."""
    letter = _choice(answer)
    if letter is not None:
        return float(_choice(predicted) == letter)
    predicted, answer = (re.sub(r" ?([^\w ]) ?", r"\1", text) for text in (predicted, answer))
    return float(
        predicted == answer != "" and not re.fullmatch(r"[+-]?(?:nan|inf|infinity)", answer)
    )


def _choice(text: str) -> str | None:
    """The letter of "b", "(b)", "b." or "b) 12", unless what follows has a letter on its own, as in "b) 12 c) 13"."""
    match = re.fullmatch(r"(\( ?)?([a-z]) ?(?(1)\)|(?:[.):]|$))(.*)", text)
    return (
        match.group(2)
        if match and not re.search(r"(?<![^\W_])[a-z](?![^\W_])", match.group(3))
        else None
    )


# ----------------------------------------------------------------------------------------------- sequences of calls

Call = tuple[str, str, str]  # function, object, value
# Each starts at the start of a word and has no two neighbouring runs of one class: linear time.
_CALL = re.compile(r"(?<!\w)(\w+) ?\( ?(\w+) ?, ?(\w+) ?\)")
_LEGACY_CALL = re.compile(r"(?<!\w)(\w+)\((\w+),\s*'?(\w+)'?\)")


def _calls(text: str, legacy: bool = False) -> list[Call]:
    """The calls in a text, in order, repeats included; strict: whatever the case, the quotes and the white space."""
    if legacy:
        return _LEGACY_CALL.findall(text)
    return _CALL.findall(re.sub(r"[\s'\"`]+", " ", text.lower()))


def _full_matches(predicted: list[Call], truth: list[Call]) -> float:
    """Reason-RFT's training reward of a sequence: the share of equal calls, times the share of calls not repeated."""
    distinct, wanted = set(predicted), set(truth)
    if not distinct or not wanted:
        return 0.0
    return len(distinct & wanted) / max(len(distinct), len(wanted)) * len(distinct) / len(predicted)


def _pair(predicted: list[Call], truth: list[Call], key) -> tuple[int, list[Call], list[Call]]:
    """Pairs each predicted call with the first free true call of the same key: the number of pairs, what is left."""
    free: dict = {}
    for call in reversed(truth):
        free.setdefault(key(call), []).append(call)
    left = [call for call in predicted if not (free.get(key(call)) and free[key(call)].pop())]
    unpaired = {call for calls in free.values() for call in calls}
    return len(predicted) - len(left), left, [call for call in truth if call in unpaired]


def _most_pairs(predicted: list[Call], truth: list[Call]) -> int:
    """The largest number of pairs of one function whose object or value agree (matching by augmenting paths)."""
    partner: dict[Call, Call] = {}  # of a predicted call

    def place(call: Call, tried: set[Call]) -> bool:
        for other in predicted:
            if (
                other not in tried
                and other[0] == call[0]
                and (other[1] == call[1] or other[2] == call[2])
            ):
                tried.add(other)
                if other not in partner or place(
                    partner[other], tried
                ):  # its partner moves elsewhere if it can
                    partner[other] = call
                    return True
        return False

    return sum(place(call, set()) for call in truth)


def _legacy_answer(text: str) -> str:
    """What Reason-RFT's `<answer>(.*?)</answer>` finds first, or without it all the text."""
    for line in text.split("\n"):  # at a newline its dot stops
        start = line.find("<answer>")
        end = line.find("</answer>", start + len("<answer>"))
        if start >= 0 and end >= 0:
            return line[start + len("<answer>") : end].strip()
    return text.strip()
