"""WaveFT: a few wavelet coefficients of the weight's change are trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from veneer.adapter import Shared, WeightAdapter
from veneer.config import WeightConfig, check_positive
from veneer.errors import ConfigError
from veneer.methods.fourierft import places
from veneer.registry import register
from veneer.sites import Site


class Budget(Shared):
    """How many coefficients every place gets."""

    def __init__(self, sites: Mapping[str, Site], config: WaveFTConfig) -> None:
        super().__init__(sites, config)
        sizes = {path: site.shape[0] * site.shape[1] for path, site in sites.items()}
        self.counts = {path: config.at(path).n_frequency for path in sizes}
        if config.proportional_parameters:
            share = config.n_frequency * len(sizes) / sum(sizes.values())
            self.counts = {path: max(1, round(share * size)) for path, size in sizes.items()}


class WaveFT(WeightAdapter):
    r"""Adds a sum of n wavelets, each times a trained coefficient.

        W' = W + s sum over i of c_i row_i col_i^T

    which is the inverse wavelet transform, of one level, of a matrix that holds c_i at n places and 0 elsewhere; row_i
    and col_i are the transform's short filters there. The places are drawn from the configuration's seed, so a file
    holds c alone. With `use_idwt=False` the c_i are elements of the change themselves.

    Trains: c (n,), zero at the start.
    Cost: n parameters a layer; n f^2 additions to the weight a call, where f is the length of the filter, 2 by default.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of matrices every matrix has coefficients of its own, at the same places.
    Raises: ConfigError for more coefficients than the weight has elements.
    Source: Bilican et al. 2025, arXiv:2505.12532, eq. 4 and 5; filters: Daubechies 1992, Ten Lectures on Wavelets.
    """

    shares = Budget
    shared: Budget
    rows: Tensor
    row_values: Tensor
    columns: Tensor
    column_values: Tensor

    def __init__(self, site: Site, config: WaveFTConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = config.init_weights

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        out_features, in_features = self.site.shape
        count, size = self.shared.counts[path], out_features * in_features
        if count > size:
            raise ConfigError(
                f"{path}: n_frequency={count} on a weight of {out_features} x {in_features}; {size} at most was "
                "expected. Lower it, or set n_frequency_pattern for this layer."
            )
        wavelet = self.config.wavelet_family if self.config.use_idwt else None
        found = wavelets(out_features, in_features, count, self.config.random_loc_seed, wavelet)
        for name, tensor in zip(("rows", "row_values", "columns", "column_values"), found, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.spectrum = nn.Parameter(torch.empty(*self.site.batch, count))

    def reset(self) -> None:
        if self.starts_as_base:
            nn.init.zeros_(self.spectrum)
        else:
            nn.init.normal_(self.spectrum, std=0.01)

    def adapt(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.spectrum.dtype)
        scaled = (self.config.scaling * self.spectrum.to(wide))[..., None] * self.row_values  # (n, f)
        values = (scaled[..., None] * self.column_values[:, None]).flatten(-3).to(wide)  # (n f f,)
        index = (self.rows[:, :, None] * self.site.shape[1] + self.columns[:, None]).flatten()
        return weight.to(wide).flatten(-2).index_add(-1, index, values).view(weight.shape)

    def to_file(self) -> dict[str, Tensor]:
        return {"waveft_spectrum": self.spectrum}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("spectrum", tensors["waveft_spectrum"])


@functools.lru_cache(maxsize=16)  # the same for all layers of one shape
def wavelets(
    out_features: int, in_features: int, count: int, seed: int, family: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns that each wavelet touches, and its values there: four tensors `(n, f)`.

    Coefficients are laid out in four quarters of a matrix with room for the filters' ends, as `peft` does it: those of
    the right half filter rows with the high pass, those of the lower half filter columns with it.
    """
    chosen = places(out_features * in_features, count, seed)
    spots = (chosen // in_features, chosen % in_features)
    if family is None:
        ones = torch.ones(count, 1, dtype=torch.float64, device="cpu")
        return spots[0][:, None], ones, spots[1][:, None], ones
    low = torch.tensor(low_pass(family), dtype=torch.float64, device="cpu")
    length = len(low)
    taps = torch.arange(length, device="cpu")
    high = low.flip(0) * (-1.0) ** taps
    halves = [(side + length - 1) // 2 for side in (out_features, in_features)]
    spots = (spots[0] + length // 2 - 1, spots[1] + length // 2 - 1)
    found: list[Tensor] = []
    for axis, side in enumerate((out_features, in_features)):
        touched = 2 * (spots[axis] % halves[axis])[:, None] + taps - (length - 2)
        filters = torch.where((spots[1 - axis] >= halves[1 - axis])[:, None], high, low)
        found += [touched.clamp(0, side - 1), filters * ((touched >= 0) & (touched < side))]
    return found[0], found[1], found[2], found[3]


# Which of the roots inside the unit circle, by their real part, a symlet takes the inverse of.
SYMLETS = {2: "0", 3: "0", 4: "10", 5: "01", 6: "101", 7: "001", 8: "1010", 9: "0110", 10: "10101"}
COIFLETS = {
    1: [
        -0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578, -0.07273261951252645,
        -0.015655728135791993,
    ],
    2: [
        0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629, 0.8127236354494135,
        0.4170051844232391, -0.07648859907828076, -0.05943441864643109, 0.02368017194684777, 0.005611434819368834,
        -0.0018232088709110323, -0.000720549445520347,
    ],
    3: [
        -0.003793512864380802, 0.007782596425672746, 0.023452696142077168, -0.06577191128146936, -0.06112339000297255,
        0.40517690240911824, 0.7937772226260872, 0.42848347637737, -0.07179982161915484, -0.08230192710629983,
        0.03455502757329774, 0.015880544863669452, -0.009007976136730624, -0.0025745176881367972,
        0.0011175187708306303, 0.0004662169598204029, -7.0983302506379e-05, -3.459977319727278e-05,
    ],
}  # fmt: skip


def family_of(name: str) -> tuple[str, int]:
    """Family and number of vanishing moments, or of their pairs for coiflets, of a wavelet's name.

    Raises:
        ConfigError: The wavelet is not known.
    """
    family = name.rstrip("0123456789")
    order = int(name.removeprefix(family) or 0)
    if order not in {"db": range(1, 39), "sym": SYMLETS, "coif": COIFLETS}.get(family, ()):
        raise ConfigError(
            f"WaveFTConfig: wavelet_family={name!r}; one of db1 to db38, sym2 to sym{max(SYMLETS)} and coif1 to "
            f"coif{max(COIFLETS)} was expected."
        )
    return family, order


@functools.cache
def low_pass(name: str) -> list[float]:
    """The low-pass filter with which the wavelet's coefficients are put together; its squares sum to one.

    Daubechies' filter with N vanishing moments is (1 + z)^N times a factor for one root out of each pair z, 1/z of
    P((2 - z - 1/z) / 4), P(y) = sum over k < N of binomial(N - 1 + k, k) y^k: the one within the unit circle. A symlet
    takes other halves of the pairs, for a filter that is nearly symmetric.
    """
    import mpmath  # comes with torch, by way of sympy; wanted here alone

    family, order = family_of(name)
    if family == "coif":
        return COIFLETS[order]
    with mpmath.workdps(50):
        terms = [mpmath.binomial(order - 1 + k, k) for k in reversed(range(order))]
        halves = [1 - 2 * y for y in (mpmath.polyroots(terms, maxsteps=500, extraprec=200) if order > 1 else [])]
        pairs = [(half + mpmath.sqrt(half**2 - 1), half - mpmath.sqrt(half**2 - 1)) for half in halves]
        roots = [min(pair, key=abs) for pair in pairs]
        if family == "sym":
            real = sorted({round(float(z.real), 12) for z in roots})
            roots = [1 / z if SYMLETS[order][real.index(round(float(z.real), 12))] == "1" else z for z in roots]
        taps = [mpmath.mpf(1)]
        for root in [*[-1] * order, *roots]:
            taps = [a - root * b for a, b in zip([*taps, 0], [0, *taps], strict=True)]
        total = sum(tap.real for tap in taps)
        return [float(mpmath.sqrt(2) * tap.real / total) for tap in taps]


@register("waveft")
@dataclass
class WaveFTConfig(WeightConfig):
    """Configuration of `WaveFT`, field by field that of `peft`.

    Args:
        n_frequency: Number of coefficients a layer.
        scaling: What the change is multiplied by.
        wavelet_family: The wavelet: db1 (Haar) to db38, sym2 to sym10, coif1 to coif3.
        use_idwt: False trains elements of the weight itself.
        random_loc_seed: Seed of the places of the coefficients.
        n_frequency_pattern: `n_frequency` by module name or regular expression, where it differs.
        proportional_parameters: Spread the same sum over the layers in proportion to their size.
        init_weights: True starts from zero; False from small normal coefficients.

    Raises:
        ConfigError: A number of coefficients that is not positive, or a wavelet that is not known.
    """

    adapter = WaveFT
    peft_name = "WAVEFT"
    patterns = {"n_frequency_pattern": "n_frequency"}  # noqa: RUF012  # read only

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_frequency", "n_frequency_pattern")
        family_of(self.wavelet_family)
        if self.proportional_parameters and self.n_frequency_pattern:
            raise ConfigError(
                "WaveFTConfig: n_frequency_pattern has no effect with proportional_parameters=True. Leave one out."
            )
