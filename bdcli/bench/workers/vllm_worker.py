"""vLLM under its own Python: one request at a time through the engine's step loop. See `lines`.

Settings: model, dtype, longest (tokens of a text). Prefixes are not kept, and nothing is detokenised.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lines import serve


def load(settings: dict):
    """A function that generates."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["longest"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        generation_config="vllm",  # not the folder's penalties
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine
    count = 0

    def generate(request: dict) -> dict:
        nonlocal count
        count += 1
        sampling = SamplingParams(
            temperature=request["temperature"],
            top_k=request["top_k"],
            top_p=request["top_p"],
            seed=request["seed"],
            max_tokens=request["max_new_tokens"],
            stop_token_ids=request["eos"],
            detokenize=False,
        )
        times, tokens = [], []
        started = time.perf_counter()
        engine.add_request(str(count), {"prompt_token_ids": request["prompt"]}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                times += [time.perf_counter() - started] * (len(tokens) - len(times))
        return {"tokens": tokens, "times": times}

    return generate


if __name__ == "__main__":  # its engine starts processes that import this file
    serve(load)
