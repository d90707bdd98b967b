"""Power-function and post-hoc EMA of network parameters (arXiv 2312.02696, Section 3 and Appendix C).

Independent of diffusion: this file needs only PyTorch and NumPy, so that it can be copied into other projects.

An averaging profile is the weight of the parameters at training time t in an average. The power-function profile of
exponent gamma at time ofs is p(t) = (gamma + 1) / ofs * (t / ofs)**gamma for 0 <= t <= ofs; `std` is its width relative
to ofs and `exp` is gamma. Times may be in any unit (images, steps), the same everywhere.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

# The widest profile has std = 0.2887 (gamma = 0, a plain mean). The bound admits that value rounded up.
MAX_STD = 0.289


def exp_to_std(exp: npt.ArrayLike) -> Array:
    """Width of the averaging kernel t**exp relative to the training time (Eq. 123). exp >= 0; result in (0, 0.289)."""
    exp = np.asarray(exp, dtype=np.float64)
    std: Array = np.sqrt((exp + 1) / ((exp + 2) ** 2 * (exp + 3)))
    return std


def std_to_exp(std: npt.ArrayLike) -> Array:
    """Exponent of the averaging kernel of relative width `std` (Eq. 126, Algorithm 2), the inverse of `exp_to_std`.

    Raises ValueError if a width is outside (0, 0.289].
    """
    std = np.asarray(std, dtype=np.float64)
    if not np.all((std > 0) & (std <= MAX_STD)):
        raise ValueError(f"EMA lengths must lie above 0 and below {MAX_STD}; got {std.tolist()}")
    s = std**-2
    # Newton's method from 1 / std, which is above the largest root of a cubic that is convex in between, so that the
    # steps approach the root from one side.
    exp = 1 / std
    for _ in range(64):
        value = ((exp + 7) * exp + (16 - s)) * exp + (12 - s)
        slope = (3 * exp + 14) * exp + (16 - s)
        step = value / slope
        exp = exp - step
        if np.all(np.abs(step) <= 1e-15 * (1 + np.abs(exp))):
            break
    return exp


def power_function_response(ofs: npt.ArrayLike, std: npt.ArrayLike, len: int, axis: int = 0) -> Array:
    """Weights of training steps 0..len-1 in the average of width `std` taken at step `ofs` (Eq. 121 and 108).

    `ofs` and `std` broadcast against each other; the steps become a new axis at `axis`, along which the result sums
    to 1. Steps after `ofs` have weight 0.
    """
    ofs, std = np.broadcast_arrays(np.asarray(ofs, dtype=np.float64), np.asarray(std, dtype=np.float64))
    ofs, exp = np.expand_dims(ofs, axis), np.expand_dims(std_to_exp(std), axis)
    shape = [1] * exp.ndim
    shape[axis] = len
    t = np.arange(len, dtype=np.float64).reshape(shape)
    # A width just above 0.2887 has a slightly negative exponent; step 0 then gets the weight of step 1, not infinity.
    base = np.where(exp < 0, np.maximum(t, 1), t) / ofs
    response: Array = np.where(t <= ofs, np.minimum(base, 1) ** exp, 0)
    response = response / response.sum(axis=axis, keepdims=True)
    return response


def power_function_correlation(
    a_ofs: npt.ArrayLike, a_std: npt.ArrayLike, b_ofs: npt.ArrayLike, b_std: npt.ArrayLike
) -> Array:
    """Inner product, over continuous time, of the profiles (a_ofs, a_std) and (b_ofs, b_std) (Eq. 151).

    The arguments broadcast; the unit is 1 / (unit of the times).
    """
    a_exp, b_exp = std_to_exp(a_std), std_to_exp(b_std)
    a_ofs, b_ofs = np.asarray(a_ofs, dtype=np.float64), np.asarray(b_ofs, dtype=np.float64)
    # Only the shared stretch of time counts. At its end the later profile is below its final value: the decay.
    decay = (np.minimum(a_ofs, b_ofs) / np.maximum(a_ofs, b_ofs)) ** np.where(a_ofs < b_ofs, b_exp, a_exp)
    product: Array = (a_exp + 1) * (b_exp + 1) * decay / ((a_exp + b_exp + 1) * np.maximum(a_ofs, b_ofs))
    return product


def power_function_beta(std: npt.ArrayLike, t_next: npt.ArrayLike, t_delta: npt.ArrayLike) -> Array:
    """Decay that tracks the profile of width `std` over a step of `t_delta` that ends at time `t_next` (Eq. 127)."""
    t_next, t_delta = np.asarray(t_next, dtype=np.float64), np.asarray(t_delta, dtype=np.float64)
    beta: Array = (1 - t_delta / t_next) ** (std_to_exp(std) + 1)
    return beta


def solve_posthoc_coefficients(
    in_ofs: npt.ArrayLike, in_std: npt.ArrayLike, out_ofs: npt.ArrayLike, out_std: npt.ArrayLike
) -> Array:
    """Weights [inputs, outputs] that combine stored averages into wanted ones (Algorithm 3); columns sum to 1.

    `in_ofs` and `in_std`, also `out_ofs` and `out_std`, broadcast to one axis each. The solution is the combination
    whose response has the least squared distance to the wanted response.
    """
    in_ofs, in_std = _profiles(in_ofs, in_std)
    out_ofs, out_std = _profiles(out_ofs, out_std)
    gram = power_function_correlation(in_ofs[:, None], in_std[:, None], in_ofs, in_std)
    rhs = power_function_correlation(in_ofs[:, None], in_std[:, None], out_ofs, out_std)
    # Scaled to profiles of unit norm; otherwise late and narrow ones would outweigh the others in the cut below.
    scale = 1 / np.sqrt(np.diagonal(gram))[:, None]
    gram, rhs = gram * scale * scale.T, rhs * scale
    # Many close profiles make the matrix singular to working precision. Directions that rounding has destroyed are left
    # out. A plain solve turns them into huge coefficients of both signs, which hardly fit better, if at all, and
    # amplify the rounding of stored parameters.
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * np.finfo(np.float64).eps
    vectors = vectors[:, kept]
    coefficients: Array = vectors @ ((vectors.T @ rhs) / values[kept, None]) * scale
    coefficients /= coefficients.sum(axis=0)
    return coefficients


def posthoc_fit(
    in_ofs: npt.ArrayLike,
    in_std: npt.ArrayLike,
    out_ofs: npt.ArrayLike,
    out_std: npt.ArrayLike,
    coefficients: npt.ArrayLike,
) -> Array:
    """Relative L2 error [outputs] between the achieved and the wanted response, over continuous time.

    0 is a perfect reconstruction, 1 is as bad as no reconstruction. Closed form from the inner products, hence exact
    to about 1e-8 times the largest coefficient.
    """
    in_ofs, in_std = _profiles(in_ofs, in_std)
    out_ofs, out_std = _profiles(out_ofs, out_std)
    x = np.asarray(coefficients, dtype=np.float64)
    gram = power_function_correlation(in_ofs[:, None], in_std[:, None], in_ofs, in_std)
    cross = power_function_correlation(in_ofs[:, None], in_std[:, None], out_ofs, out_std)
    norm = power_function_correlation(out_ofs, out_std, out_ofs, out_std)
    square = norm - 2 * (x * cross).sum(axis=0) + (x * (gram @ x)).sum(axis=0)
    # A perfect fit cancels to a rounding error of either sign.
    error: Array = np.sqrt(np.maximum(square, 0) / norm)
    return error


def posthoc_average(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], buffers: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the weighted sum of state dictionaries, with one column of `solve_posthoc_coefficients` as `weights`.

    Sums are float32, or float64 for float64. Averages have no meaning for buffers, such as the statistics of batch
    normalization: tensors named in `buffers`, and those of integers, are the last state's, so the newest comes last.
    """
    if len(states) != len(weights) or any(state.keys() != states[-1].keys() for state in states):
        raise ValueError(f"{len(weights)} weights need as many states, all with the same names")
    result = {}
    for name, last in states[-1].items():
        if name in buffers or not last.is_floating_point():
            result[name] = last.clone()
            continue
        total = torch.zeros_like(last, dtype=torch.promote_types(last.dtype, torch.float32))
        for state, weight in zip(states, weights, strict=True):
            total += state[name].to(total.dtype) * float(weight)
        result[name] = total
    return result


def _profiles(ofs: npt.ArrayLike, std: npt.ArrayLike) -> tuple[Array, Array]:
    both = np.broadcast_arrays(np.asarray(ofs, dtype=np.float64), np.asarray(std, dtype=np.float64))
    return both[0].reshape(-1), both[1].reshape(-1)


class PowerFunctionEMA:
    """Power-function averages of a network's parameters during training, one per relative width in `stds`.

    Call `update` after every optimizer step. `net` is the bare module, not its DistributedDataParallel or compiled
    wrapper. Each average is on the device of the network and takes as much memory.
    """

    def __init__(self, net: torch.nn.Module, stds: Sequence[float] = (0.050, 0.100)) -> None:
        self.net = net
        self.stds = [float(std) for std in stds]
        std_to_exp(self.stds)
        self.emas = [_frozen_copy(net) for _ in self.stds]
        self._lerp = _ParameterLerp()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the past: every average becomes the network's current parameters."""
        for ema in self.emas:
            _copy_tensors(_pairs(ema.named_parameters(), self.net.named_parameters()))

    @torch.no_grad()
    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after a step of `batch_size` images that ended at `cur_nimg` images."""
        betas = [power_function_beta(std=std, t_next=cur_nimg, t_delta=batch_size) for std in self.stds]
        self._lerp(self.emas, self.net, [1 - float(beta) for beta in betas])

    @torch.no_grad()
    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """The averaged networks, each with a suffix for its file name ('-0.050').

        These are the averages themselves, in eval mode, with the network's current buffers: copy before changing.
        """
        for ema in self.emas:
            _copy_tensors(_pairs(ema.named_buffers(), self.net.named_buffers()))
        return [(ema, f"-{std:.3f}") for std, ema in zip(self.stds, self.emas, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, in plain containers; the tensors are not copied."""
        return {"stds": list(self.stds), "emas": [dict(ema.state_dict()) for ema in self.emas]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s result. Raises ValueError if widths or tensors differ."""
        if list(state["stds"]) != self.stds or len(state["emas"]) != len(self.stds):
            raise ValueError(f"the stored averages have widths {list(state['stds'])}, this run has {self.stds}")
        for ema, tensors in zip(self.emas, state["emas"], strict=True):
            _load(ema, tensors)


class TraditionalEMA:
    """An exponential average of a network's parameters with a half-life of `halflife_Mimg` million images.

    The half-life is at most `rampup_ratio` times the training so far, so that the random start is soon forgotten;
    None removes this limit. `net` is as for `PowerFunctionEMA`.
    """

    def __init__(
        self, net: torch.nn.Module, halflife_Mimg: float = float("inf"), rampup_ratio: float | None = 0.09
    ) -> None:
        self.net = net
        self.halflife_Mimg = float(halflife_Mimg)
        self.rampup_ratio = rampup_ratio
        self.ema = _frozen_copy(net)
        self._lerp = _ParameterLerp()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the past: the average becomes the network's current parameters."""
        _copy_tensors(_pairs(self.ema.named_parameters(), self.net.named_parameters()))

    @torch.no_grad()
    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after a step of `batch_size` images that ended at `cur_nimg` images."""
        halflife_Mimg = self.halflife_Mimg
        if self.rampup_ratio is not None:
            halflife_Mimg = min(halflife_Mimg, cur_nimg / 1e6 * self.rampup_ratio)
        beta = 0.5 ** (batch_size / max(halflife_Mimg * 1e6, 1e-8))
        self._lerp([self.ema], self.net, [1 - beta])

    @torch.no_grad()
    def get(self) -> torch.nn.Module:
        """The averaged network itself, in eval mode, with the network's current buffers: copy before changing."""
        _copy_tensors(_pairs(self.ema.named_buffers(), self.net.named_buffers()))
        return self.ema

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, in plain containers; the tensors are not copied."""
        settings = {"halflife_Mimg": self.halflife_Mimg, "rampup_ratio": self.rampup_ratio}
        return {**settings, "ema": dict(self.ema.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s result. Raises ValueError if settings or tensors differ."""
        ours, theirs = (self.halflife_Mimg, self.rampup_ratio), (state["halflife_Mimg"], state["rampup_ratio"])
        if ours != theirs:
            raise ValueError(f"the stored average has (halflife_Mimg, rampup_ratio) = {theirs}, this run has {ours}")
        _load(self.ema, state["ema"])


Named = list[tuple[torch.Tensor, torch.Tensor]]


def _frozen_copy(net: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(net).eval().requires_grad_(False)


def _pairs(ours: Any, theirs: Any) -> Named:
    """Pair the tensors of two modules, in order. Raises ValueError if names or shapes differ."""
    first, second = dict(ours), dict(theirs)
    shapes = [{name: tuple(tensor.shape) for name, tensor in named.items()} for named in (first, second)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        different = dict(set(shapes[0].items()) ^ set(shapes[1].items())) or list(shapes[1])
        raise ValueError(f"the network's tensors no longer match its average's: {different}")
    return list(zip(first.values(), second.values(), strict=True))


def _copy_tensors(pairs: Named) -> None:
    for ours, theirs in pairs:
        ours.copy_(theirs)


class _ParameterLerp:
    """Moves each average's parameters towards the network's by its weight, in a few kernels for all of them.

    The parameters are paired by name at the first call, and again when those of the network or an average are others.
    """

    def __init__(self) -> None:
        self._known: list[torch.nn.Parameter | None] = []
        self._pairs: list[Named] = []

    def __call__(self, averages: Sequence[torch.nn.Module], net: torch.nn.Module, weights: Sequence[float]) -> None:
        params = [param for module in (net, *averages) for param in _all_parameters(module)]
        if len(params) != len(self._known) or any(a is not b for a, b in zip(params, self._known, strict=True)):
            self._pairs = [_pairs(average.named_parameters(), net.named_parameters()) for average in averages]
            self._known = params
        ours, theirs = ([pair[side] for named in self._pairs for pair in named] for side in (0, 1))
        if not ours:
            return
        each = [weight for weight, named in zip(weights, self._pairs, strict=True) for _ in named]
        try:
            torch._foreach_lerp_(ours, theirs, each)
        except TypeError:  # PyTorch before 2.7 takes one weight per call
            for weight, named in zip(weights, self._pairs, strict=True):
                torch._foreach_lerp_([pair[0] for pair in named], [pair[1] for pair in named], weight)


def _all_parameters(module: torch.nn.Module) -> Iterator[torch.nn.Parameter | None]:
    """Yield what module.parameters() does and a little more, in a fraction of the time: this runs after each step."""
    yield from module._parameters.values()
    for child in module._modules.values():
        if child is not None:
            yield from _all_parameters(child)


def _load(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ValueError(f"the stored average does not belong to this network: {error}") from error
