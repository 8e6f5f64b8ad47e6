"""OpenVINO GenAI under its own Python: one request at a time. See `lines`.

Settings: model (an exported folder), attention (PA or SDPA), threads. Prefixes are not kept.
"""

from __future__ import annotations

from itertools import accumulate

from lines import serve


def load(settings: dict):
    """A function that generates."""
    import numpy
    import openvino
    import openvino_genai as genai

    options = {"INFERENCE_NUM_THREADS": settings["threads"], "ATTENTION_BACKEND": settings["attention"]}
    if settings["attention"] == "PA":
        options["scheduler_config"] = genai.SchedulerConfig()
        options["scheduler_config"].enable_prefix_caching = False
    pipeline = genai.LLMPipeline(settings["model"], "CPU", **options)

    def generate(request: dict) -> dict:
        config = genai.GenerationConfig()  # not the folder's penalties
        config.max_new_tokens = request["max_new_tokens"]
        config.stop_token_ids = set(request["eos"])
        config.do_sample = request["temperature"] > 0
        if config.do_sample:
            config.temperature, config.top_p = request["temperature"], request["top_p"]
            config.rng_seed = request["seed"]
            if request["top_k"]:
                config.top_k = request["top_k"]
        ids = openvino.Tensor(numpy.array([request["prompt"]], dtype=numpy.int64))
        answer = pipeline.generate(ids, config)
        measured = answer.perf_metrics.raw_metrics  # microseconds
        tokens = list(answer.tokens[0])
        steps = [measured.m_times_to_first_token[0], *measured.m_durations[: len(tokens) - 1]]
        return {"tokens": tokens, "times": [1e-6 * at for at in accumulate(steps)]}

    return generate


if __name__ == "__main__":
    serve(load)
