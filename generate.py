"""Put a product into a new scene. Its own pixels stay, and a certificate proves it."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("generate", "packshot.infer.run:generate", __doc__)
