"""The network under the names and shapes of the release."""

import json
from pathlib import Path

import pytest
import torch

from emu35.config import IBQConfig
from emu35.vision.ibq.blocks import Downsample
from emu35.vision.ibq.model import IBQ, Through

GOLDEN = Path(__file__).parent.parent / "golden" / "ibq_state_dict_shapes.json"


def tiny_config(**changes: object) -> IBQConfig:
    values: dict[str, object] = {
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "resolution": 32,
        "z_channels": 16,
        "embed_dim": 8,
        "n_embed": 64,
    }
    return IBQConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.golden
def test_full_config_has_the_official_tensors():
    with torch.device("meta"):
        model = IBQ(IBQConfig())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == json.loads(GOLDEN.read_text())
    assert sum(weight.numel() for weight in model.parameters()) == 455_336_963


def test_one_code_covers_factor_pixels_in_each_direction():
    config = tiny_config()
    model = IBQ(config).eval()
    codes_BHW = model.encode(torch.zeros(2, 3, 8, 20))
    assert codes_BHW.shape == (2, 2, 5)
    assert codes_BHW.dtype == torch.int64
    assert model.decode(codes_BHW).shape == (2, 3, 8, 20)


def test_training_and_codec_agree_on_codes_and_pixels():
    torch.manual_seed(0)
    model = IBQ(tiny_config()).eval()
    pixels_B3HW = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        trained = model(pixels_B3HW)
    codes_BHW = model.encode(pixels_B3HW)
    assert torch.equal(trained.quantized.codes_BHW, codes_BHW)
    torch.testing.assert_close(trained.pixels_B3HW, model.decode(codes_BHW))


def test_strided_convolutions_pad_right_and_below_only():
    """The first output sees the first pixel through the kernel's corner, and no other does."""
    torch.manual_seed(0)
    halve = Downsample(4)
    x_BCHW = torch.zeros(1, 4, 8, 8)
    x_BCHW[:, :, 0, 0] = 1.0
    response_BCHW = (halve(x_BCHW) - halve(torch.zeros_like(x_BCHW))).detach()
    # With symmetric padding the first output would see row 0 through the kernel's middle row.
    corner_C = halve.conv.weight[:, :, 0, 0].sum(1).detach()
    torch.testing.assert_close(response_BCHW[0, :, 0, 0], corner_C)
    assert (response_BCHW.abs().sum((0, 1)) > 0).sum() == 1


def test_attention_goes_by_the_training_resolution():
    names = IBQ(tiny_config(attn_resolutions=[16])).state_dict().keys()
    assert any(name.startswith("encoder.down.1.attn.0.") for name in names)
    assert not any(name.startswith("encoder.down.2.attn.") for name in names)


def test_bypassing_the_codebook_trains_without_it():
    model = IBQ(tiny_config())
    output = model(torch.zeros(1, 3, 8, 8), through=Through.nothing)
    output.pixels_B3HW.sum().backward()
    assert output.quantized is None
    assert model.quantize.embedding.weight.grad is None
    assert model.quant_conv.weight.grad is not None
