"""Tensors on disk as torch.distributed.checkpoint has them, written by each rank for itself and joined by the first.

    __0_0.distcp  __1_0.distcp   every rank's tensors       .metadata   where each is, by its name in the whole model

`torch.distributed.checkpoint` (`dcp.load`, `format_utils.dcp_to_torch_save`) reads the folder like any of its own. Its
own way to write has the ranks send each other pickled plans, and one that fails takes all with it; here nobody hears of
anybody. What is read back is never unpickled but for the few types that say where a tensor is.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

INDEX = ".metadata"
_TYPES = {
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"}
    | {str(kind).removeprefix("torch.") for kind in vars(torch).values() if type(kind) is torch.dtype},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What an index may be made of, by module: nothing that does anything."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse everything that no index needs."""
        if name not in _TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    """Writes one rank's tensors and their index under its number."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.own = rank

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Be that rank, whoever else writes."""
        self.rank, self.use_collectives = self.own, False


class _Reader(FileSystemReader):
    """Reads an index without unpickling anything else; tensors are read so by torch itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return where everything is."""
        return index_of(Path(self.path))


def write(folder: Path, rank: int, tensors: Mapping[str, Any]) -> None:
    """Write a rank's tensors, by their paths in nested dictionaries, to a folder in which it has not yet written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of writing alone, and where others have
        save(dict(tensors), storage_writer=_Writer(folder, rank), no_dist=True)


def join(folder: Path, ranks: int) -> None:
    """Make one index of all ranks'. What several have written under one name is the first one's."""
    paths = [folder / f"__{rank}{INDEX}" for rank in range(ranks)]
    joined = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, storage_meta=StorageMeta())
    for own in map(_read, paths):
        joined.version = own.version
        for name, found in own.state_dict_metadata.items():
            joined.state_dict_metadata.setdefault(name, found)
        joined.planner_data = {**(own.planner_data or {}), **joined.planner_data}
        joined.storage_data = {**(own.storage_data or {}), **joined.storage_data}
    with (folder / INDEX).open("wb") as file:
        pickle.dump(joined, file)
        file.flush()
        os.fsync(file.fileno())
    for path in paths:
        path.unlink()


def index_of(folder: Path) -> Metadata:
    """Return the index of a folder. Raises `pickle.UnpicklingError` where it is none."""
    return _read(folder / INDEX)


def _read(path: Path) -> Metadata:
    with path.open("rb") as file:
        found = _Index(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
    return found


def read(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Fill tensors, by their paths in nested dictionaries, with what a folder has under the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reading alone
        load(dict(tensors), storage_reader=_Reader(folder), no_dist=True)
