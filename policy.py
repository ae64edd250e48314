"""The policy pi_theta(a|s): a vision-language model that scores actions, fast (the numerator of Eq 2).

One forward pass gives the log-probability of every token of every action of a batch of states; RL, the reference
model and SFT all use it. The distribution is the one that rollouts sample from, at top_p = 1: softmax(logits /
temperature) over the tokens that a response may hold. Special tokens (a sampled image token would crash the next
forward pass) and the padding of the vocabulary (ids that no tokenizer can decode) have probability 0.

Departure from the paper, in speed only. Other trainers repeat prompt and image for each of the G actions of a state.
Here a state and its actions are one row, and the numbers are the same (tests/test_policy.py holds them equal):

    [ prompt with image(s) | a_1 | a_2 | ... | a_G | padding ]

- every action's positions continue from the end of the prompt, as if it stood there alone;
- the attention mask lets an action see the prompt and itself, never another action;
- the images of a state are encoded once, and the LM head runs on the positions that predict an action's token only, in
  chunks, so that (tokens x 152k words) logits never exist at once.

It saves G - 1 passes over prompt and images, for attention over (P + G T)^2 pairs of tokens in place of G (P + T)^2:
a gain while prompts (images!) are long against actions, a loss for short prompts and very long actions.

    policy = Policy.load("Qwen/Qwen2-VL-2B-Instruct")
    prompts = policy.encode(states)                    # once per state
    batch = pack(prompts, actions).to("cuda")          # actions[b][g]: a list of token ids that ends with policy.eos_id
    logp = policy(batch)                               # (B, G, T), 0 where batch.action_mask is False
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from data import State

SUPPORTED = ("qwen2_vl", "qwen2_5_vl")  # model families whose positions and image features work as used below
PADDING = -1  # the segment of padding; 0 is the prompt, 1..G are the actions


@dataclass
class Prompt:
    """One state as the model's input, computed once; CPU tensors.

    state: whose it is (vLLM makes its input of it by itself). input_ids: (P,), image tokens expanded.
    position_ids: (3, P), M-RoPE (time, height, width).
    pixel_values: (patches, dim), or None without images. image_grid_thw: (n_images, 3), in patches, or None.
    """

    state: State
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None


@dataclass
class PackedBatch:
    """B states with up to G actions of up to T tokens each, in B rows of L tokens."""

    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor  # (3, B, L)
    segments: torch.Tensor  # (B, L), whose token it is: 0 the prompt's, g the g-th action's, -1 padding
    pixel_values: torch.Tensor | None  # (patches of all images, dim), row by row
    image_grid_thw: torch.Tensor | None  # (images of all rows, 3)
    action_ids: torch.Tensor  # (B, G, T)
    action_mask: torch.Tensor  # (B, G, T) bool, False where a row has fewer actions or an action fewer tokens
    predict_at: torch.Tensor  # (B, G, T), the place in the row whose output predicts this token

    def to(self, device: torch.device | str) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{name: v if v is None else v.to(device) for name, v in values.items()})

    def attention_mask(self) -> torch.Tensor:
        """(B, 1, L, L) bool: may the token in this row of the matrix look at the one in that column?"""
        looking, seen = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(looking.shape[1], looking.shape[1], dtype=torch.bool, device=looking.device).tril()
        # Padding looks at the prompt and at padding before it: useless, but a row that sees nothing would be NaN.
        return (causal & ((seen == 0) | (seen == looking)))[:, None]


def pack(prompts: list[Prompt], actions: list[list[list[int]]]) -> PackedBatch:
    """Lay out each state's prompt and actions as one row.

    actions[b][g] is a list of at least one token id, ended by EOS unless truncated. Numbers of actions and lengths may
    differ. Raises ValueError if the lists do not match or an action is empty.
    """
    if len(prompts) != len(actions):
        raise ValueError(f"{len(prompts)} prompts but actions for {len(actions)} states")
    if not all(len(action) for group in actions for action in group):
        raise ValueError("an action has no tokens; even an empty response holds EOS")

    B, G = len(prompts), max(len(group) for group in actions)
    T = max(len(action) for group in actions for action in group)
    action_ids = torch.zeros(B, G, T, dtype=torch.long)
    action_mask = torch.zeros(B, G, T, dtype=torch.bool)
    predict_at = torch.zeros(B, G, T, dtype=torch.long)
    rows, positions, segments = [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, actions)):
        P = end = len(prompt.input_ids)
        # An image's positions span a grid, so the largest one is not P - 1.
        start = int(prompt.position_ids.max()) + 1
        row, position = [prompt.input_ids], [prompt.position_ids]
        segment = [torch.zeros(P, dtype=torch.long)]
        for g, action in enumerate(group):
            n = len(action)
            ids = torch.as_tensor(action, dtype=torch.long)
            row.append(ids)
            position.append(torch.arange(start, start + n).expand(3, n))
            segment.append(torch.full((n,), g + 1))
            action_ids[b, g, :n] = ids
            action_mask[b, g, :n] = True
            predict_at[b, g, 0] = P - 1  # the prompt's last token predicts every action's first
            predict_at[b, g, 1:n] = torch.arange(end, end + n - 1)
            end += n
        rows.append(torch.cat(row))
        positions.append(torch.cat(position, dim=1).T)
        segments.append(torch.cat(segment))

    def join(tensors):  # images of all rows, one after the other
        present = [t for t in tensors if t is not None]
        return torch.cat(present) if present else None

    return PackedBatch(
        input_ids=pad_sequence(rows, batch_first=True),
        position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1),
        segments=pad_sequence(segments, batch_first=True, padding_value=PADDING),
        pixel_values=join(p.pixel_values for p in prompts),
        image_grid_thw=join(p.image_grid_thw for p in prompts),
        action_ids=action_ids,
        action_mask=action_mask,
        predict_at=predict_at,
    )


class Policy(nn.Module):
    """A model with its processor, and log pi_theta(a|s) as its forward pass.

    model, processor, tokenizer: those of Hugging Face. temperature: of sampling, and so of scoring. eos_id: the token
    that ends a response. suppressed_ids: (n,), ids of probability 0, for rollouts to leave out as well. logit_chunk: on
    how many tokens at a time the LM head runs (512 x 152k words in float32 take 0.3 GB).
    """

    def __init__(self, model, processor, *, temperature: float = 1.0, logit_chunk: int = 512):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.temperature = temperature
        self.logit_chunk = logit_chunk
        self.eos_id = self.tokenizer.eos_token_id
        self.register_buffer("suppressed_ids", self._suppressed_ids(), persistent=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attn_implementation: str = "sdpa",
        logit_chunk: int = 512,
    ) -> Policy:
        """Load a directory in Hugging Face layout, or a model of the hub.

        Weights are float32 by default: a learning rate of 1e-6 is lost in bfloat16 weights. The caller computes in
        bfloat16 by autocast. Images are resized to between min_pixels and max_pixels (None: as the checkpoint says).
        The policy is left in train mode, where gradient checkpointing acts; dropout is off, so eval mode gives the same
        numbers. Do switch to eval mode around `model.generate`: with checkpointing on, train mode drops its KV cache,
        and it writes wrong tokens. Raises ValueError, in one line, if this is no model that we can train.
        """
        if attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"attention must be sdpa or eager, which take our mask, not {attn_implementation!r}")
        try:
            config = AutoConfig.from_pretrained(path)
            if config.model_type not in SUPPORTED:
                raise ValueError(f"its model type is {config.model_type!r}, we train {' and '.join(SUPPORTED)}")
            text = config.text_config
            text.attention_dropout = 0.0  # the ratio of Eq 2 compares two passes: they must not differ by chance
            if any(layer != "full_attention" for layer in text.layer_types):
                raise ValueError("it has sliding-window attention, which our attention mask does not know")
            processor = AutoProcessor.from_pretrained(path)
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            # Hugging Face would leave these random, with a warning.
            if bad := [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]:
                raise ValueError(f"{len(bad)} weights are missing or of another shape, e.g. {min(bad)}")
        except (OSError, ValueError, SafetensorError) as error:
            where = "" if Path(path).is_dir() else " (no directory here, so taken as a model of the hub)"
            reason = textwrap.shorten(str(error), width=240)  # theirs can fill a screen
            raise ValueError(f"cannot load a vision-language model from {str(path)!r}{where}: {reason}") from error
        size = dict(processor.image_processor.size)
        size["shortest_edge"] = min_pixels or size["shortest_edge"]  # edges by name, areas by meaning
        size["longest_edge"] = max_pixels or size["longest_edge"]
        processor.image_processor.size = size
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model, processor, temperature=temperature, logit_chunk=logit_chunk).train()

    def save(self, path: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write model and processor in Hugging Face layout, for `load`, vLLM and evaluation. weights: None are the model's own."""
        self.model.save_pretrained(path, state_dict=weights)
        self.processor.save_pretrained(path)

    def prompt_text(self, state: State) -> str:
        """The prompt as text, one image token per image (vLLM expands them itself, `encode` has them expanded)."""
        return self.processor.apply_chat_template(state.messages(), tokenize=False, add_generation_prompt=True)

    def encode(self, states: list[State]) -> list[Prompt]:
        """Tokenise, resize and cut into patches: what need not be done again when a state is seen again."""
        prompts = []
        for state in states:
            inputs = self.processor(
                text=[self.prompt_text(state)], images=list(state.images) or None, return_tensors="pt"
            )
            position_ids, _ = self.model.model.get_rope_index(
                inputs["input_ids"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
                image_grid_thw=inputs.get("image_grid_thw"),
            )
            prompts.append(
                Prompt(
                    state=state,
                    input_ids=inputs["input_ids"][0],
                    position_ids=position_ids[:, 0],
                    pixel_values=inputs.get("pixel_values"),
                    image_grid_thw=inputs.get("image_grid_thw"),
                )
            )
        return prompts

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """log pi_theta of every action token, (B, G, T) float32; 0 where batch.action_mask is False.

        A suppressed token has log-probability -inf; keep such actions out of a loss.
        """
        hidden = self._hidden(batch)  # (B, L, H)
        row = torch.arange(hidden.shape[0], device=hidden.device)[:, None, None]  # (B, 1, 1)
        present = batch.action_mask
        hidden = hidden[row.expand_as(present)[present], batch.predict_at[present]]  # (N, H), N action tokens
        chunks = zip(hidden.split(self.logit_chunk), batch.action_ids[present].split(self.logit_chunk))
        if torch.is_grad_enabled():  # compute a chunk's logits again in backward rather than keep them
            logp = [checkpoint(self._token_logp, h, ids, use_reentrant=False) for h, ids in chunks]
        else:
            logp = [self._token_logp(h, ids) for h, ids in chunks]
        return torch.zeros(present.shape, device=hidden.device).masked_scatter(present, torch.cat(logp))

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states of all rows, (B, L, H)."""
        embeds = self.model.get_input_embeddings()(batch.input_ids)  # (B, L, H)
        if batch.pixel_values is not None:
            features = self.model.model.get_image_features(batch.pixel_values, batch.image_grid_thw).pooler_output
            features = torch.cat(tuple(features)).to(embeds.dtype)  # (image tokens, H)
            # Of the prompt only: an action that holds an image token must not shift the features of the next row.
            is_image = (batch.input_ids == self.model.config.image_token_id) & (batch.segments == 0)
            embeds = embeds.masked_scatter(is_image[:, :, None], features)
        mask = batch.attention_mask()
        if self.model.config._attn_implementation == "eager":  # eager attention adds its mask
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        # A 4-D mask is taken as it is. use_cache=False: a KV cache is memory for nothing, and stops checkpointing.
        return self.model.model(
            inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _token_logp(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """log softmax(logits / temperature) over the allowed tokens, at ids: (n, H), (n,) -> (n,) float32."""
        logits = self.model.get_output_embeddings()(hidden).float() / self.temperature  # (n, V)
        logits = logits.index_fill(1, self.suppressed_ids, -torch.inf)
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)

    def _suppressed_ids(self) -> torch.Tensor:
        """Ids that no response holds: all special tokens but EOS, and those that the tokenizer does not know."""
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        special |= {self.model.config.image_token_id, self.model.config.video_token_id}
        allowed = set(self.tokenizer.get_vocab().values()) - special | {self.eos_id}
        size = self.model.get_output_embeddings().weight.shape[0]
        return torch.tensor([i for i in range(size) if i not in allowed], dtype=torch.long)
