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
    plt.switch_backend("module://matplotlib_inline.backend_inline")


def show(figure, name: str, module: str) -> None:
    """In a notebook below its cell; of a script, `module` "__main__", in a file; else not at all."""
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
    axis.imshow(seen_by(layout), cmap="Blues", vmax=1.5, interpolation="nearest")
    starts = [0, *(int(at[0]) for at in layout.action_at)]
    names = ["prompt", *(f"action {number}" for number in range(1, len(starts)))]
    for start in starts[1:]:
        axis.axhline(start - 0.5, color="grey", linewidth=0.5)
        axis.axvline(start - 0.5, color="grey", linewidth=0.5)
    axis.set_xticks(starts, names, ha="left")
    axis.set_yticks(starts, names, va="top")
    axis.tick_params(length=0)


def ratios(axis, ratio: torch.Tensor, group: Group, clip_eps: float) -> None:
    """Eq 2 by token, (G, T), over the band that Eq 3 does not clip."""
    axis.axhspan(1 - clip_eps, 1 + clip_eps, color="0.9")
    for row, action, i in zip(ratio, group.kept_actions, group.kept, strict=True):
        values = row[: len(action.tokens)]
        label = f"{action.source}, R = {group.rewards[i]:.0f}"
        style = "o-" if group.accuracy[i] else "x:"
        axis.plot(values, style, color=COLORS[action.source], markersize=4, label=label)
    axis.set(yscale="log", xlabel="token of the action", ylabel="ratio")
    axis.legend(frameon=False)
