"""Length of a prompt in tokens, before any model is loaded.

A question that is too long for the model is left out at the start; it does not stop a run later.
"""

import unicodedata
from dataclasses import replace
from functools import cached_property
from pathlib import Path

TEMPLATE = 256  # tokens that a chat template adds at most; Qwen's adds about 30


class Room:
    """The tokens in which a prompt, its images and a response have to fit.

    As many as the model was made for, or `max_model_len` if that is given and less.

    model: a directory or hub id. max_new_tokens: of a response. min_pixels, max_pixels: None for
    the processor's own. request: words that follow every question in place of its own, "" for the
    latter (`State.ask`).
    longest: tokens of the longest prompt so far that fits and its response, an upper bound; vLLM
    has to hold as many.
    """

    def __init__(
        self,
        model: str | Path,
        max_new_tokens: int,
        max_model_len: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        request: str = "",
    ):
        self.request = request
        self.model, self.response, self.max_model_len = model, max_new_tokens, max_model_len
        self.min_pixels, self.max_pixels, self.longest = min_pixels, max_pixels, 0

    def problem(self, state, sizes: list[tuple[int, int]]) -> str | None:
        """Why the prompt of this state is too long, None if it fits.

        sizes: (width, height) of its images, which are not opened. The text is tokenised only if
        its bytes do not show already that it fits: no token is less than a byte.
        """
        if self._limits is None:
            return None
        if self.request:
            state = replace(state, ask=self.request)
        limit, images = self._limits[0], sum(map(self.image_tokens, sizes))
        text = unicodedata.normalize("NFC", state.messages()[0]["content"][-1]["text"])
        needed = len(text.encode()) + TEMPLATE + images + self.response
        if needed > limit:
            needed = self.text_tokens(state) - len(sizes) + images + self.response
        if needed > limit:
            given = limit == self.max_model_len
            most = f"--max-model-len {limit}" if given else f"the {limit} that the model knows"
            return (
                f"question too long: {needed - self.response} tokens "
                f"and a response of {self.response}, more than {most}"
            )
        self.longest = max(self.longest, needed)
        return None

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of this (width, height), as the models' processor resizes it."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        _, factor, fewest, most = self._limits
        height, width = smart_resize(size[1], size[0], factor, fewest, most)
        return height * width // factor**2

    def text_tokens(self, state) -> int:
        """Tokens of the whole prompt, each image counted as one."""
        text = self._processor.apply_chat_template(
            state.messages(), tokenize=False, add_generation_prompt=True
        )
        return len(self._processor.tokenizer(text, verbose=False).input_ids)

    @cached_property
    def _limits(self) -> tuple[int, int, int, int] | None:
        """(tokens that fit, pixels of a token's side, fewest, most pixels of an image).

        None if the model cannot be read: `Policy.load` tells why.
        """
        try:
            from training import pretrained  # PyTorch: seconds that data.download does without

            config, size = pretrained.described(self.model)
            limit, vision = config.text_config.max_position_embeddings, config.vision_config
            factor = vision.patch_size * vision.spatial_merge_size
            most = self.max_pixels or size["longest_edge"]
            fewest = self.min_pixels or min(size["shortest_edge"], most)
            return min(limit, self.max_model_len or limit), factor, fewest, most
        except Exception:
            return None

    @cached_property
    def _processor(self):
        from training import pretrained

        directory = pretrained.directory_of(self.model, weights=False)
        return pretrained.read_processor(directory, pretrained.read_config(directory))


def room_of(config, model: str | Path) -> Room:
    """The room of a run with these settings (`training.settings.Settings`) and that model."""
    return Room(model, config.max_new_tokens, config.max_model_len, **config.pixels)
