"""Which files hold the weights of a folder, read without torch."""

import json
from pathlib import Path

from emu35.checkpoint.durable import is_inside
from emu35.errors import ReleaseError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_LARGEST_INDEX = 100 << 20


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file beside the index; None where there is one file and no index.

    Raises:
        ReleaseError: there are no weights, or the index is none or names a path outside the folder.
    """
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).is_file():
            raise ReleaseError(
                f"{folder} holds neither {INDEX} nor {SINGLE}; is it a release folder?"
            )
        return None
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ReleaseError(f"{path} has {path.stat().st_size:,} bytes, too many to be real")
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"{path} is no index of weights: {error!r}") from None
    for file in pairs.values():
        if not is_inside(file) or not file.endswith(".safetensors"):
            raise ReleaseError(f"{path} names {file!r}, which is no safetensors file beside it")
    return pairs


def check_shards(folder: Path) -> None:
    """Check that every shard is there and as long as its own header says; no weight is read.

    Raises:
        ReleaseError: as :func:`read_weight_map`; or naming the first shard that is not.
    """
    # Imported late: most of those who start runs have no weights to check.
    from safetensors import SafetensorError, safe_open

    for file in dict.fromkeys((read_weight_map(folder) or {"": SINGLE}).values()):
        try:
            with safe_open(str(folder / file), framework="np"):
                pass
        except FileNotFoundError:
            raise ReleaseError(
                f"{folder / file} is missing, although {INDEX} names it; copy it as well"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ReleaseError(
                f"{folder / file} is damaged or truncated: {error}; copy it again"
            ) from None
