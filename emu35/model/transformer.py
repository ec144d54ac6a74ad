"""The language model: megatron-core's GPTModel, stopped at the hidden states."""

import torch

from emu35.config import LMConfig
from emu35.model.context import AttentionContext
from emu35.parallel import cpu

cpu.install()

from megatron.core.models.gpt import GPTModel  # noqa: E402


class Emu35Model(GPTModel):
    """GPTModel that returns hidden states and never forms full logits (32,768 x 282,926 in fp32
    would be 37 GB): the chunked loss and the sampler read ``output_layer.weight`` themselves.

    ``vocabulary_size`` counts real rows; the weight may hold more so that it divides over
    tensor-parallel ranks (see ``padded_vocabulary``).
    """

    lm_config: LMConfig
    vocabulary_size: int

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the output projection, [V / tp, H]; last pipeline stage only."""
        weight = self.output_layer.weight
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    def forward(  # type: ignore[override]
        self, tokens_BS: torch.Tensor, *, context: AttentionContext
    ) -> torch.Tensor:
        """Token ids int64 [B, S] -> hidden states [S, B, H] after the final norm (on the last
        pipeline stage; before it, the activations handed to the next one). Under sequence
        parallelism S is this rank's slice."""
        hidden_SBH = None
        if self.pre_process:
            hidden_SBH = self.embedding(input_ids=tokens_BS, position_ids=None)
            if self.training and torch.is_grad_enabled() and not hidden_SBH.requires_grad:
                # A frozen embedding. Recomputation asks its input, and nothing else, whether there
                # is a gradient to compute: adapters would get none and nobody would be told.
                hidden_SBH.requires_grad_()
        return self.decoder(
            hidden_states=hidden_SBH, attention_mask=None, packed_seq_params=context
        )


def padded_vocabulary(vocabulary_size: int, *, tp: int) -> int:
    """Rows of the embedding and the output layer: the next multiple of ``tp``."""
    return -(-vocabulary_size // tp) * tp
