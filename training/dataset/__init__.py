"""Data sets: the contract, folders and archives, items, labels, and the order in which a run reads them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.dataset.contract import BatchReader, ImageDataset, ItemDetails
    from training.dataset.image_folder import ImageFolderDataset

__all__ = ["BatchReader", "ImageDataset", "ImageFolderDataset", "ItemDetails"]


def __getattr__(name: str) -> Any:
    # Workers of dataset_tool.py import modules of this package and have no use for torch, which takes seconds.
    if name in __all__:
        from training.dataset import contract, image_folder

        return getattr(contract, name, None) or getattr(image_folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
