"""A rank of test_quantizer_ranks: its part of the vectors through both forms of the quantizer.

    torchrun ... quantizer_worker.py INPUTS RESULT

Rank 0 writes both entropies, the mean loss and the averaged gradients of every case.
"""

import sys

import torch
import torch.distributed as dist

from emu35.vision.ibq import nearest, sharp
from emu35.vision.ibq.entropy import EntropySettings
from emu35.vision.ibq.propagation import quantize, quantize_plain

FORMS = {"chunked": quantize, "plain": quantize_plain}


def main(inputs: str, result: str) -> None:
    dist.init_process_group("gloo")
    # The number of chunks then depends on the number of vectors, which ranks may differ in.
    nearest.CPU_CHUNK_ELEMENTS, nearest.MIN_CHUNK = 256, 1
    cases = torch.load(inputs)
    found = {(name, form): measure(form, **case) for name, case in cases.items() for form in FORMS}
    if dist.get_rank() == 0:
        torch.save(found, result)
    dist.destroy_process_group()


def measure(form, *, parts, codebook_KD, gradients, share):
    """As a trainer does: backward on the rank's own loss, then the mean of the gradients."""
    rank = dist.get_rank()
    sharp.CANDIDATE_SHARE = share
    z_ND = parts[rank].requires_grad_()
    codebook_KD = codebook_KD.requires_grad_()
    settings = EntropySettings(temperature=0.1, group=dist.group.WORLD)
    found = FORMS[form](z_ND, codebook_KD=codebook_KD, entropy=settings)
    terms = found.entropy
    loss = terms.loss(sample_weight=0.7, codebook_weight=1.3)
    loss = loss + (found.z_q_ND * gradients[rank]).sum(1).mean()
    wanted = torch.autograd.grad(loss, (z_ND, codebook_KD))
    sums = torch.stack([loss.detach(), terms.sample.detach(), terms.codebook.detach()])
    dist.all_reduce(sums)
    dist.all_reduce(wanted[1])
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, wanted[0])
    ranks = dist.get_world_size()
    return {
        "numbers": sums / ranks,
        "grad_codebook": wanted[1] / ranks,
        "grad_z": torch.cat(everyone) / ranks,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
