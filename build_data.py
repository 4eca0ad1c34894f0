"""Build a dataset: photographs in, Parquet shards with image, mask, caption and scene out."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("build_data", "packshot.caption.build:build", __doc__)
