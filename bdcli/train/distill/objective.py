"""The loss of one window under several selections: L = L_A + λ·L_C, full view and sparse views, all positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bdcli.cache.selection import Selection
from bdcli.config.distill import DistillRecipe
from bdcli.model.llama import Model
from bdcli.model.rope import RopeTable
from bdcli.train.forward import anchored_hidden, view_hidden
from bdcli.train.losses import accepted_length_weights, head_loss
from bdcli.train.targets import Target


class Objective:
    """What `recipe` teaches `drafter`, whose weights are fp32; products run in `dtype`.

    `vocabulary` is the target's size, the drafter's by default. The drafter learns the ids that both have, which are
    those that decoding lets it propose.
    """

    def __init__(self, recipe: DistillRecipe, drafter: Model, dtype: torch.dtype, vocabulary: int | None = None):
        self._recipe, self._drafter, self._dtype = recipe, drafter, dtype
        self._vocabulary = vocabulary or drafter.config.vocab_size
        v = recipe.views
        self._anchor_spans: list[slice] = []  # rows that follow an anchor, the prompt's last position first
        if v.select != "window":
            self._anchor_spans = [slice(a - 1, a - 1 + v.anchor_tokens) for a in recipe.anchors()]

    def loss(
        self, ids: Tensor, target: Target, selections: Sequence[Selection], windows: int, sparse: int | None = None
    ) -> Tensor:
        """Distillation loss of ids [T]: full-view loss + λ · mean sparse-view loss, divided by the step's `windows`.

        `sparse` is the number of sparse selections of the step, where `selections` are only some of them.
        Full and window views are stacked and teach every position, or with `teach: anchored` those after each anchor.
        Selections that choose chunks teach what follows each anchor. Every term is a mean over its positions.
        """
        sparse = len(selections) - 1 if sparse is None else sparse
        sparse_weight = self._recipe.loss.sparse_weight / max(1, sparse)
        stacked = [s for s in selections if not s.chooses]
        choosing = [s for s in selections if s.chooses]
        device, own = self._drafter.device, self._drafter.config.vocab_size
        if own < self._vocabulary:
            ids = ids.where(ids < own, 0)  # read as decoding reads them
        rope = RopeTable(self._drafter.config.rope, len(ids), len(ids), self._dtype, device)
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            everywhere = self._stacked_rows(rope, ids, stacked) if stacked else None
            anchored = [self._anchored_rows(rope, ids, span, choosing) for span in self._anchor_spans if choosing]
        total = torch.zeros((), device=device)
        weights = [1.0 if s.budget is None else sparse_weight for s in stacked]
        spans = self._anchor_spans if self._recipe.views.teach == "anchored" else [slice(0, len(ids))]
        for span in spans if stacked else ():
            part = 1 / len(spans)
            total = total + self._span_loss(everywhere[:, span], target.cut(span), [w * part for w in weights])
        for span, rows in zip(self._anchor_spans, anchored):
            weight = sparse_weight / len(anchored)
            total = total + self._span_loss(rows, target.cut(span), [weight] * len(choosing))
        return total / windows

    def _stacked_rows(self, rope: RopeTable, ids: Tensor, selections: Sequence[Selection]) -> Tensor:
        """Rows [views, T, hidden] under selections that choose nothing."""
        return view_hidden(self._drafter, rope, ids, [s.view(len(ids)) for s in selections])

    def _anchored_rows(self, rope: RopeTable, ids: Tensor, span: slice, selections: Sequence[Selection]) -> Tensor:
        """Rows [views, span, hidden] under selections from a prompt that ends where `span` starts."""
        ids, start = ids[: span.stop], span.start
        rows = []
        for selection in selections:
            view = selection.view(start)
            if view.depends_on_prompt:
                gradients = self._recipe.views.prefix_gradients
                rows.append(anchored_hidden(self._drafter, rope, ids, start, view, gradients))
            else:  # the prompt fits whole
                rows.append(view_hidden(self._drafter, rope, ids, [view])[0, start:])
        return torch.stack(rows)

    def _span_loss(self, x: Tensor, target: Target, weights: list[float]) -> Tensor:
        """Σ over views of weight · mean loss over rows; x [views, rows, hidden] before the final norm."""
        s, head, lost = self._recipe.loss, self._drafter.head, None
        if len(head) < self._vocabulary:
            target, lost = target.within(len(head))
        elif len(head) > self._vocabulary:
            head = head[: self._vocabulary]
        x = F.rms_norm(x, x.shape[-1:], self._drafter.norm, self._drafter.config.norm_eps).to(self._dtype)
        row_weights = torch.ones(x.shape[:-1], device=x.device)
        if s.weights == "accepted_length":
            with torch.no_grad():
                alpha = head_loss(x, head, target, s.kind, s.temperature)[1].alpha
            if lost is not None:
                alpha = alpha.masked_fill(lost, 0)
            row_weights = accepted_length_weights(alpha, self._recipe.evaluation.gamma)
            row_weights /= row_weights.mean(-1, keepdim=True).clamp(min=1e-6)
        row_weights = row_weights * torch.tensor(weights, device=x.device)[:, None]
        if lost is not None:
            row_weights = row_weights.masked_fill(lost, 0)
        return head_loss(x, head, target, s.kind, s.temperature, row_weights, float(x.shape[1]))[0]
