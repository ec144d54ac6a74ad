"""How long the commands that should answer at once take: best of five, in seconds.

Ends with one JSON line. Each command runs in a process of its own, as a person would start it.
"""

import json
import subprocess
import sys
import time

COMMANDS = {
    "help": ["--help"],
    "show": ["show", "experiment=demo/pretrain"],
    "plan": ["plan", "experiment=emu35_34b/pretrain_s1", "--json"],
}
REPEATS = 5


def seconds(arguments: list[str]) -> float:
    """Wall time of one ``emu35`` command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "emu35", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    times = {
        name: round(min(seconds(arguments) for _ in range(REPEATS)), 3)
        for name, arguments in COMMANDS.items()
    }
    for name, best in times.items():
        print(f"emu35 {name:<5} {best:.3f} s")
    print(json.dumps({f"seconds_{name}": best for name, best in times.items()}))


if __name__ == "__main__":
    main()
