"""Threads that wait for APIs."""

import threading
from concurrent.futures import Future
from queue import SimpleQueue


class Workers:
    """A pool of threads. Unlike an executor's they do not keep the process from ending."""

    def __init__(self, count: int):
        self.queue = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, work, *arguments) -> Future:
        job = Future()
        self.queue.put((job, work, arguments))
        return job

    def _work(self) -> None:
        while True:
            job, work, arguments = self.queue.get()
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work(*arguments))
                except BaseException as error:
                    job.set_exception(error)
