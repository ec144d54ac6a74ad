"""Checkpoints of CLIP and SigLIP with a few random weights, as transformers saves them."""

from pathlib import Path

import torch
import transformers

IMAGE, PATCH, LENGTH = 32, 8, 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SIZES, "image_size": IMAGE, "patch_size": PATCH}
START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip(folder: Path, *, siglip: bool = False) -> Path:
    """A checkpoint in ``folder``: model, image processor, tokenizer of single letters."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    tokens = {piece: number for number, piece in enumerate(pieces)}
    text = {**SIZES, "vocab_size": len(tokens), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": tokens[START], "eos_token_id": tokens[END]}
    tokenizer = transformers.CLIPTokenizer(vocab=tokens, merges=[], model_max_length=LENGTH)
    side = {"height": IMAGE, "width": IMAGE}
    torch.manual_seed(5)
    if siglip:
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text, vision_config=VISION)
        )
        images = transformers.SiglipImageProcessor(size=side)
        processor = transformers.SiglipProcessor(image_processor=images, tokenizer=tokenizer)
    else:
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
        model = transformers.CLIPModel(config)
        images = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=side)
        processor = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    with torch.no_grad():
        # As they are made, tiny models see next to no difference between two inputs.
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
