"""A network of the user's own as a denoiser, called like `Precond`: the contract, and the check that it is kept.

The class is made like `UNet`, cls(img_resolution, img_channels, label_dim, **arguments), and is one of two kinds:

    raw network F    forward(x, noise_labels, class_labels), as `UNet` is called
    whole denoiser   forward(x, sigma, class_labels), as `Precond` is called: it has a parameter named sigma

Shape legend: N images, C channels, K conditioning channels, H x W pixels, L labels.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dnnlib.errors import ConfigError
from dnnlib.own_part import OwnPart
from torch_utils.precision import unchanged_random_state
from training.fast.training_network import fully_connect
from training.networks_edm2 import MPConv, MPFourier, image_size, preconditioning, scaled_condition

_MADE_WITH = ("img_resolution", "img_channels", "label_dim")  # before the arguments that the user gives
_LOGVAR_CHANNELS = 128  # of our uncertainty head, as in Precond
_SIGMA_DATA = 0.5  # of networks that do not say theirs

Evaluate = Callable[..., Any]


class OwnNetwork(nn.Module):
    """The denoiser D(x; sigma) made of a network of the user's own, and the uncertainty u(sigma).

    A raw network is preconditioned. Where the network has no uncertainty of its own (`return_logvar`), it gets ours.
    Weights stored in float16, as in files, are computed with in float32.
    """

    use_fp16 = False  # when sampling, unless --precision says otherwise

    def __init__(self, name: str, arguments: Mapping[str, Any], model: nn.Module) -> None:
        super().__init__()
        parameters = inspect.signature(model.forward).parameters
        self.name = name  # of the class, module:Class
        self.arguments = dict(arguments)  # all that the class was called with, by name
        self.is_denoiser = "sigma" in parameters
        self.has_logvar = self.is_denoiser and "return_logvar" in parameters
        self.img_resolution, self.img_channels, self.label_dim = (arguments[name] for name in _MADE_WITH)
        self.cond_channels = int(arguments.get("cond_channels", 0))
        self.sigma_data = float(getattr(model, "sigma_data", _SIGMA_DATA))
        self.model = model
        if not self.has_logvar:
            self.logvar_fourier = MPFourier(_LOGVAR_CHANNELS)
            self.logvar_linear = MPConv(_LOGVAR_CHANNELS, 1, kernel=[])

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        cond_images: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """Denoise like `Precond.forward`, in float32; the network computes in `dtype` where autocast lowers it."""
        x = x.to(torch.float32)
        # The network always gets one noise level, and one row of labels, for each image.
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        sigma = sigma.expand(len(x), 1, 1, 1)
        dtype = torch.float32 if force_fp32 else dtype
        labels = self._labels(class_labels, x)
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        condition: dict[str, Any] = {}
        if self.cond_channels:
            scaled = scaled_condition(cond_images, self.cond_channels, self.sigma_data)
            condition = {"cond_images": cond_images if self.is_denoiser else scaled}
        logvar = None
        if self.is_denoiser:
            wanted = {"return_logvar": True} if self.has_logvar and return_logvar else {}
            result = self._call(dtype, x, sigma, labels, **condition, **wanted)
            denoised, logvar = result if wanted else (result, None)
        else:
            raw = self._call(dtype, c_in * x, c_noise, labels, **condition)
            denoised = c_skip * x + c_out * raw.to(torch.float32)
        denoised = denoised.to(torch.float32)
        if not return_logvar:
            return denoised
        if logvar is None:
            logvar = fully_connect(self.logvar_fourier(c_noise), self.logvar_linear)
        return denoised, logvar.to(torch.float32).reshape(-1, 1, 1, 1)

    def _labels(self, class_labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros([len(x), self.label_dim], device=x.device)
        return class_labels.to(torch.float32).reshape(-1, self.label_dim).expand(len(x), self.label_dim)

    def _call(self, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        """Call the network, with its weights in float32."""
        with torch.autocast(args[0].device.type, dtype, enabled=dtype != torch.float32):
            if not _is_rounded(self.model):
                return self.model(*args, **kwargs)
            tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            full = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
            return torch.func.functional_call(self.model, full, args, kwargs)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredOwnNetwork:
    """What a file has of an own network. It is made without the user's code, which may draw random numbers."""

    name: str
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return self.tensors


class OwnForm(nn.Module):
    """The form of an own network that training and sampling call: in a number format, perhaps compiled.

    Its weights are those of `net`. `through` wraps the function that evaluates the network.
    """

    def __init__(
        self, net: OwnNetwork, *, dtype: torch.dtype, through: Callable[[Evaluate], Evaluate] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.cond_channels, self.sigma_data = net.cond_channels, net.sigma_data
        self._run: Evaluate = self._evaluate if through is None else through(self._evaluate)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
        cond_images: torch.Tensor | None = None,
    ) -> Any:
        """Denoise like `Precond.forward`."""
        return self._run(x, sigma, class_labels, cond_images, *([True] if return_logvar else []))

    def _evaluate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None,
        cond_images: torch.Tensor | None,
        return_logvar: bool = False,
    ) -> Any:
        return self.net(x, sigma, class_labels, return_logvar=return_logvar, cond_images=cond_images, dtype=self.dtype)


def build_own_network(name: str, arguments: Mapping[str, Any]) -> OwnNetwork:
    """Import the class `name` and make its network, with weights drawn from torch's generator, on the CPU.

    Raises ConfigError. Global random states other than torch's stay as they are.
    """
    part = OwnPart(option="network", name=name)
    given = dict(arguments)
    if missing := [key for key in _MADE_WITH if key not in given]:
        raise part.error(f"cannot be made: its arguments lack {missing[0]}")
    shape = [given.pop(key) for key in _MADE_WITH]
    model = part.make(*shape, **given)
    if not isinstance(model, nn.Module):
        raise part.error(f"does not fit: it makes a {type(model).__name__}, not a torch.nn.Module")
    for key, value in model.state_dict().items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise part.error(
                f"does not fit: {key} is {kind}, and files hold floating-point numbers; make it a buffer with"
                " persistent=False"
            )
    return OwnNetwork(name, arguments, model)


def remade(net: OwnNetwork) -> OwnNetwork:
    """Return another network of the same class and arguments; its weights are to be replaced."""
    with unchanged_random_state(torch.device("cpu")):
        return build_own_network(net.name, net.arguments)


def chosen_class(recorded: str, own_networks: Sequence[str]) -> str:
    """Return the class to import for a network that a file records with the class `recorded`.

    It is one of `own_networks`, which the user named: the same name, or the same class in a module that has moved.
    Raises ConfigError without one, so that no file decides what is imported.
    """
    for same in (lambda given: given == recorded, lambda given: given.partition(":")[2] == recorded.partition(":")[2]):
        for given in own_networks:
            if same(given):
                return given
    shown = recorded if recorded.isprintable() and len(recorded) < 200 else "module:Class"
    raise ConfigError(
        f"its network has the class {recorded[:200]!r}, which is not ours and not imported unless you name it; type"
        f" --network={shown} if you trust this module"
    )


def check_own_network(net: OwnNetwork) -> None:
    """Raise ConfigError unless `net` keeps the contract: called on two images, on the CPU, in training mode."""
    part, size = OwnPart(option="network", name=net.name), image_size(net)
    shape = [2, net.img_channels, *size]
    x, sigma = torch.linspace(-1, 1, 2 * net.img_channels * size[0] * size[1]).reshape(shape), torch.tensor([0.5, 5.0])
    labels = torch.eye(2, net.label_dim) if net.label_dim else None
    condition = torch.zeros(2, net.cond_channels, *size) if net.cond_channels else None
    second = "sigma [2, 1, 1, 1]" if net.is_denoiser else "noise_labels [2]"
    third = "None" if labels is None else f"class_labels {list(labels.shape)}"
    call = f"forward(x {shape}, {second}, {third}{', cond_images' if net.cond_channels else ''})"
    results: list[Any] = []
    require = functools.partial(
        require_result, part, call, shape=shape, expected="that of x", without_gradients=", which could not learn"
    )
    hook = net.model.register_forward_hook(lambda module, args, result: results.append(result))
    try:
        with unchanged_random_state(torch.device("cpu")), part.calls(call), torch.enable_grad():
            net.train()(x, sigma, labels, cond_images=condition)
            if net.has_logvar:
                net(x, sigma, labels, return_logvar=True, cond_images=condition)
    except ConfigError:
        if results:  # our own computation stumbled over it
            require(results[0])
        raise
    finally:
        hook.remove()
    require(results[0])


def require_result(
    part: OwnPart, call: str, result: Any, shape: Sequence[int], *, expected: str, without_gradients: str
) -> None:
    """Raise ConfigError unless what `call` returned is a float32 tensor of `shape` with gradients.

    `expected` says what the shape should be, and `without_gradients` what such a result lacks.
    """
    problem = None
    if not isinstance(result, torch.Tensor):
        problem = f"a {type(result).__name__}, not a tensor"
    elif list(result.shape) != list(shape):
        problem = f"the shape {list(result.shape)}, not {expected}, {list(shape)}"
    elif result.dtype != torch.float32:
        problem = f"{result.dtype}, not torch.float32"
    elif not result.requires_grad:
        problem = f"a result without gradients{without_gradients}"
    if problem is not None:
        raise part.error(f"does not fit: {call} returns {problem}")


def prepared_own_network(
    net: OwnNetwork, *, dtype: torch.dtype, through: Callable[[Evaluate], Evaluate] | None
) -> OwnForm:
    """Return the form for sampling, with a copy of the weights if they are stored in float16."""
    if _is_rounded(net):
        net = copy.deepcopy(net).float()
    return OwnForm(net, dtype=dtype, through=through)


def _is_rounded(module: nn.Module) -> bool:
    return any(param.dtype in (torch.float16, torch.bfloat16) for param in module.parameters())
