"""Clocks, memory, and the machine on which a figure was measured."""

import ctypes
import json
import os
import platform
import statistics
import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch


def clock(device: str) -> float:
    """Seconds, when the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device: str) -> float:
    """The rate of matrix products, FLOP/s, in the dtype of the benchmarks: the best of five."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    seconds = []
    for _ in range(5):
        start = clock(device)
        a @ b
        seconds.append(clock(device) - start)
    return 2 * n**3 / min(seconds)


class Memory:
    """The peak of memory in use since `reset`, above what was in use at `base`, in bytes: that of
    the GPU's allocator, else of this process's resident set (Linux).
    """

    def __init__(self, device: str):
        self.device = device
        self.base()

    def base(self) -> None:
        if self.device == "cuda":
            self.start = torch.cuda.memory_allocated()
        else:
            # Freed memory goes back to the system, or it would hide what is allocated next.
            ctypes.CDLL(None).malloc_trim(0)
            self.start = resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS

    def peak(self) -> int:
        cuda = self.device == "cuda"
        return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - self.start


def resident(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


class Recorder:
    """Measures the phases of one step.

    kind: "time" counts the seconds, "memory" the peaks too, "profile" the seconds of each operator
    in "train"; "warm-up" is a step that does not count.
    """

    def __init__(self, device: str, kind: str):
        self.device, self.kind = device, kind
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.operators: dict[str, float] = {}
        self.memory = Memory(device) if kind == "memory" else None
        self.begin = clock(device)

    @contextmanager
    def phase(self, name: str):
        """May be entered several times in a step: times add up, of peaks the largest counts."""
        if self.memory:
            self.memory.reset()
        profiled = self.kind == "profile" and name == "train"
        with torch.profiler.profile() if profiled else nullcontext() as profiler:
            start = clock(self.device)
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self.device) - start
        for event in profiler.key_averages() if profiler else ():
            cuda = self.device == "cuda"
            total = event.self_device_time_total if cuda else event.self_cpu_time_total
            self.operators[event.key] = self.operators.get(event.key, 0.0) + total / 1e6
        if self.memory:
            self.bytes[name] = max(self.bytes.get(name, 0), self.memory.peak())

    def record(self, **more) -> dict:
        self.seconds["step"] = clock(self.device) - self.begin
        names = ("kind", "seconds", "bytes", "operators")
        return {name: getattr(self, name) for name in names} | more


def machine() -> dict:
    """What a figure was measured on, and with what."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return {
        "machine": name,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def processor() -> str:
    """The CPU's name where the system says it (Linux), else its kind."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def three(values: dict[str, float]) -> str:
    """A `spread` as the tables show it."""
    return " / ".join(f"{value:.2f}" for value in values.values())


def write(path: Path | None, result: dict) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
