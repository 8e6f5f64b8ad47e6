"""GGUF files: whatever a header says, a configuration comes of it or one UserError."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdcli.base.errors import UserError
from bdcli.model.build import random_model
from bdcli.model.checkpoint import read_config, save_model
from bdcli.model.config import parse_config
from bdcli.model.hub import POCKET
from tests.support.fuzz import fuzz, mutated

pytest.importorskip("gguf", reason="writes the files that are then edited")
model_gguf = pytest.importorskip("bdcli.model.gguf.model", reason="GGUF files are not read yet")
HEADER_BYTES = 3000  # of keys and tensors; weights follow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(place for an edited file, bytes of a sound one)."""
    from tests.support.gguf import alphabet, write_model

    like, folder = tmp_path_factory.mktemp("like"), tmp_path_factory.mktemp("gguf")
    small = {"vocab_size": 257, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    raw = json.loads((POCKET / "target" / "config.json").read_text()) | small
    (like / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    save_model(random_model(read_config(like), 0), like, folder / "model")
    path = write_model(folder / "model", folder / "a.gguf", "llama", alphabet())
    body = path.read_bytes()
    assert parse_config(model_gguf.Gguf(path).config(), "a").hidden_size == 8
    return folder / "edited.gguf", body


@fuzz(200)
@given(st.data())
def test_an_edited_header_is_read_or_refused(files, data):
    path, body = files
    path.write_bytes(data.draw(mutated(body[:HEADER_BYTES], edits=2)) + body[HEADER_BYTES:])
    try:
        parse_config(model_gguf.Gguf(path).config(), "edited")
    except UserError as error:
        assert "edited" in str(error)


@fuzz(30)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(files, body, marked):
    files[0].write_bytes(b"GGUF\3\0\0\0" * marked + body)
    with pytest.raises(UserError):
        model_gguf.Gguf(files[0]).config()
