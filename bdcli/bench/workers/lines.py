"""The protocol of a worker: JSON lines, requests on standard input, answers on standard output.

    {settings}                                        -> {"ready": true}
    {"prompt": [ids], "max_new_tokens": n, ...}       -> {"tokens": [ids], "times": [seconds since the request]}
    what goes wrong                                   -> {"error": "..."}, and the worker ends

`times` has the moment at which each token came. Libraries print to standard output as they like: it is standard error
for them.
"""

from __future__ import annotations

import json
import os
import sys


def serve(load) -> None:
    """Answer requests until the input ends. `load(settings)` returns a function of a request that returns an answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        generate = load(json.loads(sys.stdin.readline()))
        say({"ready": True})
        for line in sys.stdin:
            say(generate(json.loads(line)))
    except Exception as error:  # whatever the library raises is the answer
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise
