"""Fetch the weights of LPIPS into the cache folder (once; 64 MB).

    python scripts/fetch_lpips.py [--backbone vgg16|alexnet] [--out FILE] [--archive FILE]

They go to $EMU35_CACHE/lpips_vgg16.safetensors (default ~/.cache/emu35/...), backbone and linear
layers in one file, and their digest is checked. Name it in stage.perceptual.weights. Called again,
the command finds it there and returns at once.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    # A checkout that was never installed can fetch its weights too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from emu35.errors import DataError
    from emu35.vision.lpips import Backbone
    from emu35.vision.lpips_fetch import fetch_lpips

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone",
        choices=[str(backbone) for backbone in Backbone],
        default=str(Backbone.vgg16),
        help="vgg16 for the training objective, alexnet for the usual metric",
    )
    parser.add_argument("--out", type=Path, help="write here instead of the cache folder")
    parser.add_argument("--archive", type=Path, help="take them from this archive (no network)")
    arguments = parser.parse_args()
    try:
        path = fetch_lpips(
            Backbone(arguments.backbone), out=arguments.out, archive=arguments.archive
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
