"""Train a LoRA of SDXL on scenes."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("train_lora", "packshot.train.start:train", __doc__)
