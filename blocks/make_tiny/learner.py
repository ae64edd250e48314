"""How tiny/ learns: a fast forward pass for pictures of one size, two losses, one training loop."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from blocks.dataset import BlocksSet
from blocks.make_tiny.model import PATCH, SIDE, prompt_ids
from blocks.scenes import GRID

MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen2-VL's, of red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)


class Learner:
    """The model's forward pass for many pictures of one size at once.

    It gives the numbers of the model's own, which goes picture by picture; the start checks that.
    """

    def __init__(self, model, processor, device):
        self.model = model.to(device)
        self.image_token, self.device = model.config.image_token_id, device
        self.positions = []  # M-RoPE's, (3, 1024), by the number of pictures
        for count, name in ((1, "counting-train"), (2, "transformation-train")):
            state = BlocksSet(name, 1)[0]
            text = processor.apply_chat_template(
                state.messages(), tokenize=False, add_generation_prompt=True
            )
            inputs = processor(text=[text], images=list(state.images), return_tensors="pt")
            inputs = inputs.to(device)
            request = f"{state.question} {state.request}"
            ids = prompt_ids(processor.tokenizer, count, request)
            assert inputs.input_ids[0].tolist() == ids
            called, expected = called_with(model.model.language_model, model, inputs)
            position = called["position_ids"][-3:, 0]  # (3, P)
            tail = position.max() + 1 + torch.arange(1024 - position.shape[1], device=device)
            self.positions.append(torch.cat([position, tail.expand(3, -1)], dim=1))
            if count == 1:
                called, _ = called_with(model.model.visual.blocks[0], model, inputs)
                self.cos, self.sin = called["position_embeddings"]
            pictures = np.stack([np.asarray(image) for image in state.images])
            with torch.no_grad():
                logits = self.logits(torch.from_numpy(pictures).to(device)[None], inputs.input_ids)
            torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(n, 64, 64, 3) uint8 -> (n, 16, hidden): `model.visual`, all pictures at once."""
        tower, n = self.model.model.visual, len(pictures)
        mean, std = (torch.tensor(values, device=self.device) for values in (MEAN, STD))
        x = ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)  # (n, 3, 64, 64)
        m, g = 2, SIDE // PATCH // 2
        x = x.view(n, 3, g, m, PATCH, g, m, PATCH)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, g, g, m, m, 3, P, P)
        x = x.reshape(-1, 3, 1, PATCH, PATCH)
        x = x.expand(-1, -1, 2, -1, -1)  # a still picture is a film of two frames
        x = tower.patch_embed(x.reshape(len(x), -1)).view(n, (g * m) ** 2, -1)  # (n, 64, width)
        for block in tower.blocks:
            qkv = block.attn.qkv(block.norm1(x))
            q, k, v = qkv.view(n, x.shape[1], 3, block.attn.num_heads, -1).unbind(2)
            q, k = (self.rotate(y).transpose(1, 2) for y in (q, k))
            y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))  # (n, heads, 64, 32)
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return tower.merger(x.flatten(0, 1)).view(n, g * g, -1)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[:, None] + torch.cat([-second, first], dim=-1) * self.sin[:, None]

    def logits(
        self,
        pictures: torch.Tensor,
        ids: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, n, 64, 64, 3), (B, L) -> (B, L, vocabulary).

        keep (B, L): (K, vocabulary) of the K positions that it marks only.
        """
        text_model = self.model.model.language_model
        x = text_model.embed_tokens(ids)  # (B, L, hidden)
        seen = self.features(pictures.flatten(0, 1)).to(x.dtype)
        x = x.masked_scatter((ids == self.image_token)[..., None], seen)
        position = self.positions[pictures.shape[1] - 1][:, None, : ids.shape[1]]
        position = position.expand(-1, len(ids), -1)  # (3, B, L)
        x = text_model(inputs_embeds=x, position_ids=position, use_cache=False).last_hidden_state
        return self.model.lm_head(x if keep is None else x[keep])

    def naming_loss(self, pictures, labels, words: list[list[int]]) -> torch.Tensor:
        """How badly the tokens of pictures (B, 64, 64, 3) name their cells and what these show.

        labels (B, 16, 5): see `cell_labels`. words: ids of the words of each of NAMES, then CELLS.
        """
        logits = self.model.lm_head(self.features(pictures)).flatten(0, 1)  # (B x 16, vocabulary)
        cells = torch.arange(GRID**2, device=self.device).repeat(len(pictures))
        loss = F.cross_entropy(logits[:, words[-1]], cells)
        for ids, label in zip(words, labels.flatten(0, 1).T, strict=False):
            if (label >= 0).any():
                loss = loss + F.cross_entropy(logits[:, ids], label, ignore_index=-1)
        return loss

    def loss(self, pictures, ids, labels) -> torch.Tensor:
        spoken = labels[:, 1:] != -100
        logits = self.logits(pictures, ids[:, :-1], keep=spoken)
        return F.cross_entropy(logits.float(), labels[:, 1:][spoken])


def called_with(module, model, inputs) -> tuple[dict, torch.Tensor]:
    """The keyword arguments of `module` when the model reads the inputs, and the logits."""
    called = {}
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: called.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    return called, logits


def train(
    learner: Learner,
    batch_loss: Callable[[], torch.Tensor],
    steps: int,
    peak: float,
    phase: str,
) -> list[tuple[str, int, float]]:
    """AdamW, one cycle: 10 % up, then a cosine down. Returns (phase, step, loss) of each 50 steps.

    batch_loss() gives the loss of the next batch.
    """
    parameters, device, log = list(learner.model.parameters()), learner.device, []
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    total, count = torch.zeros((), device=device), 0
    bar = tqdm(range(steps), desc=phase, mininterval=5)
    for step in bar:
        up = min(1.0, (step + 1) / (0.1 * steps))
        optimizer.param_groups[0]["lr"] = peak * up * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total, count = total + loss.detach(), count + 1
        if count == 50 or step == steps - 1:
            log.append((phase, step + 1, round(float(total / count), 5)))
            bar.set_postfix(loss=log[-1][-1])
            total, count = torch.zeros_like(total), 0
    return log
