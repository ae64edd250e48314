"""What every training program needs. Only method.py, neighbours.py and metrics.py know
Vision-EKIPL and its neighbours.

Read settings.py (flags, presets, checks; method.py has the method's) and distributed.py (DDP,
FSDP2) first. A run leaves a directory (rundir.py; storage.py writes its files), records
(steplog.py, metrics.py, stopwatch.py, drawn by curves.py, shown elsewhere by trackers.py) and
checkpoints (checkpointing.py; lora.py has the adapter).
plan.py, with activations.py and disk.py, tells beforehand what fits; pretrained.py reads a model's
directory, families.py knows which models can be a policy; console.py is the command line of all
programs.
"""
