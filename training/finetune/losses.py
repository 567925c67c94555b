"""The finetune's losses (Section 3.3): masked reconstruction, router loss, object loss.

Each is taken per record first, then averaged over the batch, so that a batch split over processes gives the
same. Masks are soft at the edges: the share of a latent pixel that the subject covers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_core.address import Address
from moa_core.routing.trace import layer_size


def with_margin(subjects: Tensor, margin: int) -> Tensor:
    """The subjects [B, h, w] and so many pixels around them.

    What ends a subject, a short hair's background, is beside it: a loss on its own pixels alone never tells of it.
    """
    return F.max_pool2d(subjects[:, None], 2 * margin + 1, stride=1, padding=margin)[:, 0]


def masked_reconstruction(predicted: Tensor, noise: Tensor, area: Tensor, weights: Tensor) -> Tensor:
    """Squared error in the area, where the subjects are: predicted, noise [B, 4, h, w], area [B, h, w] -> [].

    weights [B]: how much each record's timestep counts. A record without an area teaches nothing and counts as 0.
    """
    error = (predicted.float() - noise.float()).square().mean(dim=1)  # [B, h, w]
    per_record = (error * area).sum(dim=(1, 2)) / area.sum(dim=(1, 2)).clamp(min=1e-6)
    return (per_record * weights).mean()


def router_loss(share: Tensor, subjects: Tensor) -> Tensor:
    """Eq. 10: squared share of the experts outside the subjects, summed over pixels; both [B, h, w] -> []."""
    return ((1 - subjects) * share).square().sum(dim=(1, 2)).mean()


def object_loss(attention: Mapping[Address, Tensor], masks: Tensor, rows: Tensor, records: int) -> Tensor:
    """Eq. 12, FastComposer's balanced L1: mean attention outside a subject's mask minus the mean inside.

    attention: [K, N] per block; masks [K, h, w] of the K bound subjects; rows [K]: whose record. Averaged
    over blocks, over a record's subjects, then over all records; one without subjects counts as 0. -> [].
    """
    if not attention:
        return masks.new_zeros(())
    size = masks.shape[1:]
    per_block = []
    for weights in attention.values():
        inside = F.interpolate(masks[:, None], layer_size(size, weights.shape[1]), mode="area").flatten(1)  # [K, N]
        per_block.append(_mean(weights.float(), 1 - inside) - _mean(weights.float(), inside))
    per_subject = torch.stack(per_block).mean(dim=0)  # [K]
    totals = per_subject.new_zeros(records).index_add(0, rows, per_subject)
    return (totals / rows.bincount(minlength=records).clamp(min=1)).mean()


def shares_inside_outside(share: Tensor, subjects: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' mean share where the subjects are, and elsewhere; both [B, h, w]."""
    return tuple((share * m).sum() / m.sum().clamp(min=1e-6) for m in (subjects, 1 - subjects))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all but the first dimension."""
    values, weights = values.flatten(1), weights.flatten(1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)
