"""Where a step's time goes, phase by phase."""

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Seconds by phase. A GPU records its own times, and nothing waits for it before `read`."""

    def __init__(self, device: torch.device | None = None):
        self.cuda = device is not None and device.type == "cuda"
        self.device = device
        self.marks = [("", self._now())]  # the phase that ended, and when

    def lap(self, phase: str) -> None:
        """Gives the time since the last call to this phase."""
        self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading, for metrics.jsonl."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for (_, before), (phase, now) in pairwise(self.marks):
            # CUDA's events count in milliseconds.
            passed = before.elapsed_time(now) / 1000 if self.cuda else now - before
            name = f"seconds/{phase}"
            seconds[name] = seconds.get(name, 0.0) + passed
        self.marks = self.marks[-1:]
        return seconds

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
