"""``python -m emu35`` is the ``emu35`` command."""

from emu35.cli import main
from emu35.run.worker import end_rank

end_rank(main)
