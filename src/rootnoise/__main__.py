"""`rootnoise` and `python -m rootnoise`: the command line, whose imports may be interrupted too."""

import sys


def main() -> int:
    """Run one command and return its exit status; 130 if Ctrl-C comes before it has begun."""
    try:
        from rootnoise.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("stopped: before the command began, nothing is kept\n")
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
