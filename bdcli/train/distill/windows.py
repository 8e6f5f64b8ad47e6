"""Finished training windows: shards on disk, and the accounts of everything that was read for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bdcli.config.distill import DistillRecipe
from bdcli.train.distill.teacher import stored_target
from bdcli.train.targets import Target


@dataclass
class Accounts:
    """What became of what was read: read = kept + Σ dropped + failed."""

    read: int
    kept: int
    dropped: dict[str, int]
    failed: int

    @classmethod
    def empty(cls) -> Accounts:
        return cls(0, 0, {}, 0)

    def count(self, fate: str) -> None:
        """`fate` is kept, failed, or why it was dropped."""
        self.read += 1
        if fate in ("kept", "failed"):
            setattr(self, fate, getattr(self, fate) + 1)
        else:
            self.dropped[fate] = self.dropped.get(fate, 0) + 1

    def add(self, other: Accounts) -> None:
        """Count what `other` counts as well."""
        self.read, self.kept, self.failed = self.read + other.read, self.kept + other.kept, self.failed + other.failed
        for why, count in other.dropped.items():
            self.dropped[why] = self.dropped.get(why, 0) + count


class Windows:
    """Windows of the shards that `manifest` lists in `folder`, read when asked for.

    head [V, hidden]: the target's, on the device where its cached answers are wanted. `temperature` is the loss's.
    """

    def __init__(self, folder: Path, manifest: dict, head: Tensor, temperature: float):
        self._folder, self._shards, self._head, self._temperature = folder, manifest["shards"], head, temperature
        self._places = [(n, i) for n, shard in enumerate(self._shards) for i in range(shard["accounts"]["kept"])]
        self._open: tuple[int, dict[str, Tensor]] | None = None
        self.documents = Accounts(**manifest["documents"])
        self.accounts = Accounts.empty()
        for shard in self._shards:
            self.accounts.add(Accounts(**shard["accounts"]))
        self.loop_rates = [rate for shard in self._shards for rate in shard.get("loop_rates", {}).values()]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shards(self) -> int:
        return len(self._shards)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self._folder / shard["file"]).stat().st_size for shard in self._shards)

    def ids(self, window: int) -> Tensor:
        """Token ids [T], int64."""
        return self.row(window)["ids"].long()

    def target(self, window: int) -> Target | None:
        """The target's cached answers for every position; None where none are cached."""
        return stored_target(self.row(window), self._head, self._temperature)

    def row(self, window: int) -> dict[str, Tensor]:
        """Everything that its shard holds of a window."""
        from safetensors.torch import load_file

        number, place = self._places[window]
        if self._open is None or self._open[0] != number:
            self._open = number, load_file(self._folder / self._shards[number]["file"])
        return {name: t[place] for name, t in self._open[1].items()}


def bytes_per_token(recipe: DistillRecipe, hidden_size: int) -> int:
    """Disk bytes of one position of a window in a shard."""
    answers = {"none": 0, "hidden": 2 * hidden_size, "topk": 6 * recipe.data.top_k, "argmax": 4}
    return 4 + answers[recipe.data.cache]
