"""Self-supervision from several views of each image, labelled or not (LeJEPA, Balestriero and LeCun 2025).

Axes: B sample, V view, D projection, N samples or views of them, A direction, T frequency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.data.settings import GLOBAL
from dpkd.objectives.base import Context, Head, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "sigreg"
LAST_FREQUENCY, NUM_FREQUENCIES = 3.0, 17


class SigReg(Objective):
    """The views of an image agree in a projection whose distribution is a normal one, so that it cannot collapse.

    `(1 - balance) · mean ‖z_view - c‖² / D + balance · normality`, where c is the mean over the global views of the
    image. A function of the micro-batch, and of directions that are drawn for each step.
    """

    kind: Literal["sigreg"] = "sigreg"
    views: tuple[str, ...] = (GLOBAL,)
    """Kinds of views that are compared; each needs `data.views.<name>.count` of 2 or more."""
    balance: float = Field(0.05, gt=0, lt=1)
    """Weight of the normality."""
    width: int = Field(64, ge=2)
    """D of the projection."""
    hidden: int = Field(512, ge=1)
    """Width of the hidden layer of the projection head."""
    directions: int = Field(256, ge=1)

    def needs(self) -> Needs:
        heads = {HEAD: Head("embedding", self.width, hidden=self.hidden)}
        return Needs(heads=heads, views=tuple(dict.fromkeys((GLOBAL, *self.views))), num_views=2)

    def loss(self, context: Context) -> dict[str, Tensor]:
        import torch

        size = len(context.batch.index_B)
        view_VBD = {
            name: context.student(HEAD, view=name, all_views=True).float().unflatten(0, (-1, size))
            for name in self.needs().views
        }
        all_VBD = torch.cat(list(view_VBD.values()))
        agreement = (all_VBD - view_VBD[GLOBAL].mean(0)).square().mean()
        # drawn on the CPU, so that all ranks have the same
        generator = torch.Generator().manual_seed(((context.seed << 32) + context.step) % 2**63)
        drawn_DA = torch.randn(self.width, self.directions, generator=generator)
        direction_DA = torch.nn.functional.normalize(drawn_DA, dim=0)
        from_normal = torch.stack([distance_from_normal(z_BD @ direction_DA.to(z_BD.device)) for z_BD in all_VBD])
        return {
            "agreement": self.weight * (1 - self.balance) * agreement,
            "normality": self.weight * self.balance * from_normal.mean(),
        }


def distance_from_normal(value_NA: Tensor) -> Tensor:
    """The Epps-Pulley distance of each column from a standard normal distribution, mean over the columns; a scalar.

    `N ∫ |φ_N(t) - exp(-t²/2)|² exp(-t²/2) dt` over [-3, 3] by the trapezoid rule, with the characteristic function φ_N.
    """
    import torch

    t_T = torch.linspace(0, LAST_FREQUENCY, NUM_FREQUENCIES, device=value_NA.device)
    normal_T = (-t_T.square() / 2).exp()
    angle_NAT = value_NA[..., None] * t_T
    error_AT = (angle_NAT.cos().mean(0) - normal_T).square() + angle_NAT.sin().mean(0).square()
    # the integrand is even: twice the half from 0
    return 2 * len(value_NA) * torch.trapezoid(error_AT * normal_T, t_T, dim=1).mean()
