"""A fake OpenAI-compatible endpoint on loopback, for tests of judges."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """Answers POST by `reply(body) -> (status, text or JSON)`, and keeps what it was sent.

    Attributes:
      url: for `evaluation.judges`.
      bodies, paths, keys: of the requests, in order.
    """

    def __init__(self, reply):
        self.reply, self.bodies, self.paths, self.keys = reply, [], [], []
        self._lock = threading.Lock()

    def answer(self, method, path, body, key):
        with self._lock:
            self.bodies.append(body)
            self.paths.append(path)
            self.keys.append(key)
        return (200, {"data": []}) if method == "GET" else self.reply(body)


def completion(text, top_logprobs=None):
    """A reply that suits both of the API's forms."""
    logprobs = {"top_logprobs": [top_logprobs]} if top_logprobs else None
    return 200, {"choices": [{"text": text, "logprobs": logprobs}]}


def chat(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextlib.contextmanager
def serve(reply):
    """Runs a `JudgeServer` in a thread."""
    server = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer("GET", None)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer("POST", json.loads(body))

        def _answer(self, method, body):
            status, said = server.answer(method, self.path, body, self.headers.get("Authorization"))
            data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it gave up on us
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 307:
                    self.send_header("Location", said)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
