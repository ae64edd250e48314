"""Bare answers as models and data sets write them: numbers, quantities, choices, texts.

Other ways of writing the same are read as the same: full-width and CJK characters, markdown's
bold, LaTeX's commands, the typographic minus, degree signs, names of units, `x=` in front. A text
with more than one answer, or with more than the answer, has no value: "3 or 4", "B) 12 C) 13",
"about 12, maybe 13".

Expressions are evaluated in floats by a parser of our own: linear in the length of a text, which is
bounded, without `eval`, huge integers, or an exception that leaves this file.
"""

import math
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

MAX_ANSWER = 1000  # characters of an answer that is read; a longer one is wrong
MAX_ATOMS = 50  # numbers, roots, fractions and brackets of an expression that is evaluated


@lru_cache(maxsize=4096)  # the answers of a batch, and those of the blocks world, are often equal
def compared(predicted: str, answer: str, kind: str) -> tuple[float, float] | None:
    """The values of an answer and of the truth; (1, 1) for equal choices or texts; None if wrong.

    kind "math" reads quantities (`_value`), "discrete" numbers in digits. A truth that is neither
    is a choice, known by its letter, or a text. Another unit than the truth's, or another name
    before "=", is wrong; one side may be without.
    """
    if len(predicted) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return None
    predicted, answer = _clean(predicted), _clean(answer)
    read = _value if kind == "math" else _number
    truth = read(answer)
    if truth is None:
        return (1.0, 1.0) if _same_text(predicted, answer) else None
    found = read(predicted)
    if found is None or _differ(found.unit, truth.unit) or _differ(found.name, truth.name):
        return None
    return found.value, truth.value


class Quantity(NamedTuple):
    value: float  # finite
    unit: str = ""  # the first name of its unit, such as "cm"
    name: str = ""  # what stands before "=", such as "x"


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


# --------------------------------------------------------------------------------- plain writing


def _table() -> dict[int, str]:
    """For `str.translate`: each sign in plain writing.

    Unicode's compatibility forms (NFKC) where they are one sign of the same meaning: full-width
    forms, mathematical letters and digits, squared units. Not all: NFKC makes 52 of 5², 31⁄2 of 3½.
    """
    table = {}
    for first, last in ((0xFF01, 0xFF5E), (0xFFE0, 0xFFE6), (0x1D400, 0x1D7FF), (0x3380, 0x33DF)):
        for code in range(first, last + 1):
            table[code] = unicodedata.normalize("NFKC", chr(code))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189):  # ¼ to ⅞, ↉
        over, _, under = unicodedata.normalize("NFKC", chr(code)).partition("⁄")
        table[code] = rf"\frac{{{over}}}{{{under}}}"
    pairs = {
        "−–—‐‑‒―﹣": "-",
        "˚º∘": "°",
        "∕⁄": "/",
        "∶︰": ":",
        "。｡": ".",
        "、､": ",",
        "⋅∙•・": "·",
        "【〔〖「『《〈｢": "(",
        "】〕〗」』》〉｣": ")",
        "≃≅≒≐∼∽": "≈",
        "∡∢": "∠",
        "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad": "",  # of no width
    }
    for signs, plain in pairs.items():
        table |= dict.fromkeys(map(ord, signs), plain)
    return table


_PLAIN = _table()
_RAISED, _AHEAD = "[⁰¹²³⁴-⁹⁺⁻]+", r"(?<![\w)}\]⁰¹²³⁴-⁹⁺⁻])"
_BOLD = re.compile(r"(?<![\w)}\]*])\*\*(?=[^\s*])([^*]*[^\s*])\*\*(?![\w({*])")  # but 2**3**2
_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}"
)
_DEGREE = re.compile(r"\^ ?\{? ?(?:\\circ|°|o(?![a-z])) ?\}?|\\(?:text)?degrees?(?![a-z])|°")


def _lowered(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs).replace("−", "-")


def _clean(text: str) -> str:
    """Lower case, single spaces, without commands of layout."""
    text = text.translate(_PLAIN).lower()
    text = re.sub(f"{_AHEAD}({_RAISED})√", lambda sign: rf"\sqrt[{_lowered(sign[1])}]", text)  # ³√8
    text = re.sub(
        _RAISED, lambda sign: "°" if sign[0] == "⁰" else f"^{{{_lowered(sign[0])}}}", text
    )
    text = re.sub(r"\\?\$|\\[()\[\]]", " ", text)  # $5$, \(5\)
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[,!]", "", text)
    text = text.replace("{,}", ",").replace(r"\%", "%")
    text = _DEGREE.sub(" deg", _FONT.sub(r"\1", text))
    text = re.sub(r"\\(?:approx|simeq|sim)(?![a-z])", "≈", text)
    text = _strip(re.sub(r"(?:\\[;: ]|~|\s)+", " ", text))
    text = _BOLD.sub(r"\1", text)
    marked = re.fullmatch(r"([*_`]+)([^*_`]+)\1", text)
    text = _strip(marked[2] if marked else text)
    boxed = re.fullmatch(r"\\boxed ?\{(.*)\}", text)
    return _strip(boxed[1]) if boxed else text


def _strip(text: str) -> str:
    return text.strip().rstrip(" .,;")  # the full stop, but not of ".5"


# -------------------------------------------------------------------------- numbers, quantities

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_TOKEN = re.compile(rf"({_NUMBER})|(\\(?:frac|sqrt|pi)|[^ ])")  # no rule takes an unknown sign
_NAMED = re.compile(  # "x =", "ab ≈", "m∠abc =", "=", "≈"
    r"(?:(?:m ?)?(?:\\angle|∠|\\triangle|△)? ?"
    r"([a-z]{1,3}(?: ?_ ?(?:\w|\{ ?\w{1,9} ?\}))?) ?)?[=≈] ?"
)
_UNITS: dict[str, str] = {}  # every name of a unit: its first name
for _names in """
    deg degs degree degrees 度
    rad rads radian radians 弧度
    mm mms millimeter millimeters millimetre millimetres 毫米
    cm cms centimeter centimeters centimetre centimetres 厘米 公分
    dm dms decimeter decimeters decimetre decimetres 分米
    in ins inch inches 英寸
    m meter meters metre metres 米 公尺
    ft foot feet 英尺
    yd yds yard yards 码
    km kms kilometer kilometers kilometre kilometres 千米 公里
    mi mile miles 英里
""".strip().splitlines():
    _UNITS |= dict.fromkeys(_names.split(), _names.split()[0])
_UNITS |= dict.fromkeys(("unit", "units", "单位"), "")  # these name no unit
_POWER = r"squared|cubed|square|cubic|sq|cu"
_UNIT = re.compile(
    rf"(?<![a-z\\])(?:(?:{_POWER})(?:\.| |\. )|平方|立方|平)?({'|'.join(_UNITS)})"
    rf"(?: ?\^ ?\{{? ?[23] ?\}}?|[23]| (?:{_POWER}))?$"
)
_MIXED = re.compile(r"(?<![0-9.,^/}])([0-9]+) ([0-9]+) ?/ ?([0-9]+)")  # 3 1/2, 3\frac{1}{2}
_MIXED_LATEX = re.compile(r"(?<![0-9.,^/}])([0-9]+) ?\\frac ?\{([0-9]+)\} ?\{([0-9]+)\}")


def _number(text: str) -> Quantity | None:
    """A number written in digits, or None; in double precision."""
    text, name = _without_name(text)
    match = re.fullmatch(rf"([+-]?) ?({_NUMBER})", text)
    value = float(match[1] + match[2].replace(",", "")) if match else math.inf
    return Quantity(value, "", name) if math.isfinite(value) else None


def _without_name(text: str) -> tuple[str, str]:
    """The text after a leading "x =", "=" or "≈", and the name ("x")."""
    named = _NAMED.match(text)
    return (text[named.end() :], named[1] or "") if named else (text, "")


def _value(text: str) -> Quantity | None:
    """A quantity, or None if it is not one, such as "AB", "1/0", "1 or 2" or "9^9^9^9".

    It may have numbers, + - * / ^ %, fractions, mixed numbers, roots, pi, brackets, in LaTeX or
    plain, one ratio a:b, and one unit of length or angle at the end; squares and cubes of a unit
    count as the unit. 50% is 0.5. A product without a sign binds like one with it: 1/2\\pi is pi/2.
    """
    text, name = _without_name(text)
    text = re.sub(r" ?per ?cent$", "%", text)
    unit = _UNIT.search(text)
    text = text[: unit.start()] if unit else text
    text = text.replace("**", "^").replace("÷", "/").replace(r"\div", "/")
    text = re.sub(r"\\(?:cdot|times)(?![a-z])|[×·]", "*", text)
    text = re.sub(r"\\(?:[cdt]|nice|s)frac", r"\\frac", text)
    text = re.sub(r"π|(?<![a-z\\])pi(?![a-z])", r"\\pi ", text)
    text = re.sub(r"∛|(?<![a-z\\])cbrt", r"\\sqrt[3]", text.replace("∜", r"\sqrt[4]"))
    text = re.sub(r"√|(?<![a-z\\])sqrt", r"\\sqrt", text)
    text = re.sub(r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}", text)  # \frac12
    text = _MIXED_LATEX.sub(r"(\1+\2/\3)", text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    try:
        return Quantity(_Expression(text).value(), _UNITS[unit[1]] if unit else "", name)
    except (ValueError, ArithmeticError):  # no expression; 1/0, overflow, root of a negative number
        return None


class _Expression:
    """Recursive descent over an expression; ValueError or ArithmeticError if it has no value."""

    def __init__(self, text: str):
        tokens = _TOKEN.findall(text)
        tokens = [float(digits.replace(",", "")) if digits else sign for digits, sign in tokens]
        self.tokens = [None, *reversed(tokens)]  # a stack, the next token last, None at its bottom
        self.atoms_left = MAX_ATOMS

    def value(self) -> float:
        value = self.sum()
        if self.take(":"):
            value = _finite(value / self.sum())
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
            value = math.pow(value, self.power())  # floats: no huge integers, no complex numbers
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
            return self.root()
        if token == "\\frac":
            return self.atom() / self.atom()
        value = self.sum() if token in ("(", "{") else None
        if value is None or not self.take(")" if token == "(" else "}"):
            raise ValueError("not an expression")
        return value

    def root(self) -> float:
        degree = 2.0
        if self.take("["):
            degree = self.sum()
            if not self.take("]") or degree not in range(1, 100):
                raise ValueError("not a root")
        value = self.atom()
        if value < 0 and degree % 2 == 0:
            raise ValueError("an even root of a negative number")
        return math.copysign(math.pow(abs(value), 1 / degree), value)


def _finite(value: float) -> float:
    if not math.isfinite(value):  # 1e999 is inf, and would make 1/1e999 a right 0
        raise OverflowError("not finite")
    return value


# ------------------------------------------------------------------------------- choices, texts


def _same_text(predicted: str, answer: str) -> bool:
    """Whether choices have one letter, or texts are equal but for spaces beside signs; no "nan"."""
    letter = _choice(answer)
    if letter is not None:
        return _choice(predicted) == letter
    predicted, answer = (re.sub(r" ?([^\w ]) ?", r"\1", text) for text in (predicted, answer))
    infinite = re.fullmatch(r"[+-]?(?:nan|inf|infinity)", answer)
    return predicted == answer != "" and not infinite


def _choice(text: str) -> str | None:
    """The letter of "b", "(b)", "b." or "b) 12 m"; None if another follows, as in "b) 12 c) 13"."""
    match = re.fullmatch(r"([(\[] ?)?([a-z]) ?(?(1)[)\]]|(?:[.):,]|$))(.*)", text)
    rest = re.sub(r"([0-9] ?)m(?![^\W_])", r"\1", match[3]) if match else ""  # metres
    lone = re.search(r"(?<![^\W_])[a-z](?![^\W_])", rest)
    return match[2] if match and not lone else None
