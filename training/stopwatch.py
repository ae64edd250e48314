"""TODO training.stopwatch"""

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Where the time goes, phase by phase. A GPU writes down the time itself when it has come so far: nobody waits for it before `read`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = [("", self._now())]  # the phase that ended, and when

    def lap(self, phase: str) -> None:
        """What has passed since the last call belongs to this phase."""
        self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading, for metrics.jsonl."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for (_, before), (phase, now) in pairwise(self.marks):
            name = f"seconds/{phase}"
            passed = (
                before.elapsed_time(now) / 1000 if self.device.type == "cuda" else now - before
            )  # events tell milliseconds
            seconds[name] = seconds.get(name, 0.0) + passed
        self.marks = self.marks[-1:]
        return seconds

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
