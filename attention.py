"""Attention of many continuations of one prompt: G actions share their prompt's keys and values.

transformers calls `attend` in every layer of the language model (its AttentionInterface, under
the name SHARED_PREFIX). There are three cases:

- Training and scoring: all tokens of a micro-batch stand in one row without padding, and the
  model's forward pass hands a `SharedPrefix` on to here (`shared_prefix=`), in place of a mask. A
  prompt attends to itself, an action to its prompt and itself: P^2 + G T (P + T) pairs of tokens a
  state. One row with a mask would take (P + G T)^2, and G separate rows G (P + T)^2.
- Generating one token for each row: the query heads that share a key head (GQA) become the rows
  of one small matrix, so no key is repeated.
- Anything else goes to transformers' own function for SDPA.

The numbers are those of ordinary attention: tests/test_policy.py compares them with transformers'
eager attention on separate sequences.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_PREFIX = "shared_prefix"


@dataclass
class SharedPrefix:
    """Where B prompts of up to P tokens and A actions of up to T tokens are in a row of N tokens.

    prompt_at: (B, P), action_at: (A, T): places in the row; any place past the end of a prompt or
    an action. prompt_of: (A,), which prompt an action continues. prompt_length: (B,). output_at:
    (N,), where a token of the row is among the B P + A T tokens of `prompt_at` and `action_at`,
    read one after the other. mask: (A, 1, T, P + T), 0 or -inf, made in the first layer.
    """

    prompt_at: torch.Tensor
    action_at: torch.Tensor
    prompt_of: torch.Tensor
    prompt_length: torch.Tensor
    output_at: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        prompt_at: list[torch.Tensor],
        action_at: list[torch.Tensor],
        prompt_of: list[int],
        N: int,
    ) -> "SharedPrefix":
        """The layout of a row of N tokens, from the places of each prompt and of each action."""
        prompts = pad_sequence(prompt_at, batch_first=True)  # (B, P)
        actions = pad_sequence(action_at, batch_first=True)  # (A, T)
        (B, P), T = prompts.shape, actions.shape[1]
        output_at = torch.zeros(N, dtype=torch.long)  # (N,)
        for b, at in enumerate(prompt_at):
            output_at[at] = torch.arange(b * P, b * P + len(at))
        for a, at in enumerate(action_at):
            output_at[at] = torch.arange(B * P + a * T, B * P + a * T + len(at))
        lengths = torch.tensor([len(at) for at in prompt_at])
        return cls(prompts, actions, torch.tensor(prompt_of), lengths, output_at)

    def to(self, device: torch.device | str) -> "SharedPrefix":
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(device) for name, value in given.items()})

    @property
    def in_prompt(self) -> torch.Tensor:
        """(N,) bool, which tokens of the row belong to a prompt."""
        return self.output_at < self.prompt_at.numel()

    def action_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What each token of an action sees of its prompt and of its action, (A, 1, T, P + T)."""
        if self.mask is None or self.mask.dtype != dtype:
            P, T = self.prompt_at.shape[1], self.action_at.shape[1]
            place = torch.arange(P + T, device=self.prompt_at.device)  # (P + T,)
            token = torch.arange(T, device=place.device)[:, None]  # (T, 1)
            in_prompt = place < self.prompt_length[self.prompt_of][:, None]  # (A, P + T)
            in_action = (place >= P) & (place - P <= token)  # (T, P + T), causal
            seen = in_prompt[:, None] | in_action  # (A, T, P + T)
            mask = torch.zeros(seen.shape, dtype=dtype, device=place.device)  # (A, T, P + T)
            self.mask = mask.masked_fill(~seen, -torch.inf)[:, None]  # (A, 1, T, P + T)
        return self.mask

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """(1, H, N, D), and keys and values of as many or fewer heads -> (1, N, H, D)."""
        heads, kind = query.shape[1], query.device.type

        def by_token(x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled(kind):  # as SDPA would, but before they are gathered
                x = x.to(torch.get_autocast_dtype(kind))
            return x[0].transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=1)  # (N, H, D)

        def take(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            rows = x.index_select(0, at.flatten()).view(*at.shape, heads, -1)
            return rows.transpose(1, 2)  # (rows, H, tokens, D)

        query, key, value = by_token(query), by_token(key), by_token(value)
        # Nothing else sees what stands behind a prompt's end: causal attention is mask enough.
        of_prompts = F.scaled_dot_product_attention(
            take(query, self.prompt_at),
            take(key, self.prompt_at),
            take(value, self.prompt_at),
            is_causal=True,
            scale=scaling,
        )  # (B, H, P, D)
        seen_at = torch.cat([self.prompt_at[self.prompt_of], self.action_at], dim=1)  # (A, P + T)
        of_actions = F.scaled_dot_product_attention(
            take(query, self.action_at),
            take(key, seen_at),
            take(value, seen_at),
            attn_mask=self.action_mask(query.dtype),
            scale=scaling,
        )  # (A, H, T, D)
        of_prompts = of_prompts.transpose(1, 2).flatten(0, 1)  # (B P, H, D)
        of_actions = of_actions.transpose(1, 2).flatten(0, 1)  # (A T, H, D)
        return torch.cat([of_prompts, of_actions]).index_select(0, self.output_at)[None]


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling=None,
    shared_prefix: SharedPrefix | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    query: (rows, H, tokens, D), key and value: (rows, key heads, tokens, D)
    -> (rows, tokens, H, D), None.
    """
    if shared_prefix is not None:
        return shared_prefix.attend(query, key, value, scaling), None
    if query.shape[2] == 1 and dropout == 0:
        rows, heads, _, size = query.shape
        query = query.view(rows, key.shape[1], -1, size)  # (rows, key heads, queries of one, D)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
        return output.reshape(rows, 1, heads, size), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(SHARED_PREFIX, attend)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
