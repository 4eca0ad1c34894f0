"""Score finished generate.py runs: product identity, product extension, slot adherence."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("evaluate", "packshot.evaluate.run:evaluate", __doc__)
