"""Train a ControlNet that knows where the product is."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("train_controlnet", "packshot.train.start:train", __doc__)
