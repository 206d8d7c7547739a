"""Tiny models of transformers, torch_geometric and peft with random weights: every matrix has its factors."""

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Exact
from kfac.networks import DENSE, EXACT, assert_dense_step, stepped
from oracles import gaussian

pytestmark = pytest.mark.filterwarnings("ignore:KFAC", "ignore::FutureWarning", "ignore::DeprecationWarning")

# The model adds these tables and vectors, and multiplies by the scale: no matrix product has them.
_ADDED = {
    "vit": {f"vit.embeddings.{own}": "ViTEmbeddings uses it by itself" for own in ("cls_token", "position_embeddings")},
    "whisper": {
        "model.decoder.embed_positions": "WhisperPositionalEmbedding has a forward pass of its own",
        "model.encoder.embed_positions": "frozen",
    },
    "clip": {
        "logit_scale": "CLIPModel uses it by itself",
        "vision_model.embeddings.class_embedding": "CLIPVisionEmbeddings uses it by itself",
    },
}
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
_PATCHES = {**_SIZES, "image_size": 8, "patch_size": 4}
_SPECIAL = {"decoder_start_token_id": 0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_WHISPER = {
    "vocab_size": 40,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **_SPECIAL,
}
_GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_CLIP = {
    "text_config": {**_SIZES, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "vision_config": _PATCHES,
    "projection_dim": 8,
}
INDICES, IMAGES = 3 + torch.arange(40).reshape(4, 10) * 7 % 37, gaussian(4, 3, 8, 8, seed=1).float()
TOKENS = {"input_ids": INDICES, "labels": INDICES}
LABELLED = {"pixel_values": IMAGES, "labels": torch.arange(4) % 2}
SPEECH = {"input_features": gaussian(4, 8, 20, seed=1).float(), "labels": INDICES}
PAIRS = {"input_ids": INDICES, "pixel_values": IMAGES, "return_loss": True}
# Configuration, model, configuration options, and a batch.
MODELS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "eos_token_id": 0}, TOKENS),
    "bert": ("BertConfig", "BertForMaskedLM", _SIZES, TOKENS),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA, TOKENS),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, TOKENS),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}, TOKENS),
    "vit": ("ViTConfig", "ViTForImageClassification", _PATCHES, LABELLED),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER, SPEECH),
    "clip": ("CLIPConfig", "CLIPModel", _CLIP, PAIRS),
}


def transformer(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, model, options, data = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options)), data


def covered(model, loss):
    """Take two steps. Then all layers have data, and all gradients are finite."""
    preconditioner = KFAC(model, Exact())
    for _ in range(2):
        assert all(part.isfinite().all() for part in stepped(model, preconditioner, loss()))
    report = preconditioner.report()
    assert not [row.layer for row in report.factors if row.reason == "no data yet"]
    return preconditioner


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_transformer_has_its_factors(name):
    model, data = transformer(name)
    preconditioner = covered(model, lambda: model(**data).loss)
    assert preconditioner.report().unsupported == _ADDED.get(name, {})


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "v_proj"])], ids=["gpt2", "llama"]
)
def test_both_matrices_of_an_adapter_have_their_factors(name, targets):
    peft = pytest.importorskip("peft")
    model, data = transformer(name)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    preconditioner = covered(model, lambda: model(**data).loss)
    assert set(preconditioner.report().unsupported.values()) == {"frozen"}
    trained = {id(part) for part in model.parameters() if part.requires_grad}
    assert trained == {id(part) for part in preconditioner.parameters() if part.requires_grad}


class Network(nn.Module):
    """Two graph convolutions; with ``index`` the mean of each graph's nodes."""

    def __init__(self, name):
        super().__init__()
        convolution = getattr(pytest.importorskip("torch_geometric").nn, name)
        torch.manual_seed(0)
        self.first, self.second = convolution(6, 8), convolution(8, 3)

    def forward(self, features, edges, index=None):
        nodes = self.second(torch.tanh(self.first(features, edges)), edges)
        if index is None:
            return nodes
        return nodes.new_zeros(2, 3).index_add_(0, index, nodes) / index.bincount()[:, None]


CONVOLUTIONS = {"GCNConv": {"lin"}, "GATConv": {"lin"}, "GATv2Conv": {"lin_l", "lin_r"}, "SAGEConv": {"lin_l", "lin_r"}}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_linear_of_a_graph_network_has_its_factors(name, sharing):
    """With nodes or graphs as samples, the step equals the dense definition."""
    model = Network(name).double()
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 0, 4, 5, 6, 7, 2]])
    index, features = torch.tensor([0] * 3 + [1] * 5), torch.randn(8, 6, dtype=torch.float64)
    labels = torch.arange(8 if sharing == "expand" else 2) % 3
    preconditioner = KFAC(model, EXACT, sharing=sharing, **DENSE)
    with preconditioner.graphs(index):
        output = model(features, edges, index if sharing == "reduce" else None)
    nn.functional.cross_entropy(output, labels).backward()
    assert {layer.rows("loss", None).uses for layer in preconditioner._layers} == {len(labels)}
    assert_dense_step(preconditioner)
    report = preconditioner.report()
    assert {row.layer for row in report.factors} == {
        f"{at}.{own}" for at in ("first", "second") for own in CONVOLUTIONS[name]
    }
    # Each convolution uses its bias and attention vectors by itself.
    assert {part.rpartition(".")[2] for part in report.unsupported} <= {"bias", "att", "att_src", "att_dst"}
