"""Teachers from folders of transformers checkpoints: tiny ones, against transformers itself."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from emu35.config import IBQConfig
from emu35.config.tokenizer_objective import DistillationConfig
from emu35.errors import ConfigError
from emu35.vision.ibq.objective.distillation import build_distillation
from emu35.vision.ibq.objective.vision_tower import VisionTower

transformers: Any = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SIDE, GRID = 32, 4
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SIZES, "image_size": SIDE, "patch_size": SIDE // GRID}
TEXT = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}


def save(model: Any, folder: Path, *, processor: Any = None) -> Any:
    """``model`` with weights that tell places and pictures apart, saved with its processor."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.eval().save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    (processor or transformers.SiglipImageProcessor(size=side)).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("siglip")
    config = transformers.SiglipVisionConfig(**VISION)
    return folder, save(transformers.SiglipVisionModel(config), folder)


def pixels(*, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(2, 3, height // 4, width // 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, scale_factor=4, mode="nearest")


def as_grid(states_BPC: torch.Tensor, *, skipped: int = 0) -> torch.Tensor:
    rows = [states_BPC[:, skipped + GRID * row : skipped + GRID * (row + 1)] for row in range(GRID)]
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2)


def test_siglip_gives_its_last_hidden_states_as_a_grid(siglip: tuple[Path, Any]) -> None:
    folder, model = siglip
    tower = VisionTower(folder, device=CPU)
    picture = pixels().requires_grad_()
    features = tower(picture)
    with torch.no_grad():
        # SigLIP normalises with mean and deviation 0.5: pixels in [-1, 1] are what it takes.
        expected = as_grid(model(pixel_values=picture).last_hidden_state)
    assert features.shape == (2, tower.channels, GRID, GRID) == (2, 24, 4, 4)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not features.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower(picture), features)


def test_the_tower_of_a_checkpoint_with_text_is_taken(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = save(transformers.SiglipModel(config), tmp_path)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels()).last_hidden_state
    found = VisionTower(tmp_path, device=CPU)(pixels())
    torch.testing.assert_close(found, as_grid(expected), rtol=1e-4, atol=1e-5)


def test_class_tokens_are_left_out_and_the_folders_normalisation_is_used(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
        )
    )
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    processor = transformers.SiglipImageProcessor(image_mean=mean, image_std=std)
    save(model, tmp_path, processor=processor)
    shown = (pixels() + 1) / 2
    normal = (shown - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        states = model(pixel_values=normal).last_hidden_state
    assert states.shape[1] == GRID**2 + 1
    found = VisionTower(tmp_path, device=CPU)(pixels())
    torch.testing.assert_close(found, as_grid(states, skipped=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (16, 24)])
def test_pictures_of_other_sizes_are_resized_as_siglip_does(
    siglip: tuple[Path, Any], size: tuple[int, int]
) -> None:
    folder, model = siglip
    picture = (pixels(height=size[0], width=size[1])[:1] + 1) * 127.5
    raster = picture[0].permute(1, 2, 0).round().byte().numpy()
    square = np.asarray(
        Image.fromarray(raster).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32
    )
    prepared = torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = as_grid(model(pixel_values=prepared).last_hidden_state)
    found = VisionTower(folder, device=CPU)(
        torch.from_numpy(raster / 127.5 - 1).permute(2, 0, 1)[None].float()
    )
    # Pillow rounds to whole levels in between.
    similar = torch.nn.functional.cosine_similarity(found, expected, dim=1)
    assert float(similar.min()) > 0.999


def test_the_stage_distils_from_it(siglip: tuple[Path, Any]) -> None:
    config = DistillationConfig(weight=0.5, teacher=str(siglip[0]), layer=2, hidden=8)
    model = IBQConfig(ch=32, ch_mult=[1, 2], n_embed=16)
    term = build_distillation(config, model=model, seed=0, device=CPU)
    assert term is not None
    loss = term(torch.randn(2, 32, 64, 64), pixels_B3HW=pixels())
    assert -1 <= float(loss.detach()) <= 1


def refused(folder: Path, *, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        VisionTower(folder, device=CPU)


def copy_of(siglip: tuple[Path, Any], folder: Path) -> Path:
    for path in siglip[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_checkpoint_that_lacks_weights_is_refused(
    siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    """transformers would draw them at random."""
    path = copy_of(siglip, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.fc1" not in name}
    assert len(lacking) == len(tensors) - 2
    save_file(lacking, path, metadata={"format": "pt"})
    refused(tmp_path, match=r"lacks weights of siglip_vision_model: .*layers\.1\.mlp\.fc1")


def test_folders_that_are_no_teachers_are_refused(siglip: tuple[Path, Any], tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", match="has no preprocessor_config.json or")
    copy_of(siglip, tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, match=r"has no config\.json; give the folder of a SigLIP")
    copy_of(siglip, tmp_path)
    processor = next(path for path in tmp_path.iterdir() if "processor" in path.name)
    said = json.loads(processor.read_text())
    processor.write_text(json.dumps(said | {"image_std": [0.5, 0.0, 0.5]}))
    refused(tmp_path, match=r"image_std=\[0.5, 0.0, 0.5\]; they must be three numbers")
    processor.write_text("{}")
    refused(tmp_path, match="it must have image_mean and image_std")
    copy_of(siglip, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, match="cannot be loaded")


def test_a_network_of_patches_of_any_aspect_is_refused(tmp_path: Path) -> None:
    config = transformers.Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16)
    save(transformers.Siglip2VisionModel(config), tmp_path)
    refused(tmp_path, match=r"siglip2_vision_model.* use SigLIP of a fixed resolution")


def test_without_transformers_the_extra_is_named(
    siglip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(siglip[0], match=r"needs transformers.*pip install 'emu35\[verify\]'")
