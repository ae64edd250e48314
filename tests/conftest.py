"""A random Qwen2-VL of 0.2 M parameters, and a Qwen3-VL, in Hugging Face layout, that tests load
like any other checkpoint."""

import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

# Before PyTorch: tests run beside each other, and threads that wait for each other are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from fake_api import Server
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from blocks import dataset
from experts import collect
from experts.api_expert import ApiExpert
from experts.roster import make_experts
from policy import Policy

ROOT = Path(__file__).resolve().parent.parent


def in_two_processes(function, *arguments, timeout: float = 300) -> list:
    """What function(*arguments) returns in two processes joined as by torchrun, in order of rank.

    They are forked off a process that has imported everything: that takes longer than most tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ekipl", "sft", "evaluate"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        both = [
            pool.submit(as_rank, rank, port, dict(os.environ), function, arguments)
            for rank in range(2)
        ]
        return [future.result(timeout) for future in both]


@contextmanager
def held_elsewhere(directory: Path):
    """Another process holds this directory (storage.hold)."""
    code = (
        "import sys, pathlib; from training import storage; "
        "storage.hold(pathlib.Path(sys.argv[1]), ''); print(); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline()
        yield other
    finally:
        other.kill()
        other.communicate()


def as_rank(rank: int, port: int, environment: dict, function, arguments):
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        return function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# The processor repeats an image token without spaces between: only a special token survives that as
# a token.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> "
    "<|video_pad|>"
).split()
WORDS = (
    "user assistant how many red blue cubes spheres are there in the first second image ? . , "
    "0 1 2 3 4 5 6 7 8 9 a number or letter sequence of functions Reason step by between then give "
    "final answer "
    "<think> </think> <answer> </answer> and"
).split()
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def random_tokenizer(known=WORDS) -> PreTrainedTokenizerFast:
    """One token per word: no file of merges to download, and a person can read the ids."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *known]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def token_ids(tokenizer) -> dict[str, int]:
    """What a config says of the tokens around images."""
    return {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }


def random_model(
    tokenizer, *, unused_ids: int = 9, seed: int = 0
) -> Qwen2VLForConditionalGeneration:
    """A vocabulary larger than the tokenizer's, as in the real checkpoints, which pad theirs."""
    ids = token_ids(tokenizer)
    text = dict(
        vocab_size=len(tokenizer) + unused_ids,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # far from uniform, so that an error shows in the log-probabilities
    )
    vision = dict(
        depth=2,
        embed_dim=64,
        hidden_size=128,
        num_heads=2,
        mlp_ratio=2,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        initializer_range=0.3,
    )
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config)


def random_qwen3(tokenizer) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL: wide heads, and more layers and blocks than deepstack adds to and takes from."""
    text = dict(
        vocab_size=len(tokenizer) + 9,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10000.0,
            mrope_section=[12, 10, 10],
            mrope_interleaved=True,
        ),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        hidden_size=64,
        intermediate_size=112,
        out_hidden_size=128,
        num_heads=2,
        patch_size=8,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1],
        initializer_range=0.3,
    )
    ids = token_ids(tokenizer)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config)


def random_processor(tokenizer) -> Qwen2VLProcessor:
    size = dict(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=64 * 64
    )
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**size),
        tokenizer,
        Qwen2VLVideoProcessor(**size),
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def one_thread():
    """So small a model is several times faster on one thread where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("random-qwen2-vl")
    tokenizer = random_tokenizer()
    random_model(tokenizer).save_pretrained(path)
    random_processor(tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def random_qwen3_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("random-qwen3-vl")
    tokenizer = random_tokenizer()
    random_qwen3(tokenizer).save_pretrained(path)
    parts = random_processor(tokenizer)
    videos = Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    Qwen3VLProcessor(
        parts.image_processor, tokenizer, videos, chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def blocks_policy():
    """A random policy that knows the words of the blocks world."""
    tokenizer = random_tokenizer(dataset.vocabulary())
    return Policy(random_model(tokenizer), random_processor(tokenizer))


@pytest.fixture
def serve():
    """Starts servers of fake_api.py that end with the test."""
    servers = []

    def start(*script, **settings) -> Server:
        servers.append(Server(script, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def tell(capsys, monkeypatch):
    """Runs `python -m experts.collect ...` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["experts.collect", *map(str, arguments)])
        try:
            collect.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ask(tmp_path):
    """An expert of this name, with a cache of its own."""

    def make(name: str, densities: bool = False, **changes) -> ApiExpert:
        settings = dict(
            cache=str(tmp_path / "cache.sqlite"),
            offline=False,
            expert_tokens=64,
            expert_requests=4,
            expert_deadline=8.0,
            expert_failures=5,
            price="",
        )
        return make_experts(name, SimpleNamespace(**{**settings, **changes}), densities)[0]

    return make


def collecting(*arguments) -> subprocess.Popen:
    """`python -m experts.collect ...` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experts.collect", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def eager_logits(policy: Policy, state, action: list[int]) -> torch.Tensor:
    """(T, V) logits of one action's tokens: transformers' own forward pass, with eager attention,
    on one sequence, and nothing of policy.py."""
    processor, model = policy.processor, policy.model
    text = processor.apply_chat_template(
        state.messages(), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=list(state.images) or None, return_tensors="pt")
    start, n = inputs["input_ids"].shape[1], len(action)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([action])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, n))
    config, ours = model.config.text_config, model.config.text_config._attn_implementation
    config._attn_implementation = "eager"
    logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1].float()  # (T, V)
    config._attn_implementation = ours
    return logits


def agrees(counts: dict, probabilities: dict) -> bool:
    """Pearson's chi-square test of how often each outcome was drawn, at a level of 1e-4; rare
    outcomes are one."""
    if any(counts[outcome] and not probabilities.get(outcome) for outcome in counts):
        return False  # what is impossible was drawn
    n, bins, rare = sum(counts.values()), [], [0, 0.0]
    for outcome, probability in probabilities.items():
        if n * probability >= 5:  # the test's rule of thumb
            bins.append((counts.get(outcome, 0), n * probability))
        else:
            rare[0], rare[1] = rare[0] + counts.get(outcome, 0), rare[1] + n * probability
    bins += [tuple(rare)] if rare[1] >= 5 else []
    df = len(bins) - 1
    limit = (
        df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3
    )  # Wilson-Hilferty; a normal's quantile
    return sum((seen - expected) ** 2 / expected for seen, expected in bins) < limit
