"""Attention for many continuations of one prompt: G actions share the keys and values of their prompt, and cost no more than they see.

transformers calls `attend` in every layer of the language model (its AttentionInterface, under the name SHARED_PREFIX), in three situations:

- training and scoring: all tokens of a micro-batch stand in one row without padding, and a `SharedPrefix` in the place of the attention mask says
  which of them belong together. A prompt attends to itself, an action to its prompt and itself: P^2 + G T (P + T) pairs of tokens
  a state, where one row with a mask would take (P + G T)^2 and G separate rows G (P + T)^2.
- generating one token for each row: the query heads that share a key head (GQA) become the rows of one small matrix, and no key is repeated;
- anything else is left to transformers' own function for SDPA.

The numbers are those of ordinary attention; tests/test_policy.py compares them with transformers' eager attention on separate sequences.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_PREFIX = "shared_prefix"
ROOM = 32  # tokens by which the keys and values of a generating row grow at a time


@dataclass
class SharedPrefix:
    """Where in a row of N tokens B prompts of up to P tokens and A actions of up to T tokens are.

    prompt_at: (B, P) and action_at: (A, T), places in the row; those past the end of a prompt or an action are any place.
    prompt_of: (A,), which prompt an action continues. prompt_length: (B,). output_at: (N,), where a token of the row is among the
    B P + A T tokens of `prompt_at` and `action_at`, read one after the other.
    """

    prompt_at: torch.Tensor
    action_at: torch.Tensor
    prompt_of: torch.Tensor
    prompt_length: torch.Tensor
    output_at: torch.Tensor
    mask: torch.Tensor | None = (
        None  # (A, 1, T, P + T), added to the scores: 0 or -inf; the same in all layers
    )

    def to(self, device: torch.device | str) -> "SharedPrefix":
        return SharedPrefix(
            **{
                name: value if value is None else value.to(device)
                for name, value in vars(self).items()
            }
        )

    @property
    def in_prompt(self) -> torch.Tensor:
        """(N,) bool, which tokens of the row are a prompt's."""
        return self.output_at < self.prompt_at.numel()

    def action_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What each token of an action sees of its prompt and of its action."""
        if self.mask is None or self.mask.dtype != dtype:
            P, T = self.prompt_at.shape[1], self.action_at.shape[1]
            place = torch.arange(P + T, device=self.prompt_at.device)
            in_prompt = place < self.prompt_length[self.prompt_of][:, None]  # (A, P + T)
            in_action = (place >= P) & (
                place - P <= torch.arange(T, device=place.device)[:, None]
            )  # (T, P + T), causal
            seen = in_prompt[:, None] | in_action  # (A, T, P + T)
            self.mask = torch.zeros(seen.shape, dtype=dtype, device=place.device).masked_fill(
                ~seen, -torch.inf
            )[:, None]
        return self.mask

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """(1, H, N, D), and keys and values of as many or fewer heads -> (1, N, H, D)."""
        heads, kind = query.shape[1], query.device.type
        if torch.is_autocast_enabled(kind):  # as SDPA would, but before they are gathered
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        query, key, value = (
            x[0].transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=1)
            for x in (query, key, value)
        )  # (N, H, D)

        def take(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return (
                x.index_select(0, at.flatten()).view(*at.shape, heads, -1).transpose(1, 2)
            )  # (rows, H, tokens, D)

        # What stands behind a prompt's end is seen by nobody but itself: causal attention needs no other mask.
        of_prompts = F.scaled_dot_product_attention(
            *(take(x, self.prompt_at) for x in (query, key, value)), is_causal=True, scale=scaling
        )
        seen_at = torch.cat([self.prompt_at[self.prompt_of], self.action_at], dim=1)  # (A, P + T)
        mask = self.action_mask(query.dtype)
        of_actions = F.scaled_dot_product_attention(
            take(query, self.action_at),
            take(key, seen_at),
            take(value, seen_at),
            attn_mask=mask,
            scale=scaling,
        )
        outputs = torch.cat(
            [x.transpose(1, 2).flatten(0, 1) for x in (of_prompts, of_actions)]
        )  # (B P + A T, H, D)
        return outputs.index_select(0, self.output_at)[None]


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
):
    """transformers' attention function: query (rows, H, tokens, D), key and value (rows, heads, tokens, D) -> (rows, tokens, H, D), None."""
    if isinstance(attention_mask, SharedPrefix):
        return attention_mask.attend(query, key, value, scaling), None
    if query.shape[2] == 1 and dropout == 0:
        rows, heads, _, size = query.shape
        query = query.view(
            rows, key.shape[1], -1, size
        )  # (rows, key heads, queries that share one, D)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
        return output.reshape(rows, 1, heads, size), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


class RoomyLayer(DynamicLayer):
    """One layer's keys and values while rows are generated, with room for the next tokens: transformers' own layer copies all of them for each
    token. `keys` and `values`, (rows, heads, tokens, D), are views of larger tensors, until somebody replaces them."""

    shown = None  # the keys as `update` left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self.shown is None or self.keys is not self.shown or after > self.rooms[0].shape[-2]:
            old = (self.keys, self.values)
            rows, heads, _, size = key_states.shape
            self.rooms = [
                x.new_empty(rows, heads, after + ROOM, size) for x in (key_states, value_states)
            ]
            for room, x in zip(self.rooms, old) if before else ():
                room[:, :, :before] = x
        for room, x in zip(self.rooms, (key_states, value_states)):
            room[:, :, before:after] = x
        self.keys, self.values = (room[:, :, :after] for room in self.rooms)
        self.shown, self.is_initialized = self.keys, True
        return self.keys, self.values


AttentionInterface.register(SHARED_PREFIX, attend)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
