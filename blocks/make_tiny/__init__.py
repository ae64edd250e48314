"""How tiny/ was made: a Qwen2-VL of 1.3 M parameters that sees well and reasons poorly.

    python -m blocks.make_tiny --out blocks/tiny     # seeded; half an hour on one CPU core

It stands for a pretrained model and learns what pretraining gives, in three phases:

    name    each token of a picture learns to name what it shows, in the language model's own words.
            A real vision tower is aligned like this; without it a small model is very slow to use
            its pictures at all.
    see     it learns to describe pictures ("describe ."), sums and products ("3 times 2 ?"), and,
            if asked to ("check ." or "list ."), to go through the objects of a question step by
            step. The questions are those of RL, less the two-step ones: matching objects with a
            question's words is what it learns slowly.
    glance  it learns the tags and RL's prompt ("think , then answer ."), which it answers at a
            glance: without reasoning, often wrong, sometimes in a broken format.

So it can reason step by step when asked to "check", but does not when asked to think; whether RL
discovers that reasoning pays is one experiment. Whether RL teaches it to go on from a count to a
product, or from what is left to a sum, is another: no lesson joins them. Of the out-of-distribution
splits it has seen pictures without reasoning, and none that is shifted. No test question is used.

Read in this order: model.py, lessons.py, learner.py, __main__.py.
"""
