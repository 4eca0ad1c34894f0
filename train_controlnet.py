"""Train a ControlNet that knows where the product is."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("train_controlnet")
