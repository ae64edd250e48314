"""TODO data.state"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# What a prompt asks for: a thought and an answer; the answer alone; or nothing, the question being
# all of it (Reason-RFT's ANS-SFT).
MODES = ("reason", "answer", "bare")
FORMS = {"discrete": "a number", "math": "a number", "function": "a sequence of functions"}


@dataclass(frozen=True)
class State:
    """One question about one or more images.

    id: unique within its set. images: RGB pictures, in the order in which the question speaks of them; some sets open them only when
    they are used. question: the text t. answer: the truth, as text. kind: how the answer is judged ("discrete", "math" or "function",
    see rewards.py). thought: a correct chain of thought, "" where the data set has none. mode: one of `MODES`. rules: what the
    prompt tells before the question, "" where the question says it all. form: what the prompt
    calls the answer, "" goes by kind; it must not depend on the answer where one question's is a
    letter and another's a number.
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

    @property
    def request(self) -> str:
        """What follows the question in the prompt: how to answer."""
        form = self.form or FORMS[self.kind]
        if self.mode == "answer":
            return f"Give only the final answer, {form}, between <answer> and </answer>."
        return f"Reason step by step between <think> and </think>, then give the final answer, {form}, between <answer> and </answer>."

    def messages(self) -> list[dict]:
        """The prompt as chat messages, as a processor's `apply_chat_template` takes them (images by order)."""
        content = [{"type": "image"} for _ in range(len(self.images))]
        text = self.question
        if self.mode != "bare":
            text = f"{self.rules}\n\n{text}" if self.rules else text
            text = f"{text} {self.request}"
        content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]

    def reading(self, response: str) -> str:
        """The response as the scorers read it: who was asked in mode "bare" says the answer
        without tags."""
        untagged = self.mode == "bare" and "<answer>" not in response
        return f"<answer>{response}</answer>" if untagged else response


SETS = {
    "counting": ("counting-id", "counting-ood"),
    "structure": ("structure-id", "structure-ood"),
    "transformation": ("transformation-id", "transformation-left", "transformation-right"),
}
