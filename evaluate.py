"""Score finished generate.py runs: product identity, product extension, slot adherence."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("evaluate")
