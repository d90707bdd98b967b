"""The published way of reading a network file, as docs/file-formats.md describes it: the embedded source is run.

Run by tests in a process of its own: `published_reader.py SNAPSHOT INPUTS OUTPUTS`. It has stand-ins for the two
published modules that a file names, and nothing else of any code base.
"""

import pickle
import sys
import types
from typing import Any


class EasyDict(dict[str, Any]):
    """dnnlib.util.EasyDict."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def persistent_class(original: Any) -> Any:
    """A subclass that records the constructor's arguments, as the published decorator makes one."""

    class Decorated(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs

    Decorated.__name__ = original.__name__
    return Decorated


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    if meta["module_src"] not in modules:
        module = modules[meta["module_src"]] = types.ModuleType(f"_imported_{len(modules)}")
        sys.modules[module.__name__] = module
        exec(compile(meta["module_src"], module.__name__, "exec"), module.__dict__)
    assert meta["type"] == "class" and meta["version"] == 6
    cls = modules[meta["module_src"]].__dict__[meta["class_name"]]
    obj = cls.__new__(cls)
    setstate = getattr(obj, "__setstate__", None)
    if callable(setstate):
        setstate(meta["state"])
    else:
        obj.__dict__.update(meta["state"])
    return obj


modules: dict[str, types.ModuleType] = {}


def main() -> None:
    """Read a snapshot and compute the network's outputs for the inputs in a torch.save file."""
    import torch

    persistence: Any = types.ModuleType("torch_utils.persistence")
    persistence.persistent_class = persistent_class
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util: Any = types.ModuleType("dnnlib.util")
    util.EasyDict, EasyDict.__module__ = EasyDict, "dnnlib.util"
    torch_utils: Any = types.ModuleType("torch_utils")
    torch_utils.persistence = persistence
    sys.modules |= {"torch_utils": torch_utils, "torch_utils.persistence": persistence}
    sys.modules |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}
    sys.modules["training"] = None  # type: ignore[assignment]

    snapshot, inputs, outputs = sys.argv[1:]
    with open(snapshot, "rb") as file:
        data = pickle.load(file)
    given = torch.load(inputs)
    net = data["ema"].eval()
    encoder = data["encoder"]
    with torch.no_grad():
        denoised = net(given["x"], given["sigma"], given["labels"], force_fp32=True)
    fresh = type(net)(*net._init_args, **net._init_kwargs)  # what others do with the recorded arguments
    shapes, stored = ({name: t.shape for name, t in part.state_dict().items()} for part in (fresh, net))
    assert shapes == stored
    encoded = encoder.encode_latents(given["raw"], *given["eps"])
    torch.save({"denoised": denoised, "encoded": encoded, "loss": data.loss_fn.P_mean}, outputs)


if __name__ == "__main__":
    main()
