"""EDM2 networks as a pipeline of the diffusers library: EDM2Pipeline, EDM2UNet, EDM2HeunScheduler.

The folders that they load and save are those of `convert_snapshot.py --to=folder` (training/snapshot/locate.py).
"""

try:
    # Imported here because diffusers looks up the base classes of a pipeline's parts in the package that
    # model_index.json names for them: this one.
    from diffusers import ModelMixin, SchedulerMixin
except ImportError as error:
    raise ImportError(f'edm2.diffusers needs the diffusers library; try: pip install "edm2[vae]" ({error})') from error

from edm2.diffusers.pipeline import EDM2Pipeline, EDM2PipelineOutput
from edm2.diffusers.scheduler import EDM2HeunScheduler, EDM2HeunSchedulerOutput
from edm2.diffusers.unet import EDM2UNet

__all__ = [
    "EDM2HeunScheduler",
    "EDM2HeunSchedulerOutput",
    "EDM2Pipeline",
    "EDM2PipelineOutput",
    "EDM2UNet",
    "ModelMixin",
    "SchedulerMixin",
]

# model_index.json names this package, not the module of each class.
for _part in (EDM2HeunScheduler, EDM2Pipeline, EDM2UNet):
    _part.__module__ = __name__
