"""policy.py: the packed forward equals the ordinary one, and scores the distribution that rollouts
sample from."""

import copy
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    SPECIAL,
    WORDS,
    eager_logits,
    random_model,
    random_processor,
    random_tokenizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention import SharedPrefix, attend
from data.state import State
from policy import TAGS, Policy, pack
from training import pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(random_model_dir):
    return Policy.load(random_model_dir, temperature=1.3, logit_chunk=7)


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.to(torch.uint8).numpy())


ONE_IMAGE = State(
    "one", (picture(64, 64, 1),), "how many red cubes are there in the image ?", "3", "math"
)
TWO_IMAGES = State(
    "two", (picture(32, 64, 2), picture(64, 48, 3)), "first or second image ?", "2", "discrete"
)
WIDE_IMAGE = State("wide", (picture(64, 32, 4),), "how many ?", "1", "math")
NO_IMAGE = State("none", (), "how many red cubes ?", "0", "math")


def random_actions(
    policy: Policy, lengths: list[list[int]], seed: int = 0, eos: bool = True
) -> list[list[list[int]]]:
    """For each state, for each length, an action of that many words, the last one EOS."""
    generator = torch.Generator().manual_seed(seed)
    suppressed = {*policy.suppressed_ids.tolist(), policy.eos_id}
    words = torch.tensor([i for i in range(len(policy.tokenizer)) if i not in suppressed])

    def action(n):
        ids = words[torch.randint(len(words), (n,), generator=generator)].tolist()
        return ids[:-1] + [policy.eos_id] if eos else ids

    return [[action(n) for n in group] for group in lengths]


def plain_logp(policy: Policy, state: State, action: list[int]) -> torch.Tensor:
    """(T,) log-probs of one action: Hugging Face's own forward on one sequence, and nothing of
    policy.py."""
    logits = eager_logits(policy, state, action)  # (T, V)
    tokenizer = policy.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {
        tokenizer.eos_token_id
    }
    allowed = [token for token in range(len(tokenizer)) if token not in special]
    logp = (logits[:, allowed] / policy.temperature).log_softmax(dim=-1)
    return logp[torch.arange(len(action)), [allowed.index(token) for token in action]]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, and a clean slate."""
    found = {
        name: p.grad.clone() for name, p in policy.named_parameters()
    }  # None has no clone: all must have one
    policy.zero_grad()
    return found


def packed_loss(policy, batch, weights):
    """A loss in which every token counts differently, so that no two of them can be mixed up."""
    return (policy(batch) * weights).sum()


def assert_same_gradients(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, other[name].abs().max().item())
        assert (one[name] - other[name]).abs().max().item() <= tolerance * scale, name
        assert other[name].abs().max() > 0 or name.endswith("k_proj.bias"), (
            f"{name}: a test on zeros tests nothing"
        )


class Count:
    """Counts a module's forward calls, and the rows that it was given."""

    def __init__(self, *modules):
        self.calls, self.rows = 0, 0
        self.handles = [module.register_forward_pre_hook(self.hook) for module in modules]

    def hook(self, module, args):
        self.calls += 1
        self.rows += args[0].shape[0] if args else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


CASES = {
    "one image, one action": ([ONE_IMAGE], [[5]]),
    "one image, eight ragged actions": ([ONE_IMAGE], [[5, 1, 9, 3, 2, 7, 1, 4]]),
    "two images, three actions": ([TWO_IMAGES], [[4, 8, 2]]),
    "several states, ragged groups": (
        [ONE_IMAGE, TWO_IMAGES, WIDE_IMAGE],
        [[6, 2], [3, 3, 9, 1], [2]],
    ),
    "a state without images among others": ([NO_IMAGE, WIDE_IMAGE], [[3, 5], [4, 2]]),
}


FAMILIES = {"Qwen2-VL": "random_model_dir", "Qwen3-VL": "random_qwen3_dir"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_plain_in_values_and_gradients(request, family, case):
    directory = request.getfixturevalue(FAMILIES[family])
    policy = Policy.load(directory, temperature=1.3, logit_chunk=7)
    states, lengths = CASES[case]
    actions = random_actions(policy, lengths)
    batch = pack(policy.encode(states), actions)
    weights = torch.randn(batch.action_mask.shape, generator=torch.Generator().manual_seed(1))

    logp = policy(batch)
    assert logp.dtype == torch.float32 and logp.shape == batch.action_mask.shape
    assert batch.action_mask.sum() == sum(map(sum, lengths))
    assert (logp[~batch.action_mask] == 0).all()
    (logp * weights).sum().backward()
    packed = gradients(policy)

    for b, (state, group) in enumerate(zip(states, actions)):
        for g, action in enumerate(group):
            expected = plain_logp(policy, state, action)
            n = len(action)
            assert batch.action_mask[b, g, :n].all() and not batch.action_mask[b, g, n:].any()
            torch.testing.assert_close(logp[b, g, :n], expected, rtol=0, atol=1e-5)
            (expected * weights[b, g, :n]).sum().backward()
    assert_same_gradients(packed, gradients(policy))


def test_packed_equals_plain_for_qwen2_5_vl(random_model_dir, tmp_path):
    """Its vision tower attends in windows and its configuration has other names; our code is the
    same."""
    other = Policy.load(random_model_dir)
    config = other.model.config.to_dict()
    vision = dict(
        depth=2,
        hidden_size=64,
        out_hidden_size=128,
        num_heads=2,
        intermediate_size=96,
        patch_size=8,
        window_size=32,
        fullatt_block_indexes=[1],
        spatial_merge_size=2,
        initializer_range=0.3,
    )
    ids = {
        name: config[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")
    }
    text = {**config["text_config"], "model_type": "qwen2_5_vl_text"}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )
    model.save_pretrained(tmp_path)
    parts = other.processor
    Qwen2_5_VLProcessor(
        parts.image_processor,
        parts.tokenizer,
        parts.video_processor,
        chat_template=parts.chat_template,
    ).save_pretrained(tmp_path)

    policy = Policy.load(tmp_path, logit_chunk=7)
    assert policy.model.config.model_type == "qwen2_5_vl"
    states = [ONE_IMAGE, TWO_IMAGES]
    actions = random_actions(policy, [[6, 2, 4], [3, 5]])
    logp = policy(pack(policy.encode(states), actions))
    for b, state in enumerate(states):
        for g, action in enumerate(actions[b]):
            torch.testing.assert_close(
                logp[b, g, : len(action)], plain_logp(policy, state, action), rtol=0, atol=1e-5
            )


def test_truncated_actions_are_scored_without_eos(policy):
    actions = random_actions(policy, [[4, 2]], eos=False)
    logp = policy(pack(policy.encode([ONE_IMAGE]), actions))
    for g, action in enumerate(actions[0]):
        assert policy.eos_id not in action
        torch.testing.assert_close(
            logp[0, g, : len(action)], plain_logp(policy, ONE_IMAGE, action), rtol=0, atol=1e-5
        )


def test_eos_is_scored_and_trained(policy):
    batch = pack(policy.encode([ONE_IMAGE]), random_actions(policy, [[3, 1]]))
    for g, last in ((0, 2), (1, 0)):
        assert (
            batch.predicted[batch.token_at[0, g, last]] == policy.eos_id
            and batch.action_mask[0, g, last]
        )
        logp = policy(batch)[0, g, last]
        assert -50 < logp.item() < 0
        logp.backward()
        assert policy.model.get_input_embeddings().weight.grad[policy.eos_id].abs().max() > 0
        policy.zero_grad()


def test_an_action_cannot_see_another(policy):
    prompts = policy.encode([ONE_IMAGE])
    first, second, third = random_actions(policy, [[5, 6, 7]])[0]
    _, other, _ = random_actions(policy, [[5, 6, 7]], seed=9)[0]
    assert other != second
    with torch.no_grad():
        before, after = (policy(pack(prompts, [[first, a, third]])) for a in (second, other))
    torch.testing.assert_close(before[0, 0], after[0, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(before[0, 2], after[0, 2], rtol=0, atol=1e-5)
    assert (before[0, 1] - after[0, 1]).abs().max() > 0.1  # and it does see itself


def test_what_stands_beside_a_state_changes_nothing_and_is_never_nan(policy):
    """Longer prompts and actions of other states pad its tables."""
    prompts = policy.encode([WIDE_IMAGE, TWO_IMAGES])
    actions = random_actions(policy, [[2], [9, 9, 9]])
    alone, beside = pack(prompts[:1], actions[:1]), pack(prompts, actions)
    assert beside.layout.prompt_at.shape[1] > alone.layout.prompt_at.shape[
        1
    ] and beside.layout.action_at.shape == (4, 9)
    with torch.no_grad():
        assert policy._hidden(beside).isfinite().all()
        torch.testing.assert_close(policy(beside)[0, 0, :2], policy(alone)[0, 0], rtol=0, atol=1e-5)


def test_no_place_of_the_row_is_padding(policy):
    prompts, lengths = policy.encode([ONE_IMAGE, TWO_IMAGES]), [[5, 1, 9], [4]]
    batch = pack(prompts, random_actions(policy, lengths))
    assert len(batch.input_ids) == sum(len(prompt.input_ids) for prompt in prompts) + 19
    assert len(batch.predicted) == 19


def test_equal_actions_of_a_state_are_computed_once_and_each_has_its_gradient(policy):
    prompts = policy.encode([ONE_IMAGE, TWO_IMAGES])
    (a, b), (c,) = random_actions(policy, [[5, 3], [4]])
    thrice, once = pack(prompts, [[a, b, a, a], [a, c]]), pack(prompts, [[a, b], [a, c]])
    assert torch.equal(
        thrice.input_ids, once.input_ids
    )  # another state's equal action is another computation
    weights = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logp = policy(thrice)
    torch.testing.assert_close(logp[0, 2], logp[0, 0], rtol=0, atol=0)
    packed_loss(policy, thrice, weights).backward()
    found = gradients(policy)
    for state, action, weight in (
        (0, a, weights[0, [0, 2, 3]].sum(0)),
        (0, b, weights[0, 1]),
        (1, a, weights[1, 0]),
        (1, c, weights[1, 1]),
    ):
        (
            plain_logp(policy, [ONE_IMAGE, TWO_IMAGES][state], action) * weight[: len(action)]
        ).sum().backward()
    assert_same_gradients(found, gradients(policy))


def test_images_are_encoded_once_per_state(policy):
    states = [ONE_IMAGE, TWO_IMAGES]
    prompts = policy.encode(states)
    patches = sum(len(p.pixel_values) for p in prompts)
    for G in (1, 8):
        batch = pack(prompts, random_actions(policy, [[3] * G] * 2))
        with Count(policy.model.model.visual) as tower, torch.no_grad():
            policy(batch)
        assert (tower.calls, tower.rows) == (1, patches)


def test_logits_are_computed_for_action_tokens_only_and_in_chunks(policy):
    lengths = [[5, 1, 9], [4]]
    batch = pack(policy.encode([ONE_IMAGE, TWO_IMAGES]), random_actions(policy, lengths))
    with Count(policy.model.lm_head) as head, torch.no_grad():
        policy(batch)
    assert head.rows == 19  # action tokens, of 150 or so in the batch
    assert head.calls == 3  # in chunks of 7


def test_chunks_of_logits_change_nothing(policy):
    batch = pack(policy.encode([ONE_IMAGE, TWO_IMAGES]), random_actions(policy, [[5, 1, 9], [4]]))
    weights = torch.randn(batch.action_mask.shape)
    results = []
    for chunk in (1, 7, 1000):
        policy.logit_chunk = chunk
        packed_loss(policy, batch, weights).backward()
        results.append((policy(batch).detach(), gradients(policy)))
    policy.logit_chunk = 7
    for logp, grads in results[1:]:
        torch.testing.assert_close(logp, results[0][0], rtol=0, atol=1e-5)
        assert_same_gradients(grads, results[0][1])


def test_backward_keeps_no_logits(policy):
    """What autograd saves for backward holds no (tokens x vocabulary) tensor."""
    batch = pack(policy.encode([ONE_IMAGE]), random_actions(policy, [[6, 6]]))
    V, H = policy.model.lm_head.weight.shape
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        policy(batch)
    assert len(shapes) > 20
    assert not [s for s in shapes if len(s) == 2 and s[-1] == V and s != (H, V)]


def test_gradient_checkpointing_recomputes_layers_and_keeps_gradients(policy, random_model_dir):
    checkpointed = Policy.load(
        random_model_dir, temperature=1.3, logit_chunk=7, gradient_checkpointing=True
    )
    batch = pack(policy.encode([ONE_IMAGE, TWO_IMAGES]), random_actions(policy, [[5, 1], [4]]))
    weights = torch.randn(batch.action_mask.shape)

    def calls_and_gradients(model):
        # Inside the layers, since Hugging Face replaces the layer's own __call__.
        decoder = model.model.model.language_model.layers[0].mlp
        vision = model.model.model.visual.blocks[0].mlp
        with Count(decoder) as text, Count(vision) as image:
            packed_loss(model, batch, weights).backward()
        return (text.calls, image.calls), gradients(model)

    plain_calls, plain_grads = calls_and_gradients(policy)
    calls, grads = calls_and_gradients(checkpointed)
    assert plain_calls == (1, 1)
    assert calls == (2, 2)  # once forward, once again in backward
    assert_same_gradients(grads, plain_grads)


def test_no_cache_of_keys_and_values_is_built(policy):
    seen = []
    handle = policy.model.model.language_model.register_forward_hook(
        lambda *args: seen.append(args[2].past_key_values)
    )
    policy(pack(policy.encode([ONE_IMAGE]), [[[5]]]))
    handle.remove()
    assert seen == [None]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_the_whole_row_is_made(request, family):
    """A row of 10,000 tokens would have one of 100 million entries."""
    policy = Policy.load(request.getfixturevalue(FAMILIES[family]))
    seen = []
    policy.model.model.language_model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    policy(pack(policy.encode([ONE_IMAGE]), [[[5, 6], [7]]]))
    assert seen == [None]


def test_train_and_eval_mode_give_the_same_numbers(policy):
    """The model's own configuration may ask for dropout; two passes of one policy must not differ
    by chance."""
    batch = pack(policy.encode([ONE_IMAGE]), random_actions(policy, [[5, 3]]))
    assert policy.training
    with torch.no_grad():
        train = policy(batch)
        evaluated = policy.eval()(batch)
    policy.train()
    assert torch.equal(train, evaluated)


def test_dropout_of_the_checkpoint_is_switched_off(random_model_dir, tmp_path):
    policy = Policy.load(random_model_dir)
    policy.model.config.text_config.attention_dropout = 0.5
    policy.save(tmp_path)
    policy = Policy.load(tmp_path)
    batch = pack(policy.encode([ONE_IMAGE]), random_actions(policy, [[5, 3]]))
    with torch.no_grad():
        assert torch.equal(policy(batch), policy(batch))


def test_allowed_tokens_sum_to_one_and_suppressed_ones_have_probability_zero(policy):
    """Every one-token action there is, scored."""
    vocabulary = policy.model.lm_head.weight.shape[0]
    batch = pack(policy.encode([TWO_IMAGES]), [[[i] for i in range(vocabulary)]])
    with torch.no_grad():
        probability = policy(batch)[0, :, 0].exp()
    names = ["<unk>", *(token for token in SPECIAL if token != "<|im_end|>")]
    special = policy.tokenizer.convert_tokens_to_ids(names)
    suppressed = {*special, *range(len(policy.tokenizer), vocabulary)}
    assert len(suppressed) == 7 + 9 and set(policy.suppressed_ids.tolist()) == suppressed
    for i in range(vocabulary):
        assert (probability[i] == 0) == (i in suppressed)
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0), rtol=0, atol=1e-5)
    assert probability[policy.eos_id] > 0


def test_temperature_divides_the_logits(policy):
    allowed = sorted({*range(len(policy.tokenizer))} - {*policy.suppressed_ids.tolist()})
    batch = pack(policy.encode([ONE_IMAGE]), [[[i] for i in allowed]])
    hot = copy.deepcopy(policy)
    hot.temperature = 2 * policy.temperature
    with torch.no_grad():
        cold_logp, hot_logp = policy(batch)[0, :, 0], hot(batch)[0, :, 0]
    torch.testing.assert_close((cold_logp / 2).log_softmax(0), hot_logp, rtol=0, atol=1e-5)
    assert (cold_logp - hot_logp).abs().max() > 0.1


def test_a_temperature_of_zero_is_refused(random_model_dir):
    with pytest.raises(ValueError, match="temperature"):
        Policy.load(random_model_dir, temperature=0.0)


def test_pack_refuses_what_it_cannot_score(policy):
    prompts = policy.encode([ONE_IMAGE])
    with pytest.raises(ValueError, match="no tokens"):
        pack(prompts, [[[5], []]])
    with pytest.raises(ValueError, match="1 prompts but actions for 2"):
        pack(prompts, [[[5]], [[5]]])


def test_distributed_data_parallel_gives_the_same_gradients(random_model_dir):
    policy = Policy.load(random_model_dir, gradient_checkpointing=True, logit_chunk=7)
    batch = pack(policy.encode([ONE_IMAGE, TWO_IMAGES]), random_actions(policy, [[5, 1], [4]]))
    weights = torch.randn(batch.action_mask.shape)
    packed_loss(policy, batch, weights).backward()
    expected = gradients(policy)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(policy)
        for _ in range(2):  # a parameter unused in the first step would fail in the second
            packed_loss(wrapped, batch, weights).backward()
            assert_same_gradients(gradients(policy), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_is_close_and_scores_in_float32(random_model_dir, checkpointing):
    policy = Policy.load(random_model_dir, gradient_checkpointing=checkpointing, logit_chunk=7)
    batch = pack(policy.encode([ONE_IMAGE, TWO_IMAGES]), random_actions(policy, [[5, 1, 9], [4]]))
    exact = policy(batch)
    exact[batch.action_mask].mean().backward()
    expected = gradients(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = policy(batch)
        loss = rough[batch.action_mask].mean()
    loss.backward()
    found = gradients(policy)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs()[batch.action_mask].mean() < 0.15
    assert not torch.equal(rough, exact)  # autocast was at work
    flat = [torch.cat([g[name].flatten() for name in expected]) for g in (found, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.97


def test_save_and_load_round_trip(policy, tmp_path):
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    changed.save(tmp_path)
    loaded = Policy.load(tmp_path, temperature=policy.temperature)
    batch = pack(policy.encode([TWO_IMAGES]), random_actions(policy, [[5, 3]]))
    again = pack(loaded.encode([TWO_IMAGES]), random_actions(loaded, [[5, 3]]))
    with torch.no_grad():
        torch.testing.assert_close(loaded(again), changed(batch), rtol=0, atol=1e-5)
        assert (loaded(again) - policy(batch)).abs().max() > 0.01
    for name, weight in changed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_pixel_limits_set_the_number_of_image_tokens_and_are_saved(random_model_dir, tmp_path):
    def image_tokens(policy):
        return int(
            (policy.encode([ONE_IMAGE])[0].input_ids == policy.model.config.image_token_id).sum()
        )

    assert image_tokens(Policy.load(random_model_dir)) == 16  # 64 x 64 pixels, 16 x 16 a token
    small = Policy.load(random_model_dir, max_pixels=32 * 32)
    assert image_tokens(small) == 4
    assert (
        image_tokens(Policy.load(random_model_dir, min_pixels=128 * 128, max_pixels=128 * 128))
        == 64
    )
    small.save(tmp_path)
    assert image_tokens(Policy.load(tmp_path)) == 4


def test_a_limit_below_the_models_least_is_a_limit_still(random_model_dir):
    """Qwen3-VL's least are 256 x 256, and nobody who lowers the most wants images enlarged."""
    policy = Policy.load(random_model_dir, max_pixels=32 * 16)  # its least are 32 x 32
    (prompt,) = policy.encode([State("small", (picture(32, 16, 0),), "how many ?", "1", "math")])
    assert prompt.image_grid_thw.tolist() == [[1, 2, 4]]


def test_a_batch_moves_to_a_device_whole(policy):
    batch = pack(policy.encode([ONE_IMAGE, NO_IMAGE]), random_actions(policy, [[5, 1], [4]])).to(
        "meta"
    )
    tensors = [*vars(batch).values(), *vars(batch.layout).values()]
    assert {value.device.type for value in tensors if isinstance(value, torch.Tensor)} == {"meta"}
    assert pack(policy.encode([NO_IMAGE]), [[[5]]]).to("meta").pixel_values is None


def edit(file, **values) -> None:
    """Sets values of a JSON file; "part.name" of an object in it."""
    stored = json.loads(file.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        target = stored
        for part in parts:
            target = target[part]
        target[last] = value
    file.write_text(json.dumps(stored))


class Pickled:
    """Runs code where it is read."""

    def __reduce__(self):
        return (open, ("pickle-ran", "w"))


def with_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj.weight"
CODE = {"AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
REFUSED = {  # what is done to a good directory, and what the one line says
    "another model type": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "'llama'",
    ),
    "config not JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json is not readable JSON",
    ),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json holds a list"),
    "config null": (
        lambda d: (d / "config.json").write_text("null"),
        "config.json holds a NoneType",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "an adapter": (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "adapter"),
    "a type of another type": (
        lambda d: edit(d / "config.json", model_type=["qwen2_vl"]),
        "model type",
    ),
    "quantised": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "awq"}),
        "quantised",
    ),
    "text config of another type": (
        lambda d: edit(d / "config.json", text_config=[]),
        "text_config",
    ),
    "no text config": (
        lambda d: edit(d / "config.json", text_config=None),
        "describes .* parameters",
    ),
    "heads": (lambda d: edit(d / "config.json", text_config__num_attention_heads=3), "3 heads"),
    "key heads": (
        lambda d: edit(d / "config.json", text_config__num_key_value_heads=3),
        "3 key heads",
    ),
    "no key heads": (
        lambda d: edit(d / "config.json", text_config__num_key_value_heads=0),
        "0 key heads",
    ),
    "vision heads": (
        lambda d: edit(d / "config.json", vision_config__num_heads=5),
        "scoring a small state",
    ),
    "rotary sections": (
        lambda d: edit(d / "config.json", text_config__rope_parameters__mrope_section=[4, 6, 5]),
        "scoring a small state",
    ),
    "vocabulary": (
        lambda d: edit(d / "config.json", text_config__vocab_size=10**12),
        "describes .* parameters",
    ),
    "vocabulary beyond numbers": (
        lambda d: edit(d / "config.json", text_config__vocab_size=10**30),
        "config.json does not work",
    ),
    "vocabulary too small": (
        lambda d: edit(d / "config.json", text_config__vocab_size=20),
        "20 embeddings",
    ),
    "width": (
        lambda d: edit(d / "config.json", text_config__intermediate_size=10**12),
        "describes",
    ),
    "layers": (
        lambda d: edit(d / "config.json", text_config__num_hidden_layers=10**9),
        "more than 1000",
    ),
    "image token": (lambda d: edit(d / "config.json", image_token_id=3), "image token"),
    "sliding window": (
        lambda d: edit(
            d / "config.json",
            text_config__use_sliding_window=True,
            text_config__sliding_window=8,
            text_config__layer_types=["full_attention", "sliding_attention"],
        ),
        "sliding",
    ),
    "linear attention, as Qwen3.5's": (
        lambda d: edit(
            d / "config.json",
            model_type="qwen3_5",
            text_config__layer_types=["linear_attention", "full_attention"],
        ),
        "'qwen3_5', we train .*linear_attention layers, which pass on one state .*cannot share",
    ),
    "linear attention, as Qwen3-Next's": (
        lambda d: (d / "config.json").write_text(
            '{"model_type": "qwen3_next", "full_attention_interval": 4}'
        ),
        "'qwen3_next', we train .*linear_attention layers, which pass on one state",
    ),
    "chunks": (
        lambda d: edit(
            d / "config.json", text_config__layer_types=["full_attention", "chunked_attention"]
        ),
        "chunked_attention layers, which attention.py does not know",
    ),
    "code of its own": (
        lambda d: edit(d / "config.json", model_type="evil", auto_map=CODE),
        "never run code",
    ),
    "code of its processor": (
        lambda d: edit(
            d / "processor_config.json",
            image_processor__image_processor_type="Evil",
            image_processor__auto_map=CODE,
        ),
        "which is never run",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "a pointer in place of the weights": (
        lambda d: (d / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "header",
    ),
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-9]
        ),
        "header",
    ),
    "pickled weights": (
        lambda d: (
            torch.save(Pickled(), d / "pytorch_model.bin"),
            (d / "model.safetensors").unlink(),
        ),
        "pickles",
    ),
    "an index that leads away": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "away.safetensors"),
            (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../away.safetensors"}}'
            ),
        ),
        "no file '../away.safetensors'",
    ),
    "a weight is missing": (
        lambda d: with_tensors(d, lambda t: t.pop(LAYER)),
        "1 weights are missing.*layers.1.mlp.up_proj",
    ),
    "a weight has another shape": (
        lambda d: with_tensors(d, lambda t: t.update({LAYER: t[LAYER][:5].clone()})),
        "of another shape.*layers.1.mlp.up_proj",
    ),
    "a layer more": (
        lambda d: with_tensors(d, lambda t: t.update({LAYER.replace("1", "2"): t[LAYER].clone()})),
        "1 weights have no place.*layers.2.mlp.up_proj",
    ),
    "NaN": (lambda d: with_tensors(d, lambda t: t[LAYER].fill_(torch.nan)), "no finite numbers"),
    "integers": (
        lambda d: with_tensors(d, lambda t: t.update({LAYER: t[LAYER].to(torch.int8)})),
        "of I8",
    ),
    "no processor": (
        lambda d: (d / "processor_config.json").unlink(),
        "no preprocessor_config.json",
    ),
    "other patches": (
        lambda d: edit(d / "processor_config.json", image_processor__patch_size=14),
        "patch_size 14",
    ),
    "pixel limits": (
        lambda d: edit(
            d / "processor_config.json",
            image_processor__size={"shortest_edge": 9, "longest_edge": 1},
        ),
        "limits of pixels",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    "an empty tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "its processor does not work",
    ),
    "no end of a response": (
        lambda d: edit(d / "tokenizer_config.json", eos_token=None),
        "no eos_token",
    ),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "its chat template"),
    "a broken template": (
        lambda d: (d / "chat_template.jinja").write_text("{% for %}"),
        "its chat template",
    ),
    "a template that looks around": (
        lambda d: (d / "chat_template.jinja").write_text("{{ ''.__class__ }}"),
        "its chat template",
    ),
    "a template that begins to think": (
        lambda d: (d / "chat_template.jinja").write_text(
            (d / "chat_template.jinja").read_text() + "<think>\n"
        ),
        "writes <think> itself .*Instruct",
    ),
    "a template without images": (
        lambda d: (d / "chat_template.jinja").write_text("{{ messages[0].content[-1].text }}"),
        "leaves out",
    ),
    "generation settings a list": (
        lambda d: (d / "generation_config.json").write_text("[]"),
        "holds a list",
    ),
    "generation settings that nothing can do": (
        lambda d: edit(d / "generation_config.json", num_return_sequences=4),
        "num_return_sequences",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    random_model_dir, tmp_path, monkeypatch, capfd, kind
):
    """Nothing of it runs, nothing is asked, and nothing large is allocated."""
    change, says = REFUSED[kind]
    path = shutil.copytree(random_model_dir, tmp_path / "model")
    (path / "evil.py").write_text("open('code-ran', 'w')\nclass Evil: pass\n")
    change(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ValueError, match=says) as caught:
        Policy.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    assert not list(tmp_path.glob("*-ran"))
    assert capfd.readouterr() == ("", "")  # no report of the library's beside it


def test_code_beside_a_model_that_needs_none_is_told_and_left_behind(
    random_model_dir, tmp_path, caplog
):
    path = shutil.copytree(random_model_dir, tmp_path / "model")
    edit(path / "config.json", auto_map=CODE, _attn_implementation="somebody/kernel")
    edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    for _ in range(2):  # policy and reference
        policy = Policy.load(path)
    (told,) = caplog.messages
    assert "never run" in told and str(path) in told
    policy.save(tmp_path / "saved")
    assert not [f for f in (tmp_path / "saved").glob("*.json") if "auto_map" in f.read_text()]


GENERATION = {
    "greedy with sampling": dict(do_sample=False, temperature=0.01, top_p=0.001, top_k=1),
    "nothing said of sampling": dict(temperature=0.5, min_p=0.1, typical_p=0.5, eta_cutoff=0.1),
    "beams": dict(length_penalty=2.0, early_stopping=True),
    "outputs": dict(output_scores=True),
    "padding": dict(pad_token_id=-1),
}


@pytest.mark.parametrize("kind", GENERATION)
def test_generation_settings_without_effect_do_not_stop_a_checkpoint(
    random_model_dir, tmp_path, kind
):
    path = shutil.copytree(random_model_dir, tmp_path / "model")
    edit(path / "generation_config.json", repetition_penalty=1.05, **GENERATION[kind])
    policy = Policy.load(path)
    policy.save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert said["repetition_penalty"] == 1.05  # what has an effect stays
    Policy.load(tmp_path / "saved")


def test_settings_of_sampling_that_have_an_effect_stay(random_model_dir, tmp_path):
    path = shutil.copytree(random_model_dir, tmp_path / "model")
    edit(path / "generation_config.json", do_sample=True, temperature=0.01, top_k=1)
    Policy.load(path).save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (said["do_sample"], said["temperature"], said["top_k"]) == (True, 0.01, 1)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_that_no_response_could_hold_is_refused(random_model_dir, tmp_path, tag):
    """A special token is suppressed, and decoding drops it; one that is only added is not."""
    tokenizer = random_tokenizer([word for word in WORDS if word != tag])
    for special in (True, False):
        tokenizer.add_tokens([AddedToken(tag, special=special)], special_tokens=special)
        path = tmp_path / str(special)
        random_model(tokenizer).save_pretrained(path)
        random_processor(tokenizer).save_pretrained(path)
        if special:
            with pytest.raises(ValueError, match=f"no response could hold {tag}"):
                Policy.load(path)
            tokenizer = random_tokenizer([word for word in WORDS if word != tag])
        else:
            Policy.load(path)


def test_a_tag_that_the_tokenizer_does_not_know_is_refused(random_model_dir, tmp_path):
    tokenizer = random_tokenizer([word for word in WORDS if word != "</answer>"])
    random_model(tokenizer).save_pretrained(tmp_path)
    random_processor(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no response could hold </answer>"):
        Policy.load(tmp_path)


def test_without_the_hub_one_line_tells_what_to_download_and_who_takes_it(tmp_path):
    """In a process of its own: the library reads HF_HUB_OFFLINE when it is imported."""
    model = "Somebody/Qwen2-VL-2B-Instruct"
    calls = [
        ["ekipl", "--model", model, "--experts", "none"],
        ["sft", "--model", model, "--plan", "80"],
        ["evaluate", model, "--sets", "counting-id", "--states", "2"],
    ]
    code = (
        "import importlib, sys\n"
        f"for sys.argv in {calls}:\n"
        "    try: importlib.import_module(sys.argv[0]).main()\n"
        "    except SystemExit as end: assert end.code == 2, end.code\n"
    )
    places = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, **places},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for (program, *_), line in zip(calls, done.stderr.strip().splitlines(), strict=True):
        assert f"{program}.py: error:" in line and f"hf download {model} --local-dir DIR" in line
        assert "--model DIR" in line and "[...]" not in line


@pytest.mark.parametrize(
    "name", ["no such/place/at all", "nowhere/", "/nowhere", "../nowhere", "a b"]
)
def test_a_place_that_is_none_is_told_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match="no directory here"):
        Policy.load(name)


def test_the_shared_prefix_takes_any_scale_and_changes_its_type_with_its_inputs():
    """A prompt of 3 tokens, actions of 2 and 1: softmax(scale q k) over what each token may see,
    written out."""
    layout = SharedPrefix(
        prompt_at=torch.tensor([[0, 1, 2]]),
        action_at=torch.tensor([[3, 4], [5, 0]]),
        prompt_of=torch.tensor([0, 0]),
        prompt_length=torch.tensor([3]),
        output_at=torch.tensor([0, 1, 2, 3, 4, 5]),
    )
    sees = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5]]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 6, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float32, 1e-5)):
        out = layout.attend(query.to(dtype), key.to(dtype), value.to(dtype), 0.9)
        assert out.dtype == dtype and out.shape == (1, 6, 4, 8)
        for n, seen in enumerate(sees):
            for head in range(4):  # two heads share one key head
                k, v = key[0, head // 2, seen], value[0, head // 2, seen]
                expected = (0.9 * k @ query[0, head, n]).softmax(0) @ v
                torch.testing.assert_close(
                    out[0, n, head].double(), expected, rtol=0, atol=tolerance
                )


def test_a_generated_token_attends_with_the_keys_of_its_own_heads():
    """Six query heads share two key heads, three each; transformers' function repeats the keys."""
    query, key, value = (
        torch.randn(3, heads, tokens, 8, generator=torch.Generator().manual_seed(heads + tokens))
        for heads, tokens in ((6, 1), (2, 5), (2, 7))
    )
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]], dtype=torch.bool)[
        :, None, None
    ]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    arguments = (module, query, key, value[:, :, :5], mask)
    expected, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    torch.testing.assert_close(attend(*arguments, scaling=0.3)[0], expected, rtol=0, atol=1e-6)
