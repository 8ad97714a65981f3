"""`drama targets` for any launcher: deepspeed launcher/targets.py SETTINGS [section.key=value ...]."""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would shadow the `evaluate` package of Hugging Face
    from drama_dist.cli import launch

    launch("targets")
