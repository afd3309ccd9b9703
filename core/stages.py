"""stages.py: commands of this project one after another in one process, so that torch is imported once.

    bash run_all.sh                              # hands it the pipeline: a line is a title or, indented, a command

A command runs as by `python`, but what was imported stays. The first that fails ends all with its exit code; one marked
with a minus, as in a makefile, may refuse (exit code 2, a sentence).
"""
import gc
import runpy
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = home = str(Path(__file__).resolve().parent.parent)
    for line in sys.stdin.read().splitlines():
        if not line.startswith(" "):
            print(f"\n=== {line}", flush=True)
            continue
        name, *flags = shlex.split(line)
        optional, name = name.startswith("-"), name.removeprefix("-")
        sys.argv = [f"{home}/{name}", *flags]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as left:
            if left.code and not (optional and left.code == 2):                          # Ctrl-C ends all
                print(f"\nrun_all.sh stopped at {name} {' '.join(flags)}", file=sys.stderr)
                raise
        gc.collect()                             # the models of a finished stage
