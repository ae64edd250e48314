"""States: what the policy is asked (paper, Section 3.1: s = (v, t), images and a question).

Every data set of the project gives its questions as `State`s; nothing downstream knows where they came from.
The prompt is one user turn, images first, then the question and what to do with it; the policy and the experts
get the same words, since experts that are told more than the policy teach it what it cannot see.
"""

from dataclasses import dataclass

from PIL import Image

# What the answer looks like, by its kind (the kinds are those of rewards.py).
ANSWER_FORM = {
    "discrete": "a number or a letter",
    "math": "a number",
    "function": "a sequence of functions",
}


@dataclass(frozen=True)
class State:
    """One question about one or more images.

    id: unique within its set. images: RGB pictures, in the order in which the question speaks of them.
    question: the text t. answer: the truth, as text. kind: how the answer is judged ("discrete", "math" or
    "function", see rewards.py). thought: a correct chain of thought, "" where the data set has none.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    thought: str = ""

    @property
    def request(self) -> str:
        """What follows the question in the prompt: how to answer."""
        return (
            "Reason step by step between <think> and </think> , then give the final answer , "
            f"{ANSWER_FORM[self.kind]} , between <answer> and </answer> ."
        )

    def messages(self) -> list[dict]:
        """The prompt as chat messages, as a processor's `apply_chat_template` takes them (images by order)."""
        content = [{"type": "image"} for _ in self.images]
        content.append({"type": "text", "text": f"{self.question} {self.request}"})
        return [{"role": "user", "content": content}]
