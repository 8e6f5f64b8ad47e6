"""Model folders in and out: configuration, EOS tokens and safetensors weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from bdcli.base.errors import UserError
from bdcli.base.files import digest, new_folder
from bdcli.model.config import ModelConfig, parse_config
from bdcli.model.hub import read_model_json
from bdcli.model.llama import Layer, Model
from bdcli.model.quantised import quantise

_IGNORED = ("rotary_emb.inv_freq",)  # tables that old checkpoints carry


def read_config(folder: Path) -> ModelConfig:
    return parse_config(read_model_json(folder / "config.json"), str(folder))


def eos_tokens(folder: Path) -> frozenset[int]:
    """EOS ids of a model: generation_config.json first, as `transformers` has it, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = read_model_json(path).get("eos_token_id") if path.exists() else None
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None = None) -> Model:
    """Weights from safetensors (one file or shards with an index), cast to `dtype` on `device`.

    With `bits` 4 or 8 each layer is quantised as soon as it is read (`bdcli.model.quantised`).

    Raises UserError naming the file and tensor when something is missing, truncated or of another shape.
    """
    c = read_config(folder)
    weights = _Weights(folder, dtype, device)
    hidden, q_rows, kv_rows = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
    embedding = weights.take("model.embed_tokens.weight", (c.vocab_size, hidden))
    layers = []
    for i in range(c.layers):
        layer = _load_layer(weights, f"model.layers.{i}.", c, q_rows, kv_rows)
        layers.append(layer if bits is None else layer.quantised(bits))
    norm = weights.take("model.norm.weight", (hidden,))
    if c.tied_head:
        weights.skip("lm_head.weight")
        head = embedding
    else:
        head = weights.take("lm_head.weight", (c.vocab_size, hidden))
    weights.expect_empty()
    if bits is not None:
        tied, embedding = head is embedding, quantise(embedding, 8)
        head = embedding if tied else quantise(head, 8)
    return Model(c, embedding, layers, norm, head)


def _load_layer(weights: _Weights, at: str, c: ModelConfig, q_rows: int, kv_rows: int) -> Layer:
    attention, mlp = at + "self_attn.", at + "mlp."
    hidden, inner = c.hidden_size, c.intermediate_size
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    gate_up = (("gate_proj", inner), ("up_proj", inner))
    layer = Layer(
        attention_norm=weights.take(at + "input_layernorm.weight", (hidden,)),
        qkv=torch.cat([weights.take(f"{attention}{n}.weight", (rows, hidden)) for n, rows in qkv]),
        out=weights.take(attention + "o_proj.weight", (hidden, q_rows)),
        mlp_norm=weights.take(at + "post_attention_layernorm.weight", (hidden,)),
        gate_up=torch.cat([weights.take(f"{mlp}{n}.weight", (rows, hidden)) for n, rows in gate_up]),
        down=weights.take(mlp + "down_proj.weight", (hidden, inner)),
    )
    if c.qkv_bias:
        layer.qkv_bias = torch.cat([weights.take(f"{attention}{n}.bias", (rows,)) for n, rows in qkv])
    if c.out_bias:
        layer.out_bias = weights.take(attention + "o_proj.bias", (hidden,))
    if c.mlp_bias:
        layer.gate_up_bias = torch.cat([weights.take(f"{mlp}{n}.bias", (rows,)) for n, rows in gate_up])
        layer.down_bias = weights.take(mlp + "down_proj.bias", (hidden,))
    if c.qk_norm:
        q_norm = weights.take(attention + "q_norm.weight", (c.head_dim,))
        k_norm = weights.take(attention + "k_norm.weight", (c.head_dim,))
        layer.qk_norm = torch.cat((q_norm.expand(c.heads, -1), k_norm.expand(c.kv_heads, -1)))
    return layer


class _Weights:
    """Tensors of a checkpoint by name, each taken once; what nobody took is an error at the end."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        from safetensors import SafetensorError, safe_open

        self._folder, self._dtype, self._device = folder, dtype, device
        self._corrupt = SafetensorError
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_model_json(index).get("weight_map")
            if not shards:
                raise UserError(f"{index} lists no weights", "Download it again")
            files = sorted(set(shards.values()))
        elif (folder / "model.safetensors").exists():
            files = ["model.safetensors"]
        elif list(folder.glob("*.bin")):
            hint = f"Make safetensors of them: bdcli convert {folder} NEW_FOLDER"
            raise UserError(f"{folder} has only .bin weights, which can run code when loaded", hint)
        else:
            hint = "Point at a Hugging Face model folder; of .bin weights on the hub bdcli convert makes one"
            raise UserError(f"{folder} holds no model.safetensors", hint)
        self._where = {}
        for name in files:
            path = folder / name
            if not path.exists():
                raise UserError(f"{path} is missing", "Download the model folder again")
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
            self._where.update(dict.fromkeys(handle.keys(), (path, handle)))
        self._open = set(self._where)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._where:
            raise UserError(f"{self._folder}: tensor {name} is missing", "Check config.json against the checkpoint")
        self._open.discard(name)
        path, handle = self._where[name]
        try:
            tensor = handle.get_tensor(name)
        except (self._corrupt, OSError) as error:
            raise _damaged(path, error) from None
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}", "Check the pair"
            )
        return tensor.to(self._device, self._dtype)

    def skip(self, name: str) -> None:
        self._open.discard(name)

    def expect_empty(self) -> None:
        left = sorted(n for n in self._open if not n.endswith(_IGNORED))
        if left:
            raise UserError(f"{self._folder}: {len(left)} tensors have no place in this model, first {left[0]}")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or truncated ({error})", "Download it again")


def fingerprint(folder: Path) -> str:
    """Changes when the model does: config and the first and last MiB of the weights, with their sizes."""
    parts = [(folder / "config.json").read_bytes()]
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            parts += [f"{path.name} {size}".encode(), file.read(2**20)]
            file.seek(max(0, size - 2**20))
            parts.append(file.read())
    return digest(b"".join(parts))


def save_model(model: Model, like: Path, folder: Path) -> None:
    """Write `model` as a Hugging Face folder: weights in bf16, everything but depth copied from the folder `like`.

    The folder appears whole or not at all: it is written beside its place and then renamed.
    """
    from safetensors.torch import save_file

    c, weights = model.config, {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    rows = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
    if not c.tied_head:
        weights["lm_head.weight"] = model.head
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = layer.attention_norm
        weights[at + "post_attention_layernorm.weight"] = layer.mlp_norm
        for kind in ("weight", "bias"):
            end = "" if kind == "weight" else "_bias"
            whole = {"self_attn.o_proj": getattr(layer, "out" + end), "mlp.down_proj": getattr(layer, "down" + end)}
            qkv, gate_up = getattr(layer, "qkv" + end), getattr(layer, "gate_up" + end)
            if qkv is not None:
                whole |= dict(zip((f"self_attn.{n}_proj" for n in "qkv"), qkv.split(rows), strict=True))
            if gate_up is not None:
                whole |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), gate_up.chunk(2), strict=True))
            weights |= {f"{at}{name}.{kind}": t for name, t in whole.items() if t is not None}
        if layer.qk_norm is not None:
            weights[at + "self_attn.q_norm.weight"] = layer.qk_norm[0]
            weights[at + "self_attn.k_norm.weight"] = layer.qk_norm[c.heads]
    flat = {name: t.detach().to("cpu", torch.bfloat16).contiguous().clone() for name, t in weights.items()}
    raw = read_model_json(like / "config.json") | {"dtype": "bfloat16", "num_hidden_layers": c.layers}
    if "layer_types" in raw:  # full attention in all of them, or it would not have been read
        raw["layer_types"] = raw["layer_types"][:1] * c.layers
    with new_folder(folder) as fresh:
        for path in like.iterdir():
            if path.suffix in (".json", ".model", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copy(path, fresh)
        (fresh / "config.json").write_text(json.dumps(raw, indent=2), "utf-8")
        save_file(flat, fresh / "model.safetensors", {"format": "pt"})
