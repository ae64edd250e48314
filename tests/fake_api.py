"""The network's far end: a server on loopback that speaks OpenAI's and Gemini's HTTP, and does
what a test tells it to.

`server.script` is a list of behaviours, one a request, the last one repeated: a dict is the JSON to
answer with, (status, headers, body) any answer, "hang" never answers, "cut" closes the connection
in the middle, "drip" sends a byte now and then, for ever, a number waits so many seconds and then
answers, a function gets the request's body and returns any of these. By default n good answers.
"""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-planted-0123456789abcdef"  # must be found nowhere


def chat(texts, finish="stop", logprobs=True, model="tiny-2026-01-01", usage=(100, 20)) -> dict:
    """A chat completion."""

    def choice(index, text):
        told = {
            "content": [
                {"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []}
                for word in (text or "").split()
            ]
        }
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "finish_reason": finish,
            "message": message,
            "logprobs": told if logprobs else None,
        }

    tokens = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "usage": tokens,
        "choices": list(itertools.starmap(choice, enumerate(texts))),
    }


def content(texts, finish="STOP", usage=(100, 20, 150)) -> dict:
    """Gemini's answer; usage: prompt, candidates, total (with thoughts)."""
    candidates = [
        {
            "content": {"role": "model", "parts": [{"text": text}] if text else []},
            "finishReason": finish,
            "index": i,
        }
        for i, text in enumerate(texts)
    ]
    tokens = dict(
        zip(("promptTokenCount", "candidatesTokenCount", "totalTokenCount"), usage, strict=True)
    )
    return {"candidates": candidates, "usageMetadata": tokens, "modelVersion": "tiny-001"}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=(), answer="<think> {i} </think> <answer> 3 </answer>"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.answer = list(script), answer
        self.bodies, self.headers, self.answered = (
            [],
            [],
            0,
        )  # of requests; and how many got a whole answer
        self.lock, self.stop = threading.Lock(), threading.Event()
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def openai(self) -> str:
        return f"openai:tiny@http://127.0.0.1:{self.port}/v1"

    @property
    def gemini(self) -> str:
        return f"gemini:tiny@http://127.0.0.1:{self.port}"

    def good(self, body: dict) -> dict:
        """As many answers as asked for, each another text."""
        if "messages" in body:
            return chat(
                [self.answer.format(i=i) for i in range(body["n"])],
                logprobs=body.get("logprobs", False),
            )
        return content(
            [self.answer.format(i=i) for i in range(body["generationConfig"]["candidateCount"])]
        )

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""

    def close(self):
        self.stop.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            behaviour = (
                server.script[min(number, len(server.script) - 1)] if server.script else "good"
            )
        if callable(behaviour):
            behaviour = behaviour(body)
        if isinstance(behaviour, (int, float)):
            server.stop.wait(behaviour)
            behaviour = "good"
        if behaviour == "hang":
            server.stop.wait(60)
            self.close_connection = True
            return
        if behaviour == "drip":
            self.drip()
            return
        if behaviour == "good":
            behaviour = server.good(body)
        status, headers, reply = behaviour if isinstance(behaviour, tuple) else (200, {}, behaviour)
        data = (
            (b'{"choices": [' if reply == "cut" else reply.encode())
            if isinstance(reply, str)
            else json.dumps(reply).encode()
        )
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data) + 999 * (reply == "cut")),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = self.close_connection or reply == "cut"
        with server.lock:
            server.answered += status == 200 and reply != "cut"

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "999999")
        self.end_headers()
        while not self.server.stop.wait(0.1):
            self.wfile.write(b" ")
            self.wfile.flush()
        self.close_connection = True

    def log_message(self, *arguments):
        """Quiet."""


def error(status: int, message: str, **headers) -> tuple:
    """An error as both vendors write it."""
    return (
        status,
        headers,
        {"error": {"message": message, "code": status, "status": "X", "type": "x", "param": None}},
    )
