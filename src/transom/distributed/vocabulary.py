"""The output matrix and the softmax over a vocabulary that tensor ranks divide.

Shape letters: T tokens, V rows of this rank, D model dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class OutputRows:
    """Which rows of the output matrix this rank has, and the ranks that have the others.

    Attributes:
        first: Index of the first row.
        group: The ranks that have the same hidden states and targets.
    """

    first: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight_VD: DTensor) -> OutputRows:
        """Return the rows of this rank of a matrix that tensor ranks divide by rows."""
        mesh = weight_VD.device_mesh
        each = -(-weight_VD.size(0) // mesh.size())  # as DTensor divides
        return cls(each * mesh.get_local_rank(), mesh.get_group())


def divided_log_softmax(
    logits_TV: Tensor, target_T1: Tensor, share_T1: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the log-softmax over the rows of all ranks, and -log p(target).

    Maxima, sums of exponentials and logits of targets are exchanged, three numbers per token
    (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

    Args:
        logits_TV: Logits of this rank's rows, in float32 or float64.
        target_T1: Any row of this rank, which is the target where the share is 1.
        share_T1: 1 if the target is a row of this rank, else 0.
        group: The ranks.

    Returns:
        [T, V], and [T, 1] on every rank.
    """
    most_T1 = logits_TV.amax(1, keepdim=True)
    dist.all_reduce(most_T1, dist.ReduceOp.MAX, group)
    shifted_TV = logits_TV - most_T1
    of_target_T1 = shifted_TV.gather(1, target_T1) * share_T1
    sums_2T1 = torch.stack((shifted_TV.exp().sum(1, keepdim=True), of_target_T1))
    dist.all_reduce(sums_2T1, group=group)
    log_sum_T1 = sums_2T1[0].log()
    return shifted_TV.sub_(log_sum_T1), log_sum_T1 - sums_2T1[1]
