"""Train an IP-Adapter: a reference image guides the scene."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("train_ip_adapter", "packshot.train.start:train", __doc__)
