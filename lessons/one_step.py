# %% [markdown]
# # One training step, number by number
# One question of the blocks world, one group of answers, one step of AdamW, by the functions that
# training calls: `ekipl.train` does the same for 64 questions at a time. Each bullet says what this
# group shows, and tests/lessons/test_one_step.py checks it.
#
# `python -m lessons.one_step` prints all numbers and draws the pictures in runs/lessons/one_step;
# `python -m lessons.notebook --out one_step.ipynb` makes a notebook.
# %%
import random
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(  # the repository, from where a script or a notebook starts
    0, next((str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "ekipl.py").exists()), ".")
)

import grpo
from blocks import BlocksSet
from ekipl import Config
from experts.roster import make_experts
from lessons import pictures
from policy import Policy, pack
from rollouts.transformers_sampler import TransformersSampler
from sampling import Group, add_expert_logps, give_rewards, group_log_weights, select, total_groups
from training.distributed import World, clear_gradients, clip_gradients, deterministic

# %% [markdown]
# ## The state (Section 3.1)
# A state s = (v, t) is a picture and a question. The policy is blocks/tiny, a Qwen2-VL of 1.3 M
# parameters. N and G are 4 here, and 8 in the paper.
#
# - The scene has three objects, one of them a large sphere, so the answer is 1.
# %%
config = Config(num_samples=4, group_size=4)
deterministic(World(0, 1, torch.device("cpu")))
state = BlocksSet("counting-train", 143)[142]
policy = Policy.load(config.start)
sampler = TransformersSampler(policy, config.max_new_tokens)
experts = make_experts(config.experts)
print(f"{state.question}  (answer: {state.answer}; {state.problem.describe()})")
figure, axis = plt.subplots(figsize=(3, 3), layout="constrained")
pictures.state(axis, state.images[0])
axis.set_title(state.question)
pictures.show(figure, "state", __name__)

# %% [markdown]
# ## The prompt as tokens
# Picture and question become one sequence: an image token for each 16 x 16 pixels, then words.
#
# - The prompt has 33 tokens, and 16 of them are the picture.
# %%
(prompt,) = policy.encode([state])
words = policy.tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())
image_tokens = words.count(policy.processor.image_token)
print(f"{len(words)} tokens, {image_tokens} of them the picture: {' '.join(words)}")

# %% [markdown]
# ## Actions: N of the policy and N of each expert (Eq 4, 5, 6)
# The policy samples from the distribution that is scored later. Experts see the same prompt; their
# text becomes the policy's tokens. The union is the total group of M candidates.
#
# - M is 12: four of the policy, of `careful` and of `quick`.
# - The policy thinks "at a glance", as `quick` does; only `careful` shows how it found its answer.
# %%
(group,) = total_groups([state], sampler, experts, config.num_samples, seed=2, expert_seed=2)
for i, action in enumerate(group.actions):
    print(f"{i:2} {action.source:8} {len(action.tokens):3} tokens  {action.text}")

# %% [markdown]
# ## Rewards (Eq 7)
# R = R_format + R_accuracy, by rules alone: first a thought, then an answer, and the right one.
#
# - Policy and experts are right once each; the policy's last action, a bare number, gets nothing.
# %%
give_rewards([group])
for i, action in enumerate(group.actions):
    parts = f"format {group.format[i]:.0f} + accuracy {group.accuracy[i]:.0f}"
    print(f"{i:2} {action.source:8} {parts} = {group.rewards[i]:.0f}")

# %% [markdown]
# ## Who is kept: the top G (Section 3.2), and advantages (Eq 1)
# The best G train the policy. The paper is silent on ties: here the policy's actions come first,
# then the experts' as they are named. Nor does it say whose mean and std Eq 1 takes: those of all M
# candidates (our default), or of the G selected.
#
# - Kept: the right action of each source, and of the eight with R = 1 the policy's first.
# - By all M the right ones get +1.44 and the wrong one -0.29.
# - By the selected G it is +0.50 and -1.50, a sum of 0; four right ones would teach nothing.
# %%
readings = {}
for reading in ("selected", "candidates"):  # the last one stays
    rng = random.Random(0)
    select([group], config.group_size, reading, config.tie_rule, config.selection, rng)
    readings[reading] = torch.tensor([group.advantages])  # (B, G), B = 1
advantages = readings["candidates"]
for g, (i, action) in enumerate(zip(group.kept, group.kept_actions)):
    both = f"A by all M {advantages[0, g]:+.2f}, by the G {readings['selected'][0, g]:+.2f}"
    print(f"{i:2} {action.source:8} R {group.rewards[i]:.0f}  {both}")

# %% [markdown]
# ## The packed row and its attention (policy.py, attention.py)
# Ours, for speed: the G actions stand behind one prompt in one row. An action sees the prompt and
# itself, never another action, and its positions continue from the end of the prompt.
#
# - Policy and `quick` wrote the same right action, so the row holds three actions, not four.
# %%
packed = pack([prompt], [group.kept_tokens])
figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
pictures.attention(axis, packed.layout)
axis.set_title(f"which of {len(packed.input_ids)} tokens (down) sees which (across)")
pictures.show(figure, "attention", __name__)

# %% [markdown]
# ## Importance weights and ESS (Eq 8, 9, 10; A.3, A.5)
# The kept actions were drawn from q_S, the mixture of policy and experts after selection. w =
# pi_old / q_S says how much each counts if they are to stand for pi_old. ESS = (sum w)^2 / sum w^2.
#
# - Once in 14 million the policy would write what `careful` wrote: a weight of 0.0000003.
# - The same text has the same weight, 1.08, whether the policy or `quick` wrote it.
# - So of four kept actions 2.98 are left; Eq 10 bounds the error of A by 0.52, going by these four.
# %%
add_expert_logps([group], experts)  # exact, as experts are scripted
with torch.no_grad():
    old_logp = policy(packed)  # (B, G, T), of the policy that sampled
log_w = group_log_weights([group], old_logp, config.group_size)  # (B, G)
weights = log_w.exp()
ess = float(grpo.effective_sample_size(weights))
bound = float(grpo.bias_bound(advantages.abs().max(), grpo.total_variation(weights)))
for action, logp, w in zip(group.kept_actions, old_logp[0].sum(-1), weights[0]):
    print(f"{action.source:8} log pi_old {logp:6.2f}  w {w:.3g}")
print(f"ESS {ess:.2f} of {config.group_size}; Eq 10: {bound:.2f}")

# %% [markdown]
# ## The loss and its gradient, by estimators A, B and C (Eq 2, 3; A.2, A.7)
# In the first update pi_theta = pi_old = pi_ref: every ratio is 1, KL is 0, nothing is clipped, and
# the loss of A is minus the mean advantage. What trains is the gradient. (B and C are shown on the
# same kept actions; where they train, ties are broken at random.)
#
# - By the selected G the loss of A is 0, and the norm of its gradient is 1.13.
# - By all M the losses are -1.01 (A), -0.69 (B) and -0.80 (C).
# - B and C leave `careful`'s action out, the only one that shows how to count.
# %%
optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=config.weight_decay)
given = (old_logp, old_logp, packed.action_mask)  # old, reference, mask; each (B, G, T)
options = dict(log_weights=log_w, clip_eps=config.clip_eps, beta=config.beta)
losses, norms = {}, {}
for letter, name in zip("CBA", reversed(grpo.ESTIMATORS)):
    for reading, values in readings.items():
        clear_gradients(policy, optimizer)
        loss, first = grpo.ekipl_loss(policy(packed), *given, values, estimator=name, **options)
        loss.backward()
        norm = clip_gradients(policy, config.max_grad_norm)
        losses[letter, reading], norms[letter, reading] = loss.item(), norm
        print(f"{letter} by the {reading:10}: loss {loss:+z.2f}, gradient norm {norm:.2f}")

# %% [markdown]
# ## One step of AdamW, and the same group again: ratio, clip and KL (Eq 2, 3)
# The gradient is that of the last line: A, all M. A second update on this batch
# (`--updates-per-batch 2`) would begin with these ratios.
#
# - The clip stops one token of each action: the digit of a glance, and the listing's first word.
# - That word is over ten thousand times as likely now; once it is written, the rest was known.
# - So the KL to the policy before the step is largest for `careful`'s action.
# %%
asked = {"before": (sampler.greedy([prompt])[0], sampler.sample([prompt], 64, seed=1)[0])}
optimizer.step()
with torch.no_grad():
    new_logp = policy(packed)  # (B, G, T)
_, second = grpo.ekipl_loss(new_logp, *given, advantages, **options)
ratio = grpo.policy_ratio(new_logp, old_logp)[0]  # (G, T)
for g, action in enumerate(group.kept_actions):
    clipped, kl = (float(second[name][0, g]) for name in ("clip_fraction", "kl"))
    print(f"{action.source:8} A {advantages[0, g]:+.2f}  clipped {clipped:.0%}  KL {kl:.3f}")
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
pictures.ratios(axis, ratio, group, policy.tokenizer, config.clip_eps)
pictures.show(figure, "ratio", __name__)

# %% [markdown]
# ## What the same question gets now
# - The right glance has become likelier and the wrong one rarer, though one word tells them apart.
# - The listing now comes once in some hundreds: soon it will be among the policy's own samples.
# - Of 64 samples half were right, now three quarters are; the greedy answer was right before.
# %%
asked["after"] = (sampler.greedy([prompt])[0], sampler.sample([prompt], 64, seed=1)[0])
for g, action in enumerate(group.kept_actions):
    old, new = old_logp[0, g].sum(), new_logp[0, g].sum()
    print(f"{action.source:8} log pi {old:6.2f} -> {new:6.2f}  {action.text}")
right = {}
for when, (greedy, samples) in asked.items():
    tried = Group(state, prompt, samples)
    give_rewards([tried])
    right[when] = sum(tried.accuracy)
    print(f"{when}: greedy {greedy.text}; of 64 samples {right[when]:.0f} are right")
