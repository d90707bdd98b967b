"""Magnitudes inside the network while it trains: gradients, activations and weights, at status intervals.

Figure 3 of Karras et al., arXiv 2312.02696, plots the magnitudes of activations and weights over the training time, for
each level of encoder and decoder. Here a magnitude is the root of the mean square of the elements. The names are those
of the blocks in the network, e.g. enc.16x16_block0.

The training does not change, not even in the last bit. Gradients are only read. Activations come from an extra forward
pass after the step over a few images, without gradients, in evaluation mode (which neither normalizes weights nor draws
dropout masks), outside torch.compile and DistributedDataParallel, in the number format of the training. Only `collect`
waits for the device.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torch_utils.distributed import World

_PREFIX = "Monitor/"
_MAX_IMAGES = 32  # of a process: the extra pass needs memory next to that of the training
Loss = Callable[..., torch.Tensor]  # as EDM2Loss


class Monitor:
    """Watches one network of a run; every process calls the same methods in the same iterations.

    `arm` selects the next iteration. In it, the training step passes its inputs and gradients by `see_inputs` and
    `see_gradients`, which cost nothing in other iterations. `collect` then returns the figures. With `everything` these
    are all of --monitor; otherwise it only checks that gradients are finite. If the weights are sharded, `replica`
    (FastPrecond) is called in place of `net`. `dtype` is that of the activations.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        world: World,
        *,
        everything: bool,
        replica: torch.nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.everything = everything
        self.lost: list[str] = []  # parameters whose gradients had no finite element at the last `collect`
        self._net = net
        self._world = world
        self._replica = replica
        self._dtype = dtype
        self._loss_scale: float | torch.Tensor = 1.0
        self._armed = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._gradients: torch.Tensor | None = None  # [parameters, 3]: elements, those not finite, sum of squares

    def arm(self) -> None:
        """Watch the next iteration."""
        self._armed = True

    def see_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the loss besides the network; the first images of an iteration are kept."""
        if self._armed and self.everything and self._inputs is None:
            few = {name: tensor[:_MAX_IMAGES] for name, tensor in kwargs.items()}
            self._inputs = tuple(tensor[:_MAX_IMAGES] for tensor in args), few

    @torch.no_grad()
    def see_gradients(self, loss_scale: float | torch.Tensor = 1.0) -> None:
        """Read the gradients as the backward pass left them, before non-finite elements are cleared.

        Their norm is divided by `loss_scale`, the factor of the loss.
        """
        if self._armed:
            self._loss_scale = loss_scale.clone() if isinstance(loss_scale, torch.Tensor) else loss_scale
            rows = [_describe(_local(param.grad), param) for param in self._net.parameters()]
            self._gradients = torch.stack(rows)

    def collect(self, loss_fn: Loss) -> dict[str, float]:
        """Return the figures of the watched iteration under keys of stats.jsonl, and fill `lost`.

        `loss_fn(net, *inputs)` computes the loss from the inputs that `see_inputs` took.
        """
        assert self._gradients is not None
        gradients = self._world.all_reduce_sum(self._gradients)
        names = [name for name, _ in self._net.named_parameters()]
        stats = self._summary(gradients, names)
        if self.everything:
            assert self._inputs is not None
            args, kwargs = self._inputs
            with torch.no_grad():
                net = self._net if self._replica is None else self._replica
                with self._number_format():
                    sums = _activations(net, self._computing_blocks(), lambda: loss_fn(net, *args, **kwargs))
                sums |= _weights(self._net)
            table = self._world.all_reduce_sum(torch.stack(list(sums.values())))
            for name, (count, squares) in zip(sums, table.tolist(), strict=True):
                stats[f"{_PREFIX}{name}"] = (squares / count) ** 0.5
        self._armed, self._inputs, self._gradients = False, None, None
        return stats if self.everything else {}

    @contextlib.contextmanager
    def _number_format(self) -> Iterator[None]:
        """Let the plain network compute in the format of the run's activations, which follow those of the input."""
        if self._replica is not None:  # it does so
            yield
            return

        def convert(module: torch.nn.Module, args: Any) -> Any:
            return (args[0].to(self._dtype), *args[1:])

        if not hasattr(self._net, "unet"):  # of the user's own: in float32, as it is
            yield
            return
        hook = self._net.get_submodule("unet").register_forward_pre_hook(convert)
        try:
            yield
        finally:
            hook.remove()

    def _computing_blocks(self) -> list[tuple[str, torch.nn.Module]]:
        """Return the module called for each part of the U-Net, with the part's name.

        The fast form has no call for the first convolution.
        """
        blocks = list(_blocks(self._net))
        if self._replica is None:
            return blocks
        if not hasattr(self._net, "unet"):
            return list(_blocks(self._replica.get_submodule("net")))
        modules = [*self._replica.get_submodule("enc").children(), *self._replica.get_submodule("dec").children()]
        return [(name, module) for (name, _), module in zip(blocks[1:], modules, strict=True)]

    def _summary(self, gradients: torch.Tensor, names: list[str]) -> dict[str, float]:
        """Return norm and share of non-finite elements, and fill `lost`. `gradients` is summed over the processes.

        A process may hold all of a parameter or a part of it, so the sums are scaled to one copy.
        """
        full = torch.tensor([param.numel() for param in self._net.parameters()], device=gradients.device)
        copies = gradients[:, 0] / full
        counts, bad, squares = (gradients / copies[:, None]).unbind(1)
        norm, share = torch.stack([squares.sum().sqrt() / self._loss_scale, bad.sum() / counts.sum()]).tolist()
        self.lost = [name for name, lost in zip(names, (bad == counts).tolist(), strict=True) if lost]
        return {f"{_PREFIX}gradients/norm": norm, f"{_PREFIX}gradients/nonfinite": share}


def _describe(grad: torch.Tensor | None, param: torch.Tensor) -> torch.Tensor:
    """Return numbers of all and of non-finite elements, and the sum of squares of finite ones, of this process: [3]."""
    if grad is None:
        return torch.tensor([_local(param).numel(), 0, 0], dtype=_wide(param), device=param.device)
    finite = grad.isfinite()
    squares = grad.float().where(finite, 0).square().sum(dtype=_wide(grad))
    count = torch.full_like(squares, grad.numel())
    return torch.stack([count, count - finite.sum(), squares])


def _activations(
    net: torch.nn.Module, blocks: list[tuple[str, torch.nn.Module]], forward: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    """Return (elements, sum of squares) of the output of each block and level while `forward` runs `net`."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def measure(module: torch.nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):  # parts of an own network may return anything
                _add(sums, "activations", name, output)

        return measure

    hooks = [block.register_forward_hook(hook(name)) for name, block in blocks]
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        with _uncompiled():
            forward()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for each in hooks:
            each.remove()
    return sums


def _weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return (elements, sum of squares) of the weights of each block and level, without gains and other scalars."""
    sums: dict[str, torch.Tensor] = {}
    for name, block in _blocks(net):
        for param in block.parameters():
            if param.ndim > 0:
                _add(sums, "weights", name, _local(param))
    return sums


def _add(sums: dict[str, torch.Tensor], kind: str, name: str, values: torch.Tensor) -> None:
    squares = values.detach().float().square().sum(dtype=_wide(values))
    row = torch.stack([torch.full_like(squares, values.numel()), squares])
    level = name.rpartition("_")[0]
    for key in (f"{kind}/{name}", *([f"{kind}/{level}"] if level else [])):
        sums[key] = sums[key] + row if key in sums else row


def _blocks(net: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the parts of the U-Net in order, each with its name: {enc|dec}.{resolution}_{part}.

    Those of an own network are its submodules, and the elements of lists of them.
    """
    if not hasattr(net, "unet"):
        for name, module in net.get_submodule("model").named_children():
            if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
                yield from ((f"{name}_{part}", block) for part, block in module.named_children())
            else:
                yield name, module
        return
    unet = net.get_submodule("unet")
    for half in ("enc", "dec"):
        for name, block in unet.get_submodule(half).named_children():
            yield f"{half}.{name}", block


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled code eagerly, so that hooks are called and nothing is compiled again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _local(tensor: Any) -> Any:
    """Return this process's part of a tensor: all of it, unless it is sharded (DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Return the type for sums; Apple's GPUs have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
