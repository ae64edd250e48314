"""How long a prompt is, before any model is loaded: one that is longer than the model can read is
left out, not met in the middle of a run."""

import unicodedata
from functools import cached_property
from pathlib import Path

from training import pretrained

TEMPLATE = 256  # tokens that a chat template adds at most; Qwen's adds about 30


class Room:
    """Where a prompt with its images and a response has to fit: what the model knows, or
    `max_model_len` if that is given and less.

    model: a directory or hub id. max_new_tokens: of a response. min_pixels, max_pixels: None are
    the processor's own.
    longest: what the longest prompt so far that fits takes with its response, at most, in tokens;
    vLLM has to hold as much.
    """

    def __init__(
        self,
        model: str | Path,
        max_new_tokens: int,
        max_model_len: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.model, self.response, self.max_model_len = model, max_new_tokens, max_model_len
        self.min_pixels, self.max_pixels, self.longest = min_pixels, max_pixels, 0

    def problem(self, state, sizes: list[tuple[int, int]]) -> str | None:
        """Why this state's prompt cannot be asked, None if it can. sizes: width and height of its
        images, which are not opened.

        The text is tokenised only where its number of bytes does not show already that it fits: no
        token is less than a byte.
        """
        if self._limits is None:
            return None
        limit, images = self._limits[0], sum(map(self.image_tokens, sizes))
        text = unicodedata.normalize("NFC", state.messages()[0]["content"][-1]["text"])
        needed = len(text.encode()) + TEMPLATE + images + self.response
        if needed > limit:
            needed = self.text_tokens(state) - len(sizes) + images + self.response
        if needed > limit:
            knows = (
                f"--max-model-len {limit}"
                if limit == self.max_model_len
                else f"the {limit} that the model knows"
            )
            return f"question too long: {needed - self.response} tokens and a response of {self.response}, more than {knows}"
        self.longest = max(self.longest, needed)
        return None

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Of an image with this width and height, as Qwen2-VL's processor resizes it."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        _, factor, fewest, most = self._limits
        height, width = smart_resize(size[1], size[0], factor, fewest, most)
        return height * width // factor**2

    def text_tokens(self, state) -> int:
        """Of the whole prompt, with one token for each image."""
        text = self._processor.apply_chat_template(
            state.messages(), tokenize=False, add_generation_prompt=True
        )
        return len(self._processor.tokenizer(text, verbose=False).input_ids)

    @cached_property
    def _limits(self) -> tuple[int, int, int, int] | None:
        """Tokens that fit, the side in pixels of what becomes a token, fewest and most pixels of
        an image; None if there is no such model."""
        try:
            from training.pretrained import (
                described,  # transformers: seconds, which data.py does without
            )

            config, size = described(self.model)
            limit, vision = config.text_config.max_position_embeddings, config.vision_config
            factor = vision.patch_size * vision.spatial_merge_size
            fewest, most = (
                self.min_pixels or size["shortest_edge"],
                self.max_pixels or size["longest_edge"],
            )
            return min(limit, self.max_model_len or limit), factor, fewest, most
        except Exception:  # whatever is wrong with a model, `Policy.load` tells it better
            return None

    @cached_property
    def _processor(self):

        directory = pretrained.directory_of(self.model, weights=False)
        return pretrained.read_processor(directory, pretrained.read_config(directory))


def room_of(config, model: str | Path) -> Room:
    """What a prompt of a run with these settings (`training.settings.Settings`) has to fit in, with
    the config and tokenizer of that model."""
    return Room(model, config.max_new_tokens, config.max_model_len, **config.pixels)
