"""`python -m sightline`: the same as the `sightline` program."""

from sightline.cli import entry

if __name__ == "__main__":
    entry()
