"""The policy pi_theta(a|s): a vision-language model that scores actions, fast (the numerator of Eq 2).

One forward pass gives the log-probability of every token of every action of a batch of states; RL, the reference
model and SFT all use it. The distribution is the one that rollouts sample from, at top_p = 1: softmax(logits /
temperature) over the tokens that a response may hold. Special tokens (a sampled image token would crash the next
forward pass) and the padding of the vocabulary (ids that no tokenizer can decode) have probability 0.

Departure from the paper, in speed only. Other trainers repeat prompt and image for each of the G actions of a state.
Here the states of a micro-batch and their actions are one row without padding, and the numbers are the same
(tests/test_policy.py holds them equal):

    [ prompt with image(s) | a_1 | a_2 | ... | a_G | the next state's prompt | its actions | ... ]

- every action's positions continue from the end of its prompt, as if it stood there alone;
- an action attends to its prompt and to itself, never to another action (attention.py);
- the images of a state are encoded once, an action that was said twice is scored once, and the LM head runs on the
  positions that predict an action's token only, in chunks, so that (tokens x 152k words) logits never exist at once.

    policy = Policy.load("Qwen/Qwen2-VL-2B-Instruct")
    prompts = policy.encode(states)                    # once per state
    batch = pack(prompts, actions).to("cuda")          # actions[b][g]: a list of token ids that ends with policy.eos_id
    logp = policy(batch)                               # (B, G, T), 0 where batch.action_mask is False
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from attention import SHARED_PREFIX, SharedPrefix
from data.state import State
from training import pretrained

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a response (rewards.py)


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
    """B states with up to G actions of up to T tokens each, in one row of N tokens; M of these are to be predicted."""

    input_ids: torch.Tensor  # (N,)
    position_ids: torch.Tensor  # (3, N)
    pixel_values: torch.Tensor | None  # (patches of all images, dim), state by state
    image_grid_thw: torch.Tensor | None  # (images of all states, 3)
    layout: SharedPrefix  # which tokens see which
    predict_at: torch.Tensor  # (M,), the place in the row whose output predicts a token
    predicted: torch.Tensor  # (M,), that token
    token_at: torch.Tensor  # (B, G, T), which of the M it is; equal actions of a state share theirs
    action_mask: (
        torch.Tensor
    )  # (B, G, T) bool, False where a state has fewer actions or an action fewer tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{name: v if v is None else v.to(device) for name, v in values.items()})


def pack(prompts: list[Prompt], actions: list[list[list[int]]]) -> PackedBatch:
    """Lay out all states, each with its prompt and its actions, as one row.

    actions[b][g] is a list of at least one token id, ended by EOS unless truncated. Numbers of actions and lengths may
    differ. Raises ValueError if the lists do not match or an action is empty.
    """
    if len(prompts) != len(actions):
        raise ValueError(f"{len(prompts)} prompts but actions for {len(actions)} states")
    if not all(len(action) for group in actions for action in group):
        raise ValueError("an action has no tokens; even an empty response holds EOS")

    B, G = len(prompts), max(len(group) for group in actions)
    T = max(len(action) for group in actions for action in group)
    token_at = torch.zeros(B, G, T, dtype=torch.long)
    action_mask = torch.zeros(B, G, T, dtype=torch.bool)
    ids, positions, predict_at, predicted = [], [], [], []
    prompt_at, action_at, prompt_of = [], [], []
    end = count = 0  # tokens in the row, tokens to predict
    for b, (prompt, group) in enumerate(zip(prompts, actions)):
        P = len(prompt.input_ids)
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        prompt_at.append(torch.arange(end, end + P))
        end += P
        last = end - 1  # the prompt's last token predicts every action's first
        start = (
            int(prompt.position_ids.max()) + 1
        )  # an image's positions span a grid, so the largest one is not P - 1
        scored = {}  # the first one of equal actions: where its tokens are among those to predict
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

    # Where the row's tokens are among those of the two tables below, read one after the other.
    P, A = max(map(len, prompt_at)), max(map(len, action_at))
    output_at = torch.zeros(end, dtype=torch.long)
    for b, at in enumerate(prompt_at):
        output_at[at] = torch.arange(b * P, b * P + len(at))
    for a, at in enumerate(action_at):
        output_at[at] = torch.arange(B * P + a * A, B * P + a * A + len(at))

    def join(tensors):  # images of all states, one after the other
        present = [t for t in tensors if t is not None]
        return torch.cat(present) if present else None

    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        pixel_values=join(p.pixel_values for p in prompts),
        image_grid_thw=join(p.image_grid_thw for p in prompts),
        layout=SharedPrefix(
            prompt_at=pad_sequence(prompt_at, batch_first=True),
            action_at=pad_sequence(action_at, batch_first=True),
            prompt_of=torch.tensor(prompt_of),
            prompt_length=torch.tensor([len(at) for at in prompt_at]),
            output_at=output_at,
        ),
        predict_at=torch.tensor(predict_at),
        predicted=torch.tensor(predicted),
        token_at=token_at,
        action_mask=action_mask,
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
        logit_chunk: int = 512,
    ) -> Policy:
        """Load a directory in Hugging Face layout, or a model of the hub.

        Weights are float32 by default: a learning rate of 1e-6 is lost in bfloat16 weights. The caller computes in
        bfloat16 by autocast. Images are resized to between min_pixels and max_pixels (None: as the checkpoint says).
        The policy is left in train mode, where gradient checkpointing acts; dropout is off, so eval mode gives the same
        numbers. Do switch to eval mode around `model.generate`: with checkpointing on, train mode drops its KV cache,
        and it writes wrong tokens. Raises ValueError, in one line, if this is no model that we can train.
        """
        try:
            directory = pretrained.directory_of(path)
            config = pretrained.read_config(directory)
            processor = pretrained.read_processor(directory, config)
            attention = {
                "": SHARED_PREFIX,
                "text_config": SHARED_PREFIX,
                "vision_config": "sdpa",
            }
            model = pretrained.read_model(directory, config, dtype, attention)
            if not all(weight.isfinite().all() for weight in model.parameters()):
                raise ValueError("some of its weights are no finite numbers (NaN or infinity)")
            policy = cls(model, processor, temperature=temperature, logit_chunk=logit_chunk)
            policy.try_out()
        except Exception as error:  # strangers' files: whatever comes of them
            raise ValueError(
                f"cannot load a vision-language model from {str(path)!r}: "
                + pretrained.one_line(error, 300)
            ) from error
        size = dict(processor.image_processor.size)
        size["shortest_edge"] = (
            min_pixels or size["shortest_edge"]
        )  # edges by name, areas by meaning
        size["longest_edge"] = max_pixels or size["longest_edge"]
        processor.image_processor.size = size
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return policy.train()

    def try_out(self) -> None:
        """One small state, encoded and scored. ValueError for what a run would only meet later.

        That is a template that leaves something out, a tokenizer that cannot write the tags of a
        response, weights that are no numbers.
        """
        banned = set(self.suppressed_ids.tolist())
        response = []
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

        pictures = (Image.new("RGB", (56, 56)), Image.new("RGB", (56, 56)))
        state = State("try", pictures, "how many ?", "1", "discrete")
        with pretrained.library("its chat template"):
            text = self.prompt_text(state)
        if text.count(self.processor.image_token) != 2 or "how many ?" not in text:
            raise ValueError("its chat template leaves out the question or its images")
        with pretrained.library("scoring a small state"), torch.no_grad():
            (prompt,) = self.encode([state])
            logp = self(pack([prompt], [[[*response, self.eos_id]]]))
        image_id = self.model.config.image_token_id
        patches = int(prompt.image_grid_thw.prod(-1).sum())
        features = patches // self.processor.image_processor.merge_size**2
        if prompt.input_ids.tolist().count(image_id) != features:
            raise ValueError(f"its tokenizer's image token is not the model's, {image_id}")
        if not logp.isfinite().all():
            raise ValueError("its log-probabilities are no numbers: damaged weights?")

    def freeze_vision(self) -> None:
        """Leaves the vision tower and its projector (`visual.merger`) as they are. Before
        `World.place`."""
        self.model.model.visual.requires_grad_(False)

    def save(self, path: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write model and processor in Hugging Face layout, for `load`, vLLM and evaluation. weights: None are the model's own."""
        self.model.save_pretrained(path, state_dict=weights)
        self.processor.save_pretrained(path)

    def prompt_text(self, state: State) -> str:
        """The prompt as text, one image token per image (vLLM expands them itself, `encode` has them expanded)."""
        return self.processor.apply_chat_template(
            state.messages(), tokenize=False, add_generation_prompt=True
        )

    def encode(self, states: list[State]) -> list[Prompt]:
        """Tokenise, resize and cut into patches: what need not be done again when a state is seen again."""
        prompts = []
        for state in states:
            inputs = self.processor(
                text=[self.prompt_text(state)],
                images=list(state.images) or None,
                return_tensors="pt",
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
        """log pi_theta of every action token, (B, G, T) float32; 0 where batch.action_mask is False.

        A suppressed token has log-probability -inf; keep such actions out of a loss.
        """
        hidden = self._hidden(batch).index_select(0, batch.predict_at)  # (M, H)
        chunks = zip(hidden.split(self.logit_chunk), batch.predicted.split(self.logit_chunk))
        if (
            torch.is_grad_enabled()
        ):  # compute a chunk's logits again in backward rather than keep them
            logp = [checkpoint(self._token_logp, h, ids, use_reentrant=False) for h, ids in chunks]
        else:
            logp = [self._token_logp(h, ids) for h, ids in chunks]
        logp = (
            torch.cat(logp).index_select(0, batch.token_at.flatten()).view(batch.token_at.shape)
        )  # (B, G, T)
        return logp.masked_fill(~batch.action_mask, 0.0)

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states of the row, (N, H)."""
        embeds = self.model.get_input_embeddings()(batch.input_ids)  # (N, H)
        if batch.pixel_values is not None:
            features = self.model.model.get_image_features(
                batch.pixel_values, batch.image_grid_thw
            ).pooler_output
            features = torch.cat(tuple(features)).to(embeds.dtype)  # (image tokens, H)
            # Of the prompt only: an action that holds an image token must not shift the features of the next state.
            is_image = (
                batch.input_ids == self.model.config.image_token_id
            ) & batch.layout.in_prompt
            embeds = embeds.masked_scatter(is_image[:, None], features)
        # A mapping is taken as it is. use_cache=False: a KV cache is memory for nothing, and stops checkpointing.
        return self.model.model(
            inputs_embeds=embeds[None],
            position_ids=batch.position_ids[:, None],
            attention_mask={"full_attention": batch.layout},
            use_cache=False,
        ).last_hidden_state[0]

    def _token_logp(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """log softmax(logits / temperature) over the allowed tokens, at ids: (n, H), (n,) -> (n,) float32."""
        logits = self.model.get_output_embeddings()(
            hidden
        ).float()  # (n, V); of 152k words each copy costs as much as the product
        logits = logits.div_(self.temperature).index_fill_(1, self.suppressed_ids, -torch.inf)
        return -F.cross_entropy(logits, ids, reduction="none")

    def _suppressed_ids(self) -> torch.Tensor:
        """Ids that no response holds: all special tokens but EOS, and those that the tokenizer does not know."""
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {
            i for i, token in added.items() if token.special
        }
        special |= {self.model.config.image_token_id, self.model.config.video_token_id}
        allowed = set(self.tokenizer.get_vocab().values()) - special | {self.eos_id}
        size = self.model.get_output_embeddings().weight.shape[0]
        return torch.tensor([i for i in range(size) if i not in allowed], dtype=torch.long)
