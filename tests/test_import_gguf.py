"""A GGUF file becomes a Hugging Face folder with the same logits, or is refused by what would be lost."""
import sys

import numpy as np
import pytest
import torch
from conftest import fails, tiny_model

from core import backbone, import_gguf

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}


def write(path, model, arch="llama", leave="", **more):
    """`model`, a Llama, as a GGUF file: q and k in the file format's own order of rotary pairs."""
    c, writer = model.config, gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(c.vocab_size)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", *(chr(i) for i in range(97, 97 + 26)), "ab", *(f"x{i}" for i in range(36))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for name, p in model.state_dict().items():
        array = p.numpy()
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name not in OUTSIDE:
            _, _, i, *rest, _ = name.split(".")
            name = f"blk.{i}.{NAMES['.'.join(rest)]}.weight"
        if (name := OUTSIDE.get(name, name)) != leave:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_same_logits(tmp_path, capsys):
    model = tiny_model("llama")
    write(tmp_path / "tiny.gguf", model)
    argv = ["--import_gguf", tmp_path / "tiny.gguf", "--out", tmp_path / "out"]
    import_gguf.main([str(a) for a in argv])
    lm = backbone.load(str(tmp_path / "out"), torch.device("cpu"), torch.float32)
    ids = torch.randint(64, (2, 20))
    assert torch.allclose(lm.head(lm.through(lm.embed(ids), 0, 4)), model(ids).logits, atol=1e-5)
    assert backbone.load_tokenizer(tmp_path / "out")("abc", add_special_tokens=False)["input_ids"] == [27, 3]
    assert "exists already" in fails(capsys, import_gguf.main, *argv)


def test_refusals(tmp_path, capsys, monkeypatch):
    model, file, out = tiny_model("llama"), tmp_path / "tiny.gguf", tmp_path / "out"
    argv = [import_gguf.main, "--import_gguf", file, "--out", out]
    assert "is no file" in fails(capsys, *argv)
    for said, how in {"rope scaling": dict(rope_scaling_type=gguf.RopeScalingType.YARN),
                      "attention.key_length = 16": dict(key_length=16), "sliding_window = 8": dict(sliding_window=8),
                      "layers.1.mlp.up_proj": dict(leave="blk.1.ffn_up.weight"),
                      "strange is not supported": dict(arch="strange")}.items():
        write(file, model, **how)
        assert said in fails(capsys, *argv)
    write(file, model)
    whole = file.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:size])
        assert "could not be read" in fails(capsys, *argv)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf accelerate" in fails(capsys, *argv)
    assert not out.exists() and [f.name for f in tmp_path.iterdir()] == ["tiny.gguf"]
