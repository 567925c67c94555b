"""What a row of a U-Net call shows of which picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NOWHERE = (0, 0, 0, 0)
"""The box of a view of some part of its picture that nobody knows."""


@dataclass(frozen=True)
class View:
    """What a row of a U-Net call shows."""

    picture: int
    """Its index in the batch that is sampled."""
    box: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in latent pixels; None: the whole picture."""
    number: int | None = None
    """Its index in the batch that the sampled one was taken out of; None: the same."""

    @property
    def variant(self) -> int:
        """Which of a subject's variants it shows."""
        return self.picture if self.number is None else self.number

    def within(self, size: tuple[int, int]) -> tuple[int, slice, slice]:
        """The index of what is shown in [P, h, w]."""
        top, left, height, width = self.box or (0, 0, *size)
        return self.picture, slice(top, top + height), slice(left, left + width)

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """What is shown of an area [h, w] in a row [..., h', w']; all of it where that is not known."""
        size = tuple(whole.shape)
        return whole[self.within(size)[1:]] if self.fits(size, like) else whole.new_ones(like.shape[-2:])

    def fits(self, size: tuple[int, int], like: Tensor) -> bool:
        """Whether a row [..., h, w] is what the view says of latents of that size: hosts know other ways to cut."""
        _, rows, columns = self.within(size)
        shown = len(range(*rows.indices(size[0]))), len(range(*columns.indices(size[1])))
        return shown == tuple(like.shape[-2:])
