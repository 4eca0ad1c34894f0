"""Merge LoRAs into a base: a pipeline folder that stock diffusers loads."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("merge")
