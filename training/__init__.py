"""What every training program needs. It handles records, not groups; only method.py and
metrics.py know Vision-EKIPL.

Read settings.py (flags, presets, checks; method.py has the method's) and distributed.py (DDP,
FSDP2) first. A run leaves a directory (rundir.py; storage.py writes its files), records
(steplog.py, metrics.py, stopwatch.py, drawn by curves.py) and checkpoints (checkpointing.py).
plan.py, with activations.py and disk.py, tells beforehand what fits; pretrained.py reads a model's
directory, families.py knows which models can be a policy; console.py is the command line of all
programs.
"""
