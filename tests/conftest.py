"""Shared by all tests: the repository on the path, one thread, no network, and one tiny pipeline run per session."""
import os
import shutil
import sys
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="seconds each: run by .ci/run, which sets SLOW=1")

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
GROUPED, HEADS = dict(num_key_value_heads=2), dict(num_key_value_heads=2, head_dim=8)
ALTERNATING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
EXPERTS = dict(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {  # name -> (config class, what it adds); every windowed family has both layer types on each side of a cut
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", dict(**GROUPED, use_sliding_window=True, max_window_layers=0, sliding_window=8,
                                  layer_types=["full_attention", "sliding_attention"] * 2)),
    "qwen3": ("Qwen3Config", dict(**HEADS, use_sliding_window=True, max_window_layers=0, **ALTERNATING)),
    "mistral": ("MistralConfig", dict(**HEADS, sliding_window=8)),
    "gemma2": ("Gemma2Config", dict(**HEADS, query_pre_attn_scalar=8, **ALTERNATING)),
    "gemma3": ("Gemma3TextConfig", dict(**HEADS, query_pre_attn_scalar=8, **ALTERNATING)),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": ("SmolLM3Config", dict(**GROUPED, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, **ALTERNATING)),
    "phi": ("PhiConfig", GROUPED),
    "phi3": ("Phi3Config", dict(**GROUPED, sliding_window=8)),
    "gemma": ("GemmaConfig", HEADS),
    "granite": ("GraniteConfig", dict(**GROUPED, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=4)),
    "cohere": ("CohereConfig", dict(**GROUPED, logit_scale=0.5)),
    "cohere2": ("Cohere2Config", dict(**GROUPED, logit_scale=0.5, **ALTERNATING)),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo3": ("Olmo3Config", dict(**GROUPED, **ALTERNATING)),
    "olmoe": ("OlmoeConfig", dict(**GROUPED, num_experts=4, num_experts_per_tok=2)),
    "starcoder2": ("Starcoder2Config", dict(**GROUPED, sliding_window=8)),
    "stablelm": ("StableLmConfig", dict(**GROUPED, use_parallel_residual=True)),
    "falcon": ("FalconConfig", dict(multi_query=True)),
    "opt": ("OPTConfig", dict(word_embed_proj_dim=32, ffn_dim=48)),
    "gpt_neo": ("GPTNeoConfig", dict(attention_types=[[["global", "local"], 2]], window_size=8)),
    "gptj": ("GPTJConfig", dict(rotary_dim=8)),
    "gpt_bigcode": ("GPTBigCodeConfig", {}),
    "bloom": ("BloomConfig", {}),
    "mpt": ("MptConfig", dict(max_seq_len=64)),
    "mixtral": ("MixtralConfig", dict(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "qwen2_moe": ("Qwen2MoeConfig", dict(**EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(**EXPERTS, head_dim=8)),
    "gpt_oss": ("GptOssConfig", dict(**HEADS, num_local_experts=4, num_experts_per_tok=2, **ALTERNATING)),
    "glm4": ("Glm4Config", HEADS),
    "nemotron": ("NemotronConfig", GROUPED),
}
CAUSAL_ONLY = ["bloom", "gpt_neo", "mpt"]  # their attention goes by place: no mask makes it two-way
FEW = ["qwen3", "gemma3", "gpt2", "falcon", "mixtral"]  # windows; soft caps; learned positions; tuples; experts
MOST = [pytest.param(f, marks=[] if f in FEW else slow) for f in FAMILIES]              # for tests that are not cheap
CONVERTIBLE = [p for p in MOST if p.values[0] not in CAUSAL_ONLY]



def tiny_model(family, seed=0, **changes):
    """A transformers causal LM of `family` with random weights, in eval mode."""
    import transformers
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **extra, **changes})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def randomise(module, seed=0, scale=0.3):
    """Every weight random, outputs and modulations too: an untrained bridge with a zero output proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module


def fails(capsys, main, *argv):
    """Run main(argv), which must refuse with exit code 2 and one sentence. Returns the sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().split("\r")[-1]
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message
    return message


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Real text: some forty modules of the running interpreter's own library, about 1 MB."""
    folder = tmp_path_factory.mktemp("text")
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory, text):
    """out/ of a whole tiny pipeline: real data, real training, seconds."""
    import bridge
    import generate
    import geometry
    import hybrid
    import repr_align
    import toy
    out = tmp_path_factory.mktemp("pipeline") / "out"
    tiny = ["--preset", "tiny", "--data", str(text)]
    toy.main([*tiny, "--out", f"{out}/toy"])
    geometry.main([*tiny, "--out", f"{out}/geometry"])
    bridge.main([*tiny, "--out", f"{out}/bridge"])
    bridge.main([*tiny, "--objective", "regression", "--out", f"{out}/regression"])
    hybrid.main([*tiny, "--bridge", f"{out}/bridge", "--out", f"{out}/hybrid"])
    for w in (0, 10):
        repr_align.main([*tiny, "--align_weight", str(w), "--out", f"{out}/convert/w{w}"])
    bridge.main([*tiny, "--generate", "--layer", "2", "--out", f"{out}/generator"])
    generate.main([*tiny, "--bridges", f"{out}/generator", "--converted", f"{out}/convert/w10",
                   "--out", f"{out}/generate"])
    return out


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    """Real text: 40 short modules of the running interpreter's library."""
    folder = tmp_path_factory.mktemp("notes")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in [file for file in files if file.stat().st_size < 9000][:40]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def shards(notes, tmp_path_factory):
    """The folder of shards of `notes`, with a BPE of 512 tokens."""
    out = tmp_path_factory.mktemp("shards") / "data"
    import data
    data.main(["--data", str(notes), "--vocab", "512", "--out", str(out)])
    return out
