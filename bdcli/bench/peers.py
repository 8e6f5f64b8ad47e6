"""Peers: the same weights, prompt ids and stop rules in `transformers`, as its users would run it, in any dtype.

The prompt is read once into a dynamic cache, outside the clock, and rolled back (`crop`) before each peer. A streamer
notes when each block of tokens arrives. Decode speed is all tokens after the first block over the time from its arrival
to the last, so the assistant's prefill, which precedes the first block, is not counted. Time to first token is the
prefill and the wait for the first block.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

import torch

from bdcli.backends.transformers_engine import cache_argument
from bdcli.bench.outcome import Block, Method, Outcome, PreparedTarget, rounds_of
from bdcli.config.bench import Arm, BenchRecipe
from bdcli.model.hub import resolve

PREFILL_ROWS = 512
WARM_UP_TOKENS = 3
LOOKUP_TOKENS = 10  # the library's default draft length of prompt lookup


class Clock:
    """A streamer, as `generate` calls it: notes the moment and the size of every block of new tokens."""

    def __init__(self):
        self.blocks: list[tuple[float, int]] = []
        self._prompt_seen = False

    def put(self, ids: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self.blocks.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        pass


@dataclass
class Transformers:
    """The pair as `transformers` models in one dtype, and the prompt that was read last."""

    recipe: BenchRecipe
    device: torch.device
    dtype: torch.dtype
    eos: frozenset[int]
    _prompt: list[int] | None = None
    _cache: object = None
    _drafters: dict[str, object] = field(default_factory=dict)
    prefill_s: float = 0.0

    def load(self, name: str, role: str):
        """The model, with the library's own generation settings in place of its folder's.

        A penalty or a forced token there would change the text, and `generate` takes what it is not given from there.
        """
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        model = AutoModelForCausalLM.from_pretrained(
            resolve(name, role), dtype=self.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model.generation_config = GenerationConfig()
        return model.to(self.device).eval()

    @functools.cached_property
    def target(self):
        model = self.load(self.recipe.target, "target")
        prepare = model.prepare_inputs_for_generation

        def prepare_unread(input_ids, next_sequence_length=None, *rest, **kwargs):
            """Assisted generation (seen in transformers 5.23) would read again what the given cache holds."""
            cache = rest[0] if rest else kwargs.get(cache_argument())
            cached = cache.get_seq_length() if cache is not None else 0
            if next_sequence_length is None and cached:
                next_sequence_length = input_ids.shape[1] - cached
            return prepare(input_ids, next_sequence_length, *rest, **kwargs)

        model.prepare_inputs_for_generation = prepare_unread
        return model

    def drafter(self, name: str):
        if name not in self._drafters:
            self._drafters[name] = self.load(name, "drafter")
        return self._drafters[name]

    @torch.inference_mode()
    def read(self, prompt: list[int]) -> None:
        """Fill the dynamic cache with the prompt but its last token, unless it holds that already."""
        if self._prompt == prompt:
            return
        from transformers import DynamicCache

        self._prompt, self._cache = None, None
        self._cache = DynamicCache(config=self.target.config)
        started = time.perf_counter()
        fill(self.target, prompt[:-1], self._cache)
        self.prefill_s, self._prompt = time.perf_counter() - started, prompt

    def prompt_cache(self):
        """The dynamic cache, rolled back to the prompt but its last token."""
        beyond = self._cache.get_seq_length() - len(self._prompt) + 1
        if beyond:
            self._cache.crop(-beyond)
        return self._cache


def fill(model, ids: list[int], cache) -> None:
    """Read ids in blocks, without logits but the last row's."""
    for start in range(0, len(ids), PREFILL_ROWS):
        block = torch.tensor([ids[start : start + PREFILL_ROWS]], device=model.device)
        model(input_ids=block, use_cache=True, logits_to_keep=1, **{cache_argument(): cache})


class HfMethod(Method):
    """What the peers share: settings, generation under the clock, and figures."""

    peer = True

    def __init__(self, models, arm: Arm):
        self.hf, self.arm, self.recipe = models.transformers(arm), arm, models.recipe
        self._warm = False

    def prepare(self, prompt: list[int]) -> None:
        self.hf.read(prompt)
        if not self._warm:
            self._generate(prompt, seed=0, limit=WARM_UP_TOKENS)
            self._warm = True

    def extra(self) -> dict:
        """Arguments of `generate` besides the common ones."""
        return {}

    def weights(self) -> int:
        """Bytes of the models that run."""
        return _bytes(self.hf.target.parameters())

    def generate(self, prompt: list[int], prepared: PreparedTarget, seed: int) -> Outcome:  # noqa: ARG002
        return self._generate(prompt, seed, self.recipe.max_new_tokens)

    def _generate(self, prompt: list[int], seed: int, limit: int) -> Outcome:
        return self._timed(prompt, self.hf.prompt_cache(), seed, limit)

    @torch.inference_mode()
    def _timed(self, prompt: list[int], cache, seed: int, limit: int) -> Outcome:
        hf, r, eos = self.hf, self.recipe, sorted(self.hf.eos)
        clock, widths = Clock(), []
        hook = hf.target.register_forward_pre_hook(
            lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        torch.manual_seed(seed)
        sampling = {"do_sample": False}
        if r.temperature > 0:
            sampling = {"do_sample": True, "temperature": r.temperature, "top_k": r.top_k, "top_p": r.top_p}
            sampling |= {"min_p": r.min_p} if r.min_p else {}
        sampling["repetition_penalty"] = r.repetition_penalty
        ids = torch.tensor([prompt], device=hf.target.device)
        try:
            started = time.perf_counter()
            out = hf.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                eos_token_id=eos or None,
                pad_token_id=eos[0] if eos else 0,
                streamer=clock,
                **{cache_argument(): cache},
                **sampling,
                **self.extra(),
            )
        finally:
            hook.remove()
        tokens = out[0, len(prompt) :].tolist()
        return Outcome(
            tokens=tokens,
            rounds=rounds_of([Block(at, n, w - 1) for (at, n), w in zip(clock.blocks, widths, strict=True)]),
            ttft_s=hf.prefill_s + clock.blocks[0][0] - started,
            finish_reason="stop" if tokens and tokens[-1] in eos else "length",
            entries=None,
            drafter_kv_bytes=0,
            target_kv_bytes=_cache_bytes(cache),
            weight_bytes=self.weights(),
        )


class HfAutoregressive(HfMethod):
    """Plain `generate`, with the dynamic cache that it makes by default."""


class HfStatic(HfMethod):
    """Plain `generate` with a static cache, filled with the prompt."""

    def _generate(self, prompt: list[int], seed: int, limit: int) -> Outcome:
        return self._timed(prompt, self._static_cache(prompt), seed, limit)

    def _static_cache(self, prompt: list[int]):
        """A static cache with the entries of the dynamic one."""
        from transformers import StaticCache

        source = self.hf.prompt_cache()
        cache = StaticCache(config=self.hf.target.config, max_cache_len=len(prompt) + self.recipe.max_new_tokens)
        for i, layer in enumerate(source.layers):
            cache.update(layer.keys, layer.values, i)
        return cache


class HfAssisted(HfMethod):
    """`generate` with the drafter as assistant model and its full cache; γ auto is the library's own schedule.

    The library refuses static caches here.
    """

    def extra(self) -> dict:
        model = self.hf.drafter(self.recipe.drafter_of(self.arm))
        config = model.generation_config
        if self.arm.gamma == "auto":
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = None, None  # the library's defaults
            config.assistant_confidence_threshold = None
        else:
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = self.arm.gamma, "constant"
            config.assistant_confidence_threshold = 0.0
        return {"assistant_model": model}

    def weights(self) -> int:
        model = self.hf.drafter(self.recipe.drafter_of(self.arm))
        return super().weights() + _bytes(model.parameters())


class HfLookup(HfMethod):
    """`generate` with prompt lookup; γ auto is the library's default. The library refuses static caches here."""

    def extra(self) -> dict:
        return {"prompt_lookup_num_tokens": LOOKUP_TOKENS if self.arm.gamma == "auto" else self.arm.gamma}


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _cache_bytes(cache) -> int:
    return _bytes(t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
