"""The shim's list operations against megatron-core's own fallbacks, call by call."""

import pytest
import torch

from emu35.parallel import cpu
from emu35.parallel.mesh import single_process_mesh

cpu.install()

from megatron.core import utils  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPUs")


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (2, 2, 2))]


def test_norm_and_scaling_are_those_of_megatron_core() -> None:
    unused = torch.zeros(1, dtype=torch.int)
    ours, _ = clip_grads.l2_norm_impl(65536, unused, [gradients()], False)
    theirs, _ = utils.local_multi_tensor_l2_norm(65536, unused, [gradients()], False)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)

    scaled, reference = gradients(), gradients()
    clip_grads.multi_tensor_scale_impl(65536, unused, [scaled, scaled], 0.25)
    utils.local_multi_tensor_scale(65536, unused, [reference, reference], 0.25)
    torch.testing.assert_close(scaled, reference)

    copies = [torch.zeros_like(tensor) for tensor in gradients()]
    clip_grads.multi_tensor_scale_impl(65536, unused, [gradients(), copies], 0.25)
    torch.testing.assert_close(copies, reference)


def test_clipping_brings_the_norm_to_the_limit() -> None:
    single_process_mesh()
    parameters: list[torch.Tensor] = [
        torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in gradients()
    ]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    norm = float(clip_grads.get_grad_norm_fp32(gradients()))
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients()]).norm()))
    clip_grads.clip_grad_by_total_norm_fp32(parameters, 0.5, norm)
    grads = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    assert float(torch.cat(grads).norm()) == pytest.approx(0.5, rel=1e-4)
