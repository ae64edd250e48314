"""The pictures of the walk and of the sheet."""

import builtins
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from attention import SharedPrefix
from sampling import Group
from training import curves

COLORS = {"policy": "tab:blue", "careful": "tab:orange", "quick": "tab:green"}
OUT = Path("runs/lessons/one_step")
NOTEBOOK = hasattr(builtins, "__IPYTHON__")
if NOTEBOOK:  # training/curves.py draws into files
    from IPython import get_ipython

    get_ipython().run_line_magic("matplotlib", "inline")


def show(figure, name: str, module: str) -> None:
    """In a notebook below its cell; of a script, module "__main__", in a file; else nowhere."""
    if NOTEBOOK:
        plt.show()
    elif module == "__main__":
        OUT.mkdir(parents=True, exist_ok=True)
        curves.save(figure, OUT / f"{name}.png", dpi=110)
    plt.close(figure)


def state(axis, image) -> None:
    """The state's picture, a cell of the scene by its name."""
    axis.imshow(image, interpolation="nearest")
    places = [8, 24, 40, 56]  # of 64 pixels
    axis.set_xticks(places, "abcd")
    axis.set_yticks(places, "1234")
    axis.tick_params(length=0)


def seen_by(layout: SharedPrefix) -> torch.Tensor:
    """(N, N) bool for a row of one state: whether token i (row) sees token j (column)."""
    N, prompt = len(layout.output_at), layout.prompt_at[0]  # (P,)
    P = len(prompt)
    seen = torch.zeros(N, N, dtype=torch.bool)
    seen[:P, :P] = torch.ones(P, P).tril().bool()
    masks = layout.action_mask(torch.float32)[:, 0]  # (A, T, P + T)
    for at, mask in zip(layout.action_at, masks, strict=True):
        T = int((at > 0).sum())  # what follows is padding
        seen[at[:T, None], torch.cat([prompt, at[:T]])] = mask[:T, : P + T] == 0
    return seen


def attention(axis, layout: SharedPrefix) -> None:
    """Which token of the row sees which."""
    axis.imshow(seen_by(layout).numpy(), cmap="Blues", vmax=1.5, interpolation="nearest")
    starts = [0, *(int(at[0]) for at in layout.action_at)]
    names = ["prompt", *(f"action {number}" for number in range(1, len(starts)))]
    for start in starts[1:]:
        axis.axhline(start - 0.5, color="grey", linewidth=0.5)
        axis.axvline(start - 0.5, color="grey", linewidth=0.5)
    axis.set_xticks(starts, names, ha="left")
    axis.set_yticks(starts, names, va="top")
    axis.tick_params(length=0)


def ratios(axis, ratio: torch.Tensor, group: Group, tokenizer, clip_eps: float) -> None:
    """Eq 2 by token, (G, T), over the band that Eq 3 does not clip; names what is outside."""
    axis.axhspan(1 - clip_eps, 1 + clip_eps, color="0.9")
    for g, action in enumerate(group.kept_actions):
        right = group.accuracy[group.kept[g]]
        words = tokenizer.convert_ids_to_tokens(action.tokens)
        values = ratio[g, : len(words)].tolist()
        name = f"{action.source}, {'right' if right else 'wrong'}"
        style = dict(marker="o" if right else "X", linestyle="-" if right else ":")
        size = max(8 - 2 * g, 5)  # equal actions lie upon each other
        axis.plot(values, color=COLORS[action.source], label=name, markersize=size, **style)
        for place, (word, value) in enumerate(zip(words, values, strict=True)):
            if abs(value - 1) > clip_eps:
                axis.annotate(word, (place, value), (7, -3), textcoords="offset points")
    axis.set(yscale="log", xlabel="token of the action", ylabel="ratio", xticks=range(0, 21, 5))
    axis.legend(frameon=False)
