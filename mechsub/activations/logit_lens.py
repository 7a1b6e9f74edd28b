"""The logit lens: vectors of the residual stream read through a model's own final norm and unembedding."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mechsub.checkpoints import as_computed


@dataclass(frozen=True)
class LogitLens:
    """What a model would say if its residual stream were read out at once.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al., arXiv:2303.08112, section 2.
    """

    norm: nn.Module
    """The norm before the unembedding."""
    unembedding: nn.Module
    """W_U, with its bias where it has one."""

    @torch.no_grad()
    def read(self, residual: Float[Tensor, "*vector d_model"]) -> Float[Tensor, "*vector vocabulary"]:
        """W_U norm(h) + b minus its mean over the vocabulary: logits, up to what no probability depends on.

        Computed in float32 at least, whatever the model is held in; float64 out, on the CPU.
        """
        wide = residual.to(next(self.unembedding.parameters()).device)
        for module in (self.norm, self.unembedding):
            weights = {name: as_computed(parameter) for name, parameter in module.named_parameters()}
            wide = functional_call(module, weights, (wide.to(next(iter(weights.values())).dtype),))
        logits = wide.double().cpu()
        centred: Tensor = logits - logits.mean(-1, keepdim=True)
        return centred

    def change(
        self, start: Float[Tensor, " d_model"], vector: Float[Tensor, "*vector d_model"]
    ) -> Float[Tensor, "*vector vocabulary"]:
        """lens(h + v) − lens(h), in logits: what adding v to a residual stream h changes in the reading.

        A norm divides by the length of what it is given, so that v alone has no reading of its own: lens(v) would be that of
        a stream which holds nothing but v. 0 where v is 0. At the last block's output it is what the model's own logits change
        by, where h is the stream of one prompt; of a mean over prompts it is the reading of their mean.
        """
        changed: Tensor = self.read(start + vector) - self.read(start)
        is_moved = vector.any(-1, keepdim=True).cpu()  # products of several rows are rounded otherwise than those of one
        return torch.where(is_moved, changed, torch.zeros_like(changed))
