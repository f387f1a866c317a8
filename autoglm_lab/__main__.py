"""``python -m autoglm_lab``: the command where it is not on the PATH."""

from autoglm_lab.cli import main

if __name__ == "__main__":
    main()
