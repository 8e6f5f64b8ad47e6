"""Targets of other families in transformers, with our drafter and verification: the text is the library's own."""

import json
import shutil

import pytest
import torch
import transformers

from bdcli.backends.transformers_engine import EntryCache, load_target, read_target_config
from bdcli.base.errors import UserError
from bdcli.config.decode import DecodeOptions
from bdcli.decode.session import Session
from bdcli.model.checkpoint import read_config
from bdcli.model.hub import POCKET
from bdcli.speculation.runner import Runner
from tests.support.bench import SMALL, cells

BASE = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {  # class, configuration; windows are shorter than the prompts
    "gemma2": ("Gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3-full": ("Gemma3", {"layer_types": ["full_attention"] * 4}),
    "phi3": ("Phi3", {"sliding_window": 40}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "gpt-neox": ("GPTNeoX", {}),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a folder of random weights of a family, with the pocket tokenizer; once for each."""
    made = {}

    def make(name: str):
        if name not in made:
            family, settings = FAMILIES[name]
            config = getattr(transformers, family + ("TextConfig" if family == "Gemma3" else "Config"))
            torch.manual_seed(0)
            model = getattr(transformers, family + "ForCausalLM")(
                config(**BASE | {"initializer_range": 0.3} | settings)
            )
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(POCKET / "target" / file, made[name])
        return made[name]

    return make


def session(folder, **settings) -> Session:
    plain = {
        "drafter": "pocket",
        "budget": 64,
        "gamma": 3,
        "max_new_tokens": 24,
        "dtype": "float32",
        "engine": "transformers",
    }
    return Session.open(DecodeOptions(target=str(folder), **plain | settings))


def library_text(folder, ids: list[int], count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_the_librarys(folder, text_ids, name):
    place, ids = folder(name), text_ids[1000:1180]
    result = session(place, check=True).decode(ids)
    assert result.tokens == library_text(place, ids, 24)
    assert result.figures.output_equal is True and result.figures.drafted > 0
    assert result.settings["attention"] == "transformers" and result.figures.max_drafter_entries <= 64
    assert result.figures.target_kv_bytes > 0


@pytest.mark.parametrize("name", ["gemma2", "qwen3-moe"])
def test_feeds_of_many_rows_and_rollbacks_leave_the_logits_of_a_whole_forward(folder, text_ids, name):
    model = load_target(folder(name), torch.float32, CPU)
    ids, at = text_ids[500:590], 50
    whole = model.library(torch.tensor([ids])).logits[0]
    runner = Runner(model, EntryCache(model, 100))
    runner.prefill(ids[:at])
    generator = torch.Generator().manual_seed(1)
    while at < len(ids):
        rows = min(int(torch.randint(1, 9, (1,), generator=generator)), len(ids) - at)
        runner.feed([7] * rows, rows)  # a draft that is rejected
        runner.rollback(at)
        saved = runner.cache.save(at - 2)
        runner.rollback(at - 2)
        runner.feed([9, 9], 2)
        runner.cache.restore(saved)
        assert runner.length == at
        torch.testing.assert_close(runner.feed(ids[at : at + rows], rows), whole[at : at + rows], atol=2e-4, rtol=1e-3)
        at += rows
    with pytest.raises(RuntimeError, match="cache of 100 entries cannot hold 101"):
        runner.feed([5] * 11, 1)


def test_sampling_runs_and_repeats_by_its_seed(folder, text_ids):
    one, other, third = (
        session(folder("mixtral"), temperature=1.0, seed=seed, select="chunk").decode(text_ids[:150]).tokens
        for seed in (1, 1, 2)
    )
    assert one == other and one != third and len(one) == 24


def test_a_sweep_measures_such_a_target_beside_its_peers(cli, folder):
    words = [
        "--engine",
        "transformers",
        "--target",
        folder("qwen3-moe"),
        "--drafter",
        "pocket",
        "--budgets",
        64,
        "--gamma",
        3,
    ]
    found = cells(cli(*SMALL, *words, "--methods", "bd,lookup,hf-ar", "--json"))
    assert {arm: (c["output_equal"], c["attention"]) for (_, arm), c in found.items()} == dict.fromkeys(
        ("ar", "bd-64-g3", "lookup-g3", "hf-ar"), (True, "transformers")
    )


def test_an_unsupported_family_names_this_engine(folder):
    with pytest.raises(UserError, match="any other causal model decodes with --engine transformers"):
        read_config(folder("gemma2"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mamba", {"state_size": 8}),
        ("Qwen3Next", EXPERTS | {"layer_types": ["linear_attention", "full_attention"] * 2}),
    ],
)
def test_a_state_that_cannot_be_rolled_back_is_refused(tmp_path, family, settings):
    getattr(transformers, family + "Config")(**BASE | settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be rolled back"):
        read_target_config(tmp_path)


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 1024), ("default", 4096), ("linear", 4096)])
def test_positions_whose_frequencies_would_change_are_not_used(tmp_path, kind, limit):
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
    transformers.LlamaConfig(**BASE, rope_parameters=scaling).save_pretrained(tmp_path)
    assert read_target_config(tmp_path).max_position == limit


def test_drafters_of_other_families_and_broken_folders_are_one_line(cli, folder, tmp_path):
    place = folder("gemma2")
    prompt = tmp_path / "p.txt"
    prompt.write_text("def main():\n" * 20)
    words = ["decode", prompt, "--engine", "transformers", "--max-new-tokens", 4]
    for drafter in ("self", str(place)):
        done = cli(*words, "--target", place, "--drafter", drafter)
        assert done.code == 2 and f"--drafter {drafter}: " in done.err and "Gemma2ForCausalLM" in done.err
        assert "Name a drafter of the Llama family" in done.err
    odd = shutil.copytree(place, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5})
    )
    words += ["--drafter", "pocket"]
    done = cli(*words, "--target", odd)
    assert done.code == 2 and "tensors are missing, first model.layers.4" in done.err
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    done = cli(*words, "--target", odd)
    assert done.code == 2 and "transformers cannot read this model" in done.err
