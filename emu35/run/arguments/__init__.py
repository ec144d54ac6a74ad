"""Arguments of the subcommands that do not run a configuration: one module a subcommand.

Each module has ``add(commands)``, which describes the arguments, and handlers that turn them into
the options of a stage and call it. Choices are written out as words, so that ``--help`` does not
import the packages that define them; a test keeps the two equal.
"""

import argparse

Commands = argparse._SubParsersAction  # type: ignore[reportPrivateUsage]
"""What ``add_subparsers`` returns; argparse has no public name for it."""
