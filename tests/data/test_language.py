"""A GGUF file becomes the model it was made from; corpora become text, text becomes windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from aerogel import data, models
from aerogel.data import brown, packages, smollm
from aerogel.data import fetching as fetch_module
from aerogel.data.fetching import fetch
from aerogel.data.gguf import convert_llama
from aerogel.data.sources import ASSETS, Asset, File, Package
from aerogel.train import perplexity

TOKENS = ["<|endoftext|>", "a", "b", "Ġ", "1", "2", "ab", "Ġa"]
MERGES = ["a b", "Ġ a"]


def tiny_llama(transformers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter.normal_(1.0, 0.2)
    return model


def write_gguf(gguf, model, path: Path, architecture: str = "llama") -> None:
    """As llama.cpp's converter writes it: short names, query and key rows interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *([1] * (len(TOKENS) - 1))])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    short = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "model.layers.": "blk.", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if ".q_proj" in name or ".k_proj" in name:
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        for long, brief in short.items():
            name = name.replace(long, brief)
        array = value.numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_it_was_made_from(tmp_path: Path):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    model = tiny_llama(transformers)
    write_gguf(gguf, model, tmp_path / "m.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_llama(tmp_path / "m.gguf", folder)
    loaded = models.create_model("smollm2", checkpoint_path=folder).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = torch.randint(len(TOKENS), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = model(ids).logits, loaded(ids).logits
    # 8-bit blocks and bfloat16 cost about 1 % of the largest logit; a wrong row order costs all.
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.encode("ab a12<|endoftext|>").tokens == ["ab", "Ġa", "1", "2", "<|endoftext|>"]
    assert tokenizer.decode(tokenizer.encode("ab a12").ids) == "ab a12"


def test_another_architecture_is_refused(tmp_path: Path):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    write_gguf(gguf, tiny_llama(transformers), tmp_path / "m.gguf", "mamba")
    with pytest.raises(ValueError, match="'mamba', not a llama"):
        convert_llama(tmp_path / "m.gguf", tmp_path)


def test_a_language_model_folder_of_other_weights_is_refused(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    tiny_llama(transformers).config.save_pretrained(tmp_path)
    save_file({"foo": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="another model"):
        models.create_model("smollm2", checkpoint_path=tmp_path)


def test_a_damaged_conversion_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def convert(path: Path, folder: Path, on_progress: object) -> None:
        made.append(path.name)
        for name in smollm.FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(smollm, "fetch", lambda *_, **__: tmp_path / "source")
    monkeypatch.setattr(smollm, "convert_llama", convert)
    folder = data.fetch_checkpoint("smollm2", cache_dir=tmp_path)
    assert data.fetch_checkpoint("smollm2", cache_dir=tmp_path) == folder
    assert len(made) == 1
    (folder / "config.json").write_text("something else")
    data.fetch_checkpoint("smollm2", cache_dir=tmp_path)
    (folder / "converted.json").write_text(json.dumps({"version": 0}))
    data.fetch_checkpoint("smollm2", cache_dir=tmp_path)
    assert len(made) == 3


def test_an_asset_may_be_the_package_file_itself(tmp_path: Path, monkeypatch):
    content = b"a whole package"
    digest = hashlib.sha256(content).hexdigest()
    package = Package("npm", "toy", "1", digest, len(content), "")
    asset = Asset("toy", "a toy", "none", (File("toy-1.tgz", digest, len(content)),), (package,))
    monkeypatch.setitem(ASSETS, "toy", asset)
    monkeypatch.setattr(fetch_module, "BACKOFF", 0.0)

    def download(package, folder, on_bytes):
        (folder / "toy-1.tgz").write_bytes(content)
        return folder / "toy-1.tgz"

    monkeypatch.setattr(packages, "download", download)
    assert (fetch("toy", cache_dir=tmp_path) / "toy-1.tgz").read_bytes() == content


def test_tagged_words_become_printed_text():
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at (/( real/jj )/) evidence/nn ''/'' ./.\n"
        "\tWho/wps and\\/or/cc what/wdt ?/. ?/.\n"
    )
    assert brown.plain_text(tagged) == ('The jury said, "no (real) evidence".\nWho and\\/or what?')


def test_the_brown_corpus_is_read_whole(real_asset):
    real_asset("brown")
    texts = data.load_brown()
    assert len(texts) == 500
    assert sum(map(len, texts.values())) > 5_900_000
    assert texts["ca01"].startswith("The Fulton County Grand Jury said Friday an investigation of")
    assert not any("/nn" in text for text in texts.values())


class Words:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str):
        self.ids = [ord(c) for c in text]
        return self


def test_windows_are_the_running_text():
    windows = data.token_windows(Words(), ["abcd", "efg"], 3)
    assert "".join(map(chr, windows.flatten().tolist())) == "abcd\n\nefg"
    assert windows.shape == (3, 3)
    with pytest.raises(ValueError, match="fewer than one window of length=10"):
        data.token_windows(Words(), ["abc"], 10)
    with pytest.raises(ValueError, match="length=0"):
        data.token_windows(Words(), ["abc"], 0)


class Bigrams(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.table[ids]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_the_exponent_of_the_mean_loss_of_the_next_token(batch_size):
    generator = torch.Generator().manual_seed(0)
    model = Bigrams(torch.randn(7, 7, generator=generator))
    windows = torch.randint(7, (5, 4), generator=generator)
    probability = model.table.detach().double().softmax(-1)
    losses = [-probability[w[i], w[i + 1]].log() for w in windows for i in range(3)]
    wanted = float(torch.stack(losses).mean().exp())
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(wanted)
    assert model.training
    assert perplexity(Bigrams(torch.zeros(7, 7)), windows) == pytest.approx(7.0)
    with pytest.raises(ValueError, match=r"shape \(5, 1\)"):
        perplexity(model, windows[:, :1])


@pytest.mark.slow
def test_smollm2_reads_english(real_asset):
    pytest.importorskip("transformers")
    real_asset("brown")
    if not smollm.is_whole(data.cache_root() / smollm.FOLDER):
        pytest.importorskip("gguf")
        real_asset("smollm2-gguf")
    folder = data.fetch_checkpoint("smollm2")
    model = models.create_model("smollm2", checkpoint_path=folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    windows = data.token_windows(tokenizer, [data.load_brown()["ca01"]], 512)[:1]
    assert perplexity(model, windows) < 45
