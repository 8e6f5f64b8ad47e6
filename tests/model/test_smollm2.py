"""SmolLM2-135M-Instruct from its GGUF file, where `bdcli fetch smollm2` has put it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from bdcli.base.errors import UserError
from bdcli.cache.full import FullCache
from bdcli.data.prompts import cut_prompt, encode, stdlib_text
from bdcli.model.checkpoint import eos_tokens, load_model, read_config
from bdcli.model.known import fetched
from bdcli.model.tokenizer import load_tokenizer
from tests.support.gguf import ENDS, NAMES, ORIGINALS, PROBE, digest_of

try:
    FILE, WHY = fetched("smollm2"), ""
except UserError as error:
    FILE, WHY = None, str(error)
pytestmark = pytest.mark.skipif(FILE is None, reason=WHY)
CONTEXT, NEW_TOKENS = 1024, 24


def test_its_configuration_and_tokenizer_are_those_of_the_original():
    c = read_config(FILE)
    assert (c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_dim, c.max_position) == (30, 576, 9, 3, 64, 8192)
    assert c.tied_head and c.rope.theta == 100_000 and c.norm_eps == 1e-5 and eos_tokens(FILE) == {2}
    tokenizer = load_tokenizer(FILE)
    assert digest_of(encode(tokenizer, PROBE)) == ORIGINALS["smollm"]
    chat = tokenizer.decode(encode(tokenizer, "Hello", chat=True))
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n") and "SmolLM" in chat


def reference():
    """The `transformers` model with the weights that the `gguf` package reads, heads put in its order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader, state = GGUFReader(FILE), {}
    names = {gguf: name for name, gguf in NAMES.items()}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{names[part]}"
            if part in ("attn_q", "attn_k"):
                values = values.view(-1, 32, 2, 576).swapaxes(1, 2).reshape_as(values)
        else:
            name = next(name for name, gguf in ENDS.items() if gguf == stem)
        state[name + ".weight"] = values
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    missing, more = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not more
    model.tie_weights()
    return model


@pytest.mark.slow
@torch.inference_mode()
def test_it_continues_a_prompt_as_transformers_does():
    tokenizer = load_tokenizer(FILE)
    prompt = encode(tokenizer, cut_prompt(tokenizer, stdlib_text(), CONTEXT))
    theirs = reference()
    want = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
    model = load_model(FILE, torch.float32, torch.device("cpu"))
    cache, got, pending = FullCache(model, CONTEXT + NEW_TOKENS), [], prompt[-1:]
    model.prefill(prompt[:-1], cache)
    for _ in range(NEW_TOKENS):
        pending = [int(model.forward(pending, cache, 1).argmax())]
        got += pending
    assert got == want.tolist()
    last = theirs(torch.tensor([prompt[:200]])).logits[0]
    ours = model.forward(prompt[:200], FullCache(model, 200), 200)
    assert torch.allclose(ours, last, atol=2e-3 * last.abs().max())
