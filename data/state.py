"""A state s = (v, t), images and a question (Section 3.1), and the prompt made of it.

The prompt is one user turn: the images, then the question and how to answer. Policy and experts get
the same words: an expert that knew more would teach the policy what it cannot see. The words are
ours, not Reason-RFT's, except in mode "bare".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# A prompt asks for a thought and an answer, for the answer alone, or is the bare question, as in
# Reason-RFT's ANS-SFT.
MODES = ("reason", "answer", "bare")
SETS = {  # the test sets of each task
    "counting": ("counting-id", "counting-ood"),
    "structure": ("structure-id", "structure-ood"),
    "transformation": ("transformation-id", "transformation-left", "transformation-right"),
}
SET_NAMES = []
for _task, _test_sets in SETS.items():
    # In "-val" a setting such as the learning rate is chosen; no table uses it (blocks world only).
    SET_NAMES += [f"{_task}-train", f"{_task}-val", *_test_sets]
FORMS = {"discrete": "a number", "math": "a number", "function": "a sequence of functions"}


@dataclass(frozen=True)
class State:
    """One question about one or more images.

    id: unique within its set.
    images: RGB, in the order in which the question mentions them; files are opened when used.
    question: the text t.
    answer: the truth, as text.
    kind: how the answer is judged: "discrete", "math" or "function", see rewards.py.
    thought: a correct chain of thought, "" if the set has none.
    mode: one of `MODES`.
    rules: text before the question, "" for none.
    form: the prompt's name for an answer, "" for that of its kind. It must not tell a question
        whose answer is a letter from one whose answer is a number.
    part: its kind of question within the set, reported beside the whole; "" for none.
    ask: words that follow the question in place of this project's own; "" for the latter.
    """

    id: str
    images: Sequence[Image.Image]
    question: str
    answer: str
    kind: str
    thought: str = ""
    mode: str = "reason"
    rules: str = ""
    form: str = ""
    part: str = ""
    ask: str = ""

    @property
    def request(self) -> str:
        """What follows the question in the prompt: how to answer."""
        if self.ask:
            return self.ask
        form = self.form or FORMS[self.kind]
        if self.mode == "answer":
            return f"Give only the final answer, {form}, between <answer> and </answer>."
        return (
            "Reason step by step between <think> and </think>, "
            f"then give the final answer, {form}, between <answer> and </answer>."
        )

    def messages(self) -> list[dict]:
        """The prompt as chat messages for `apply_chat_template`; images by their order."""
        content = [{"type": "image"} for _ in range(len(self.images))]
        text = self.question
        if self.mode != "bare":
            text = f"{self.rules}\n\n{text}" if self.rules else text
            text = f"{text} {self.request}"
        content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]

    def reading(self, response: str) -> str:
        """The response as rewards.py reads it: in mode "bare" the answer has no tags."""
        untagged = self.mode == "bare" and "<answer>" not in response
        return f"<answer>{response}</answer>" if untagged else response
