"""Models as users bring them, made from configurations, small enough for a laptop: `models.py:NAME`.

Dropout is off, so that a plan's losses can be compared with a plain loop's to the last digits.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

warnings.filterwarnings("ignore")

batch_size = 8
WORDS, TOKENS, CLASSES = 128, 16, 10


def _torchvision() -> None:
    """Let torchvision be imported beside a torch without CUDA, for which its own kernels are not built.

    The models need none of them; only their names must exist.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    vars(torch.ops)["names of torchvision"] = library  # it forgets them when it is collected
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r"(?:torchvision::|register_meta\(\")(\w+)", text))):
        library.define(f"{name}(Tensor x) -> Tensor")


_torchvision()


def _transformer(model: str, config: str, **fields: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**fields))
    return made


def _words(n: int, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, WORDS, (n, length))


def _language(n: int) -> dict[str, torch.Tensor]:
    """What a language model takes; its loss is its own."""
    words = _words(n)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}


def _images(n: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(n, 3, 32, 32), "labels": torch.randint(0, CLASSES, (n,))}


def _pictures(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 64, 64), torch.randint(0, CLASSES, (n,))


SMALL = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _transformer("GPT2LMHeadModel", "GPT2Config", **SMALL, n_positions=32, n_embd=32, n_layer=4, n_head=2, **off)


gpt2_batch = _language


def llama() -> nn.Module:
    return _transformer("LlamaForCausalLM", "LlamaConfig", **LLAMA)


llama_batch = _language


def qwen2() -> nn.Module:
    return _transformer("Qwen2ForCausalLM", "Qwen2Config", **LLAMA, num_key_value_heads=2)


qwen2_batch = _language


def mixtral() -> nn.Module:
    return _transformer("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_key_value_heads=2, num_local_experts=4)


mixtral_batch = _language


def mamba() -> nn.Module:
    return _transformer("MambaForCausalLM", "MambaConfig", **SMALL, hidden_size=32, num_hidden_layers=4, state_size=8)


mamba_batch = _language


def bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _transformer("BertForMaskedLM", "BertConfig", **LLAMA, **off)


bert_batch = _language


def distilbert() -> nn.Module:
    sizes = {"vocab_size": WORDS, "dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 2}
    return _transformer("DistilBertForMaskedLM", "DistilBertConfig", **sizes, dropout=0.0, attention_dropout=0.0)


distilbert_batch = _language


def t5() -> nn.Module:
    sizes = {"vocab_size": WORDS, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 4, "num_heads": 2}
    return _transformer("T5ForConditionalGeneration", "T5Config", **sizes, dropout_rate=0.0, decoder_start_token_id=0)


def t5_batch(n: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _words(n), "labels": _words(n, 8)}


def whisper() -> nn.Module:
    layers = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    lengths = {"max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 2}
    return _transformer(
        "WhisperForConditionalGeneration", "WhisperConfig", **SMALL, **layers, **sizes, **lengths, dropout=0.0
    )


def whisper_batch(n: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(n, 8, 32), "labels": _words(n, 8)}


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES}
    return _transformer("ViTForImageClassification", "ViTConfig", **sizes, **off, **shape)


vit_batch = _images


def resnet_hf() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 2, 1], "num_labels": CLASSES}
    return _transformer("ResNetForImageClassification", "ResNetConfig", **sizes)


resnet_hf_batch = _images


def resnet50() -> nn.Module:
    import torchvision

    made: nn.Module = torchvision.models.resnet50(num_classes=CLASSES)
    return made


resnet50_batch = _pictures


def vit_torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    made: nn.Module = VisionTransformer(64, 16, 4, 2, 32, 64, num_classes=CLASSES)
    return made


vit_torchvision_batch = _pictures


def convnext() -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("convnext_atto", num_classes=CLASSES)
    return made


convnext_batch = _pictures


def unet() -> nn.Module:
    import diffusers

    made: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return made


def unet_batch(n: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    noisy, noise = torch.randn(n, 4, 16, 16), torch.randn(n, 4, 16, 16)
    step, text = torch.randint(0, 100, (n,)), torch.randn(n, 6, 16)
    return {"sample": noisy, "timestep": step, "encoder_hidden_states": text}, noise


def unet_loss(outputs: Any, noise: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs.sample, noise)


class Translator(nn.Module):
    """`nn.Transformer` between embeddings and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 2, 3, 3, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(32, WORDS)

    def forward(self, source: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        hidden = self.transformer(self.words(source), self.words(target), tgt_mask=causal, src_key_padding_mask=mask)
        found: torch.Tensor = self.out(hidden)
        return found


def nn_transformer() -> nn.Module:
    return Translator()


def nn_transformer_batch(n: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    return (_words(n), _words(n, 8)), _words(n, 8)


class Seq2Seq(nn.Module):
    """Two LSTMs with attention between them, and one table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.encoder, self.decoder = nn.LSTM(32, 32, batch_first=True), nn.LSTM(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.out = nn.Linear(32, WORDS)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        states, last = self.encoder(self.words(source))
        hidden, _ = self.decoder(self.words(target), last)
        seen, _ = self.attention(hidden, states, states, need_weights=False)
        found: torch.Tensor = self.out(hidden + seen)
        return found


def lstm() -> nn.Module:
    return Seq2Seq()


lstm_batch = nn_transformer_batch


class Siamese(nn.Module):
    """One network called on two inputs, and two heads on what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(inplace=True))
        self.same, self.kind = nn.Linear(32, 2), nn.Linear(32, CLASSES)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        between = (self.features(one) - self.features(other)).abs()
        return {"same": self.same(between), "kind": self.kind(between)}


def siamese() -> nn.Module:
    return Siamese()


def siamese_batch(n: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    inputs = torch.randn(n, 8), torch.randn(n, 8)
    return inputs, (torch.randint(0, 2, (n,)), torch.randint(0, CLASSES, (n,)))


def siamese_loss(outputs: dict[str, torch.Tensor], targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    same, kind = targets
    return nn.functional.cross_entropy(outputs["same"], same) + nn.functional.cross_entropy(outputs["kind"], kind)


class Tied(nn.Module):
    """Its first and its last layer share their weights; a block is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.out = nn.Embedding(WORDS, 32), nn.Linear(32, 32), nn.Linear(32, WORDS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.words(words)
        for _ in range(3):
            hidden = hidden + torch.tanh(self.block(hidden))
        found: torch.Tensor = self.out(hidden)
        return found


def tied() -> nn.Module:
    return Tied()


def tied_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    words = _words(n)
    return words, words.roll(-1, 1)
