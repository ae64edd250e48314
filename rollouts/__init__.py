"""Rollouts (Eq 4): where the policy's actions come from. In the order to read:

choice.py                  which sampler a run gets: vLLM where it can run, else transformers
transformers_sampler.py    by transformers' `generate`, on any device
vllm_sampler.py            by a vLLM engine: actions, weight sync, memory
vllm_engine.py             how that engine is started
parity.py                  whether it samples from what the policy scores
asking.py                  how a model is asked in an evaluation: flags, a run's own settings
answering.py               its predictions there
"""

import os

# vLLM reads these when it is imported: the engine runs in this process (weights reach it without a
# copy, and it ends with us), no telemetry, errors only.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
