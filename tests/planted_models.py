"""Tiny models of the real classes that decide as their weights are planted here, whatever the rounding.

For preparing data, a picture shows people as boxes, red or blue, on green: the captioner says CAPTION of every picture,
the segmenter finds the boxes, and the matcher takes what is blue for a man and what is red for a woman. For evaluating,
FaceNet tells faces apart by their colour, and the faint base draws pictures in which nobody finds one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from facenet_pytorch import InceptionResnetV1
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from training.host.tokenizer import clip_tokenizer
from training.host.toy_base import load_toy, save_toy

CAPTION = "one man beside a woman"
"""Each of its words follows from the one before."""
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_TEXT = TINY | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
CLIP_VISION = TINY | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
RED, BLUE = 0, 2
"""Channels of a picture."""


def silent(model: nn.Module) -> nn.Module:
    """All weights 0 but the norms' scales: no residual branch adds anything, and what enters comes out, normed."""
    for parameter in model.parameters():
        parameter.data.zero_()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.fill_(1.0)
    return model.eval()


def make_captioner(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    config = Blip2Config(
        vision_config=TINY | {"image_size": 16, "patch_size": 8},
        qformer_config=TINY | {"encoder_hidden_size": 16, "vocab_size": 40},
        text_config={
            "model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": len(tokenizer) + 8, "word_embed_proj_dim": 16, "max_position_embeddings": 128,
            "pad_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "tie_word_embeddings": False,
        },
        num_query_tokens=2,
    )  # fmt: skip
    model = silent(Blip2ForConditionalGeneration(config))
    read = model.language_model.get_input_embeddings().weight.data  # the n-th word is axis n, anything before them 0
    say = model.language_model.get_output_embeddings().weight.data  # after axis n comes word n + 1
    words = tokenizer(CAPTION)["input_ids"][1:]  # the last one ends the text
    read[:, 0] = 1.0
    model.language_projection.bias.data[0] = 1.0  # what a picture is to the language model
    for n, word in enumerate(words):
        say[word, n] = 1.0
        read[word] = torch.eye(16)[n + 1]
    processor = Blip2Processor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer, num_query_tokens=2)
    processor.tokenizer.add_tokens(["<image>"], special_tokens=True)
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_segmenter(folder: Path) -> None:
    """Four queries: what is red and what is blue, both a person; everything, a dog; and nothing."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=4, num_attention_heads=2,
        encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16,
        id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1},
    )  # fmt: skip
    model = silent(Mask2FormerForUniversalSegmentation(config))
    backbone, decoder = model.model.pixel_level_module.encoder, model.model.pixel_level_module.decoder
    patches = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d)).weight.data
    for axis, colour in enumerate((RED, BLUE)):
        patches[axis, colour], patches[axis + 2, colour] = 1.0, -1.0  # a mean of 0, so that norms keep the sign
        decoder.adapter_1[0].weight.data[axis, axis] = 1.0
        decoder.layer_1[0].weight.data[axis, axis, 1, 1] = 1.0
        decoder.mask_projection.weight.data[axis, axis] = 1.0
    decoder.mask_projection.bias.data[:3] = torch.tensor([-1.0, -1.0, 0.2])  # the norms give 0 elsewhere, above 1 there
    transformer = model.model.transformer_module
    transformer.queries_features.weight.data.copy_(torch.eye(4, 32))
    for module in transformer.decoder.mask_predictor.mask_embedder.modules():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
    model.class_predictor.weight.data[:, :4] = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def make_matcher(folder: Path) -> None:
    model = silent(CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8)))
    man, woman = (clip_tokenizer()(word)["input_ids"][1] for word in ("man", "woman"))
    words = model.text_model.get_input_embeddings().weight.data
    words[man, 0] = words[woman, 1] = 1.0
    patches = model.vision_model.embeddings.patch_embedding.weight.data
    for axis, colour, other in ((0, BLUE, RED), (1, RED, BLUE)):
        patches[axis, colour], patches[axis, other] = 1.0, -1.0
    for name, module in model.named_modules():  # the last token and the class token see all others alike
        if name.endswith(("v_proj", "out_proj", "text_projection", "visual_projection")):
            nn.init.eye_(module.weight)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), clip_tokenizer()).save_pretrained(folder)


def make_facenet(file: Path) -> None:
    """As the published file, with its classifier. Six channels say how much one colour outweighs another."""
    model = silent(InceptionResnetV1(classify=True, num_classes=3))
    stem = [getattr(model, f"conv2d_{name}").conv.weight.data for name in ("1a", "2a", "2b", "3b", "4a", "4b")]
    for channel, (more, less) in enumerate(itertools.permutations(range(3), 2)):
        middle = [weight.shape[-1] // 2 for weight in stem]
        stem[0][channel, more, 1, 1], stem[0][channel, less, 1, 1] = 1.0, -1.0
        for weight, at in zip(stem[1:], middle[1:], strict=True):
            weight[channel, channel, at, at] = 1.0
        # Two layers put what they pool behind their convolutions' 640 and 896 channels.
        model.last_linear.weight.data[channel, 640 + 896 + channel] = 1.0
    save_file(model.state_dict(), file)


def make_faint_base(trained: Path, file: Path) -> None:
    """The toy base, but that its pictures hardly differ from grey."""
    base = load_toy(trained)
    last = base.autoencoder.decoder["layers"][-1]
    last.weight.data *= 0.05
    last.bias.data.fill_(0.5)
    save_toy(base, file)
