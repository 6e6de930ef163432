"""Makes a captioner of 9 million parameters that two CPU cores can train: pictures by a convolutional network that has
seen ImageNet, words by a small decoder that has seen nothing yet.

    pip install timm
    python examples/photographs/captioner.py data/flickr8k/train models/photo-captioner

The network (EfficientNet-lite0, 3.4 M) makes 49 vectors of a picture, in 16 ms of a core. The connector is the first
256 principal components of them over 400 of the pictures, so that it need not learn, and features are made once. The
decoder (5.2 M) is four layers of the Qwen2 kind, with a tokenizer of 4,000 pieces from the captions. It is a FastVLM
for transformers; `configs/flickr8k.yaml` trains it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import read_split

TOWER = "timm/tf_efficientnet_lite0.in1k"
SIDE, STRIDE, TOKENS = 224, 32, 49
HIDDEN, LAYERS, HEADS, PIECES = 256, 4, 4, 4000
PICTURES, AT_ONCE = 400, 20
FAR_RIGHT = 12.0
"""GELU leaves numbers as they are from there on."""
SPECIAL = ["<pad>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>"]
TEMPLATE = """
{%- for message in messages %}{{ '<' + message.role + '>' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif %}{{ '<eos>' if message.role == 'assistant' }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def tokenizer_of(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level pieces of these captions."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, min_frequency=3, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(captions, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    extra = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", extra_special_tokens=extra, **names)


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures are squeezed into a square."""
    square = {"height": SIDE, "width": SIDE}
    values = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}  # as the network was trained
    pictures = CLIPImageProcessor(size=square, do_center_crop=False, **values)
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def untrained(tower: str, tokenizer: PreTrainedTokenizerFast) -> FastVlmForConditionalGeneration:
    """The network as it was trained, all else at random."""
    network = AutoModel.from_pretrained(tower)
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = FastVlmConfig(
        text_config=text,
        vision_config=network.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(network.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


@torch.no_grad()
def set_connector(model: FastVlmForConditionalGeneration, features: torch.Tensor) -> float:
    """Makes it the principal components of `features` [N, width], half whitened; returns their share of the variance.

    The first layer moves them to where GELU is the identity, the second moves them back.
    """
    mean = features.mean(0)
    _, values, vectors = torch.pca_lowrank(features - mean, q=HIDDEN, center=False, niter=4)
    spread = values / len(features) ** 0.5
    weight = (vectors / (spread * spread[0]).sqrt()).T
    connector = model.model.multi_modal_projector
    connector.linear_1.weight.copy_(weight)
    connector.linear_1.bias.copy_(FAR_RIGHT - weight @ mean)
    connector.linear_2.weight.copy_(torch.eye(HIDDEN))
    connector.linear_2.bias.fill_(-FAR_RIGHT)
    return float((spread**2).sum() / features.var(0).sum())


@torch.no_grad()
def features_of(
    model: FastVlmForConditionalGeneration, processor: LlavaProcessor, pictures: Sequence[Image.Image]
) -> torch.Tensor:
    """[pictures · 49, width]."""
    found = []
    for begin in range(0, len(pictures), AT_ONCE):
        pixels = processor.image_processor(list(pictures[begin : begin + AT_ONCE]), return_tensors="pt")["pixel_values"]
        made = model.model.vision_tower(pixels).last_hidden_state
        found.append(made.flatten(2).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="training pictures with captions, as `mmrl data import` writes them")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--tower", default=TOWER, help="of the hub, or a folder (default: %(default)s)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already: name a new folder")
    torch.manual_seed(0)
    samples = list(read_split(args.data, prompt=""))
    tokenizer = tokenizer_of(caption for sample in samples for caption in sample.references)
    processor, model = processor_of(tokenizer), untrained(args.tower, tokenizer)
    some = random.Random(0).sample(samples, min(PICTURES, len(samples)))
    kept = set_connector(model, features_of(model, processor, [decode_image(sample.images[0]) for sample in some]))
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.out}: {millions:.1f} M parameters, {len(tokenizer):,} pieces; the connector keeps {kept:.0%}")


if __name__ == "__main__":
    main()
