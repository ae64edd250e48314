"""`python -m blocks.make_tiny --out DIR`: writes a Hugging Face directory and losses.csv."""

import argparse
import csv
import time
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from blocks.make_tiny.learner import Learner, train
from blocks.make_tiny.lessons import NAMES, Lessons
from blocks.make_tiny.model import build_model, build_processor, save
from blocks.scenes import CELLS

PHASES = ("name", "see", "glance")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m blocks.make_tiny",
        description="Makes the tiny Qwen2-VL of the blocks world.",
    )
    add = parser.add_argument
    add("--out", required=True, help="directory to write")
    add("--seed", type=int, default=0)
    add("--steps", type=int, nargs=3, default=(250, 4800, 400), metavar="N", help="of each phase")
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=1.5e-3, help="peak of each phase")
    add("--lessons", type=int, default=60000, help="problems in the pool of a phase")
    add("--right", type=float, default=0.45, help="share of right answers at a glance")
    add("--worked", type=float, default=0.0, help="share of worked thoughts under RL's prompt")
    add("--start", metavar="DIR", help="weights to start from; phases of 0 steps are left out")
    make(parser.parse_args())


def make(args: argparse.Namespace) -> None:
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    out = Path(args.out)
    build_processor().save_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)  # as users will load it
    tokenizer = processor.tokenizer
    model = build_model(tokenizer)
    if args.start:
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters on {device}", flush=True)
    learner, log = Learner(model, processor, device), []
    words = [tokenizer.convert_tokens_to_ids(list(names)) for names in (*NAMES, CELLS)]
    generator = torch.Generator().manual_seed(args.seed)
    lessons = None

    def naming() -> torch.Tensor:
        return learner.naming_loss(*lessons.picture_batch(args.batch, generator), words)

    def answering() -> torch.Tensor:
        return learner.loss(*lessons.batch(args.batch, generator))

    for phase, (name, steps) in enumerate(zip(PHASES, args.steps, strict=True)):
        if not steps:
            continue
        seed = args.seed + phase
        if name == "glance":
            save(model, out / "seen", dtype=torch.float32)  # to try other last phases from
            pool = 2 * steps * args.batch
            asked = dict(glances=2, right=args.right, worked=args.worked)
            lessons = Lessons(pool, seed, tokenizer, device, **asked)
            generator.manual_seed(seed)
        elif lessons is None:  # "see" goes on with the lessons of "name"
            lessons = Lessons(args.lessons, seed, tokenizer, device)
            generator.manual_seed(seed)
        log += train(learner, naming if name == "name" else answering, steps, args.lr, name)
    save(model, out, dtype=torch.bfloat16)
    with open(out / "losses.csv", "w", newline="") as file:
        csv.writer(file).writerows([("phase", "step", "loss"), *log])
    print(f"made {out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
