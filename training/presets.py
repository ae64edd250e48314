"""Presets of ekipl.py: the settings of the paper, each with its source."""

from training import settings


def paper(task: str, size: str) -> dict:
    """For a task of Reason-RFT-CoT and a policy of "2B" or "7B" parameters."""
    return dict(
        model=f"Qwen/Qwen2-VL-{size}-Instruct",  # Section 4.1
        data="reason-rft",
        task=task,
        epochs={"counting": 1, "structure": 5, "transformation": 1}.get(task, 1),  # Section 4.1
        # Section 4.1: GPT-4o and Gemini-1.5-Pro, for whose successor Google names this model
        experts="openai:gpt-4o,gemini:gemini-3.8-flash",
        expert_tokens=4096,  # gemini-3.8-flash thinks first, and its thoughts count
        num_samples=8,  # N and G: Section 4.1 (Reason-RFT samples 4 for some tasks of the 7B model)
        group_size=8,
        lr=1e-6,  # Reason-RFT's and TRL's default; Section 4.1 names AdamW and the cosine
        warmup=0.0,  # the paper is silent; Reason-RFT's scripts have none
        weight_decay=0.0,  # the paper is silent; Reason-RFT's scripts have none
        max_grad_norm=1.0,  # the paper is silent; the default of transformers, as in Reason-RFT
        beta=0.04,  # Section 4.1, "default KL penalty": TRL's default at that time
        clip_eps=0.2,  # the paper is silent; TRL's default
        updates_per_batch=1,  # the paper is silent; Open-R1 and Reason-RFT make one
        temperature=1.0,  # the paper is silent; Reason-RFT's is between 0.9 and 1
        max_new_tokens=512,  # the paper is silent; Reason-RFT's max_completion_length
        min_pixels=3136,  # the paper is silent; Reason-RFT's
        # The same: at most 612 tokens a picture, far from the 4096 at which Reason-RFT cuts
        max_pixels=480000,
        batch_size=16,  # the paper is silent; Reason-RFT has 2 a step for each of 7 GPUs
        micro_batch=1,
        gradient_checkpointing=True,  # of memory only; Reason-RFT's scripts have it both ways
        eval_every=200,
        eval_states=200,
        save_every=100,  # Reason-RFT's save_steps
    )


PRESETS = settings.presets(paper)
