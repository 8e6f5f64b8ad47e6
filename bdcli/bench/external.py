"""What the methods of other tools share: a process each, the same prompt ids, threads, sampling and stop rules.

    prepare  start the tool and warm it up        generate  one text, timed        close  end the tool

The clock is that of the transformers peers: decode speed is all tokens after the first block over the time from its
arrival to the last; time to first token is from the request to the first block. A tool that fails is ended, and its
later texts have the same error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bdcli.base.devices import pick_device, thread_limit
from bdcli.bench.outcome import Block, Method, Outcome, PreparedTarget, rounds_of
from bdcli.bench.process import GuardedProcess, PeerError
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.model.hub import resolve

LOAD_S = 1800.0  # that a tool gets to load; vLLM compiles meanwhile
PATIENCE_S = 600.0  # longest silence after a request
WARM_UP_PROMPT, WARM_UP_TOKENS = 512, 3


@dataclass(frozen=True)
class Request:
    """What a tool is asked to continue, and how."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_k: int  # 0: off
    top_p: float
    seed: int
    eos: list[int]


@dataclass(frozen=True)
class Answer:
    """New tokens and when they came: seconds since the request."""

    tokens: list[int]
    blocks: list[Block]


class Tool:
    """A tool that runs in a process of its own, with the target loaded."""

    _process: GuardedProcess

    def generate(self, request: Request) -> Answer:
        """One text. Raises PeerError."""
        raise NotImplementedError

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        self._process.resume()

    def close(self) -> None:
        self._process.close()


class External(Method):
    """Generation by a tool in a process of its own."""

    peer = True

    def __init__(self, models, arm: Arm):
        self.models, self.arm, self.recipe = models, arm, models.recipe
        self._tool: Tool | None = None
        self._failure: PeerError | None = None

    @classmethod
    def obstacle(cls, recipe: BenchRecipe) -> str | None:
        if pick_device(recipe.device).type != "cpu":
            return "it is measured on a CPU only; give --device cpu"
        if recipe.min_p or recipe.repetition_penalty != 1:
            return "tools mean other things by min_p and repetition_penalty; leave them out"
        return cls.missing() or cls.misfit(recipe)

    @classmethod
    def missing(cls) -> str | None:
        """Why the tool is not here, with what to set."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, recipe: BenchRecipe) -> str | None:
        """Why it cannot run this target; None when it can."""
        raise NotImplementedError

    def start(self, longest: int, threads: int) -> Tool:
        """The tool with the target loaded, for texts of up to `longest` tokens. Raises PeerError."""
        raise NotImplementedError

    def prepare(self, prompt: list[int]) -> None:
        if self._failure is not None:
            raise self._failure
        if self._tool is None:
            longest = max(self.recipe.contexts) + self.recipe.max_new_tokens
            self._tool = self._tried(lambda: self.start(longest, thread_limit()))
            limit = min(WARM_UP_TOKENS, self.recipe.max_new_tokens)
            self._answer(prompt[-WARM_UP_PROMPT:], 0, limit)

    def generate(self, prompt: list[int], prepared: PreparedTarget, seed: int) -> Outcome:  # noqa: ARG002
        limit = self.recipe.max_new_tokens
        answer = ended(self._answer(prompt, seed, limit), self.models.pair.eos, limit)
        return Outcome(
            tokens=answer.tokens,
            rounds=rounds_of(answer.blocks),
            ttft_s=answer.blocks[0].at,
            finish_reason="stop" if answer.tokens[-1] in self.models.pair.eos else "length",
            entries=None,
            drafter_kv_bytes=None,
            target_kv_bytes=None,
            weight_bytes=None,
        )

    def _answer(self, prompt: list[int], seed: int, limit: int) -> Answer:
        """What the tool continues with; it runs during this call only."""
        r = self.recipe
        request = Request(prompt, limit, r.temperature, r.top_k, r.top_p, seed, sorted(self.models.pair.eos))
        self._tool.resume()
        answer = self._tried(lambda: self._tool.generate(request))
        self._tool.pause()
        if not answer.tokens or sum(block.tokens for block in answer.blocks) != len(answer.tokens):
            raise PeerError(f"{self.arm.method} answered {len(answer.tokens)} tokens in {len(answer.blocks)} blocks")
        return answer

    def _tried(self, action):
        """The result of `action`; a tool that fails in it is ended."""
        try:
            return action()
        except PeerError as error:
            self._failure = error
            self.close()
            raise

    def close(self) -> None:
        if self._tool is not None:
            self._tool.close()
            self._tool = None


def ended(answer: Answer, eos: frozenset[int], limit: int) -> Answer:
    """The answer up to the first end token of the target, whatever the tool takes for one.

    Raises PeerError where the tool ended the text early by a token of its own choice.
    """
    end = next((i for i, token in enumerate(answer.tokens, 1) if token in eos), None)
    if end is None and len(answer.tokens) < limit:
        raise PeerError(
            f"the text ended after {len(answer.tokens)} of {limit} tokens with {answer.tokens[-1]}, which ends no text "
            "of the target"
        )
    left, blocks = end or len(answer.tokens), []
    for block in answer.blocks:
        if left > 0:
            blocks.append(block._replace(tokens=min(block.tokens, left)))
        left -= block.tokens
    return Answer(answer.tokens[:end], blocks)


def hugging_face_folder(name: str) -> Path | None:
    """The target's folder with config.json and safetensors; None for a GGUF file."""
    folder = resolve(name, "target")
    return folder if (folder / "config.json").exists() else None


def gguf_file(name: str) -> Path | None:
    """The target's GGUF file: itself, or the only one of its folder; None for a Hugging Face folder."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def named_file(variable: str) -> Path | None:
    """The path that an environment variable names, where something is."""
    value = os.environ.get(variable)
    path = Path(value).expanduser() if value else None
    return path if path is not None and path.exists() else None
