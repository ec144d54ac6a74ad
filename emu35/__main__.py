"""``python -m emu35`` is the ``emu35`` command."""

import sys

from emu35.cli import main

sys.exit(main())
