"""llama.cpp beside ours: its server on a free local port, with the GGUF file that is the target here.

The server's own clock times the tokens (`timings` of each event), so that our reading of events costs it nothing.
Tokens of one round share a time. Settings are the server's defaults but for one slot, our threads, no reuse of prompts
and f16 entries; flash attention is its own choice.
"""

from __future__ import annotations

import functools
import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bdcli.base.files import digest
from bdcli.bench import external
from bdcli.bench.external import Answer, External, Request, Tool, gguf_file, named_file
from bdcli.bench.outcome import Block
from bdcli.bench.process import GuardedProcess, PeerError, wait_until
from bdcli.config.bench import BenchRecipe

VARIABLE, PROGRAM = "BDCLI_LLAMA_CPP", "llama-server"
SPARE_TOKENS = 128  # of the context, beyond the text: drafts, and rounding to its blocks
HOST = "127.0.0.1"


def server_binary() -> Path | None:
    """`llama-server`, from BDCLI_LLAMA_CPP (the file or its folder) or PATH."""
    named = named_file(VARIABLE)
    if named is not None and named.is_dir():
        named = next((p for p in (named / PROGRAM, named / "bin" / PROGRAM) if p.exists()), None)
    found = named or shutil.which(PROGRAM)
    return Path(found) if found else None


@functools.cache
def version_of(binary: Path) -> str:
    """What the program says of its version, and a digest of it: a build from an archive knows no number."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=False)
    said = next((line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")), "version ?")
    return f"{said.removeprefix('version').strip(' :')} {digest(binary.read_bytes())[:12]}"


class LlamaCpp(External):
    """Plain decoding by llama.cpp."""

    @classmethod
    def missing(cls) -> str | None:
        if server_binary() is None:
            return f"{PROGRAM} is neither on PATH nor named by {VARIABLE} (the program, or its folder)"
        return None

    @classmethod
    def misfit(cls, recipe: BenchRecipe) -> str | None:
        if gguf_file(recipe.target) is None:
            return "llama.cpp reads GGUF files; pass the model's .gguf as --target"
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"llama.cpp": version_of(server_binary())}

    def columns(self) -> dict:
        return {"dtype": "gguf"}

    def flags(self) -> list[str]:
        """Of speculation."""
        return []

    def start(self, longest: int, threads: int) -> LlamaServer:
        model = gguf_file(self.recipe.target)
        return LlamaServer(server_binary(), model, longest, threads, self.flags())


class LlamaCppNgram(LlamaCpp):
    """The same with its n-gram drafts: γ auto is its `--spec-default`, a number the longest draft of ngram-simple."""

    def flags(self) -> list[str]:
        if self.arm.gamma == "auto":
            return ["--spec-default"]
        return ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", str(self.arm.gamma)]


class LlamaServer(Tool):
    """A server that holds one model and answers one request at a time."""

    def __init__(self, binary: Path, model: Path, longest: int, threads: int, flags: list[str]):
        self._port = free_port()
        command = [str(binary), "--model", str(model), "--host", HOST, "--port", str(self._port)]
        command += ["--ctx-size", str(longest + SPARE_TOKENS), "--parallel", "1", "--no-webui", "--cache-ram", "0"]
        command += ["--threads", str(threads), "--threads-batch", str(threads)]
        command += ["--cache-type-k", "f16", "--cache-type-v", "f16", "--flash-attn", "auto", *flags]
        self._process = GuardedProcess("llama-server", command)
        try:
            wait_until(self._ready, self._process, external.LOAD_S)
        except BaseException:
            self.close()
            raise

    def _ready(self) -> bool:
        try:
            connection = http.client.HTTPConnection(HOST, self._port, timeout=external.PATIENCE_S)
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False

    def generate(self, request: Request) -> Answer:
        """One text. Raises PeerError where the server dies, is silent, or refuses."""
        body = {
            "prompt": request.prompt,
            "n_predict": request.max_new_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": 0.0,
            "seed": request.seed,
            "cache_prompt": False,
            "return_tokens": True,
            "timings_per_token": True,
            "samplers": ["top_k", "top_p", "temperature"],
        }
        started = time.perf_counter()
        arrived, tokens, whole = None, [], False
        for event in self._events(body | {"stream": True}):
            whole = whole or bool(event.get("stop"))
            if event.get("tokens"):
                arrived = arrived or time.perf_counter() - started
                tokens.append(Token.of(event))
        if not whole:
            raise self._process.death()
        if not tokens:
            raise PeerError("llama-server sent no token")
        ids = [token.id for token in tokens]
        if [token.number for token in tokens] != list(range(1, len(tokens) + 1)):
            # the stream leaves out tokens that end inside a character; the whole answer has all of them
            ids = next(self._events(body | {"stream": False}))["tokens"]
            if any(token.number > len(ids) or ids[token.number - 1] != token.id for token in tokens):
                raise PeerError("llama-server generated two texts from one request")
        return Answer(ids, blocks_of(tokens, len(ids), arrived))

    def _events(self, body: dict) -> Iterator[dict]:
        """JSON objects of the answer as they come."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=external.PATIENCE_S)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise PeerError(f"llama-server: {response.status} {response.read()[:200].decode(errors='replace')}")
            for line in response:
                text = line.decode().removeprefix("data: ").strip()
                if text and not text.startswith(":") and text != "[DONE]":  # comments keep a silent line open
                    event = json.loads(text)
                    if "error" in event:
                        raise PeerError(f"llama-server: {event['error'].get('message', event['error'])}")
                    yield event
        except TimeoutError:
            raise PeerError(f"llama-server did not answer within {external.PATIENCE_S:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not self._process.alive:
                raise self._process.death() from None
            raise PeerError(f"llama-server: {type(error).__name__}: {error}") from None
        finally:
            connection.close()


@dataclass(frozen=True)
class Token:
    """A token of a stream: its id, its number from 1, the server's decode clock, and what was drafted so far."""

    id: int
    number: int
    seconds: float
    drafted: int

    @classmethod
    def of(cls, event: dict) -> Token:
        """Raises PeerError where the server does not time its tokens."""
        try:
            timings = event["timings"]
            seconds = timings["predicted_ms"] / 1e3
            return cls(event["tokens"][0], timings["predicted_n"], seconds, timings.get("draft_n", 0))
        except KeyError as missing:
            raise PeerError(f"llama-server sends no {missing}; use a newer one") from None


def blocks_of(tokens: list[Token], total: int, first_s: float) -> list[Block]:
    """Rounds of the server: tokens that share its clock. The first came `first_s` after the request.

    Tokens that were left out of the stream count with the next one: as drafts of its round where that had so many, else
    as rounds of one token between it and the round before. Those after the last token end with it.
    """
    blocks, counted, drafted, before = [], 0, 0, first_s
    for i, token in enumerate(tokens):
        last = i + 1 == len(tokens)
        if not last and tokens[i + 1].seconds == token.seconds:
            continue
        at = first_s + token.seconds - tokens[0].seconds
        number, drafts = total if last else token.number, token.drafted - drafted
        alone = max(0, number - counted - 1 - drafts)
        blocks += [Block(before + (at - before) * (k + 1) / (alone + 1), 1, 0) for k in range(alone)]
        blocks.append(Block(at, number - counted - alone, drafts))
        counted, drafted, before = number, token.drafted, at
    return blocks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
