"""A round as a pure tensor program: draft γ tokens, verify them, accept, append. No value is looked at on the way.

Batch is 1, written N where the kernels have it. What a round needs to know (the text so far, its length, the sampling
parameters, its uniform numbers) lies in static buffers on the device, and so does what it found; the host copies
`RoundProgram.result` once. Models are `StaticRunner`s: a model, its cache, and the size of the target's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.backends.cuda.graph import Clock
from bdcli.backends.cuda.ops import ops_for
from bdcli.speculation.sampling import Sampling


@dataclass(frozen=True)
class Text:
    """All tokens so far, ids [N, capacity], and how many: length [N]. The target has read all but the last, the drafter
    the first held [N], which are one or two fewer than length. int64.
    """

    ids: Tensor
    length: Tensor
    held: Tensor


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters as tensors [1]; top_k is the vocabulary where it is off, `truncated` False where all are.

    (A graph can hold no copy from the host, and torch makes one of a Python number in `where`: there are none here.)
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    truncated: bool

    @classmethod
    def of(cls, sampling: Sampling, vocab: int, device: torch.device) -> SamplingTensors:
        values = (sampling.divisor, min(sampling.top_k or vocab, vocab), sampling.mass, sampling.min_p)
        truncated = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
        return cls(*(torch.tensor([x], device=device) for x in values), truncated)

    def distribution(self, logits: Tensor) -> Tensor:
        """Serving probabilities [T, V] of fp32 logits [T, V], as `Sampling.distribution` has them."""
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if not self.truncated:
            return logits.softmax(-1)
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered < ordered.index_select(-1, self.top_k - 1), -torch.inf)
        probs = ordered.softmax(-1)
        beyond = (probs.cumsum(-1) - probs >= self.top_p) & (self.top_p < 1)  # mass before the token already suffices
        probs = probs.masked_fill(beyond, 0.0)
        probs = probs.masked_fill(probs < self.min_p * probs[..., :1], 0.0)
        return torch.empty_like(probs).scatter_(-1, index, probs / probs.sum(-1, keepdim=True))


def forward(runner, tokens: Tensor, start: Tensor) -> Tensor:
    """What the lm head reads, [T, hidden], of ids `tokens` [T] at positions start[0].., appended to the cache."""
    model, cache, eps = runner.model, runner.cache, runner.model.config.norm_eps
    ops = ops_for(start.device.type)
    if model.config.vocab_size < runner.vocab:
        tokens = tokens.masked_fill(tokens >= model.config.vocab_size, 0)
    x = F.embedding(tokens, model.embedding)
    place = cache.place(start, tokens.shape[0])
    after = [*(layer.attention_norm for layer in model.layers[1:]), model.norm]
    normed = F.rms_norm(x, x.shape[-1:], model.layers[0].attention_norm, eps)
    for i, layer in enumerate(model.layers):
        attended = cache.attend(i, place, *model.project_normed(layer, normed))
        normed = ops.add_norm(x, F.linear(attended, layer.out, layer.out_bias), layer.mlp_norm, eps)
        gated = ops.gate(F.linear(normed, layer.gate_up, layer.gate_up_bias))
        normed = ops.add_norm(x, F.linear(gated, layer.down, layer.down_bias), after[i], eps)
    return normed


def logits(runner, normed: Tensor) -> Tensor:
    """fp32 logits [T, V] over the target's vocabulary."""
    return runner.aligned(F.linear(normed, runner.model.head).float())


class Feed:
    """Append `tokens` rows to a cache, with logits of the last `rows`. `given` [1 + tokens] is position and ids."""

    def __init__(self, runner, tokens: int, rows: int):
        device = runner.model.device
        self.runner, self.rows = runner, rows
        self.given = torch.zeros(1 + tokens, dtype=torch.long, device=device)
        self.logits = torch.zeros(rows, runner.vocab, device=device)

    @torch.inference_mode()
    def __call__(self) -> None:
        x = forward(self.runner, self.given[1:], self.given[:1])
        if self.rows:
            self.logits.copy_(logits(self.runner, x[-self.rows :]))


class RoundProgram:
    """One round over `text`. `drafter` None goes with γ = 0, and a round of γ = 0 does not touch the drafter.

    result [γ + 3]: the tokens to emit, then -1s; how many drafts were accepted; whether the drafter's choices were
    sound. -1 in the last two means non-finite logits, of the target and of the drafter; then nothing was appended.
    logits [γ + 1, V] are the target's. uniform [N, 2γ + 1]: numbers in [0, 1) for γ draws and γ + 1 verdicts.
    """

    def __init__(self, target, drafter, text: Text, sampling: SamplingTensors | None, gamma: int):
        device = target.model.device
        self.target, self.drafter, self.text, self.sampling, self.gamma = target, drafter, text, sampling, gamma
        self.result = torch.zeros(gamma + 3, dtype=torch.long, device=device)
        self.logits = torch.zeros(gamma + 1, target.vocab, device=device)
        self.uniform = torch.zeros(1, 2 * gamma + 1, device=device)
        self.clock = Clock(device, 3)  # begin, drafted, end
        self._nothing = torch.zeros(1, 0, dtype=torch.long, device=device)
        self._ops = ops_for(device.type)

    @torch.inference_mode()
    def __call__(self) -> None:
        ids, length = self.text.ids, self.text.length
        self.clock.mark(0)
        draft, q, sound = self._draft()
        self.clock.mark(1)
        before = length - 1
        tokens = torch.cat((ids[0].index_select(0, before), draft[0]))
        self.logits.copy_(logits(self.target, forward(self.target, tokens, before)))
        if self.sampling is None:
            tokens, accepted = self._ops.accept_greedy(draft, self.logits[None], ids, length)
        else:
            p = self.sampling.distribution(self.logits)[None]
            uniform = self.uniform[:, self.gamma :]
            tokens, accepted = self._ops.accept_sampled(draft, p if q is None else q, p, uniform, ids, length)
        if self.gamma:
            self.text.held.copy_(torch.minimum(before + self.gamma, length - 1))
        self.result.copy_(torch.cat((tokens[0], accepted.long(), sound)))
        self.clock.mark(2)

    def _draft(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draft [N, γ], what each token was drawn from [N, γ, V] or None, and [1] whether all choices were sound.

        The first step reads two rows: after a full acceptance the drafter lacks two tokens, else one, and then the
        second row is nothing that anybody sees; the next step overwrites it.
        """
        if self.gamma == 0:
            return self._nothing, None, torch.zeros_like(self.text.length)
        ids, length, held = self.text.ids, self.text.length, self.text.held
        tokens = ids[0].index_select(0, held + torch.arange(2, device=held.device))
        x = forward(self.drafter, tokens, held).index_select(0, length - 1 - held)
        draft, drawn_from, sound = [], [], []
        for i in range(self.gamma):
            guess = logits(self.drafter, x).contiguous()
            if self.sampling is None:
                token, fine = self._ops.accept_greedy(self._nothing, guess[None])
            else:
                q = self.sampling.distribution(guess)
                drawn_from.append(q)
                token, fine = self._ops.accept_sampled(self._nothing, q[None], q[None], self.uniform[:, i : i + 1])
            draft.append(token[0].clamp(min=0))  # -1 where logits were broken; see `sound`
            sound.append(fine)
            if i < self.gamma - 1:
                x = forward(self.drafter, draft[-1], length + i)
        q = torch.cat(drawn_from)[None] if drawn_from else None
        return torch.cat(draft)[None], q, torch.cat(sound).amin(0, keepdim=True).long()
