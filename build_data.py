"""Build a dataset: photographs in, Parquet shards with image, mask, caption and scene out."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("build_data")
