"""A stand-in for llama-server: the endpoints that `bdcli.bench.llama_cpp` uses. FAKE says what goes wrong.

It continues with the prompt's first tokens backwards, in rounds of three where it drafts. FAKE_FOLDER gets a file for
the process and one for each request.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

MODE, FOLDER = os.environ.get("FAKE", ""), Path(os.environ.get("FAKE_FOLDER", "."))
ARGUMENTS = sys.argv[1:]
DRAFTS = "--spec-default" in ARGUMENTS or "--spec-type" in ARGUMENTS
requests = 0


def timings(number):
    """The clock after `number` tokens: tokens of one round of three share it."""
    rounds = (number + 1) // 3 if DRAFTS else number - 1
    found = {"prompt_ms": 10.0, "predicted_n": number, "predicted_ms": 10.0 * rounds}
    return found | ({"draft_n": 4 * rounds, "draft_n_accepted": 2 * rounds} if DRAFTS and rounds else {})


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(503 if MODE == "loading" else 200, b'{"status":"ok"}')

    def do_POST(self):
        global requests
        requests += 1
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (FOLDER / f"request-{os.getpid()}-{requests}.json").write_text(json.dumps(asked | {"arguments": ARGUMENTS}))
        if MODE == "refuses":
            return self.answer(500, b'{"error":{"message":"no slot"}}')
        tokens = asked["prompt"][: asked["n_predict"]][::-1]  # text that repeats none
        if MODE == "short":
            tokens = tokens[: asked["n_predict"] // 2]
        if not asked["stream"]:
            return self.answer(200, json.dumps({"tokens": tokens, "timings": timings(len(tokens))}).encode())
        self.send_response(200)
        self.end_headers()
        for number, token in enumerate(tokens, 1):
            if number == 4 and MODE == "dies":
                print("ggml: out of memory", file=sys.stderr, flush=True)
                os._exit(7)
            if number == 4 and MODE == "hangs":
                time.sleep(600)
            if number == 4 and MODE == "fails":
                self.wfile.write(b'data: {"error":{"message":"decode failed"}}\n\n')
                return None
            if MODE == "halves" and number % 3 == 2:
                continue  # a token that ends inside a character is not sent
            event = {"content": "x", "tokens": [token], "stop": False, "timings": timings(number)}
            if MODE == "old":
                del event["timings"]
            self.wfile.write(b": ping\n\ndata: " + json.dumps(event).encode() + b"\n\n")  # as after a long silence
        self.wfile.write(b'data: {"content":"","tokens":[],"stop":true,"stop_type":"limit"}\n\n')
        return None


if __name__ == "__main__":
    if "--version" in ARGUMENTS:
        sys.exit("version: 7 (abc)")
    if MODE == "broken":
        sys.exit("error: unknown model architecture")
    (FOLDER / f"pid-{os.getpid()}").touch()
    HTTPServer(("127.0.0.1", int(ARGUMENTS[ARGUMENTS.index("--port") + 1])), Handler).serve_forever()
