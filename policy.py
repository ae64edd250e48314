"""The policy pi_theta(a|s): a vision-language model that scores actions (the numerator of Eq 2).

One forward pass gives the log-probability of every token of every action of a batch of states,
for RL, the reference model and SFT. The distribution is the one that rollouts sample from:
softmax(logits / temperature) over the tokens that a response may hold. Special tokens (an image
token would crash the next forward pass) and the padding of the vocabulary have probability 0.

Departure from the paper, in speed only. Other trainers repeat prompt and image for each of the G
actions of a state. Here the states of a micro-batch and their actions are one row without padding,
with the same numbers (tests/test_policy.py holds them equal):

    [ prompt with image(s) | a_1 | a_2 | ... | a_G | the next state's prompt | its actions | ... ]

- the positions of every action continue from the end of its prompt, as if it stood there alone;
- an action attends to its prompt and to itself, never to another action (attention.py);
- the images of a state are encoded once, equal actions are scored once, and the LM head runs on
  the positions that predict an action's token, in chunks: (tokens x 152k) logits are never whole.

    policy = Policy.load("Qwen/Qwen2-VL-2B-Instruct")
    prompts = policy.encode(states)             # once per state
    batch = pack(prompts, actions).to("cuda")   # actions[b][g]: token ids that end with eos_id
    logp = policy(batch)                        # (B, G, T), 0 where batch.action_mask is False
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from attention import SHARED_PREFIX, SharedPrefix
from data.state import State
from training import pretrained

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a response (rewards.py)


@dataclass
class Prompt:
    """One state as the model's input, computed once; CPU tensors.

    state: the state itself, from which vLLM makes its own input. input_ids: (P,), image tokens
    expanded. position_ids: (3, P), M-RoPE (time, height, width). pixel_values: (patches, dim), or
    None without images. image_grid_thw: (n_images, 3), in patches, or None.
    """

    state: State
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None


@dataclass
class PackedBatch:
    """B states with up to G actions of up to T tokens each, in one row of N tokens.

    M tokens of the row are to be predicted. Equal actions of a state share theirs. action_mask is
    False where a state has fewer actions or an action fewer tokens.
    """

    input_ids: torch.Tensor  # (N,)
    position_ids: torch.Tensor  # (3, N)
    pixel_values: torch.Tensor | None  # (patches of all images, dim), state by state
    image_grid_thw: torch.Tensor | None  # (images of all states, 3)
    layout: SharedPrefix  # which tokens see which
    predict_at: torch.Tensor  # (M,), the place in the row whose output predicts a token
    predicted: torch.Tensor  # (M,), that token
    token_at: torch.Tensor  # (B, G, T), which of the M it is
    action_mask: torch.Tensor  # (B, G, T) bool

    def to(self, device: torch.device | str) -> PackedBatch:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(device) for name, value in given.items()})


def pack(prompts: list[Prompt], actions: list[list[list[int]]]) -> PackedBatch:
    """Lays out all states, each with its prompt and its actions, as one row.

    actions[b][g] is a list of at least one token id, ended by EOS unless truncated. Numbers of
    actions and lengths may differ. ValueError if the lists do not match or an action is empty.
    """
    if len(prompts) != len(actions):
        raise ValueError(f"{len(prompts)} prompts but actions for {len(actions)} states")
    flat = sum(actions, [])
    if not all(map(len, flat)):
        raise ValueError("an action has no tokens; even an empty response holds EOS")
    shape = len(prompts), max(map(len, actions)), max(map(len, flat))
    token_at = torch.zeros(shape, dtype=torch.long)  # (B, G, T)
    action_mask = torch.zeros(shape, dtype=torch.bool)  # (B, G, T)
    ids, positions, predict_at, predicted = [], [], [], []
    prompt_at, action_at, prompt_of = [], [], []
    end = count = 0  # tokens in the row, tokens to predict
    for b, (prompt, group) in enumerate(zip(prompts, actions)):
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        prompt_at.append(torch.arange(end, end + len(prompt.input_ids)))
        end += len(prompt.input_ids)
        last = end - 1  # the prompt's last token predicts the first token of every action
        start = int(prompt.position_ids.max()) + 1  # not P: an image's positions span a grid
        scored = {}  # action -> where its tokens are among those to predict
        for g, action in enumerate(map(tuple, group)):
            n = len(action)
            if action not in scored:
                scored[action] = count
                ids.append(torch.tensor(action))
                positions.append(torch.arange(start, start + n).expand(3, n))
                action_at.append(torch.arange(end, end + n))
                prompt_of.append(b)
                predict_at += [last, *range(end, end + n - 1)]
                predicted += action
                end, count = end + n, count + n
            token_at[b, g, :n] = torch.arange(scored[action], scored[action] + n)
            action_mask[b, g, :n] = True
    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        pixel_values=joined([prompt.pixel_values for prompt in prompts]),
        image_grid_thw=joined([prompt.image_grid_thw for prompt in prompts]),
        layout=SharedPrefix.of(prompt_at, action_at, prompt_of, end),
        predict_at=torch.tensor(predict_at),
        predicted=torch.tensor(predicted),
        token_at=token_at,
        action_mask=action_mask,
    )


def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The images of all states, one after the other."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


class Policy(nn.Module):
    """A model with its processor, and log pi_theta(a|s) as its forward pass.

    temperature: of sampling, and so of scoring. eos_id: the token that ends a response.
    suppressed_ids: (n,), ids of probability 0, which rollouts leave out as well. logit_chunk: the
    LM head runs on so many tokens at a time (512 x 152k words in float32 take 0.3 GB).
    """

    def __init__(self, model, processor, *, temperature: float = 1.0, logit_chunk: int = 512):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.temperature, self.logit_chunk = temperature, logit_chunk
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
        logit_chunk: int = 512,
    ) -> Policy:
        """Loads a directory in Hugging Face layout, or a model of the hub, in train mode.

        Trained weights are float32: a learning rate of 1e-6 is lost in bfloat16. The caller
        computes in bfloat16 by autocast. Images are resized to between min_pixels and max_pixels
        (None: as the checkpoint says). Around `model.generate` switch to eval mode: with
        checkpointing, train mode drops its KV cache and it writes wrong tokens. ValueError, in one
        line, if this is no model that we can train.
        """
        try:
            directory = pretrained.directory_of(path)
            config = pretrained.read_config(directory)
            processor = pretrained.read_processor(directory, config)
            attention = {"": SHARED_PREFIX, "text_config": SHARED_PREFIX, "vision_config": "sdpa"}
            model = pretrained.read_model(directory, config, dtype, attention)
            if not all(weight.isfinite().all() for weight in model.parameters()):
                raise ValueError("some of its weights are no finite numbers (NaN or infinity)")
            policy = cls(model, processor, temperature=temperature, logit_chunk=logit_chunk)
            policy.try_out()
        except Exception as error:  # the files may be anybody's: any error is possible
            why = pretrained.one_line(error, 300)
            message = f"cannot load a vision-language model from {str(path)!r}: {why}"
            raise ValueError(message) from error
        size = dict(processor.image_processor.size)  # the edges are areas, whatever their names
        size["longest_edge"] = max_pixels or size["longest_edge"]
        size["shortest_edge"] = min_pixels or min(size["shortest_edge"], size["longest_edge"])
        processor.image_processor.size = size
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return policy.train()

    def try_out(self) -> None:
        """Encodes and scores one small state. ValueError for what a run would only meet later: a
        template that leaves something out or begins the response, tags that no response can hold,
        weights that are NaN."""
        response = self._tags()
        pictures = (Image.new("RGB", (56, 56)), Image.new("RGB", (56, 56)))
        state = State("try", pictures, "how many ?", "1", "discrete")
        with pretrained.library("its chat template"):
            text = self.prompt_text(state)
        if text.count(self.processor.image_token) != 2 or "how many ?" not in text:
            raise ValueError("its chat template leaves out the question or its images")
        if text.rstrip().endswith(TAGS[0]):
            raise ValueError(
                f"its chat template writes {TAGS[0]} itself (a Thinking model): no response would "
                "have the format that is rewarded. Start from the Instruct model"
            )
        with pretrained.library("scoring a small state"), torch.no_grad():
            (prompt,) = self.encode([state])
            logp = self(pack([prompt], [[[*response, self.eos_id]]]))  # (1, 1, T)
        image_id = self.model.config.image_token_id
        patches = int(prompt.image_grid_thw.prod(-1).sum())
        features = patches // self.processor.image_processor.merge_size**2
        if prompt.input_ids.tolist().count(image_id) != features:
            raise ValueError(f"its tokenizer's image token is not the model's, {image_id}")
        if not logp.isfinite().all():
            raise ValueError("its log-probabilities are no numbers: damaged weights?")

    def _tags(self) -> list[int]:
        """The tokens of all tags. ValueError if no response could hold them, or end."""
        banned, response = set(self.suppressed_ids.tolist()), []
        for tag in TAGS:
            ids = self.tokenizer(tag, add_special_tokens=False).input_ids
            read = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            if read != tag or banned & set(ids):
                raise ValueError(
                    f"no response could hold {tag}, which its tokenizer takes for a special or an "
                    "unknown token: no answer would be read. Make it an ordinary token"
                )
            response += ids
        if self.eos_id in response or self.eos_id in banned:
            raise ValueError(f"its eos_token {self.tokenizer.eos_token!r} cannot end a response")
        return response

    def freeze_vision(self) -> None:
        """Freezes the vision tower and its projector (`visual.merger`). Before `World.place`."""
        self.model.model.visual.requires_grad_(False)

    def save(self, path: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes a directory in Hugging Face layout. weights: None for the model's own."""
        self.model.save_pretrained(path, state_dict=weights)
        self.processor.save_pretrained(path)

    def prompt_text(self, state: State) -> str:
        """The prompt as text with one token per image, which `encode` and vLLM expand."""
        return self.processor.apply_chat_template(
            state.messages(), tokenize=False, add_generation_prompt=True
        )

    def encode(self, states: list[State]) -> list[Prompt]:
        """Tokenises, resizes and cuts into patches: all that is the same in every epoch."""
        prompts = []
        for state in states:
            inputs = self.processor(
                text=[self.prompt_text(state)],
                images=list(state.images) or None,
                return_tensors="pt",
            )
            ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")  # (1, P), (n_images, 3)
            positions, _ = self.model.model.get_rope_index(
                ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grid
            )  # (3, 1, P)
            prompts.append(Prompt(state, ids[0], positions[:, 0], inputs.get("pixel_values"), grid))
        return prompts

    def tokens_of(self, text: str, limit: int, ended: bool = True) -> tuple[list[int], bool]:
        """A text as a response: at most `limit` tokens, and whether it is truncated.

        Special tokens are dropped; EOS ends it unless it fills the limit, or was not `ended`.
        Only the beginning of a long text is tokenised, until it has twice the tokens: near the cut
        they may differ from those of the whole text, but no tokenizer looks that far ahead.
        """
        banned = set(self.suppressed_ids.tolist()) | {self.eos_id}
        letters = 16 * limit + 1024
        while True:
            ids = self.tokenizer(text[:letters], add_special_tokens=False).input_ids
            tokens = [token for token in ids if token not in banned]
            if letters >= len(text) or len(tokens) >= 2 * limit + 64:
                break
            letters *= 4
        truncated = len(tokens) >= limit or (not ended and len(tokens) > 0)
        return (tokens[:limit] if truncated else [*tokens, self.eos_id]), truncated

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """log pi_theta of every action token, (B, G, T) float32; 0 where action_mask is False.
        A suppressed token has log-probability -inf: keep such actions out of a loss."""
        hidden = self._hidden(batch).index_select(0, batch.predict_at)  # (M, H)
        chunks = zip(hidden.split(self.logit_chunk), batch.predicted.split(self.logit_chunk))
        if torch.is_grad_enabled():  # the backward pass computes a chunk's logits again
            logp = [checkpoint(self._token_logp, h, ids, use_reentrant=False) for h, ids in chunks]
        else:
            logp = [self._token_logp(h, ids) for h, ids in chunks]
        logp = torch.cat(logp).index_select(0, batch.token_at.flatten())  # (B G T,)
        return logp.view(batch.token_at.shape).masked_fill(~batch.action_mask, 0.0)  # (B, G, T)

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states of the row, (N, H)."""
        model, deepstack = self.model.model, {}
        embeds = self.model.get_input_embeddings()(batch.input_ids)  # (N, H)
        if batch.pixel_values is not None:
            images = model.get_image_features(batch.pixel_values, batch.image_grid_thw)
            features = torch.cat(tuple(images.pooler_output)).to(embeds.dtype)  # (image tokens, H)
            # Prompts only: an image token in an action must not shift the next state's features.
            is_image = batch.input_ids == self.model.config.image_token_id  # (N,)
            is_image &= batch.layout.in_prompt
            embeds = embeds.masked_scatter(is_image[:, None], features)
            if hasattr(images, "deepstack_features"):
                # Qwen3-VL adds features of earlier blocks to what its first layers give out there.
                levels = [torch.cat(level) for level in images.deepstack_features]
                deepstack = dict(visual_pos_masks=is_image[None], deepstack_visual_embeds=levels)
        # A KV cache would be of no use and stop checkpointing.
        return model.language_model(
            inputs_embeds=embeds[None],  # (1, N, H)
            position_ids=batch.position_ids[:, None],  # (3, 1, N)
            shared_prefix=batch.layout,
            use_cache=False,
            **deepstack,
        ).last_hidden_state[0]

    def _token_logp(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """log softmax(logits / temperature) over allowed tokens, (n, H), (n,) -> (n,) float32."""
        logits = self.model.get_output_embeddings()(hidden).float()  # (n, V)
        # In place: with 152k words a copy costs as much as the product.
        logits = logits.div_(self.temperature).index_fill_(1, self.suppressed_ids, -torch.inf)
        return -F.cross_entropy(logits, ids, reduction="none")

    def _suppressed_ids(self) -> torch.Tensor:
        """All special tokens but EOS, and ids that the tokenizer does not know: (n,)."""
        config, special = self.model.config, set(self.tokenizer.all_special_ids)
        special |= {config.image_token_id, config.video_token_id}
        added = self.tokenizer.added_tokens_decoder
        special |= {i for i, token in added.items() if token.special}
        allowed = set(self.tokenizer.get_vocab().values()) - special | {self.eos_id}
        size = self.model.get_output_embeddings().weight.shape[0]
        return torch.tensor([i for i in range(size) if i not in allowed], dtype=torch.long)
