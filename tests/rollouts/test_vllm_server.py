"""End to end with a real open server: vLLM serves tiny/ over OpenAI's protocol, and is an expert
of a training run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import ekipl
from blocks.dataset import BlocksSet
from experts.cache import Cache
from experts.roster import make_experts
from policy import Policy, pack
from rollouts.choice import why_no_engine
from sampling import expert_action
from training import storage

ROOT = Path(__file__).resolve().parents[2]
if reason := why_no_engine(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip(f"no engine can run here: {reason}", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's address and log file, which has a line for each request."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(ROOT / "blocks" / "tiny"),
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--generation-config",
        "vllm",
    ]
    settings = dict(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            cwd=log.parent,
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def requests(log: Path) -> int:
    return len(re.findall(r'"POST /v1/chat/completions', log.read_text()))


def test_twenty_steps_and_the_same_again_without_a_request(server, tmp_path):
    url, log = server
    flags = [
        "--states",
        "80",
        "--batch-size",
        "4",
        "--num-samples",
        "4",
        "--group-size",
        "4",
        "--max-new-tokens",
        "32",
        "--eval-every",
        "0",
    ]
    flags += [
        "--runs",
        str(tmp_path),
        "--cache",
        str(tmp_path / "cache.sqlite"),
        "--experts",
        f"openai:tiny@{url}",
        "--log-groups",
        "4",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | {
        "OMP_NUM_THREADS": "1"
    }
    asked = []
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "ekipl.py", *flags, "--name", name],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        asked.append(requests(log))
    first, second = (
        storage.read(tmp_path / name / "metrics.jsonl") for name in ("first", "second")
    )
    assert len(first) == len(second) == 20
    assert asked == [80, 80]  # one request a state, and then none
    assert all(
        record["api/failures"] == 0 and record["api/states_without"] == 0 for record in first
    )
    assert sum(record["expert_share"] for record in first) > 0
    assert sum(record["api/cache_hits"] for record in second) == 80 * 4
    assert storage.read(tmp_path / "first" / "samples.jsonl") == storage.read(
        tmp_path / "second" / "samples.jsonl"
    )
    assert Cache(tmp_path / "cache.sqlite", read_only=True).faults() == []


def test_its_log_probs_are_the_policys_own_since_it_is_the_same_model(server, tmp_path):
    # So prompt, pictures, template, tokens, temperature and EOS agree on both sides.
    url, _ = server
    policy = Policy.load(ROOT / "blocks" / "tiny")
    states = [
        BlocksSet(name, 2)[i] for name in ("counting-train", "transformation-train") for i in (0, 1)
    ]
    (expert,) = make_experts(
        f"openai:tiny@{url}", ekipl.Config(cache=str(tmp_path / "cache.sqlite"))
    )
    for state, samples in zip(states, expert.sample(states, 4), strict=True):
        assert len(samples) == 4
        actions = [expert_action(policy, sample, expert.name, 512) for sample in samples]
        with torch.no_grad():
            logp = policy(
                pack(policy.encode([state]), [[action.tokens for action in actions]])
            ).sum(-1)[0]
        assert logp.tolist() == pytest.approx(
            [sample.logp for sample in samples], rel=5e-3, abs=0.05
        ), json.dumps([action.text for action in actions])
