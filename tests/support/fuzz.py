"""Inputs by Hypothesis: the same few in every run of the tests, others for as long as `make fuzz` is given."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))  # as many inputs as in the tests; beyond 1 they are fresh ones

WORDS = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.sampled_from([0, 1, -1, 2**31, 2**63, 1e-46]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def fuzz(inputs: int):
    """Settings of a property that is tried with so many inputs."""
    return settings(
        max_examples=inputs * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        print_blob=TIMES > 1,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated(draw, body: bytes, edits: int = 4) -> bytes:
    """`body` after some edits: bytes changed, inserted, left out, repeated, or the end cut off."""
    data = bytearray(body)
    for _ in range(draw(st.integers(1, edits))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "insert", "leave out", "repeat", "cut"]))
        if kind == "change":
            new = draw(st.binary(min_size=1, max_size=8))
            data[place : place + len(new)] = new
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del data[place:]
        else:
            end = place + draw(st.integers(1, 64))
            data[place:end] = data[place:end] * 2 if kind == "repeat" else b""
    return bytes(data)
