"""A rounded block with what stays continuous in it: scales of weights, gains of norms and ratios of clipping."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from affinequant.formats import STORED
from affinequant.models.on_demand import OnDemand
from affinequant.numbers import in_units
from affinequant.numbers.weights import dequantize
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors
from affinequant.transforms.online import acting, parts_of


class Continuous(nn.Module):
    """One rounded block whose scales, gains and clips are trained; each is its start times exp(parameter).

    Online matrices stay: trained along, they left the held-out divergence 2 % higher.
    """

    def __init__(self, job: BlockJob, stored: Tensors, *, keeps: bool = False) -> None:
        """Args:
        stored: the block's committed tensors.
        keeps: what a backward pass needs is kept, and weights as the products read them; else all is made again.
        """
        super().__init__()
        self.job, self.keeps, family = job, keeps, job.family
        self.unscaled: Tensors = {}
        prefix = f"{family.blocks}.{job.index}."
        self.stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        self.groups = dict(family.input_groups())
        read = {member: site for site, members in self.groups.items() for member in members}
        self.linears = {linear.name: job.weight_grid(read[linear.name]) for linear in family.linears}
        parts = {f"{name}.{part}" for name in self.linears for part in STORED}
        norms = {edge.module for site in job.sites.values() for edge in site.sources if edge.side == "gain"}
        self.gains = [f"{norm}.weight" for norm in sorted(norms)]
        self.online = {
            site: {part: self._here(self.stored[name]) for part, name in parts_of(self.stored, members[0]).items()}
            for site, members in self.groups.items()
        }
        parts |= {name for linear in self.linears for name in parts_of(self.stored, linear).values()}
        rotation = parts_of(self.stored, family.attention)
        self.on_attention = job.cached_heads({part: self._here(self.stored[name]) for part, name in rotation.items()})
        parts |= set(rotation.values())
        self.rest = [name for name in self.stored if name not in parts and name not in self.gains]
        units = {site: self.stored.get(f"{members[0]}.input_unit") for site, members in self.groups.items()}
        self.job = replace(job, units={site: float(unit) for site, unit in units.items() if unit is not None})
        shapes = {f"{name}.scale": self.stored[f"{name}.scale"].shape for name in self.linears}
        shapes |= {name: self.stored[name].shape for name in self.gains}
        clipped = (site for site in self.groups if job.activation_grid(site) and job.clipping(site) != "none")
        shapes |= {site: torch.Size(()) for site in clipped}
        device = job.decoder.device
        self.names = list(shapes)
        self.logs = nn.ParameterList(nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes.values())

    def tensors(self) -> tuple[Mapping[str, Tensor], Tensors]:
        """The block's tensors by their names within it, those of experts on demand, and factors of rows of weights that are
        left to the outputs.

        A scale per row never meets its weight: the product with what codes stand for is scaled, which spares every step
        the making of the weight and a product for its gradient. Scales per group are in the weights.
        """
        stored = self.stored
        tensors = {name: self._here(stored[name]) for name in self.rest} | self._gains()
        factors = {}
        for name, grid in self.linears.items():
            if grid.fmt.granularity == "channel":
                factors[name] = self._scale(name).squeeze(1)
        names, experts = {f"{name}.weight": name for name in self.linears}, self.job.family.expert()
        late = [name for name in names if experts and name.startswith(f"{experts}.")]
        tensors |= {name: self._weight(names[name]) for name in names if name not in late}
        return OnDemand(tensors, late, lambda name: self._weight(names[name])), factors

    def run_all(self, x: Float[Tensor, "samples tokens hidden"]) -> Float[Tensor, "samples tokens hidden"]:
        """The block on every sample, without gradients."""
        with torch.no_grad():
            tensors, factors = self.tensors()
            return self.job.run_all(tensors, x, self.on_input, self.on_attention, factors)

    def on_input(self, site: str, x: Tensor) -> Tensor:
        """Transform and round what a site's linears read."""
        clip = None if self.job.activation_grid(site) is None else self._clip(site)
        return self.job.site_input(site, acting(self.online[site]), clip)(x)

    def forward(self, x: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """The block on a batch."""
        if torch.is_grad_enabled() and not self.keeps:
            return checkpoint(self._compute, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._compute(x)

    def changed(self) -> Tensors:
        """The trained values under full names, in the dtypes of the stage."""
        prefix = f"{self.job.family.blocks}.{self.job.index}."
        result = {prefix + name: gain.to(self.stored[name].dtype) for name, gain in self._gains().items()}
        for name in self.linears:
            result[f"{prefix}{name}.scale"] = self._scale(name)
        for site, members in self.groups.items():
            if self.job.activation_grid(site) is not None:
                result |= {f"{prefix}{member}.input_clip": self._clip(site).clone() for member in members}
        return {name: tensor.detach() for name, tensor in result.items()}

    def _compute(self, x: Tensor) -> Tensor:
        tensors, factors = self.tensors()
        return self.job.run(tensors, x, self.on_input, self.on_attention, scales=factors)

    def _weight(self, linear: str) -> Tensor:
        grid = self.linears[linear]
        if grid.fmt.granularity == "channel":
            return self._unscaled(linear)
        codes, scale = self._here(self.stored[f"{linear}.codes"]), self._scale(linear)
        return dequantize(codes, scale, self._zero(linear).to(scale), grid)

    def _unscaled(self, linear: str) -> Tensor:
        """What codes stand for at a scale of one: small numbers, exact in every dtype that is computed in."""
        if linear in self.unscaled:
            return self.unscaled[linear]
        codes = self._here(self.stored[f"{linear}.codes"]).to(self.job.decoder.dtype)
        values = self.linears[linear].value(codes, codes.new_ones(()), self._zero(linear).to(codes), out=codes)
        if self.keeps:
            self.unscaled[linear] = values
        return values

    def _zero(self, linear: str) -> Tensor:
        shape = self.stored[f"{linear}.scale"].shape
        return self._here(self.stored.get(f"{linear}.zero", torch.zeros(shape, dtype=torch.int8)))

    def _log(self, name: str) -> Tensor:
        return self.logs[self.names.index(name)]

    def _scale(self, linear: str) -> Tensor:
        start = self._here(self.stored[f"{linear}.scale"])
        unit = self.stored.get(f"{linear}.weight_unit")
        grid = in_units(self.linears[linear], None if unit is None else float(unit))
        return grid.kept(start * self._log(f"{linear}.scale").exp(), self.job.store)

    def _gains(self) -> Tensors:
        offset = self.job.family.norm_offset
        return {
            name: kept(
                (self._here(self.stored[name]).float() + offset) * self._log(name).exp() - offset, self.job.store
            )
            for name in self.gains
        }

    def _clip(self, site: str) -> Tensor:
        start = self._here(self.stored[f"{self.groups[site][0]}.input_clip"])
        return (start * self._log(site).exp()).clamp_max(1.0) if site in self.names else start

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.job.decoder.device)


def kept(value: Tensor, store: torch.dtype) -> Tensor:
    """The value as it will be stored, with the gradient passing straight through."""
    return value + (value.detach().to(store).to(value.dtype) - value.detach())
