"""The door for `accelerate launch -m motionlora.train`: the `train` subcommand."""

import sys

from motionlora.train.command import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
