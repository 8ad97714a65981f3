"""`drama augment` for any launcher: deepspeed launcher/augment.py SETTINGS [section.key=value ...]."""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would shadow a package that Hugging Face libraries import
    from drama_dist.cli import launch

    launch("augment")
